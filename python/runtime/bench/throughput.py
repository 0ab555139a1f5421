"""``bench throughput``: many prompts at once, engine only."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from runtime.bench.datasets import add_dataset_arguments, check_dataset_arguments, make_prompts
from runtime.bench.summary import write_json
from runtime.engine_args import EngineArgs, parse_or_exit
from runtime.sampling_params import SamplingParams


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Requests and tokens per second, all prompts submitted at once."
    )
    add_dataset_arguments(parser, num_prompts=100, input_len=128, output_len=128)
    group = parser.add_argument_group("benchmark")
    group.add_argument("-n", "--n", type=int, default=1, help="outputs per prompt (default: 1)")
    group.add_argument(
        "--output-json", metavar="FILE", help="elapsed_time, num_requests, total_num_tokens, requests_per_second, ..."
    )
    EngineArgs.add_arguments(parser)
    return parser


def main(
    argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.bench throughput", load_engine=None
) -> int:
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    try:
        check_dataset_arguments(namespace)
    except ValueError as error:
        parser.error(str(error))

    from runtime.llm import LLM

    try:
        with LLM.from_engine_args(args, load_engine) as llm:
            prompts = make_prompts(namespace, llm.ordinary_token_ids, args.seed)
            sampling = [
                SamplingParams(n=namespace.n, temperature=1.0, ignore_eos=True, max_tokens=prompt.num_output_tokens)
                for prompt in prompts
            ]
            started_s = time.perf_counter()
            requests = llm.generate([prompt.prompt for prompt in prompts], sampling, use_tqdm=True)
            elapsed_s = time.perf_counter() - started_s
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum(len(output.token_ids) for request in requests for output in request.outputs)
    result = {
        "elapsed_time": elapsed_s,
        "num_requests": len(requests),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(requests) / elapsed_s,
        "tokens_per_second": (num_prompt + num_output) / elapsed_s,
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "output_tokens_per_second": num_output / elapsed_s,
    }
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_prompt}")
    print(f"Total num output tokens:  {num_output}")
    if namespace.output_json:
        write_json(namespace.output_json, result)
    return 0
