"""Times the sampling of one row of logits, one thread, beside NumPy's argmax, its floor.

    PYTHONPATH=python python bench/kernels/bench_sampling.py [--rounds 300] [--json out.json]

Each line: vocabulary, logits, parameters, microseconds (median of the rounds; best in brackets), GB/s of logits read
once, and the ratio to np.argmax of the same row. The call from Python is counted: some 2 us. "peaked" logits are a
model's when it is sure (a normal tail of deviation 2, twenty tokens 14 above it); "flat" ones a normal of deviation 1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runtime import _native
from runtime.ops.sampling import SamplingParams, sample_token

CASES = [
    ("peaked", {"temperature": 0.0}),
    ("peaked", {"temperature": 0.0, "repetition_penalty": 1.1}),
    ("peaked", {"temperature": 0.0, "num_logprobs": 5}),
    ("peaked", {}),
    ("peaked", {"top_k": 50}),
    ("peaked", {"top_p": 0.95}),
    ("flat", {"top_p": 0.95}),
    ("peaked", {"min_p": 0.05}),
    ("peaked", {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01}),
]
PARAMS_TEXT_WIDTH = 62


def median_and_best_us(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return float(np.median(times)), min(times)


def make_logits(kind: str, vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(vocab_size) * (2 if kind == "peaked" else 1)
    if kind == "peaked":
        logits[rng.integers(0, vocab_size, 20)] += 14
    return logits.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    history = np.random.default_rng(2).integers(0, 49152, 2000).astype(np.int32)
    print(f"instruction set: {_native.active_cpu_isa()}")
    for vocab_size in (49152, 262144):
        for kind, fields in CASES:
            logits = make_logits(kind, vocab_size)
            params = SamplingParams()
            for name, value in fields.items():
                setattr(params, name, value)
            argmax_us, _ = median_and_best_us(logits.argmax, options.rounds)
            us, best_us = median_and_best_us(
                lambda logits=logits, params=params: sample_token(logits, params, history, 1000), options.rounds
            )
            text = " ".join(f"{name}={value}" for name, value in fields.items()) or "temperature=1.0"
            print(
                f"V={vocab_size:<7} {kind:<7} {text:<{PARAMS_TEXT_WIDTH}} {us:8.1f} us ({best_us:7.1f})"
                f" {logits.nbytes / us / 1e3:6.1f} GB/s {us / argmax_us:6.2f} x argmax"
            )
            results.append({"vocab_size": vocab_size, "logits": kind, **fields, "us": us, "best_us": best_us})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
