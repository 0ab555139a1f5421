"""What a step takes in the engine beyond its nodes: gaps, and the core that the engine's own thread has meanwhile.

A lane's workers want every core of their share, and the thread that plans, prepares and publishes needs one for a while in
each step. That is invisible to steps that a bench submits one by one (measured_steps.py), so it is measured where it
happens: a real Engine decodes for n requests, and its steps are compared with steps of the same kind without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from runtime.measured_steps import StepBench, StepKind
from runtime.messages import Submit
from runtime.sampling_params import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 48
_DISCARDED = 8  # steps of a phase, in which its requests start
_GAP_TRIM = 0.02  # of the longest gaps: in those the thread was kept from its core by others


class StepTimes:
    """In place of a StepTrace: whole plans only, because node spans cost the engine's thread more than all else it does."""

    has_nodes = False

    def __init__(self) -> None:
        self.steps: list[tuple] = []  # (plan, start_ns, end_ns, heard_ns)

    def add(self, completion: dict, plan) -> None:
        self.steps.append((plan, completion["start_ns"], completion["end_ns"], time.monotonic_ns()))

    def close(self) -> None:
        pass


class EngineTimes(NamedTuple):
    gap_s: float  # mean, from the end of a step to the start of the next one, which was planned ahead
    result_delay_s: float  # median, from the end of a step to the engine's thread hearing of it
    host_s_per_step: float
    host_s_per_request: float


def measure_engine(loaded, args, counts: Sequence[int] = (1, 4, 16)) -> EngineTimes:
    """counts: requests that decode at the same time, a phase each; those that rows or pages do not allow are left out."""
    plan = loaded.kv_plan
    pages_of_one = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // plan.page_size) * plan.num_groups
    counts = [n for n in counts if n <= args.max_num_seqs and n * pages_of_one <= plan.num_pages]
    phases = _engine_phases(loaded, args, counts)
    gaps = sorted(gap for phase in phases for gap in phase.gaps_s)
    gaps = gaps[: max(1, round(len(gaps) * (1.0 - _GAP_TRIM)))]
    bench = StepBench(loaded, [loaded.device.engine_cores()], max(counts), max(counts))
    hosts = []
    for num, phase in zip(counts, phases, strict=True):
        kind = StepKind(num, PROMPT_TOKENS + (OUTPUT_TOKENS + _DISCARDED) // 2)
        alone_s = statistics.median(bench.run_times_s(kind, len(phase.steps_s)))
        hosts.append(statistics.median(phase.steps_s) - alone_s)
    per_step_s, per_request_s = line_above_zero(counts, hosts)
    delays = [delay for phase in phases for delay in phase.delays_s]
    return EngineTimes(
        max(0.0, statistics.mean(gaps)), max(0.0, statistics.median(delays)), per_step_s, per_request_s
    )  # fmt: skip


class _Phase(NamedTuple):
    steps_s: list[float]
    gaps_s: list[float]
    delays_s: list[float]


def _engine_phases(loaded, args, counts: Sequence[int]) -> list[_Phase]:
    from runtime.engine_loader import start_engine

    args = replace(args, policy="default", lanes="", prefill="", enable_prefix_caching=False)
    times, phases = StepTimes(), []
    engine = start_engine(loaded, args, lambda deltas: None, times)
    try:
        for num in counts:
            first = len(times.steps)
            for index in range(num):
                prompt = tuple(3 + (7 * i + index) % (loaded.config.vocab_size - 3) for i in range(PROMPT_TOKENS))
                sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
                engine.submit(Submit(f"{num}-{index}", prompt, sampling, arrival_s=time.monotonic()))
            if not engine.wait_idle(60.0):
                raise RuntimeError(f"calibration: {num} requests of {OUTPUT_TOKENS} tokens did not end in a minute")
            phases.append(_phase_of(times.steps[first:], num))
    finally:
        engine.shutdown()
    return phases


def _phase_of(steps: list[tuple], num: int) -> _Phase:
    """Of the steps in which all of the phase's requests decode and nothing else happens."""
    full = [all(s.num_tokens == 1 for s in plan.requests) and len(plan.requests) == num for plan, *_ in steps]
    chosen = [step for step, is_full in zip(steps, full, strict=True) if is_full][_DISCARDED:]
    gaps = [
        (after[1] - before[2]) / 1e9
        for before, after in pairwise(chosen)
        if after[0].plan_id == before[0].plan_id + 1 and after[1] >= before[2]
    ]
    return _Phase(
        [(end - start) / 1e9 for _, start, end, _ in chosen], gaps, [(heard - end) / 1e9 for *_, end, heard in chosen]
    )  # fmt: skip


def line_above_zero(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares y ~ a + b * x with neither below 0."""
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    slope = sum((value - mean_x) * (of - mean_y) for value, of in zip(x, y, strict=True)) / spread if spread else 0.0
    constant = mean_y - slope * mean_x
    if slope < 0.0:
        return max(0.0, mean_y), 0.0
    if constant < 0.0:
        squares = sum(value * value for value in x)
        return 0.0, max(0.0, sum(value * of for value, of in zip(x, y, strict=True)) / squares)
    return constant, slope
