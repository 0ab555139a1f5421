"""Times sampling on a GPU beside its floor (the logits read once from memory) and torch's own steps where torch is.

    PYTHONPATH=python python bench/kernels/bench_gpu_sampling.py [--rows 1,64] [--vocab-size 128256] [--json out.json]

Device time of one call: a replayed graph of several, each on logits of its own, together more than twice the L2, so
that every call reads its logits from memory as if the last linear had long left. Each line: rows, logits, parameters,
microseconds (median; best in brackets), GB/s of logits read once, the floor, and torch's time for the same step
(argmax; softmax and multinomial; top-k, or sort for top_p, before these). "peaked" logits are a model's when it is sure
(a normal of deviation 2, twenty tokens 14 above it); "flat" ones a normal of deviation 1: top_p must then look at most
of the vocabulary. --world simt runs the same on the host, to see that the script works; it has no clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from runtime import _native
from runtime.ops.sampling import GpuSampler, SamplingParams

CASES = [
    ("peaked", {"temperature": 0.0}),
    ("peaked", {}),
    ("peaked", {"top_k": 50}),
    ("peaked", {"top_p": 0.9}),
    ("flat", {"top_p": 0.9}),
    ("peaked", {"min_p": 0.05}),
    ("peaked", {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}),
    ("flat", {"top_k": 5000}),
    ("peaked", {"temperature": 0.0, "num_logprobs": 5}),
    ("peaked", {"temperature": 0.0, "repetition_penalty": 1.1}),
]
NUM_HISTORY_TOKENS = 2000


def make_logits(kind: str, num_rows: int, vocab_size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_rows, vocab_size), dtype=np.float32) * (2 if kind == "peaked" else 1)
    if kind == "peaked":
        for row in logits:
            row[rng.integers(0, vocab_size, 20)] += 14
    return logits


def on_gpu(gpu, host: np.ndarray):
    array = _native.GpuArray(gpu, list(host.shape), host.dtype.name)
    array.upload(host)
    return array


def make_sampling_params(fields: dict, seed: int) -> SamplingParams:
    params = SamplingParams()
    params.seed = seed
    for name, value in fields.items():
        setattr(params, name, value)
    return params


class Case:
    """One set of parameters over `num_buffers` batches of logits."""

    def __init__(self, gpu, buffers, fields: dict):
        num_rows, vocab_size = buffers[0].shape
        self.fields, self.buffers = fields, buffers
        self.sampler = GpuSampler(gpu, num_rows, vocab_size, num_rows, NUM_HISTORY_TOKENS + 8)
        for row in range(num_rows):
            self.sampler.set_row(row, make_sampling_params(fields, row), NUM_HISTORY_TOKENS // 2)
        gpu.synchronize()
        history = np.random.default_rng(2).integers(0, vocab_size, (num_rows, NUM_HISTORY_TOKENS + 8))
        self.tokens = on_gpu(gpu, history.astype(np.int32))
        self.rows = on_gpu(gpu, np.arange(num_rows, dtype=np.int32))
        self.num_tokens = on_gpu(gpu, np.full(num_rows, NUM_HISTORY_TOKENS, np.int32))
        self.sampled = on_gpu(gpu, np.zeros(num_rows, np.int32))
        self.outputs = {}
        if "num_logprobs" in fields:
            top = [num_rows, _native.max_top_logprobs]
            self.outputs = {
                "logprobs": on_gpu(gpu, np.zeros(num_rows, np.float32)),
                "ranks": on_gpu(gpu, np.zeros(num_rows, np.int32)),
                "top_ids": on_gpu(gpu, np.zeros(top, np.int32)),
                "top_logprobs": on_gpu(gpu, np.zeros(top, np.float32)),
            }

    def launches(self) -> list:
        def on(logits):
            return lambda stream: self.sampler.sample(
                logits,
                self.rows,
                self.num_tokens,
                self.tokens,
                self.sampled,
                **self.outputs,
                adjusts="repetition_penalty" in self.fields,
                draws=self.fields.get("temperature", 1.0) > 0,
                stream=stream,
            )

        return [on(logits) for logits in self.buffers]


def torch_microseconds(kind: str, num_rows: int, vocab_size: int, num_buffers: int, fields: dict, rounds: int):
    """The same step as torch has it, or None: no torch, no such step."""
    if set(fields) & {"num_logprobs", "repetition_penalty"} or len(fields) > 1:
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    buffers = [torch.from_numpy(make_logits(kind, num_rows, vocab_size, seed)).cuda() for seed in range(num_buffers)]

    def step(logits):
        if fields.get("temperature") == 0.0:
            return logits.argmax(-1)
        if "top_k" in fields:
            values, ids = logits.topk(fields["top_k"])
            return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))
        if "top_p" in fields:
            values, ids = logits.sort(descending=True)
            probabilities = values.softmax(-1)
            probabilities[probabilities.cumsum(-1) - probabilities >= fields["top_p"]] = 0
            return ids.gather(-1, torch.multinomial(probabilities, 1))
        probabilities = logits.softmax(-1)
        if "min_p" in fields:
            probabilities = probabilities * (probabilities >= fields["min_p"] * probabilities.amax(-1, keepdim=True))
        return torch.multinomial(probabilities, 1)

    for logits in buffers:
        step(logits)
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for logits in buffers:
            step(logits)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / num_buffers)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("cuda", "simt"), default="cuda")
    parser.add_argument("--rows", default="1,64", help="logit rows of a call, comma-separated")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        gpu = _native.open_gpu(options.world)
    except RuntimeError as error:
        print(f"bench_gpu_sampling: {error}", file=sys.stderr)
        return 1
    print(f"{gpu.name}: {gpu.num_sms} SMs, {gpu.memory_gb_per_second:.0f} GB/s, L2 {gpu.l2_bytes >> 20} MiB")
    results = []
    for num_rows in map(int, options.rows.split(",")):
        row_bytes = 4 * options.vocab_size
        num_buffers = 1 if options.world == "simt" else min(256, 1 + 2 * gpu.l2_bytes // (num_rows * row_bytes))
        batches = {
            kind: [on_gpu(gpu, make_logits(kind, num_rows, options.vocab_size, seed)) for seed in range(num_buffers)]
            for kind in ("peaked", "flat")
        }
        floor_us = num_rows * row_bytes / gpu.memory_gb_per_second * 1e-3 if gpu.memory_gb_per_second else 0.0
        for kind, fields in CASES:
            case = Case(gpu, batches[kind], fields)
            times = [ms * 1e3 for ms in _native.time_gpu_launches(gpu, case.launches(), options.rounds)]
            us, best_us = statistics.median(times), min(times)
            torch_us = None
            if options.world == "cuda":
                torch_us = torch_microseconds(
                    kind, num_rows, options.vocab_size, num_buffers, fields, min(options.rounds, 10)
                )
            text = " ".join(f"{name}={value}" for name, value in fields.items()) or "temperature=1.0"
            print(
                f"S={num_rows:<4} V={options.vocab_size} {kind:<6} {text:<48} {us:8.1f} us ({best_us:7.1f})"
                f" {num_rows * row_bytes / us * 1e-3 if us else 0:7.1f} GB/s  floor {floor_us:6.1f} us"
                + (f"  torch {torch_us:8.1f} us, {torch_us / us:5.2f} x" if torch_us else "")
            )
            results.append(
                {
                    "num_rows": num_rows,
                    "vocab_size": options.vocab_size,
                    "logits": kind,
                    "params": fields,
                    "us": us,
                    "best_us": best_us,
                    "floor_us": floor_us,
                    "torch_us": torch_us,
                }
            )
    if options.json:
        machine = {
            "gpu": gpu.name,
            "num_sms": gpu.num_sms,
            "memory_gb_per_second": gpu.memory_gb_per_second,
            "world": options.world,
        }
        options.json.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
