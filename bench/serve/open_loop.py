"""Open-loop load on an engine in this process: classes of requests that arrive by themselves, and what each of them felt.

A trace is drawn once, from a seed; every configuration gets the same requests at the same times. Prompts are random tokens,
so nothing is shared; answers have the drawn lengths, whatever is sampled.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.engine_loader import start_engine
from runtime.messages import Delta, Submit
from runtime.sampling_params import SamplingParams
from runtime.service_level import ServiceLevel
from scheduler.goodput import outcome_of
from scheduler.simulator.report import percentile

FIRST_TOKEN_ID = 256  # below are control tokens in most vocabularies


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests that are alike. Lengths in tokens, drawn evenly between both ends."""

    name: str
    weight: float  # of arrivals
    prompt: tuple[int, int]
    output: tuple[int, int]
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadRequest:
    arrival_s: float
    kind: RequestClass
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Felt:
    """What a request felt, seconds since its arrival."""

    request: LoadRequest
    submitted_s: float
    token_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    @property
    def inter_token_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]

    def outcome(self):
        kind = self.request.kind
        end_s = self.end_s if self.end_s is not None else math.inf
        return outcome_of(
            kind.ttft_s, kind.tpot_s, None, first_token_s=self.ttft_s, end_s=end_s, num_tokens=len(self.token_s)
        )


def draw_trace(classes: Sequence[RequestClass], rate: float, duration_s: float, seed: int = 0) -> list[LoadRequest]:
    """Poisson arrivals, `rate` a second in all, for duration_s seconds. The classes alternate at random by weight."""
    rng = random.Random(seed)
    requests: list[LoadRequest] = []
    arrival_s = rng.expovariate(rate)
    while arrival_s < duration_s:
        kind = rng.choices(classes, [one.weight for one in classes])[0]
        requests.append(LoadRequest(arrival_s, kind, rng.randint(*kind.prompt), rng.randint(*kind.output)))
        arrival_s += rng.expovariate(rate)
    return requests


def draw_prompt(request: LoadRequest, rng: random.Random, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(request.num_prompt_tokens))


class StepCounter:
    """Stands where the engine's trace stands: what kinds of steps there were, without node-by-node timing."""

    def __init__(self) -> None:
        self.counts = {"decode": 0, "prefill": 0, "mixed": 0, "part": 0, "paused": 0, "nano": 0}
        self.busy_s: dict[int, float] = {}  # per lane

    def add(self, completion: dict, plan) -> None:
        num_decodes = sum(scheduled.num_tokens == 1 for scheduled in plan.requests)
        if plan.continues or plan.node_range is not None:
            self.counts["part"] += 1
        elif num_decodes == len(plan.requests):
            self.counts["decode"] += 1
        else:
            self.counts["mixed" if num_decodes else "prefill"] += 1
        self.counts["paused"] += bool(completion.get("was_stopped"))
        self.counts["nano"] += plan.nano is not None
        seconds = (completion["end_ns"] - completion["start_ns"]) / 1e9
        self.busy_s[plan.lane] = self.busy_s.get(plan.lane, 0.0) + seconds

    def close(self) -> None: ...


@dataclass(slots=True)
class LoadResult:
    felt: list[Felt]
    duration_s: float  # from the first arrival to the last answer
    steps: dict[str, int]
    busy_s: dict[int, float]
    stats: Any  # SchedulerStats, or None when the run was cut short
    is_complete: bool


