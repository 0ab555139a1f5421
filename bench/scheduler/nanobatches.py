"""Nano-batches: what planning costs, what the cost model says of them, and what the CPU engine measures.

    python bench/scheduler/nanobatches.py planning          time per call of NanoPlanner.plan
    python bench/scheduler/nanobatches.py simulated         policy nanoflow on a machine file, nano-batches auto against off
    python bench/scheduler/nanobatches.py engine            SmolLM2 on this CPU: the trial's verdicts, tokens per second

`simulated` is a cost model's belief about a machine that was never measured. `engine` needs the model.
"""

from __future__ import annotations

import argparse
import random
import time

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.nanobatch_planner import NanoPlanner
from scheduler.simulator import ModelCosts, Simulation
from scheduler.simulator.setup import load_model, scheduler_config
from scheduler.simulator.traces import TraceRequest
from scheduler.step import ScheduledRequest


def planning() -> None:
    machine = Machine.load("h100-sxm")
    config = SchedulerConfig(
        num_pages=10_000, max_num_seqs=256, max_num_batched_tokens=1024, nano_batches="auto", max_model_len=16384
    )
    started = time.perf_counter()
    planner = NanoPlanner(config, CostModel(load_model("llama-3-8b", machine), machine))
    print(f"searches at start: {time.perf_counter() - started:.2f} s")
    rng, times = random.Random(0), []
    for _ in range(3000):
        num_decodes = rng.randrange(64, 257)
        requests = [ScheduledRequest(f"r{i}", i, rng.randrange(400, 4000), 1, ((),), True) for i in range(num_decodes)]
        left = 1024 - num_decodes
        while left:
            num = min(left, rng.randrange(100, 900))
            requests.append(ScheduledRequest(f"p{left}", 300, rng.choice((0, 512)), num, ((),), num != left))
            left -= num
        started = time.thread_time()  # of this thread, since the machine may be shared
        planner.plan(requests)
        times.append(time.thread_time() - started)
    times.sort()
    print("plan() of 64 to 256 decodes and a chunk or more, while kinds are being searched, microseconds of CPU time:")
    print(f"median {times[1500] * 1e6:.0f}, p99 {times[2970] * 1e6:.0f}, most {times[-1] * 1e6:.0f}")


def simulated(machine_name: str) -> None:
    machine = Machine.load(machine_name)
    spec = load_model("llama-3-8b", machine)
    model = CostModel(spec, machine)
    print(f"{machine.name}: {machine.source}")
    for num_input, num_output, budget in ((1800, 450, 1024), (1800, 450, 2048), (900, 300, 1024), (512, 512, 1024)):
        rng, tokens = random.Random(1), {}
        requests = [
            TraceRequest(0.0, 1 + int(rng.expovariate(1 / num_input)), 1 + int(rng.expovariate(1 / num_output)))
            for _ in range(600)
        ]
        for nano_batches in ("off", "auto"):
            limits = scheduler_config(
                spec,
                machine,
                longest=32768,
                max_num_batched_tokens=budget,
                policy="nanoflow",
                nano_batches=nano_batches,
            )
            cut = [0]

            def observe(step) -> None:
                cut[0] += step.plan.nano is not None  # noqa: B023

            simulation = Simulation(limits, ModelCosts(model), requests, cost_model=model, observe=observe)
            result = simulation.run()
            num_tokens = sum(record.num_prompt_tokens + record.num_tokens for record in result.records.values())
            tokens[nano_batches] = num_tokens / result.duration_s
        print(
            f"600 requests at once, {num_input} in, {num_output} out on average, steps of {budget}: "
            f"{tokens['off']:.0f} tokens/s whole, {tokens['auto']:.0f} with nano-batches "
            f"({tokens['auto'] / tokens['off'] - 1:+.1%}), {cut[0]} of {result.num_steps} steps cut"
        )


def engine() -> None:
    from runtime import engine_loader
    from runtime.describe_model import spec_of
    from tests.kit.engines import load, running_engine

    limits = {
        "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256, "device": "cpu", "policy": "nanoflow"
    }  # fmt: skip
    loaded, rng = load("smollm2", **limits), random.Random(3)
    machine = Machine.load("cpu-2-cores")
    engine_loader.calibrated_model = lambda loaded, args: CostModel(spec_of(loaded, args.kv_codecs), machine)
    prompts = [[rng.randrange(3, 40_000) for _ in range(rng.randrange(200, 700))] for _ in range(24)]
    num_tokens = sum(len(prompt) + 40 for prompt in prompts)
    for nano_batches in ("off", "auto", "2", "3", "4"):
        with running_engine("smollm2", loaded=loaded, nano_batches=nano_batches, **limits) as running:
            running.run([[3] * 64], max_tokens=4)
            started = time.perf_counter()
            running.run(prompts, max_tokens=40)
            seconds = time.perf_counter() - started
            lines = running.engine.describe_nano_batches()
        print(f"--nano-batches {nano_batches}: {num_tokens / seconds:.0f} tokens/s")
        for line in lines:
            if line.startswith("trial"):
                print(f"    {line}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planning", "simulated", "engine"))
    parser.add_argument("--machine", default="h100-sxm")
    arguments = parser.parse_args()
    {"planning": planning, "simulated": lambda: simulated(arguments.machine), "engine": engine}[arguments.what]()
