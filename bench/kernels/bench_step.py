"""One step of a whole model, node by node: what each kind of node takes, without scheduler or server.

    PYTHONPATH=python python bench/kernels/bench_step.py [--model smollm2] [--threads 2]

A line per step shape: median and best time of a step, tokens a second at the median, then the median microseconds of
each kind of node over all layers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from array import array
from collections import defaultdict

import numpy as np

from runtime import _native
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model

# (requests, context, new tokens of each, repeats)
SHAPES = ((1, 16, 1, 60), (1, 2048, 1, 30), (8, 128, 1, 30), (32, 128, 1, 20), (1, 0, 512, 6), (1, 1536, 512, 5))
CHUNK_TOKENS = 512


def run_shape(loaded, num_rows: int, context: int, num_tokens: int, repeats: int) -> dict:
    plan = loaded.kv_plan
    pages = plan.max_model_len // plan.page_size
    arena = _native.KvArena(list(plan.groups), num_rows * pages * plan.num_groups)
    rows = _native.RowStore(num_rows, plan.max_model_len, plan.num_groups, plan.page_size, loaded.config.vocab_size)
    completions = _native.CompletionQueue()
    lane = _native.Lane(0, [], loaded.threads, completions)
    frame = _native.Frame(loaded.program, arena, rows, max(CHUNK_TOKENS, num_rows), num_rows)
    greedy = _native.SamplingParams()
    greedy.temperature = 0.0
    rng = np.random.default_rng(0)

    def run(quadruples: array) -> dict:
        frame.prepare(quadruples)
        lane.submit(frame, 0, loaded.program.num_nodes)
        while not (done := completions.wait_any(-1.0)):
            pass
        if done[0]["error"]:
            raise RuntimeError(done[0]["error"])
        return done[0]

    for row in range(num_rows):
        tokens = rng.integers(0, loaded.config.vocab_size, context + num_tokens).tolist()
        rows.admit(row, array("i", tokens), len(tokens), greedy)
        for group in range(plan.num_groups):
            first = (row * plan.num_groups + group) * pages
            rows.set_pages(row, group, 0, list(range(first, first + pages)), arena.num_pages)
        for start in range(0, context, CHUNK_TOKENS):
            run(array("i", (row, start, min(CHUNK_TOKENS, context - start), 0)))
    lane.set_tracing(True)
    step_us, node_us = [], defaultdict(list)
    for _ in range(repeats):
        done = run(array("i", [value for row in range(num_rows) for value in (row, context, num_tokens, 1)]))
        step_us.append((done["end_ns"] - done["start_ns"]) / 1e3)
        kinds: dict[str, float] = defaultdict(float)
        for node, start_ns, end_ns in done["spans"]:
            kinds[loaded.program.node_names[node].rpartition(".")[2]] += (end_ns - start_ns) / 1e3
        for kind, us in kinds.items():
            node_us[kind].append(us)
    return {
        "requests": num_rows, "context": context, "new_tokens": num_tokens,
        "median_us": statistics.median(step_us), "best_us": min(step_us),
        "nodes_us": {kind: statistics.median(us) for kind, us in node_us.items()},
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
    print(json.dumps(results))


if __name__ == "__main__":
    main()
