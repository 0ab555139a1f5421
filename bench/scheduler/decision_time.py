"""What a scheduling decision costs: one on_event, the result of a plan in and the next plan out.

    PYTHONPATH=python python bench/scheduler/decision_time.py

Cases: 32 decoding requests; 256 running and 2,000 queued: as they are, with arrivals and ends between the steps, with
pages so short that requests are preempted, and with FastGen's predicted budget. CPU time of the thread, since the machine
may be shared. One aligned line per case, microseconds; the last line is JSON.
"""

from __future__ import annotations

import gc
import json
import random
import time

from scheduler import Arrival, LaneFinished, LanePlan, LaneResult, Request, Scheduler, SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator.setup import load_model


def result_of(plan: LanePlan) -> LaneResult:
    sampled = tuple((scheduled.request_id, 1) for scheduled in plan.requests if scheduled.samples)
    return LaneResult(plan.plan_id, plan.lane, sampled)


def measure(
    name: str, num_running: int, num_queued: int, num_pages: int, num_steps: int, max_tokens: int, num_arrivals: int = 0,
    policy: str = "default",
) -> dict:  # fmt: skip
    """Times num_steps events of a steady state. num_arrivals: new requests between two steps (not timed). A policy that
    predicts does so for Llama 3 8B on the h100-sxm file, under a target of 30 ms a token."""
    rng = random.Random(0)
    config = SchedulerConfig(
        num_pages=num_pages, max_num_seqs=num_running, max_num_batched_tokens=2048, max_model_len=1 << 20,
        policy=policy,
    )  # fmt: skip
    scheduler = Scheduler(config, CostModel(load_model("llama-3-8b"), Machine.load("h100-sxm")))
    plans: list[LanePlan] = []
    num_requests = 0

    def arrive() -> None:
        nonlocal num_requests
        prompt = tuple(rng.randrange(50_000) for _ in range(rng.randint(16, 400)))
        tokens = max_tokens if max_tokens > 1000 else rng.randint(1, 2 * max_tokens)
        request = Request(
            f"request-{num_requests}", prompt, tokens, frozenset([0]), arrival_s=float(num_requests), tpot_s=0.03
        )
        num_requests += 1
        plans.extend(scheduler.on_event(Arrival(request), 0.0))

    for _ in range(num_running + num_queued):
        arrive()
    for _ in range(max(40, 2 * num_running * 400 // 2048)):  # past the first prefills
        plans.extend(scheduler.on_event(LaneFinished(result_of(plans.pop(0))), 0.0))
        scheduler.take_outputs()

    gc.collect()
    gc.freeze()
    times_us: list[float] = []
    for _ in range(num_steps):
        for _ in range(num_arrivals):
            arrive()
        event = LaneFinished(result_of(plans.pop(0)))
        begin = time.thread_time()
        plans.extend(scheduler.on_event(event, 0.0))
        scheduler.take_outputs()
        times_us.append((time.thread_time() - begin) * 1e6)
    times_us.sort()
    stats = scheduler.stats()
    line = {
        "case": name,
        "median_us": round(times_us[len(times_us) // 2], 1),
        "p99_us": round(times_us[int(len(times_us) * 0.99)], 1),
        "max_us": round(times_us[-1], 1),
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "preemptions": stats.num_preemptions,
    }
    print("  ".join(f"{key} {value!s:>9}" if key != "case" else f"{value:<28}" for key, value in line.items()))
    return line


def main() -> None:
    lines = [
        measure("decode 32", 32, 0, 8192, 2000, 10_000),
        measure("run 256, queue 2000", 256, 2000, 1 << 20, 2000, 10_000),
        measure("same, ends and arrivals", 256, 2000, 1 << 14, 3000, 200, num_arrivals=1),
        measure("same, pages short", 256, 2000, 700, 3000, 200, num_arrivals=1),
        measure("ends and arrivals, fastgen", 256, 2000, 1 << 14, 3000, 200, num_arrivals=1, policy="fastgen"),
    ]
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
