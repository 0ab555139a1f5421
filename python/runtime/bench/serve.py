"""``bench serve``: a client that loads a running OpenAI-compatible server and says what its users would feel."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from runtime.bench.datasets import BenchPrompt, add_dataset_arguments, check_dataset_arguments, make_prompts
from runtime.bench.http_client import HttpClient, HttpFailure
from runtime.bench.summary import deviation, mean, parse_percentiles, percent_key, percentile, write_json

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
# Words from which random prompts are made when the server tells no token ids.
_WORDS = "time year people way day man thing woman life child world school state family student group country".split()


@dataclass(slots=True)
class RequestResult:
    """What one request felt like; times in seconds."""

    success: bool = False
    error: str = ""
    prompt_len: int = 0
    output_tokens: int = 0
    start_time: float = 0.0
    latency: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    generated_text: str = ""


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Loads a running server and reports TTFT, TPOT, ITL, end-to-end latency and throughput.",
        epilog=f"example: {prog} --launch smollm2 --num-prompts 64 --max-concurrency 16 --input-len 512",
    )  # fmt: skip
    group = parser.add_argument_group("server")
    group.add_argument(
        "--backend", "--endpoint-type", choices=tuple(BACKENDS), default="openai", help="(default: openai)"
    )
    group.add_argument("--base-url", metavar="URL", help="http://host:port, instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--endpoint", metavar="PATH", help="(default: the backend's)")
    group.add_argument("--model", metavar="NAME", help="(default: the first of /v1/models)")
    group.add_argument("--api-key", metavar="KEY", help="sent as a Bearer token")
    group.add_argument(
        "--launch", nargs="?", const="", metavar="ARGUMENTS",
        help='start `runtime.serve ARGUMENTS` on a free port for this run, such as --launch "smollm2 --kv-dtype int8"',
    )  # fmt: skip
    add_dataset_arguments(parser, num_prompts=1000, input_len=1024, output_len=128)
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="requests per second (default: inf, all at once; a trace's own times)",
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B",
        help="shape of the gamma distributed gaps: 1 is Poisson, below it burstier, above it more even (default: 1)",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight at most")
    group.add_argument(
        "--num-warmups", type=int, default=1, metavar="N", help="requests before the clock starts (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers have their full length (default)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="(default: the server's)")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields of every request")
    group = parser.add_argument_group("report")
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="LIST", help="(default: ttft,tpot,itl,e2el)"
    )
    group.add_argument("--metric-percentiles", default="99", metavar="LIST", help="(default: 99)")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests within these, such as ttft:500 tpot:50",
    )
    group.add_argument(
        "--slo", metavar="TARGETS",
        help="the same as --goodput, as ttft=500,tpot=50 in milliseconds, and every request carries them as its targets",
    )  # fmt: skip
    group.add_argument("--label", metavar="TEXT")
    group.add_argument("--save-result", action="store_true", help="write the JSON file")
    group.add_argument("--save-detailed", action="store_true", help="with every request in it")
    group.add_argument("--result-dir", default=".", metavar="DIR")
    group.add_argument("--result-filename", metavar="FILE", help="(default: backend-rate-model-time.json)")
    group.add_argument("--output-json", metavar="FILE", help="the same as --save-result with this path")
    return parser


def trace_times(arrivals_s: Sequence[float], rate: float) -> list[float]:
    """A trace's own times from its first request on, stretched to `rate` per second where one is given."""
    span_s = arrivals_s[-1] - arrivals_s[0]
    factor = 1.0 if math.isinf(rate) or span_s <= 0 else (len(arrivals_s) - 1) / span_s / rate
    return [(arrival_s - arrivals_s[0]) * factor for arrival_s in arrivals_s]


def arrival_times(num_requests: int, rate: float, burstiness: float, generator: random.Random) -> list[float]:
    """Seconds from the start; gaps are gamma distributed with mean 1 / rate, scaled so that the total is exact."""
    if math.isinf(rate):
        return [0.0] * num_requests
    gaps = [generator.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(num_requests)]
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    scale = (num_requests / rate) / now if now > 0 else 1.0
    return [when * scale for when in times]