class OpenLoop:
    """One engine over a loaded model, started for one load and shut down behind it."""

    def __init__(self, loaded, args) -> None:
        self._felt: dict[str, Felt] = {}
        self._num_left = 0
        self._all_ended = threading.Event()
        self._vocab_size = loaded.config.vocab_size
        self.engine = start_engine(loaded, args, self._on_deltas)
        self.engine._trace = self._steps = StepCounter()  # the engine's own hook

    def _on_deltas(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        for delta in deltas:
            felt = self._felt.get(delta.request_id)
            if felt is None:
                continue
            since_s = now - felt.submitted_s
            felt.token_s.extend([since_s] * len(delta.token_ids))
            if delta.finish_reason is not None:
                felt.end_s, felt.finish_reason = since_s, delta.finish_reason
                self._num_left -= 1
                if self._num_left == 0:
                    self._all_ended.set()

    def _submit(self, name: str, request: LoadRequest, rng: random.Random, arrival_s: float) -> None:
        prompt = draw_prompt(request, rng, self._vocab_size)
        sampling = SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True)
        kind = request.kind
        service = ServiceLevel(
            ttft_ms=kind.ttft_s and kind.ttft_s * 1e3, tpot_ms=kind.tpot_s and kind.tpot_s * 1e3, user=kind.name
        )
        self.engine.submit(Submit(name, prompt, sampling, service, arrival_s=arrival_s))

    def run(self, requests: Sequence[LoadRequest], *, limit_s: float, warm_up: LoadRequest | None = None) -> LoadResult:
        """limit_s: from the first arrival; what has no answer then counts as one that never comes."""
        rng = random.Random(1)
        try:
            if warm_up is not None:
                self._submit("warm-up", warm_up, rng, time.monotonic())
                self.engine.wait_idle(120)
                self.engine._trace = self._steps = StepCounter()
            self._num_left = len(requests)
            started_s = time.monotonic()
            for index, request in enumerate(requests):
                arrival_s = started_s + request.arrival_s
                time.sleep(max(0.0, arrival_s - time.monotonic()))
                # From when it should have come: a submitter that was late is the machine's doing as well.
                self._felt[f"r{index}"] = Felt(request, arrival_s)
                self._submit(f"r{index}", request, rng, arrival_s)
            is_complete = self._all_ended.wait(max(0.0, started_s + limit_s - time.monotonic()))
            duration_s = time.monotonic() - started_s
            stats = self.engine._scheduler.stats() if is_complete else None
        finally:
            self.engine.shutdown()
        return LoadResult(
            list(self._felt.values()), duration_s, self._steps.counts, self._steps.busy_s, stats, is_complete
        )


def _percentile(ordered: list[float], percent: float) -> float:
    """Of ascending seconds, among them such that never came."""
    place = math.ceil((len(ordered) - 1) * percent / 100)
    return ordered[place] if ordered and ordered[place] == math.inf else percentile(ordered, percent)


def summarise(result: LoadResult) -> dict[str, float]:
    """Numbers of one run, seconds and per second. A request without an answer counts as infinitely late."""
    felt, never = result.felt, math.inf
    outcomes = [one.outcome() for one in felt]
    num_tokens = sum(len(one.token_s) for one in felt)
    line: dict[str, float] = {
        "requests": len(felt),
        "duration_s": result.duration_s,
        "output_tokens_per_s": num_tokens / result.duration_s,
        "ttft_attainment": sum(o.ttft is not False for o in outcomes) / len(felt),
        "attainment": sum(o.is_good for o in outcomes) / len(felt),
        "ttft_goodput_per_s": sum(o.ttft is not False for o in outcomes) / result.duration_s,
        "goodput_per_s": sum(o.is_good for o in outcomes) / result.duration_s,
    }
    for kind in dict.fromkeys(one.request.kind for one in felt):
        of_kind = [one for one in felt if one.request.kind is kind]
        ttft = sorted(never if one.ttft_s is None else one.ttft_s for one in of_kind)
        for percent in (50, 90, 99):
            line[f"{kind.name}_ttft_p{percent}_s"] = _percentile(ttft, percent)
        line[f"{kind.name}_ttft_attainment"] = sum(one.outcome().ttft is not False for one in of_kind) / len(of_kind)
    tpot = sorted(one.tpot_s for one in felt if one.tpot_s is not None)
    gaps = sorted(gap for one in felt for gap in one.inter_token_s)
    for name, values in (("tpot", tpot), ("itl", gaps)):
        for percent in (50, 90, 99):
            line[f"{name}_p{percent}_s"] = _percentile(values, percent) if values else never
    line |= {f"steps_{name}": count for name, count in result.steps.items()}
    line |= {f"lane{lane}_busy": seconds / result.duration_s for lane, seconds in sorted(result.busy_s.items())}
    if result.stats is not None:
        line |= {
            "border_moves": result.stats.num_moves, "pauses": result.stats.num_pauses,
            "preemptions": result.stats.num_preemptions,
        }  # fmt: skip
    return line
