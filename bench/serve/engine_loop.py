"""The closed loop of bench/serve/closed_loop.py inside the engine's own process: what HTTP and text cost is the rest.

    python -m bench.serve.engine_loop [--model smollm2] [--clients 1 8 32] [--repeats 3]

Each client submits token ids and submits anew from the delivery that ends its answer. A line per number of clients with
output tokens a second, beside it what the engine's steps spent their time on: steps that only decode, and steps with
prompt tokens in them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import random
import statistics
import time
from pathlib import Path

from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_engine
from runtime.messages import Delta, Submit
from runtime.sampling_params import SamplingParams

FIRST_TOKEN_ID = 256  # below are control tokens in most vocabularies


class StepSums:
    """Stands where the engine's trace stands: seconds and tokens of steps with and without prompt tokens."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.seconds = {"decode": 0.0, "mixed": 0.0}
        self.tokens = {"decode": 0, "mixed": 0}

    def add(self, completion: dict, plan) -> None:
        kind = "decode" if all(scheduled.num_tokens == 1 for scheduled in plan.requests) else "mixed"
        self.seconds[kind] += (completion["end_ns"] - completion["start_ns"]) / 1e9
        self.tokens[kind] += plan.num_tokens

    def close(self) -> None: ...


class ClosedLoop:
    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        args = EngineArgs(model=arguments.model, threads=arguments.threads).check()
        self._engine, *_ = load_engine(args, self._receive)
        self._engine._trace = self.steps = StepSums()  # the engine's own hook, without its node-by-node timing
        self._ids = itertools.count()
        self._sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arguments.output_len)

    def _receive(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                self._ended.put(delta)

    def run(self, num_clients: int, seed: int) -> float:
        """Output tokens a second."""
        draw = random.Random(seed)
        vocab_size, input_len = self._engine.config.vocab_size, self._arguments.input_len
        num_requests = num_clients * self._arguments.rounds
        prompts = [
            tuple(draw.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(input_len)) for _ in range(num_requests)
        ]
        self.steps.clear()
        begin = time.perf_counter()
        for prompt in prompts[:num_clients]:
            self._submit(prompt)
        for number in range(num_requests):
            if error := self._ended.get(timeout=300).error:
                raise RuntimeError(error)
            if number + num_clients < num_requests:
                self._submit(prompts[number + num_clients])
        return num_requests * self._arguments.output_len / (time.perf_counter() - begin)

    def _submit(self, prompt: tuple[int, ...]) -> None:
        self._engine.submit(Submit(f"loop-{next(self._ids)}", prompt, self._sampling))

    def close(self) -> None:
        self._engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client in a run")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="runs per number of clients; the median is printed")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    loop = ClosedLoop(arguments)
    rows = []
    try:
        for num_clients in arguments.clients:
            tokens_per_s = statistics.median(loop.run(num_clients, seed) for seed in range(arguments.repeats))
            seconds, tokens = loop.steps.seconds, loop.steps.tokens
            rows.append({"clients": num_clients, "output_throughput": tokens_per_s, "last_run_step_s": seconds})
            print(
                f"{num_clients:4d} clients {tokens_per_s:8.1f} tok/s; of the last run "
                + ", ".join(f"{kind} steps {seconds[kind]:.2f} s for {tokens[kind]} tokens" for kind in seconds),
                flush=True,
            )
    finally:
        loop.close()
    print(json.dumps(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