class Load:
    """One run against one server."""

    def __init__(self, namespace: argparse.Namespace, client: HttpClient, model: str) -> None:
        self.namespace = namespace
        self.client = client
        self.model = model
        self.endpoint = namespace.endpoint or BACKENDS[namespace.backend]
        self.is_chat = self.endpoint.endswith("/chat/completions")
        self.num_in_flight = 0
        self.max_in_flight = 0

    def _body(self, prompt: BenchPrompt) -> dict[str, Any]:
        namespace = self.namespace
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.is_chat:
            body |= {"messages": [{"role": "user", "content": prompt.prompt}]}
            body |= {"max_completion_tokens": prompt.num_output_tokens}
        else:
            body |= {"prompt": prompt.prompt, "max_tokens": prompt.num_output_tokens}
        if namespace.ignore_eos:
            body["ignore_eos"] = True
        body |= {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(namespace, name)) is not None
        }
        return body | namespace.extra_body

    async def ask(self, prompt: BenchPrompt) -> RequestResult:
        result = RequestResult(prompt_len=prompt.num_prompt_tokens or 0, start_time=time.perf_counter())
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        texts: list[str] = []
        num_chunks, last_s, usage = 0, result.start_time, None
        try:
            async for event in self.client.stream_events(self.endpoint, self._body(prompt)):
                now = time.perf_counter()
                if event == "[DONE]":
                    break
                chunk = json.loads(event)
                if "error" in chunk:
                    raise HttpFailure(0, str(chunk["error"].get("message", chunk["error"])))
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    text = (choice.get("delta") or {}).get("content") if self.is_chat else choice.get("text")
                    if not text:
                        continue
                    texts.append(text)
                    num_chunks += 1
                    if num_chunks == 1:
                        result.ttft = now - result.start_time
                    else:
                        result.itl.append(now - last_s)
                    last_s = now
            result.latency = last_s - result.start_time
            result.output_tokens = usage["completion_tokens"] if usage else num_chunks
            result.prompt_len = usage["prompt_tokens"] if usage else result.prompt_len
            result.success = num_chunks > 0
            result.error = "" if result.success else "the answer held no text"
        except (HttpFailure, OSError, ValueError, KeyError, asyncio.TimeoutError) as error:
            result.error = str(error) or type(error).__name__
        finally:
            self.num_in_flight -= 1
        result.generated_text = "".join(texts)
        return result

    async def run(self, prompts: Sequence[BenchPrompt]) -> tuple[list[RequestResult], float]:
        """All results in the order of the prompts, and the seconds from the first request to the last answer."""
        namespace = self.namespace
        limit = asyncio.Semaphore(namespace.max_concurrency or len(prompts))
        generator = random.Random(namespace.seed)
        if prompts[0].arrival_s is not None:
            times = trace_times([prompt.arrival_s for prompt in prompts], namespace.request_rate)
        else:
            times = arrival_times(len(prompts), namespace.request_rate, namespace.burstiness, generator)
        started_s = time.perf_counter()

        async def one(prompt: BenchPrompt, when_s: float) -> RequestResult:
            delay_s = started_s + when_s - time.perf_counter()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            async with limit:
                return await self.ask(prompt)

        results = await asyncio.gather(*(one(prompt, when_s) for prompt, when_s in zip(prompts, times, strict=True)))
        return list(results), time.perf_counter() - started_s


def summarise(
    results: Sequence[RequestResult], duration_s: float, percents: Sequence[float], goodput: dict
) -> dict[str, Any]:
    """vllm bench's numbers under vllm bench's keys. Percentiles are over the requests that succeeded."""
    good = [result for result in results if result.success]
    num_input, num_output = sum(result.prompt_len for result in good), sum(result.output_tokens for result in good)
    tpots = [(result.latency - result.ttft) / (result.output_tokens - 1) for result in good if result.output_tokens > 1]
    series = {
        "ttft": [result.ttft for result in good],
        "tpot": tpots,
        "itl": [gap for result in good for gap in result.itl],
        "e2el": [result.latency for result in good],
    }
    summary: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    if goodput:
        within = [result for result in good if _is_within(result, goodput)]
        summary["request_goodput"] = len(within) / duration_s
        summary["token_goodput"] = sum(result.output_tokens for result in within) / duration_s
        # Of all that were sent: who failed kept nothing.
        summary["slo_attainment"] = len(within) / len(results) if results else 0.0
        for name, limit_ms in goodput.items():
            num_kept = sum(_is_within(result, {name: limit_ms}) for result in good)
            summary[f"{name}_attainment"] = num_kept / len(results) if results else 0.0
    for name, seconds in series.items():
        values_ms = [value * 1e3 for value in seconds]
        summary[f"mean_{name}_ms"] = mean(values_ms)
        summary[f"median_{name}_ms"] = percentile(values_ms, 50)
        summary[f"std_{name}_ms"] = deviation(values_ms)
        for percent in percents:
            summary[f"p{percent_key(percent)}_{name}_ms"] = percentile(values_ms, percent)
    return summary


