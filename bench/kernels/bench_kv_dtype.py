"""One request's decode step at long contexts, KV in each codec: fewer bytes must mean less time.

    PYTHONPATH=python python bench/kernels/bench_kv_dtype.py [--model smollm2] [--contexts 4096 8192] [--json FILE]

The codecs take turns, step by step, so that the machine's moods fall on all of them alike. A line per context and codec:
median and best microseconds of a step, tokens a second, the ratio to bf16 at the median, bytes of KV a step reads, and
the floor: KV and weights at the read bandwidth measured here. The last line is JSON; the exit status is 1 when int8 or
int4 is not faster than bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from step_runner import StepRunner

from runtime import _native
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8191])
    parser.add_argument("--kv-dtype", nargs="+", default=["bf16", "int8", "int4"], help="the first is the base")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=40, help="timed of each codec at each context")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    runners = {}
    for kv_dtype in arguments.kv_dtype:
        args = EngineArgs(model=arguments.model, threads=arguments.threads, kv_dtype=kv_dtype)
        runners[kv_dtype] = runner = StepRunner(load_model(args.check()), 1, max(arguments.contexts) + 1)
        runner.fill(max(arguments.contexts))
    loaded = runner.loaded
    bandwidth = _native.machine_peaks(loaded.device.threads, 1.0)["read_gb_per_second"]
    print(f"{_native.active_cpu_isa()}, {loaded.device.threads} threads, read {bandwidth:.1f} GB/s")
    results, are_faster = [], True
    for context in arguments.contexts:
        step_us: dict[str, list[float]] = {kv_dtype: [] for kv_dtype in runners}
        for _ in range(arguments.steps):
            for kv_dtype, runner in runners.items():
                step_us[kv_dtype].append(runner.step_us(context))
        base = statistics.median(step_us[arguments.kv_dtype[0]])
        for kv_dtype, times in step_us.items():
            plan = runners[kv_dtype].loaded.kv_plan
            kv_bytes = context / plan.page_size * sum(group.page_bytes() for group in plan.groups)
            floor_us = (kv_bytes + loaded.packed.packed_bytes) / bandwidth / 1e3
            median = statistics.median(times)
            print(
                f"context {context:5}  {kv_dtype:10} {median:9.0f} us (best {min(times):9.0f}) {1e6 / median:7.1f} tok/s  "
                f"{base / median:5.2f}x  KV {kv_bytes / 1e6:6.1f} MB  {floor_us / median:4.0%} of the floor",
                flush=True,
            )
            is_base = kv_dtype == arguments.kv_dtype[0]
            are_faster &= is_base or median < base
            results.append(
                {
                    "context": context, "kv_dtype": kv_dtype, "median_us": median, "best_us": min(times),
                    "ratio": base / median, "kv_bytes": kv_bytes, "floor_us": floor_us,
                }
            )  # fmt: skip
    print(json.dumps(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if are_faster else 1


if __name__ == "__main__":
    sys.exit(main())
