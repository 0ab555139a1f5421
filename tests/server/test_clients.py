"""The official OpenAI client, metrics as Prometheus parses them, and the page as a browser gets it."""

from __future__ import annotations

import base64
import hashlib
import re

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import MODEL, serve
from tests.server.test_answers import MESSAGES, chat_parrot


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_client_lists_models(client):
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).max_model_len == 512


def test_openai_client_chats(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == chat_parrot(MESSAGES)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_openai_client_streams_chat(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat_parrot(MESSAGES)
    assert chunks[-1].usage.completion_tokens == sum(
        len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
    )


def test_openai_client_completes(client):
    answer = client.completions.create(
        model=MODEL, prompt=["hello", "world"], temperature=0, logprobs=1, extra_body={"ignore_eos": True}, max_tokens=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[1].logprobs.tokens) == 5
    stream = client.completions.create(model=MODEL, prompt=[5, 6, 7], temperature=0, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "stop"


def test_openai_client_raises_its_own_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="temperature must be") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=99)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * 600)
    assert caught.value.code == "context_length_exceeded"


def test_openai_client_that_stops_reading_cancels():
    with serve(step_s=0.01) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, extra_body={"ignore_eos": True, "max_tokens": 400}
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        server.wait_until(server.is_idle)
        assert [abort.reason for abort in server.engine.aborts] == ["disconnect"]


def read_metrics(server) -> dict[str, float]:
    answer = server.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(answer.raw.decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("engine", "model_name")}
            key = sample.name + "".join(f"{{{name}={value}}}" for name, value in sorted(labels.items()))
            samples[key] = sample.value
    return samples


def test_metrics_add_up():
    with serve() as server:
        num_prompt = num_output = num_gaps = 0
        for max_tokens in (1, 2, 5):
            usage = server.complete(prompt="hello world", ignore_eos=True, max_tokens=max_tokens).json()["usage"]
            num_prompt += usage["prompt_tokens"]
            num_output += usage["completion_tokens"]
            num_gaps += usage["completion_tokens"] - 1
        server.complete(prompt="hello")  # ends by itself
        usage = server.complete(prompt="hello").json()["usage"]
        num_prompt += 2 * usage["prompt_tokens"]
        num_output += 2 * usage["completion_tokens"]
        num_gaps += 2 * (usage["completion_tokens"] - 1)
        server.engine.paused.set()
        server.send_and_leave("/v1/completions", {"prompt": "hello"}, after_s=0.1)
        server.wait_until(lambda: server.engine.aborts)
        server.complete(prompt="hello", temperature=-1)
        samples = read_metrics(server)
    assert samples["vllm:prompt_tokens_total"] == num_prompt
    assert samples["vllm:generation_tokens_total"] == num_output
    reasons = {
        reason: samples[f"vllm:request_success_total{{finished_reason={reason}}}"]
        for reason in ("stop", "length", "abort")
    }
    assert reasons == {"stop": 2, "length": 3, "abort": 1}
    assert samples["vllm:time_to_first_token_seconds_count"] == 5
    assert samples["vllm:inter_token_latency_seconds_count"] == num_gaps
    assert samples["vllm:e2e_request_latency_seconds_count"] == 6
    assert samples["vllm:request_generation_tokens_sum"] == num_output
    assert samples["vllm:prompt_tokens_cached_total"] == 5
    assert samples["vllm:iteration_tokens_total_sum"] == num_prompt + num_output
    assert samples["vllm:num_requests_running"] == samples["vllm:num_requests_waiting"] == 0
    assert samples["vllm:kv_cache_usage_perc"] == samples["vllm:gpu_cache_usage_perc"] == 0
    assert samples["vllm:prefix_cache_queries_total"] == 10
    assert samples["vllm:prefix_cache_hits_total"] == 4
    assert samples["partita:good_tokens_total"] == 70
    assert (samples["partita:ttft_targets_total"], samples["partita:ttft_targets_kept_total"]) == (5, 3)
    assert samples["partita:deadlines_total"] == 0
    assert (samples["partita:prefill_pauses_total"], samples["partita:border_moves_total"]) == (3, 2)
    assert samples["partita:arrangements_total{arrangement=50:50 token}"] == 6
    assert samples["partita:arrangements_total{arrangement=one lane, token}"] == 1
    assert samples["vllm:num_preemptions_total"] == 0
    buckets = [samples[key] for key in samples if key.startswith("vllm:e2e_request_latency_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert samples["http_requests_total{handler=/v1/completions}{method=POST}{status=2xx}"] == 5
    assert samples["http_requests_total{handler=/v1/completions}{method=POST}{status=4xx}"] >= 1


def test_no_label_value_comes_from_a_client(server):
    for path in ("/a", "/b/c", "/v1/models/x", "/v1/models/y"):
        server.request("GET", path)
    server.request("MADEUP", "/a")
    handlers = {match for key in read_metrics(server) for match in re.findall(r"{handler=(.*?)}{method", key)}
    assert "unmatched" in handlers
    assert "/v1/models/{name:path}" in handlers
    assert not handlers & {"/a", "/b/c", "/v1/models/x"}
    methods = {match for key in read_metrics(server) for match in re.findall(r"{method=([^}]*)}", key)}
    assert "MADEUP" not in methods


def test_page_runs_only_its_own_script_and_loads_nothing_from_elsewhere(server):
    answer = server.request("GET", "/")
    page = answer.raw.decode()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element in ("script", "style"):
        (block,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    remote = [
        url for url in re.findall(r"https?://[^\s\"'<>)]+", page) if not url.startswith("http://www.w3.org/2000/svg")
    ]
    assert remote == []
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert sink not in script
    assert not re.search(r"<[^>]*\son\w+\s*=", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
