"""What a scheduling decision costs: one on_event, the result of a plan in and the next plans out.

    PYTHONPATH=python python bench/scheduler/decision_time.py [CASE ...] [--profile]

Cases: 32 decoding requests; 256 running and 2,000 queued: as they are, with arrivals and ends between the steps, with pages
so short that requests are preempted, with every policy that predicts, cuts prompts by layers or operators, reorders them,
or has two lanes. Steps take the time that the cost model says (Llama 3 8B on the h100-sxm file), so deadlines come and go,
runs are paused and the border moves. CPU time of the thread, since the machine may be shared. One aligned line per case,
microseconds: of results and, under `arrival`, of arrivals. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections import deque

from runtime import garbage
from scheduler import Arrival, LaneFinished, LanePlan, LaneResult, Request, Scheduler, SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator.setup import load_model
from scheduler.step import PausePlan
from scheduler.step_shape import shape_of

TTFT_TARGETS_S = (0.3, 1.0, 5.0, 60.0, None)
RUNGS = (0.25, 0.5, 0.75)


class _Step:
    """A plan on its lane."""

    def __init__(self, plan: LanePlan, seconds: float) -> None:
        self.plan = plan
        self.seconds = seconds
        self.start_s = 0.0  # of the lane's first; of others not known yet
        self.cursor: int | None = None  # the node where it was stopped


class Driver:
    """A scheduler and lanes that take as long as predicted. Contention is left out: it changes no decision's price."""

    def __init__(self, scheduler: Scheduler, model: CostModel) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self._model = model
        self._lanes: list[deque[_Step]] = [deque() for _ in range(scheduler.config.num_lanes)]
        self.result_us: list[float] = []
        self.arrival_us: list[float] = []

    def arrive(self, request: Request) -> None:
        begin = time.thread_time()
        plans = self.scheduler.on_event(Arrival(request), self.now)
        self.arrival_us.append((time.thread_time() - begin) * 1e6)
        self._launch(plans)

    def land(self) -> None:
        """The plan that ends first."""
        lane = min((lane for lane in self._lanes if lane), key=lambda lane: lane[0].start_s + lane[0].seconds)
        step = lane.popleft()
        self.now = max(self.now, step.start_s + step.seconds)
        if lane:
            lane[0].start_s = self.now
        plan, cursor = step.plan, step.cursor
        is_end = cursor is None and (plan.node_range is None or plan.node_range[1] == self._model.num_nodes)
        sampled = tuple((scheduled.request_id, 1) for scheduled in plan.requests if scheduled.samples and is_end)
        event = LaneFinished(LaneResult(plan.plan_id, plan.lane, sampled, cursor=cursor))
        begin = time.thread_time()
        plans = self.scheduler.on_event(event, self.now)
        self.scheduler.take_outputs()
        self.result_us.append((time.thread_time() - begin) * 1e6)
        self._launch(plans)

    def _launch(self, plans: list[LanePlan]) -> None:
        for plan in plans:
            cost = self._model.step_cost(shape_of(plan.requests, self._model.window), plan.share, plan.node_range)
            step = _Step(plan, cost.alone_s)
            if not self._lanes[plan.lane]:
                step.start_s = self.now
            self._lanes[plan.lane].append(step)
        for order in self.scheduler.take_orders():
            if isinstance(order, PausePlan):
                self._pause(order)

    def _pause(self, order: PausePlan) -> None:
        lane = self._lanes[order.lane]
        step = next(step for step in lane if step.plan.plan_id == order.plan_id)
        plan, done = step.plan, (self.now - step.start_s) / step.seconds if step is lane[0] else 0.0
        node, fraction = self._model.stop_node(shape_of(plan.requests), plan.node_range, min(done, 1.0), plan.share)
        if fraction < 1.0:
            step.cursor, step.seconds = node, fraction * step.seconds