def _is_within(result: RequestResult, goodput: dict[str, float]) -> bool:
    num_after_first = result.output_tokens - 1
    felt_ms = {
        "ttft": result.ttft * 1e3,
        "tpot": (result.latency - result.ttft) / num_after_first * 1e3 if num_after_first > 0 else 0.0,
        "e2el": result.latency * 1e3,
    }
    return all(felt_ms[name] <= limit_ms for name, limit_ms in goodput.items())


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``["ttft:500", "tpot:50"]`` -> milliseconds by name. Raises ValueError."""
    goodput = {}
    for pair in pairs:
        name, colon, limit = pair.partition(":")
        if not colon or name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"--goodput must be pairs such as ttft:500 of ttft, tpot, e2el, got {pair!r}")
        goodput[name] = float(limit)
    return goodput


def parse_slo(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """``"ttft=500,tpot=50,deadline=9000"`` -> (limits for goodput, fields that a request carries). Raises ValueError."""
    goodput, fields = {}, {}
    for pair in text.split(","):
        name, equals, limit = pair.strip().partition("=")
        if not equals or name not in ("ttft", "tpot", "deadline"):
            raise ValueError(f"--slo must be such as ttft=500,tpot=50 of ttft, tpot, deadline, got {text!r}")
        goodput["e2el" if name == "deadline" else name] = fields[f"{name}_ms"] = float(limit)
    return goodput, fields


def print_report(summary: dict[str, Any], metrics: Sequence[str], percents: Sequence[float]) -> None:
    def line(label: str, value, form: str = "<10.2f") -> None:
        print(f"{label:<40} {value:{form}}")

    print(f"{' Serving Benchmark Result ':=^50}")
    line("Successful requests:", summary["completed"], "<10d")
    line("Failed requests:", summary["failed"], "<10d")
    line("Benchmark duration (s):", summary["duration"])
    line("Total input tokens:", summary["total_input_tokens"], "<10d")
    line("Total generated tokens:", summary["total_output_tokens"], "<10d")
    line("Request throughput (req/s):", summary["request_throughput"])
    if summary["request_goodput"] is not None:
        line("Request goodput (req/s):", summary["request_goodput"])
        line("Token goodput (tok/s):", summary["token_goodput"])
        line("SLO attainment (%):", 100 * summary["slo_attainment"])
        for name in METRICS:
            if f"{name}_attainment" in summary:
                line(f"{name.upper()} attainment (%):", 100 * summary[f"{name}_attainment"])
    line("Output token throughput (tok/s):", summary["output_throughput"])
    line("Total token throughput (tok/s):", summary["total_token_throughput"])
    line("Peak concurrent requests:", summary["max_concurrent_requests"], "<10d")
    for name in metrics:
        print(f"{' ' + METRICS[name] + ' ':-^50}")
        line(f"Mean {name.upper()} (ms):", summary[f"mean_{name}_ms"])
        line(f"Median {name.upper()} (ms):", summary[f"median_{name}_ms"])
        for percent in percents:
            line(f"P{percent_key(percent)} {name.upper()} (ms):", summary[f"p{percent_key(percent)}_{name}_ms"])
    print("=" * 50)


class LaunchedServer:
    """`runtime.serve` as a child for the time of a run. Raises RuntimeError when it ends before it is ready."""

    def __init__(self, arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "runtime.serve", *shlex.split(arguments), "--port", str(self.port)]
        self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    async def wait_ready(self, client: HttpClient, limit_s: float = 600.0) -> None:
        started_s = time.monotonic()
        while True:
            if self.child.poll() is not None:
                raise RuntimeError(f"the launched server ended with status {self.child.returncode}")
            try:
                await client.get_json("/ready")
                return
            except (HttpFailure, OSError):
                if time.monotonic() - started_s > limit_s:
                    raise RuntimeError(f"the launched server was not ready after {limit_s:.0f} s") from None
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


async def _random_token_ids(client: HttpClient, model: str) -> list[int]:
    """Ordinary token ids of the server's own tokenizer; none when it has no /tokenize."""
    words = " ".join(_WORDS)
    try:
        answer = await client.post_json("/tokenize", {"model": model, "prompt": words, "add_special_tokens": False})
        return sorted(set(answer["tokens"]))
    except (HttpFailure, ValueError, KeyError):
        return []


