"""Policies on the H100 file (simulated: nobody has measured it) with Llama 3 8B: what the acceptance tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from scheduler.arrangement import Arrangement, Controller
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.request import Request
from scheduler.simulator.costs import ModelCosts
from scheduler.simulator.report import percentile
from scheduler.simulator.setup import load_model, scheduler_config
from scheduler.simulator.simulation import RequestRecord, ServiceTargets, Simulation, SimulationResult
from scheduler.simulator.traces import TraceRequest

MACHINE = Machine.load("h100-sxm")
SPEC = load_model("llama-3-8b", MACHINE)
MODEL = CostModel(SPEC, MACHINE)


def simulation(
    policy: str, requests: Sequence[TraceRequest], targets: ServiceTargets | None = None, *, observe=None,
    keep_plans: bool = False, **fields,
) -> Simulation:  # fmt: skip
    """One run, not yet run. The scheduler predicts with a cost model of its own."""
    fields.setdefault("enable_prefix_caching", False)
    config = scheduler_config(SPEC, MACHINE, policy=policy, **fields)
    return Simulation(
        config, ModelCosts(MODEL), requests, targets=targets, cost_model=CostModel(SPEC, MACHINE), observe=observe,
        keep_plans=keep_plans,
    )  # fmt: skip


def run(
    policy: str, requests: Sequence[TraceRequest], targets: ServiceTargets | None = None, **kwargs
) -> SimulationResult:
    return simulation(policy, requests, targets, **kwargs).run()


def arrivals(rate: float, seconds: float, lengths: Callable[[random.Random], tuple[int, int]], *, seed: int,
             start_s: float = 0.0, cv: float = 1.0) -> list[TraceRequest]:  # fmt: skip
    """rate: requests/s. lengths: draws (prompt tokens, generated tokens). cv: of the gaps between arrivals; 1 is Poisson."""
    rng, now, requests = random.Random(seed), start_s, []
    while True:
        now += rng.gammavariate(1.0 / cv**2, cv**2 / rate)
        if now >= start_s + seconds:
            return requests
        requests.append(TraceRequest(now, *lengths(rng)))


def ttft_s(record: RequestRecord) -> float:
    return (record.first_token_ns - record.arrival_ns) / 1e9


def attainment(records: Sequence[RequestRecord], target_s: float) -> float:
    """Share of requests whose first token came in time."""
    return sum(ttft_s(record) <= target_s for record in records) / len(records)


def arrived_between(result: SimulationResult, first_s: float, last_s: float) -> list[RequestRecord]:
    return [record for record in result.records.values() if first_s <= record.arrival_ns / 1e9 < last_s]


def inter_token_s(result: SimulationResult, percent: float) -> float:
    return percentile(sorted(result.inter_token_s), percent)


class Recorder:
    """Passes everything on to a controller and keeps what it decided beside the use of KV at that moment."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.decisions: list[tuple[float, float, Arrangement]] = []  # (clock, KV use, decision)

    def arrange(self, outlook) -> Arrangement:
        arrangement = self.controller.arrange(outlook)
        self.decisions.append((outlook.now, outlook.kv_usage, arrangement))
        return arrangement

    def hear_first_token(self, request, now: float) -> None:
        self.controller.hear_first_token(request, now)

    def hear_finished(self, request, now: float) -> None:
        self.controller.hear_finished(request, now)


def record(one: Simulation, controller: Controller | None = None) -> Recorder:
    """Puts a recorder, or another controller, in the place of the scheduler's own."""
    scheduler = one.scheduler
    recorder = Recorder(controller or scheduler._controller)
    scheduler._controller = scheduler._planner._controller = scheduler._lives._controller = recorder
    return recorder


def with_own_targets(
    policy: str, drawn: Sequence[tuple[float, int, int, float | None]], *, observe=None, **fields
) -> Simulation:
    """Requests of (arrival, prompt tokens, generated tokens, TTFT target)."""
    one = simulation(policy, [], observe=observe, **fields)
    for index, (arrival_s, num_prompt, num_output, target_s) in enumerate(drawn):
        name = f"r{index}"
        request = Request(name, range(num_prompt), num_output, arrival_s=arrival_s, namespace=name, ttft_s=target_s)
        one.add(round(arrival_s * 1e9), request)
    return one
