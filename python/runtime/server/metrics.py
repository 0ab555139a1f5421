"""Prometheus metrics under vLLM's names, so that dashboards and autoscalers made for it work unchanged."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from runtime.front import Front, LiveOutput, Observer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# vLLM's buckets, with finer ones below 10 ms: small models are faster than what those were made for.
_TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5,
         10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_ITL = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1,
        2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_REQUEST = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # fmt: skip
_FINISH_REASONS = ("stop", "length", "abort", "error")


def _one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to ``limit``."""
    series = [mantissa * 10**exponent for exponent in range(10) for mantissa in (1, 2, 5)]
    return [value for value in series if value <= max(limit, 1)]


class Metrics(Observer):
    """Counts what the front reports; asks the engine for its gauges when it is scraped."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.model_name = ""
        self._http_registry = CollectorRegistry()
        self._registry: CollectorRegistry | None = None  # made when the model is known: its name is a label
        disable_created_metrics()
        labels = ("handler", "method", "status")
        self._http_requests = Counter(
            "http_requests", "HTTP requests by route, method and status class.", labels, registry=self._http_registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds", "Seconds to the end of the answer.", ("handler", "method"), buckets=_HTTP,
            registry=self._http_registry,
        )  # fmt: skip

    def bind_model(self, model_name: str, max_model_len: int) -> None:
        """Makes the model's series; call it once, on the loop's thread, when the engine is attached."""
        self.model_name = model_name
        registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets) -> Histogram:
            metric = Histogram(f"vllm:{name}", text, ("model_name", "engine"), buckets=buckets, registry=registry)
            return metric.labels(model_name, "0")

        def counter(name: str, text: str) -> Counter:
            metric = Counter(f"vllm:{name}", text, ("model_name", "engine"), registry=registry)
            return metric.labels(model_name, "0")

        lengths = _one_two_five(max_model_len)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens.")
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        success = Counter(
            "vllm:request_success", "Finished requests.", ("model_name", "engine", "finished_reason"), registry=registry
        )
        self._success = {reason: success.labels(model_name, "0", reason) for reason in _FINISH_REASONS}
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self._itl = _LoopHistogram(
            "vllm:inter_token_latency_seconds",
            "Between one step's tokens of a request and the next's.",
            _ITL,
            (model_name, "0"),
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a request after its first token.", _ITL
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduling.", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduling to first token.", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "First token to last.", _REQUEST)
        self._inference = histogram("request_inference_time_seconds", "First scheduling to last token.", _REQUEST)
        self._request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._request_generation = histogram("request_generation_tokens", "Generated tokens of a request.", lengths)
        self._request_max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", lengths)
        self._step_tokens = histogram(
            "iteration_tokens_total", "Prompt and generated tokens that one step ended.", _STEP_TOKENS
        )
        registry.register(self._itl)
        registry.register(_EngineGauges(self.front, model_name))
        self._registry = registry

    # Observer

    def stepped(self, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        if num_generated_tokens:
            self._generation_tokens.inc(num_generated_tokens)
            self._step_tokens.observe(num_prompt_tokens + num_generated_tokens)
        if num_prompt_tokens:
            self._prompt_tokens.inc(num_prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._itl.observe(seconds)

    def finished(self, output: LiveOutput) -> None:
        reason = output.finish_reason if output.finish_reason in self._success else "abort"
        self._success[reason].inc()
        if output.num_cached_tokens:
            self._cached_tokens.inc(output.num_cached_tokens)
        self._e2e.observe(output.finished_s - output.arrival_s)
        self._request_prompt.observe(output.num_prompt_tokens)
        self._request_generation.observe(output.num_tokens)
        self._request_max_tokens.observe(output.sampling.max_tokens or 0)
        if output.scheduled_s is not None:
            self._queue.observe(max(0.0, output.scheduled_s - output.arrival_s))
        if output.first_token_s is None:
            return
        decode_s = output.last_token_s - output.first_token_s
        self._decode.observe(decode_s)
        if output.num_tokens > 1:
            self._tpot.observe(decode_s / (output.num_tokens - 1))
        if output.scheduled_s is not None:
            self._prefill.observe(output.first_token_s - output.scheduled_s)
            self._inference.observe(output.last_token_s - output.scheduled_s)

    # HTTP

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """``handler`` is a route's template or "unmatched": no label value comes from a client."""
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH") else "other"
        status_class = f"{status // 100}xx" if status else "none"
        self._http_requests.labels(handler, method, status_class).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        model = generate_latest(self._registry) if self._registry is not None else b""
        return model + generate_latest(self._http_registry)