def measure(
    name: str, num_running: int, num_queued: int, num_pages: int, num_steps: int, max_tokens: int, *,
    has_arrivals: bool = False, policy: str = "default", profile: bool = False, **fields,
) -> dict:  # fmt: skip
    """Times num_steps results of a steady state. has_arrivals: the queue is filled up to num_queued between two steps."""
    rng = random.Random(0)
    model = CostModel(load_model("llama-3-8b"), Machine.load("h100-sxm"))
    nodes = model.spec.nodes()
    layer_starts = [next(i for i, node in enumerate(nodes) if node.layer == n) for n in range(model.spec.num_layers)]
    config = SchedulerConfig(
        num_pages=num_pages, max_num_seqs=num_running, max_num_batched_tokens=2048, max_model_len=1 << 20, policy=policy,
        num_nodes=len(nodes), layer_starts=tuple(layer_starts), rungs=RUNGS, **fields,
    )  # fmt: skip
    scheduler = Scheduler(config, model)
    driver = Driver(scheduler, model)
    num_requests = 0

    def arrive() -> None:
        nonlocal num_requests
        prompt = tuple(rng.randrange(50_000) for _ in range(rng.randint(16, 400)))
        tokens = max_tokens if max_tokens > 1000 else rng.randint(1, 2 * max_tokens)
        request = Request(
            f"request-{num_requests}", prompt, tokens, frozenset([0]), arrival_s=driver.now, tpot_s=0.03,
            ttft_s=rng.choice(TTFT_TARGETS_S),
        )  # fmt: skip
        driver.arrive(request)
        num_requests += 1

    def fill_queue() -> None:
        while scheduler.stats().num_waiting < num_queued:
            arrive()

    for _ in range(num_running + num_queued):
        arrive()
    for _ in range(1000):  # past the first prefills, as far as policy and pages let so many run
        if scheduler.stats().num_running == num_running:
            break
        driver.land()
        if has_arrivals:
            fill_queue()
    for _ in range(40):
        driver.land()

    garbage.settle()  # as an engine does it
    driver.result_us.clear()
    driver.arrival_us.clear()
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    num_running_seen = 0
    for _ in range(num_steps):
        if has_arrivals:
            fill_queue()
        driver.land()
        num_running_seen += len(scheduler._running)
    if profile:
        import pstats

        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    gc.unfreeze()
    times_us, arrival_us, stats = sorted(driver.result_us), sorted(driver.arrival_us) or [0.0], scheduler.stats()
    line = {
        "case": name,
        "median_us": round(times_us[len(times_us) // 2], 1),
        "p99_us": round(times_us[int(len(times_us) * 0.99)], 1),
        "max_us": round(times_us[-1], 1),
        "arrival_p99_us": round(arrival_us[int(len(arrival_us) * 0.99)], 1),
        "running": round(num_running_seen / num_steps),
        "waiting": stats.num_waiting,
        "preemptions": stats.num_preemptions,
        "pauses": stats.num_pauses,
        "moves": stats.num_moves,
    }
    print(
        "  ".join(f"{key} {value!s:>8}" if key != "case" else f"{value:<32}" for key, value in line.items()), flush=True
    )
    return line


LOADED = {"num_running": 256, "num_queued": 2000, "num_pages": 1 << 14, "num_steps": 3000, "max_tokens": 200}
CASES: dict[str, dict] = {
    "decode 32": {"num_running": 32, "num_queued": 0, "num_pages": 8192, "num_steps": 2000, "max_tokens": 10_000},
    "run 256, queue 2000": {**LOADED, "num_pages": 1 << 20, "num_steps": 2000, "max_tokens": 10_000},
    "same, ends and arrivals": {**LOADED, "has_arrivals": True},
    "same, pages short": {**LOADED, "num_pages": 700, "has_arrivals": True},
    **{
        f"ends and arrivals, {label}": {**LOADED, "has_arrivals": True, **fields}
        for label, fields in {
            "fastgen": {"policy": "fastgen"},
            "layered": {"policy": "layered"},
            "operator": {"prefill": "operator"},
            "flowprefill": {"policy": "flowprefill"},
            "50:50": {"lanes": "50:50"},
            "50:50 operator": {"lanes": "50:50", "prefill": "operator"},
            "two-lanes": {"policy": "two-lanes"},
            "semi-pd": {"policy": "semi-pd"},
            "nexus": {"policy": "nexus"},
            "nano-batches": {"nano_batches": "2"},
            "nanoflow": {"policy": "nanoflow"},
            "arbitrate": {"policy": "arbitrate"},
        }.items()
    },
    "pages short, arbitrate": {**LOADED, "num_pages": 700, "has_arrivals": True, "policy": "arbitrate"},
    "pages short, flowprefill": {**LOADED, "num_pages": 700, "has_arrivals": True, "policy": "flowprefill"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="those whose names contain one of these (default: all)"
    )
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    namespace = parser.parse_args()
    wanted = [name for name in CASES if not namespace.cases or any(part in name for part in namespace.cases)]
    print(json.dumps([measure(name, **CASES[name], profile=namespace.profile) for name in wanted]))


if __name__ == "__main__":
    main()
