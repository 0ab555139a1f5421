"""One step of a whole model, node by node: what each kind of node takes, without scheduler or server.

    PYTHONPATH=python python bench/kernels/bench_step.py [--model smollm2] [--threads 2]

A line per step shape: median and best time of a step, tokens a second at the median, then the median microseconds of
each kind of node over all layers. Below it the same from the quickest run of each single node: what the step takes while
nobody else uses the machine, which a whole step on a shared host may never see. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict

from step_runner import StepRunner

from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model

# (requests, context, new tokens of each, repeats)
SHAPES = ((1, 16, 1, 60), (1, 2048, 1, 30), (8, 128, 1, 30), (32, 128, 1, 25), (1, 0, 512, 8), (1, 1536, 512, 6))


def run_shape(loaded, num_rows: int, context: int, num_tokens: int, repeats: int) -> dict:
    runner = StepRunner(loaded, num_rows, context + num_tokens)
    runner.fill(context)
    runner.set_tracing(True)
    step_us, node_us = [], defaultdict(list)
    quickest_us: dict[int, float] = {}
    for _ in range(repeats):
        done = runner.step(context, num_tokens)
        step_us.append((done["end_ns"] - done["start_ns"]) / 1e3)
        kinds: dict[str, float] = defaultdict(float)
        for node, start_ns, end_ns in done["spans"]:
            us = (end_ns - start_ns) / 1e3
            kinds[loaded.program.node_names[node].rpartition(".")[2]] += us
            quickest_us[node] = min(us, quickest_us.get(node, us))
        for kind, us in kinds.items():
            node_us[kind].append(us)
    quickest: dict[str, float] = defaultdict(float)
    for node, us in quickest_us.items():
        quickest[loaded.program.node_names[node].rpartition(".")[2]] += us
    return {
        "requests": num_rows, "context": context, "new_tokens": num_tokens,
        "median_us": statistics.median(step_us), "best_us": min(step_us),
        "nodes_us": {kind: statistics.median(us) for kind, us in node_us.items()},
        "quickest_nodes_us": dict(quickest),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    loaded = load_model(EngineArgs(model=arguments.model, threads=arguments.threads, max_model_len=4096).check())
    results = []
    for shape in SHAPES:
        result = run_shape(loaded, *shape)
        results.append(result)
        nodes = sorted(result["nodes_us"].items(), key=lambda item: -item[1])
        tokens_per_s = result["requests"] * result["new_tokens"] / result["median_us"] * 1e6
        print(
            f"x{result['requests']:<3} context {result['context']:5} new {result['new_tokens']:4}  "
            f"{result['median_us']:9.0f} us (best {result['best_us']:9.0f})  {tokens_per_s:6.0f} tok/s  "
            + ", ".join(f"{kind} {us:.0f}" for kind, us in nodes[:7])
        )
        quickest = sorted(result["quickest_nodes_us"].items(), key=lambda item: -item[1])
        print(
            f"{'':32}{sum(us for _, us in quickest):9.0f} us, the quickest run of each node: "
            + ", ".join(f"{kind} {us:.0f}" for kind, us in quickest[:7])
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
