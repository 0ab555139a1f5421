"""A trace slice on the real CPU engine and in the simulator: how far apart are their latencies?

    partita calibrate --model smollm2 --output machine.json
    PYTHONPATH=python python bench/scheduler/simulation_against_real.py TRACE --machine machine.json [--duration 300]

The slice is stretched to --load (0.7) of the rate that the simulator sustains on it, so that both see the same requests at
the same times. Prompts are random tokens of the trace's lengths, cut to what --max-model-len leaves; answers have its
lengths. One line per number, then JSON. Run it on a machine that does nothing else. Node spans are off: with them the
engine's thread takes 0.6 ms of a core in each step and not 0.2.

A machine that others share is not as fast as when it was calibrated. The last column is a second simulation in which every
step takes longer by the one factor that the whole real run shows (its measured over its predicted time): what is left there
is the simulation's own error, of queues and not of speed.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from runtime.calibrate import machine_file
from runtime.describe_model import spec_of
from runtime.engine_args import EngineArgs
from runtime.engine_loader import layer_starts, load_model, start_engine
from runtime.measured_engine import StepTimes
from runtime.messages import Submit
from runtime.sampling_params import SamplingParams
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator import ModelCosts, Report, Simulation, read_trace
from scheduler.simulator.costs import ScaledCost
from scheduler.simulator.report import percentile
from scheduler.simulator.traces import TraceRequest, at_rate, cut
from scheduler.step_shape import shape_of


class RealRun:
    """Submits on time, notes when tokens come."""

    def __init__(self, loaded, args, requests: list[TraceRequest]) -> None:
        self.requests = requests
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self.e2e_s: list[float] = []
        self._first: dict[str, float] = {}
        self._num_tokens: dict[str, int] = {}
        self._arrived: dict[str, float] = {}
        self._num_left = len(requests)
        self._done = threading.Event()
        self._vocab_size = loaded.config.vocab_size
        self.times = StepTimes()
        self.engine = start_engine(loaded, args, self._on_deltas, self.times)

    def _on_deltas(self, deltas) -> None:
        now = time.monotonic()
        for delta in deltas:
            if delta.request_id not in self._arrived:
                continue
            if delta.token_ids:
                self._first.setdefault(delta.request_id, now)
                self._num_tokens[delta.request_id] = self._num_tokens.get(delta.request_id, 0) + len(delta.token_ids)
            if delta.finish_reason is not None:
                arrived_s, first_s = self._arrived[delta.request_id], self._first.get(delta.request_id, now)
                num_tokens = self._num_tokens.get(delta.request_id, 0)
                self.ttft_s.append(first_s - arrived_s)
                self.e2e_s.append(now - arrived_s)
                if num_tokens > 1:
                    self.tpot_s.append((now - first_s) / (num_tokens - 1))
                self._num_left -= 1
                if not self._num_left:
                    self._done.set()

    def _submit(self, name: str, request: TraceRequest, rng: random.Random) -> None:
        prompt = tuple(rng.randrange(3, self._vocab_size) for _ in range(request.num_prompt_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True)
        arrived_s = time.monotonic()
        if name != "warm-up":
            self._arrived[name] = arrived_s
        self.engine.submit(Submit(name, prompt, sampling, arrival_s=arrived_s))

    def run(self) -> float:
        """Seconds from the first arrival to the last answer."""
        rng = random.Random(0)
        self._submit("warm-up", TraceRequest(0.0, 600, 8), rng)
        self.engine.wait_idle(120)
        started_s = time.monotonic()
        for index, request in enumerate(self.requests):
            time.sleep(max(0.0, started_s + request.arrival_s - time.monotonic()))
            self._submit(f"r{index}", request, rng)
        self._done.wait(20 * self.requests[-1].arrival_s + 600)
        duration_s = time.monotonic() - started_s
        self.engine.shutdown()
        return duration_s


def predicted_and_measured(times: StepTimes, model: CostModel) -> list[tuple[float, float]]:
    """Seconds of every whole step that ran."""
    return [
        (model.within_step_s(shape_of(plan.requests, model.window), plan.share), (end_ns - start_ns) / 1e9)
        for plan, start_ns, end_ns, _ in times.steps
        if plan.node_range is None
    ]


def idle_share(times: StepTimes) -> float:
    """Of the time from the first step to the last, what lies between a step and the next one that was planned ahead."""
    gaps_ns = sum(
        after[1] - before[2]
        for before, after in pairwise(times.steps)
        if after[0].plan_id == before[0].plan_id + 1 and after[1] - before[2] < 2_000_000
    )
    return gaps_ns / (times.steps[-1][2] - times.steps[0][1])


class CostsAtSpeed(ModelCosts):
    """The model's durations, all `factor` times as long."""

    def __init__(self, model: CostModel, factor: float) -> None:
        super().__init__(model)
        self._factor = factor

    def step_cost(self, plan):
        return ScaledCost(super().step_cost(plan), self._factor)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--machine", help="default: the file that partita calibrate left for this machine")
    parser.add_argument("--duration", type=float, default=300.0, help="seconds of the run (default: 300)")
    parser.add_argument("--start", type=float, default=600.0, help="of the slice in the trace, s (default: 600)")
    parser.add_argument("--load", type=float, default=0.7, help="of capacity (default: 0.7)")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--policy", default="default")
    parser.add_argument("--lanes", default="", help="auto, off or P:D (default: as the policy has it)")
    parser.add_argument("--prefill", default="", help="token, layer or operator (default: as the policy has it)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    namespace = parser.parse_args()

    args = EngineArgs(
        model=namespace.model, kv_memory=namespace.kv_memory, max_model_len=namespace.max_model_len,
        enable_prefix_caching=False, policy=namespace.policy, lanes=namespace.lanes, prefill=namespace.prefill,
        max_num_batched_tokens=namespace.max_num_batched_tokens,
    ).check()  # fmt: skip
    loaded = load_model(args)
    plan = loaded.kv_plan
    path = namespace.machine or machine_file(loaded, args.kv_dtype)
    model = CostModel(spec_of(loaded, args.kv_codecs), Machine.load(path))
    config = SchedulerConfig(
        num_pages=plan.num_pages, page_size=plan.page_size, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens, max_model_len=plan.max_model_len,
        enable_prefix_caching=False, policy=args.policy, lanes=args.lanes, prefill=args.prefill,
        rungs=tuple(rung for rung in model.machine.rungs if rung < 1.0), num_nodes=loaded.program.num_nodes,
        layer_starts=layer_starts(loaded.program), max_resting_runs=args.max_resting_runs,
        kv_group_windows=tuple(group.window for group in plan.groups),
    )  # fmt: skip

    longest = namespace.max_model_len
    trace = [
        replace(r, num_prompt_tokens=min(r.num_prompt_tokens, longest - 1 - min(r.num_output_tokens, longest // 4)),
                num_output_tokens=min(r.num_output_tokens, longest // 4))
        for r in cut(read_trace(namespace.trace), start_s=namespace.start)
    ]  # fmt: skip

    def simulate(requests, factor: float = 1.0):
        costs = CostsAtSpeed(model, factor)
        return Report(Simulation(config, costs, requests, cost_model=model).run(), model.machine)

    capacity = simulate([replace(r, arrival_s=0.0) for r in trace[:200]]).to_json()["request_throughput"]
    rate = namespace.load * capacity
    requests = at_rate(trace[: max(8, int(rate * namespace.duration))], rate)
    simulated = simulate(requests).to_json()
    print(
        f"{len(requests)} requests at {rate:.3f}/s, {namespace.load:.0%} of the simulated capacity of {capacity:.3f}/s"
    )

    real_run = RealRun(loaded, args, requests)
    duration_s = real_run.run()
    steps = predicted_and_measured(real_run.times, model)
    ratios = sorted(predicted_s / measured_s for predicted_s, measured_s in steps)
    errors = sorted(abs(ratio - 1) for ratio in ratios)
    factor = sum(measured_s for _, measured_s in steps) / sum(predicted_s for predicted_s, _ in steps)
    print(
        f"{len(ratios)} real steps: model / measured median {percentile(ratios, 50):.3f}, median error "
        f"{percentile(errors, 50):.1%}, p95 {percentile(errors, 95):.1%}; {idle_share(real_run.times):.1%} of the time "
        f"between steps; together {factor:.3f} times as long as predicted"
    )
    at_speed = simulate(requests, factor).to_json()
    lines = {"requests": len(requests), "rate": rate, "real_duration_s": duration_s, "machine": str(path)}
    lines |= {"step_ratio_p50": percentile(ratios, 50), "step_error_p50": percentile(errors, 50), "factor": factor}
    for name in ("ttft", "tpot", "e2e"):
        measured = sorted(getattr(real_run, f"{name}_s"))
        for percent in (50, 90, 99):
            key = f"{name}_s_p{percent}"
            real_ms, ours_ms, adjusted_ms = (
                1e3 * seconds for seconds in (percentile(measured, percent), simulated[key], at_speed[key])
            )
            lines[f"{name}_p{percent}"] = {
                "real_ms": real_ms, "simulated_ms": ours_ms, "simulated_at_speed_ms": adjusted_ms,
            }  # fmt: skip
            apart, apart_at_speed = ours_ms / real_ms - 1, adjusted_ms / real_ms - 1
            print(
                f"{name} p{percent:<3} real {real_ms:10.1f} ms   simulated {ours_ms:10.1f} ms   {apart:+7.1%}   at the "
                f"run's speed {apart_at_speed:+7.1%}"
            )
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
