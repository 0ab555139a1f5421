"""The kernels between the matrix products, which walk rows: norm, preparation of inputs, rotation and append to KV
pages, gated activation, embedding. One thread.

    PYTHONPATH=python python bench/kernels/bench_rows.py [--model-shape smollm2|llama-1b] [--only append] [--json FILE]

Each line: kernel, rows, microseconds (best of --repeats windows), GB/s of what must be read and written once, and the
share of the floor: NumPy's copy of as many bytes lying in the same cache. Rows are those of a step of 32 decodes and of
a prefill chunk of 512. A call from Python takes some 10 us, so what is shown is the time of that many rows and one more,
less the time of one; `prepare` is timed natively.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import Measurement, write_json

from runtime import _native
from runtime.ops.activation import gated_activation
from runtime.ops.attention import append, kv_group_layout, rope_table
from runtime.ops.embedding import embedding
from runtime.ops.norm import rms_norm

PAGE_SIZE = 64
WINDOW_S = 0.004


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {"smollm2": Shape(576, 1536, 9, 3, 64), "llama-1b": Shape(2048, 8192, 32, 8, 64)}
VOCAB_SIZE = 8192  # rows of the embedding table here: more than a core's cache holds


def best_us(call: Callable[[], object], repeats: int) -> float:
    """Best window of several calls: other load on the machine only adds."""
    begin = time.perf_counter()
    call()
    num_calls = max(1, int(WINDOW_S / max(time.perf_counter() - begin, 1e-7)))
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        best = min(best, (time.perf_counter() - begin) / num_calls)
    return best * 1e6


def copy_gb_per_second(num_bytes: float, repeats: int) -> float:
    """NumPy's copy that reads and writes this many bytes in all."""
    source = np.ones(max(int(num_bytes) // 2, 64), np.uint8)
    target = np.empty_like(source)
    return 2 * source.nbytes / best_us(lambda: np.copyto(target, source), repeats) / 1e3


def cases(shape: Shape, num_rows: int, repeats: int) -> Iterator[tuple[str, Callable[[], float], float]]:
    """(kernel, a call that measures microseconds, bytes that must be read or written)."""
    rng = np.random.default_rng(0)
    hidden, intermediate = shape.hidden, shape.intermediate

    def rows(width: int) -> np.ndarray:
        return rng.standard_normal((num_rows, width)).astype(np.float32)

    x, weight, normed = rows(hidden), np.ones(hidden, np.float32), np.empty((num_rows, hidden), np.float32)
    yield "rms_norm", lambda: best_us(lambda: rms_norm(x, weight, normed), repeats), 2 * x.nbytes

    matrix = _native.Weight(np.zeros(64 * hidden * 34 // 32, np.uint8), "Q8_0", 64, hidden)
    for activations in ("int8", "bf16", "fp32"):
        linear = _native.pack_linear([matrix], activations)
        iterations = max(1, 2000 // num_rows)

        def prepare(linear=linear, iterations=iterations) -> float:
            seconds = min(_native.bench_prepare_rows(linear, num_rows, iterations) for _ in range(repeats))
            return seconds / iterations * 1e6

        yield f"norm + prepare {activations}", prepare, x.nbytes + num_rows * linear.prepared_row_bytes

    num_heads = shape.num_q_heads + 2 * shape.num_kv_heads
    num_pages = -(-num_rows // PAGE_SIZE)
    rope = rope_table((1e4 ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)).tolist(), num_rows)
    bounds, starts = np.array([0, num_rows], np.int32), np.zeros(1, np.int32)
    table = np.arange(num_pages, dtype=np.int32).reshape(1, -1)
    for codec in ("bf16", "int8", "int4"):
        layout = kv_group_layout(1, shape.num_kv_heads, shape.head_dim, page_size=PAGE_SIZE, kv_dtype=codec)
        arena = np.zeros((num_pages, layout.page_bytes()), np.uint8)
        qkv = rows(num_heads * shape.head_dim)

        def run_append(layout=layout, arena=arena, qkv=qkv) -> float:
            return best_us(
                lambda: append(
                    qkv, arena, bounds, starts, table, layout, num_q_heads=shape.num_q_heads, rope=rope, num_threads=1
                ),
                repeats,
            )

        q_bytes = num_rows * shape.num_q_heads * shape.head_dim * 4
        yield f"rope + append {codec}", run_append, qkv.nbytes + q_bytes + layout.page_bytes() / PAGE_SIZE * num_rows

    gate_up, gated = rows(2 * intermediate), np.empty((num_rows, intermediate), np.float32)
    yield (
        "gated silu",
        lambda: best_us(lambda: gated_activation(gate_up, gated), repeats),
        gate_up.nbytes + gated.nbytes,
    )

    blocks = rng.integers(0, 256, (VOCAB_SIZE, hidden // 32, 34), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    flat, ids = blocks.reshape(VOCAB_SIZE, -1), rng.integers(0, VOCAB_SIZE, num_rows).astype(np.int32)
    yield (
        "embedding Q8_0",
        lambda: best_us(lambda: embedding(flat, ids, normed, weight_format="Q8_0"), repeats),
        num_rows * flat.shape[1] + normed.nbytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    measurements = []
    print(f"{_native.active_cpu_isa()}, one thread, {arguments.model_shape}")
    shape = SHAPES[arguments.model_shape]
    for num_rows in arguments.rows:
        one_row = {name: measure for name, measure, _ in cases(shape, 1, arguments.repeats)}
        for name, measure, num_bytes in cases(shape, num_rows + 1, arguments.repeats):
            if arguments.only not in name:
                continue
            num_bytes *= num_rows / (num_rows + 1)
            us = measure() - one_row[name]()
            floor = copy_gb_per_second(num_bytes, arguments.repeats)
            measurement = Measurement(f"{name} T={num_rows}", us, 0.0, num_bytes, 0.0, floor)
            measurements.append(measurement)
            print(
                f"{measurement.name:<32} {us:9.1f} us {measurement.gb_per_second:8.2f} GB/s, copy {floor:7.1f} GB/s: "
                f"{100 * measurement.roofline_share:5.1f} % of the floor",
                flush=True,
            )
    if arguments.json:
        write_json(arguments.json, {}, measurements)


if __name__ == "__main__":
    main()
