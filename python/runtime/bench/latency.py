"""``bench latency``: how long one batch takes from submission to its last token, engine only."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence

from runtime.bench.summary import mean, percentile, write_json
from runtime.engine_args import EngineArgs, parse_or_exit
from runtime.sampling_params import SamplingParams

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Seconds for one batch, from submission to its last token.")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--input-len", type=int, default=32, metavar="N", help="prompt tokens (default: 32)")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="generated tokens (default: 128)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    group.add_argument("-n", "--n", type=int, default=1, help="outputs per prompt (default: 1)")
    group.add_argument("--num-iters-warmup", type=int, default=3, metavar="N", help="(default: 3)")
    group.add_argument("--num-iters", type=int, default=10, metavar="N", help="(default: 10)")
    group.add_argument("--output-json", metavar="FILE", help="avg_latency, latencies, percentiles")
    EngineArgs.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.bench latency", load_engine=None) -> int:
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(namespace, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(namespace, name)}")

    from runtime.llm import LLM

    try:
        sampling = SamplingParams(n=namespace.n, temperature=1.0, ignore_eos=True, max_tokens=namespace.output_len)
        with LLM.from_engine_args(args, load_engine) as llm:
            generator = random.Random(args.seed)
            ordinary = llm.ordinary_token_ids()

            def run() -> float:
                # New tokens each time: a prefix found in the cache would shorten the prompt that is measured.
                prompts = [generator.choices(ordinary, k=namespace.input_len) for _ in range(namespace.batch_size)]
                started_s = time.perf_counter()
                llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
                return time.perf_counter() - started_s

            for _ in range(namespace.num_iters_warmup):
                run()
            latencies = [run() for _ in range(namespace.num_iters)]
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {
        "avg_latency": mean(latencies),
        "latencies": latencies,
        "percentiles": {str(percent): percentile(latencies, percent) for percent in PERCENTAGES},
    }
    print(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for percent in PERCENTAGES:
        print(f"{percent}% percentile latency: {result['percentiles'][str(percent)]:.4f} seconds")
    if namespace.output_json:
        write_json(namespace.output_json, result)
    return 0
