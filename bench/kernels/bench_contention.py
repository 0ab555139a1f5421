"""Decode steps on one thread, on all, and on all with another process busy on one of their cores.

    PYTHONPATH=python python bench/kernels/bench_contention.py [--model smollm2] [--requests 1 8] [--json FILE]

Workers claim chunks, so one that loses its core for a while should cost the step what its share was, not stall it:
with a busy neighbour two workers on two cores have one and a half cores, so about 3/4 of their speed is what can be
asked. The three settings take turns. A line each: p50, p99 and longest step, tokens a second over all steps, and the
ratio to undisturbed threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from step_runner import StepRunner

from runtime import _native
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model

CONTEXT = 128
SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=_native.usable_cores())
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60, help="of each setting in a round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    loaded = load_model(EngineArgs(model=arguments.model, threads=arguments.threads).check())
    cores = _native.usable_core_ids()[: arguments.threads]
    busy = subprocess.Popen([sys.executable, "-c", SPIN, str(cores[-1])])
    results = []
    try:
        busy.send_signal(signal.SIGSTOP)
        for num_requests in arguments.requests:
            runners = {n: StepRunner(loaded, num_requests, CONTEXT + 1, cores[:n]) for n in {1, len(cores)}}
            for runner in runners.values():
                runner.fill(CONTEXT)
            settings = {
                "1 thread": (1, False),
                f"{len(cores)} threads": (len(cores), False),
                f"{len(cores)} threads, busy neighbour": (len(cores), True),
            }
            step_us: dict[str, list[float]] = {name: [] for name in settings}
            for _ in range(arguments.rounds):
                for name, (num_threads, is_disturbed) in settings.items():
                    busy.send_signal(signal.SIGCONT if is_disturbed else signal.SIGSTOP)
                    runners[num_threads].step_us(CONTEXT)
                    step_us[name] += [runners[num_threads].step_us(CONTEXT) for _ in range(arguments.steps)]
                busy.send_signal(signal.SIGSTOP)
            base = statistics.fmean(step_us[f"{len(cores)} threads"])
            for name, times in step_us.items():
                row = {
                    "requests": num_requests, "setting": name, "p50_us": percentile(times, 0.5),
                    "p99_us": percentile(times, 0.99), "max_us": max(times),
                    "tokens_per_s": num_requests / statistics.fmean(times) * 1e6,
                    "ratio": base / statistics.fmean(times),
                }  # fmt: skip
                results.append(row)
                print(
                    f"x{num_requests:<3} {name:<26} p50 {row['p50_us']:8.0f} us  p99 {row['p99_us']:8.0f}  "
                    f"max {row['max_us']:8.0f}  {row['tokens_per_s']:7.1f} tok/s  {row['ratio']:5.2f}x",
                    flush=True,
                )
    finally:
        os.kill(busy.pid, signal.SIGKILL)
        busy.wait()
    print(json.dumps(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