class _LoopHistogram:
    """A histogram that only the loop's thread fills: without the library's lock and its walk over the buckets, which
    once per token would cost more than the token's text."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self):
        totals = list(accumulate(self._counts))
        bounds = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name", "engine"))
        family.add_metric(self._labels, list(zip(bounds, totals, strict=True)), self._sum)
        yield family


class _EngineGauges:
    """Reads engine.stats() at scrape time: nothing is copied while nobody looks."""

    def __init__(self, front: Front, model_name: str) -> None:
        self.front = front
        self.values = (model_name, "0")

    def collect(self):
        stats = self.front.engine.stats() if self.front.engine is not None else {}
        names = ("model_name", "engine")

        def family(kind, name: str, text: str, value: float):
            metric = kind(f"vllm:{name}", text, labels=names)
            metric.add_metric(self.values, value)
            return metric

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield family(gauge, "num_requests_running", "Requests that hold pages.", stats.get("num_requests_running", 0))
        yield family(gauge, "num_requests_waiting", "Requests in the queue.", stats.get("num_requests_waiting", 0))
        yield family(
            gauge, "kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", stats.get("kv_cache_usage", 0.0)
        )
        yield family(
            gauge, "gpu_cache_usage_perc", "The former name of kv_cache_usage_perc.", stats.get("kv_cache_usage", 0.0)
        )
        yield family(
            counter, "num_preemptions", "Requests that gave their pages back.", stats.get("num_preemptions", 0)
        )
        yield family(counter, "prefix_cache_queries", "Prompt tokens looked up.", stats.get("prefix_queries", 0))
        yield family(counter, "prefix_cache_hits", "Prompt tokens found.", stats.get("prefix_hits", 0))
        goodput = stats.get("goodput") or {}
        names_and_texts = (
            ("num_good", "good_requests", "Requests that ended and kept every target they carried."),
            ("num_good_tokens", "good_tokens", "Tokens that those requests generated."),
            ("num_with_targets", "requests_with_targets", "Requests that ended and carried a target."),
            ("num_good_with_targets", "good_requests_with_targets", "Of those, how many kept every target."),
            ("num_ttft_kept", "ttft_targets_kept", "Targets for the time to the first token that were kept."),
            ("num_ttft_targets", "ttft_targets", "Targets for the time to the first token."),
            ("num_tpot_kept", "tpot_targets_kept", "Targets for the time per token that were kept."),
            ("num_tpot_targets", "tpot_targets", "Targets for the time per token."),
            ("num_deadlines_kept", "deadlines_kept", "Deadlines that were kept."),
            ("num_deadlines", "deadlines", "Deadlines."),
        )
        for key, name, text in names_and_texts:
            metric = counter(f"partita:{name}", text, labels=names)
            metric.add_metric(self.values, goodput.get(key, 0))
            yield metric
        names_and_texts = (
            (
                "num_pauses",
                "prefill_pauses",
                "Prefills that stopped between two operators, for one that ranks before or for more of the chip.",
            ),
            ("num_moves", "border_moves", "Changes of the shares of the chip that prefill and decode have."),
        )
        for key, name, text in names_and_texts:
            metric = counter(f"partita:{name}", text, labels=names)
            metric.add_metric(self.values, stats.get(key, 0))
            yield metric
        text = "Boundaries at which the controller decided on this arrangement of the chip."
        metric = counter("partita:arrangements", text, labels=(*names, "arrangement"))
        for arrangement, count in (stats.get("arrangements") or {}).items():
            metric.add_metric((*self.values, arrangement), count)
        yield metric
        yield family(counter, "engine_steps", "Steps executed.", stats.get("steps", 0))
