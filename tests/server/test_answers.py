"""What the API answers to good requests: shapes, counts, streams that equal whole answers."""

from __future__ import annotations

import json

import pytest

from runtime.service_level import ServiceLevel
from tests.server.serving import MODEL, serve
from tests.server.tiny_tokenizer import EOS, tiny_template, tiny_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world, é 😀!"}]


def chat_parrot(messages, num_tokens: int | None = None) -> str:
    """What the scripted engine says to messages."""
    ids = tiny_tokenizer().encode(tiny_template().render(messages), add_special_tokens=False)
    return tiny_tokenizer().decode(ids[:num_tokens] if num_tokens else ids[: ids.index(EOS)])


def test_completion_has_openai_shape(server):
    answer = server.complete(prompt="hello world").json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("cmpl-")
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == ("hello world", "stop", 0)
    num_prompt = len(tiny_tokenizer().encode("hello world"))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_prompt + 1)  # with EOS
    assert usage["total_tokens"] == 2 * num_prompt + 1
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert answer["timings"]["predicted_n"] == num_prompt + 1


def test_chat_has_openai_shape(server):
    answer = server.chat(messages=MESSAGES).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == chat_parrot(MESSAGES)
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("prompt", ["hello world", "é", "😀😀", "x" * 300], ids=["words", "accent", "emoji", "long"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 60])
def test_stream_equals_whole_answer(server, prompt, max_tokens):
    whole = server.complete(prompt=prompt, max_tokens=max_tokens).json()
    chunks = server.events("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


def test_chat_stream_opens_with_the_role_and_ends_with_usage(server):
    chunks = server.events(
        "/v1/chat/completions", {"messages": MESSAGES, "stream_options": {"include_usage": True}, "max_tokens": 20}
    )
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] <= 20
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == server.chat(messages=MESSAGES, max_tokens=20).json()["choices"][0]["message"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_continuous_usage_counts_up(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    # Tokens that arrive while a chunk is written share the next one: 400 never fit in one.
    body = {"prompt": "abcdef", "stream_options": options, "max_tokens": 400, "ignore_eos": True}
    chunks = server.events("/v1/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 400


def test_several_prompts_and_n_are_numbered_prompt_by_prompt(server):
    answer = server.complete(prompt=["aaa", "bbb"], n=2, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]
    assert answer["usage"]["completion_tokens"] == 8
    chunks = server.events("/v1/completions", {"prompt": ["aaa", "bbb"], "n": 2, "max_tokens": 2})
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]]])
def test_token_id_prompts_and_returned_ids(server, prompt):
    answer = server.complete(prompt=prompt, return_token_ids=True, max_tokens=3).json()
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == [*ids, EOS][:3]
    chunks = server.events("/v1/completions", {"prompt": prompts[0], "return_token_ids": True, "max_tokens": 3})
    assert chunks[0]["choices"][0]["prompt_token_ids"] == prompts[0]
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]
    assert ids == answer["choices"][0]["token_ids"]


def test_echo_puts_the_prompt_first(server):
    assert server.complete(prompt="hello", echo=True).json()["choices"][0]["text"] == "hellohello"
    ids = tiny_tokenizer().encode("hello")
    assert server.complete(prompt=ids, echo=True).json()["choices"][0]["text"] == "hellohello"
    chunks = server.events("/v1/completions", {"prompt": "hello", "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hellohello"


@pytest.mark.parametrize("stop", ["lo w", ["zzz", "lo w"], ["o", "lo w"]])
def test_stop_strings_end_the_output_and_the_engines_request(server, stop):
    num_aborts = len(server.engine.aborts)
    choice = server.complete(prompt="hello world", stop=stop, ignore_eos=True, max_tokens=400).json()["choices"][0]
    first = "o" if stop == ["o", "lo w"] else "lo w"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", first)
    assert choice["text"] == "hello world"[: "hello world".index(first)]
    server.wait_until(server.is_idle)
    assert [abort.reason for abort in server.engine.aborts[num_aborts:]] == ["stop"]


def test_stop_string_can_be_included_and_waits_for_min_tokens(server):
    fields = {"prompt": "abcabc", "stop": "c", "ignore_eos": True, "max_tokens": 20}
    assert server.complete(**fields, include_stop_str_in_output=True).json()["choices"][0]["text"] == "abc"
    later = server.complete(**fields, min_tokens=4).json()
    assert later["choices"][0]["text"] == "abcab"
    assert later["usage"]["completion_tokens"] == 6


def test_stop_token_ids_are_named_and_not_shown(server):
    (stop_id,) = tiny_tokenizer().encode("c")
    choice = server.complete(prompt="abc", stop_token_ids=[stop_id]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", stop_id)


def test_stream_with_stop_string_never_shows_its_beginning(server):
    chunks = server.events("/v1/completions", {"prompt": "abxyabxz", "stop": "xz"})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abxyab"


def test_completion_logprobs(server):
    whole = server.complete(prompt="hello world", logprobs=2, max_tokens=2).json()["choices"][0]["logprobs"]
    assert (
        whole["tokens"]
        == [tiny_tokenizer().token_bytes(i).decode() for i in tiny_tokenizer().encode("hello world")][:2]
    )
    assert whole["token_logprobs"] == [-0.5, -0.5]
    assert whole["text_offset"] == [0, len(whole["tokens"][0])]
    assert all(len(top) == 2 for top in whole["top_logprobs"])
    chunks = server.events("/v1/completions", {"prompt": "hello world", "logprobs": 2, "max_tokens": 2})
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for key in whole:
        assert [value for part in streamed for value in part[key]] == whole[key]


def test_chat_logprobs(server):
    answer = server.chat(logprobs=True, top_logprobs=3, max_tokens=2).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    chunks = server.events("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hello world"}], "logprobs": True, "top_logprobs": 3, "max_tokens": 2,
    })  # fmt: skip
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [entry for part in streamed for entry in part["content"]] == content