async def _prompts(namespace: argparse.Namespace, client: HttpClient, model: str, is_chat: bool) -> list[BenchPrompt]:
    is_drawn = namespace.dataset_name in ("random", "trace")
    ids = [] if not is_drawn or is_chat else await _random_token_ids(client, model)
    prompts = make_prompts(namespace, lambda: ids or range(len(_WORDS)), namespace.seed)
    if is_drawn and not ids:  # about one token a word
        words = [" ".join(_WORDS[i] for i in prompt.prompt) for prompt in prompts]
        return [replace(one, prompt=text, num_prompt_tokens=None) for one, text in zip(prompts, words, strict=True)]
    return prompts


async def _run(namespace: argparse.Namespace, launched: LaunchedServer | None) -> dict[str, Any]:
    base_url = namespace.base_url or f"http://{namespace.host}:{launched.port if launched else namespace.port}"
    headers = {"Authorization": f"Bearer {namespace.api_key}"} if namespace.api_key else {}
    client = HttpClient(base_url, headers)
    try:
        if launched is not None:
            await launched.wait_ready(client)
        model = namespace.model or (await client.get_json("/v1/models"))["data"][0]["id"]
        load = Load(namespace, client, model)
        prompts = await _prompts(namespace, client, model, load.is_chat)
        for prompt in prompts[: namespace.num_warmups]:
            first = await load.ask(
                BenchPrompt(prompt.prompt, prompt.num_prompt_tokens, min(8, prompt.num_output_tokens))
            )
            if not first.success:
                raise RuntimeError(f"the warm-up request failed: {first.error}")
        load.max_in_flight = 0
        results, duration_s = await load.run(prompts)
    finally:
        await client.close()
    percents = parse_percentiles(namespace.metric_percentiles)
    summary = summarise(results, duration_s, percents, namespace.goodput)
    rate = namespace.request_rate
    result = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": namespace.backend,
        "backend": namespace.backend,
        "label": namespace.label,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(prompts),
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": namespace.burstiness,
        "max_concurrency": namespace.max_concurrency,
        **summary,
        "max_concurrent_requests": load.max_in_flight,
    }
    if namespace.save_detailed:
        result |= {
            "input_lens": [one.prompt_len for one in results],
            "output_lens": [one.output_tokens for one in results],
            "start_times": [one.start_time for one in results],
            "ttfts": [one.ttft for one in results],
            "itls": [one.itl for one in results],
            "generated_texts": [one.generated_text for one in results],
            "errors": [one.error for one in results],
        }
    failures = {one.error for one in results if one.error}
    for error in sorted(failures)[:5]:
        print(f"failed: {error}", file=sys.stderr)
    return result


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.bench serve") -> int:
    parser = build_parser(prog)
    namespace = parser.parse_args(argv)
    metrics = [name for name in namespace.percentile_metrics.split(",") if name]
    try:
        check_dataset_arguments(namespace)
        percents = parse_percentiles(namespace.metric_percentiles)
        namespace.goodput = parse_goodput(namespace.goodput)
        if namespace.slo is not None:
            limits, targets = parse_slo(namespace.slo)
            namespace.goodput = {**limits, **namespace.goodput}
        if any(name not in METRICS for name in metrics):
            raise ValueError(
                f"--percentile-metrics must be of {', '.join(METRICS)}, got {namespace.percentile_metrics!r}"
            )
        if not namespace.request_rate > 0 or not namespace.burstiness > 0:
            raise ValueError("--request-rate and --burstiness must be above 0")
        if namespace.max_concurrency is not None and namespace.max_concurrency < 1:
            raise ValueError(f"--max-concurrency must be at least 1, got {namespace.max_concurrency}")
        if not isinstance(namespace.extra_body, dict):
            raise ValueError("--extra-body must be a JSON object")
        if namespace.slo is not None:
            namespace.extra_body = {**targets, **namespace.extra_body}
    except ValueError as error:
        parser.error(str(error))
    launched = None if namespace.launch is None else LaunchedServer(namespace.launch)
    try:
        result = asyncio.run(_run(namespace, launched))
    except (RuntimeError, ValueError, OSError, HttpFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if launched is not None:
            launched.stop()
    print_report(result, metrics, percents)
    path = namespace.output_json
    if path is None and (namespace.save_result or namespace.save_detailed):
        model = result["model_id"].replace("/", "_")
        name = f"{namespace.backend}-{result['request_rate']}qps-{model}-{result['date']}.json"
        path = f"{namespace.result_dir}/{namespace.result_filename or name}"
    if path is not None:
        write_json(path, result)
        print(f"result in {path}")
    return 0 if result["completed"] else 1
