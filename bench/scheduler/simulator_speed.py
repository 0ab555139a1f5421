"""How fast the simulator goes through the Azure conversation trace, on one core.

    PYTHONPATH=python python bench/scheduler/simulator_speed.py TRACE [--num-requests 10000] [--profile]

TRACE: azure_llm_2023_conv.csv.gz. Llama 3 8B on the h100-sxm machine file at the trace's own rate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

from scheduler.simulator import setup
from scheduler.simulator.command import CommandRun, build_parser


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    namespace = parser.parse_args()
    arguments = [
        "--trace",
        namespace.trace,
        "--num-requests",
        str(namespace.num_requests),
        "--slo",
        "ttft=1s,tpot=50ms",
    ]
    run = CommandRun(build_parser("simulate").parse_args(arguments))
    if namespace.profile:
        import cProfile
        import pstats

        profile = cProfile.Profile()
        profile.runcall(run.run, "default", run.requests)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        return
    report = run.run("default", run.requests)
    print(report.table())
    numbers = report.to_json()
    line = {"requests": namespace.num_requests, "longest": setup.longest_request(run.requests)}
    line |= {name: round(numbers[name], 3) for name in ("wall_s", "requests_per_wall_s", "duration_s")}
    line["requests_per_minute"] = round(60 * numbers["requests_per_wall_s"])
    line["us_per_step"] = round(1e6 * numbers["wall_s"] / numbers["num_steps"], 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