def test_a_prompt_that_begins_with_eos_can_be_answered_past_it(server):
    """The scripted engine once looked for another token for ever; a bench's random prompts begin so now and then."""
    answer = server.complete(prompt=[EOS, EOS], ignore_eos=True, max_tokens=4).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 4)


def test_length_ends_and_ignore_eos_goes_on(server):
    short = server.complete(prompt="hello world", max_tokens=1).json()["choices"][0]
    assert short["finish_reason"] == "length"
    long = server.complete(prompt="hello", ignore_eos=True, max_tokens=30).json()
    assert long["usage"]["completion_tokens"] == 30


def test_chat_fills_the_context_when_no_limit_is_given(server):
    answer = server.chat(ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == server.front.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_wins_over_max_tokens(server):
    answer = server.chat(max_tokens=9, max_completion_tokens=2, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 2


def test_seed_makes_each_of_n_reproducible_and_different(server):
    def texts(seed):
        answer = server.complete(prompt="abcdefgh", n=3, seed=seed, temperature=1.0, max_tokens=4).json()
        return [choice["text"] for choice in answer["choices"]]

    assert texts(1) == texts(1)
    assert len(set(texts(1))) == 3
    assert texts(2) != texts(1)
    assert texts(-1) == texts(-1)


def test_content_parts_are_joined(server):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    one = server.chat(messages=[{"role": "user", "content": parts}]).json()
    other = server.chat(messages=[{"role": "user", "content": "hello\nworld"}]).json()
    assert one["choices"][0]["message"] == other["choices"][0]["message"]


def test_continue_final_message_leaves_the_turn_open(server):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick brown"}]
    answer = server.chat(
        messages=messages, continue_final_message=True, add_generation_prompt=False, return_token_ids=True, max_tokens=1
    ).json()
    prompt = tiny_tokenizer().decode(answer["choices"][0]["prompt_token_ids"], skip_special_tokens=False)
    assert prompt.endswith("assistant: the quick brown")


def test_sampling_reaches_the_engine(server):
    server.complete(
        prompt="hello", temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5,
        repetition_penalty=1.1, seed=3, logit_bias={"7": 2.5}, min_tokens=1, priority=-2, cache_salt="mine",
    )  # fmt: skip
    submit = server.engine.submits[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 5, 0.1)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (0.5, -0.5, 1.1)
    assert (sampling.seed, sampling.logit_bias, sampling.min_tokens) == (3, ((7, 2.5),), 1)
    assert (submit.service.priority, submit.cache_salt, sampling.n, sampling.max_tokens) == (-2, "mine", 1, 16)


def test_service_levels_come_from_the_body_and_where_it_is_silent_from_headers(server):
    headers = {
        "x-partita-ttft-ms": "900",
        "x-partita-tpot-ms": "30.5",
        "x-partita-user": "team",
        "x-partita-priority": "4",
    }
    server.post("/v1/completions", {"prompt": "hello", "ttft_ms": 250, "deadline_ms": 5000, "max_tokens": 1}, headers)
    assert server.engine.submits[-1].service == ServiceLevel(250, 30.5, 5000, 4, "team")
    server.chat(max_tokens=1)
    assert server.engine.submits[-1].service == ServiceLevel()
    refused = server.post("/v1/completions", {"prompt": "hello"}, {"x-partita-ttft-ms": "fast"})
    assert refused.status == 400 and "x-partita-ttft-ms" in refused.json()["error"]["message"]


def test_models_own_sampling_defaults_apply_and_give_way():
    with serve() as server:
        server.front.default_sampling = {"temperature": 0.25, "top_k": 11}
        server.post("/v1/completions", {"prompt": "hello", "top_k": 3})
        sampling = server.engine.submits[-1].sampling
        assert (sampling.temperature, sampling.top_k) == (0.25, 3)


def test_tokenize_and_detokenize_are_inverse(server):
    text = "hello wörld 😀"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tiny_tokenizer().encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert len(answer["token_strs"]) == answer["count"]
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == tiny_tokenizer().encode(tiny_template().render(MESSAGES), add_special_tokens=False)


def test_models_list_and_card(server):
    cards = server.request("GET", "/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [MODEL, "alias"]
    assert server.request("GET", f"/v1/models/{MODEL}").json() == cards[0]
    assert cards[0]["max_model_len"] == 512
    assert server.post("/v1/completions", {"model": "alias", "prompt": "hello"}).status == 200


def test_status_routes(server):
    for path in ("/health", "/live", "/ready"):
        assert server.request("GET", path).json() == {"status": "ok"}
        assert server.request("HEAD", path).status == 200
    assert server.request("GET", "/version").json() == {"version": "1.2.3"}
    document = server.request("GET", "/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "temperature" in body["properties"]
    assert "$ref" not in json.dumps(body)


def test_request_id_is_kept_when_it_is_harmless(server):
    assert server.request("GET", "/live", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    answer = server.request("GET", "/live", headers={"X-Request-Id": "bad id\twith spaces"})
    assert answer.headers["x-request-id"] not in ("bad id\twith spaces", None)
