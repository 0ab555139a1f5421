"""Times the GPU's row kernels beside their floor: what must be read and written once, at the memory's data-sheet speed.

    PYTHONPATH=python python bench/kernels/bench_gpu_rows.py [--only append] [--rows 64,2048] [--json out.json]

Norm with conversion, norm added to the residual, gated activation, embedding, gathered rows, append for each codec and
page copies, at the sizes of one layer of Llama-3-8B. Device time of one call, from a replayed graph of several: `cold`
over buffers that together are more than twice the L2, `warm` over one (what a decode step sees, whose rows the last
kernel has just written). The last lines compare append with the rotated int4 codec to the plain one, as a share of the
time that the model's 4-bit weights take to be read once: what the rotation costs a decode step at least hides behind.
--world simt runs the same on the host, to see that the script works; it has no clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime import _native
from runtime.ops.activation import gated_activation
from runtime.ops.attention import append_gpu, copy_pages, kv_group_layout
from runtime.ops.embedding import embedding, gather_rows, gpu_embedding_table
from runtime.ops.norm import prepare_rows, rms_norm

HIDDEN, FFN, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 4096, 14336, 32, 8, 128, 32
VOCAB_SIZE = 32064  # a quarter of the model's: only the rows that are asked for are read
WEIGHT_BYTES = 7.5e9 * 4.5 / 8  # of the linear layers in 4 bits with a scale and zero per group of 64
PAGE_SIZE = 64
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1, "int32": 4, "uint8": 1}


@dataclass
class Measurement:
    kernel: str
    case: str
    rows: int
    bytes: float  # that one call must at least move
    cold_us: float
    warm_us: float
    floor_us: float  # 0 where the device names no memory speed

    def line(self) -> str:
        share = 100 * self.floor_us / self.cold_us if self.cold_us else 0.0
        rate = self.bytes / self.cold_us * 1e-3 if self.cold_us else 0.0
        return (
            f"{self.kernel:<13} {self.case:<28} {self.rows:5d} rows {self.cold_us:9.2f} us cold {self.warm_us:9.2f} us "
            f"warm {rate:8.1f} GB/s {share:6.1f} % of the bandwidth"
        )


class Arrays:
    """Device arrays of random content, made once a case and buffer."""

    def __init__(self, gpu, seed: int):
        self.gpu, self.rng = gpu, np.random.default_rng(seed)

    def empty(self, dtype: str, *shape: int):
        return _native.GpuArray(self.gpu, list(shape), dtype)

    def of(self, values: np.ndarray):
        array = _native.GpuArray(self.gpu, list(values.shape), values.dtype.name)
        array.upload(np.ascontiguousarray(values))
        return array

    def normal(self, dtype: str, *shape: int):
        values = np.resize(self.rng.standard_normal(1 << 16, dtype=np.float32), shape)
        if dtype == "bfloat16":
            import ml_dtypes

            return self.of(values.astype(ml_dtypes.bfloat16))
        return self.of(values.astype(dtype))


Launch = Callable[[int], None]
# (kernel, case, rows, bytes moved, maker of one buffer's launch)
Case = tuple[str, str, int, float, Callable[[Arrays], Launch]]


def prepare_case(rows: int, width: int, in_type: str, out_type: str, has_norm: bool, group: int = 0) -> Case:
    def make(arrays: Arrays) -> Launch:
        x, out = arrays.normal(in_type, rows, width), arrays.empty(out_type, rows, width)
        weight = arrays.normal("float32", width) if has_norm else None
        is_coded = out_type in ("int8", "float8_e4m3fn")
        shape = (rows, width // group if group else 1)
        scale = arrays.empty("float32", *shape) if is_coded else None
        code_sum = arrays.empty("int32", *shape) if out_type == "int8" else None
        return lambda stream: prepare_rows(
            x, out, norm_weight=weight, scale=scale, code_sum=code_sum, group=group, stream=stream
        )

    name = f"{'norm ' if has_norm else ''}{in_type} to {out_type}{f'/{group}' if group else ''}"
    num_bytes = rows * width * (ITEM_BYTES[in_type] + ITEM_BYTES[out_type]) + 4 * width * has_norm
    return "prepare_rows", name.replace("float8_e4m3fn", "e4m3"), rows, num_bytes, make


def norm_add_case(rows: int) -> Case:
    def make(arrays: Arrays) -> Launch:
        branch, residual = arrays.normal("float32", rows, HIDDEN), arrays.normal("float32", rows, HIDDEN)
        weight = arrays.normal("float32", HIDDEN)
        return lambda stream: rms_norm(branch, weight, residual, add_to_out=True, stream=stream)

    return "norm_add", "float32", rows, rows * HIDDEN * 12, make


def activation_case(rows: int, out_type: str) -> Case:
    def make(arrays: Arrays) -> Launch:
        x, out = arrays.normal("bfloat16", rows, 2 * FFN), arrays.empty(out_type, rows, FFN)
        scale = arrays.empty("float32", rows) if out_type == "int8" else None
        code_sum = arrays.empty("int32", rows) if out_type == "int8" else None
        return lambda stream: gated_activation(x, out, scale=scale, code_sum=code_sum, stream=stream)

    return "activation", f"silu bfloat16 to {out_type}", rows, rows * FFN * (4 + ITEM_BYTES[out_type]), make


def embedding_case(rows: int, weight_format: str, row_bytes: int) -> Case:
    tables = []  # one for all buffers: it is larger than any L2, and its rows are drawn at random

    def make(arrays: Arrays) -> Launch:
        if not tables:
            data = np.zeros(VOCAB_SIZE * row_bytes, np.uint8)
            weight = _native.Weight(data, weight_format, VOCAB_SIZE, HIDDEN)
            tables.append(gpu_embedding_table(arrays.gpu, weight))
        table = tables[0]
        ids = arrays.of(arrays.rng.integers(0, VOCAB_SIZE, rows).astype(np.int32))
        out = arrays.empty("float32", rows, HIDDEN)
        return lambda stream: embedding(table, ids, out, stream=stream)

    return "embedding", weight_format, rows, rows * (row_bytes + 4 * HIDDEN), make


def gather_case(rows: int) -> Case:
    def make(arrays: Arrays) -> Launch:
        x = arrays.normal("float32", rows, HIDDEN)
        idxs, out = arrays.of(arrays.rng.permutation(rows).astype(np.int32)), arrays.empty("float32", rows, HIDDEN)
        return lambda stream: gather_rows(x, idxs, out, stream=stream)

    return "gather_rows", "float32", rows, rows * HIDDEN * 8, make


def append_case(rows: int, kv_dtype: str, has_norms: bool = False) -> Case:
    """`rows` requests of one token each at scattered positions, as in decode."""
    layout = kv_group_layout(1, NUM_KV_HEADS, HEAD_DIM, page_size=PAGE_SIZE, kv_dtype=kv_dtype)
    width = (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM

    def make(arrays: Arrays) -> Launch:
        max_pages = 4
        qkv = arrays.normal("bfloat16", rows, width)
        arena = arrays.empty("uint8", rows * max_pages, layout.page_bytes())
        tables = arrays.of(arrays.rng.permutation(rows * max_pages).reshape(rows, max_pages).astype(np.int32))
        positions = arrays.of(arrays.rng.integers(0, max_pages * PAGE_SIZE, rows).astype(np.int32))
        requests = arrays.of(np.arange(rows, dtype=np.int32))
        angles = np.outer(np.arange(max_pages * PAGE_SIZE), 5e5 ** -np.linspace(0, 1, HEAD_DIM // 2))
        cos, sin = arrays.of(np.cos(angles).astype(np.float32)), arrays.of(np.sin(angles).astype(np.float32))
        norms = {n: arrays.normal("float32", HEAD_DIM) for n in ("q_norm_weight", "k_norm_weight") if has_norms}
        return lambda stream: append_gpu(
            qkv, arena, positions, requests, tables, layout, num_q_heads=NUM_Q_HEADS, cos=cos, sin=sin, stream=stream,
            **norms,
        )  # fmt: skip

    slot_bytes = (layout.k_stream_bytes() + layout.v_stream_bytes()) / PAGE_SIZE
    num_bytes = rows * (2 * width + 2 * NUM_Q_HEADS * HEAD_DIM + slot_bytes + 4 * HEAD_DIM)
    return "append", kv_dtype + (" with qk norm" if has_norms else ""), rows, num_bytes, make


def copy_pages_case(num_pages: int) -> Case:
    page_bytes = kv_group_layout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, kv_dtype="int8").page_bytes()

    def make(arrays: Arrays) -> Launch:
        arena = arrays.empty("uint8", 2 * num_pages, page_bytes)
        pairs = arrays.of(np.arange(2 * num_pages, dtype=np.int32).reshape(2, num_pages).T.copy())
        return lambda stream: copy_pages(arena, pairs, stream=stream)

    return "copy_pages", f"{page_bytes >> 10} KiB each", num_pages, 2 * num_pages * page_bytes, make


def cases(rows: int) -> Iterator[Case]:
    yield prepare_case(rows, HIDDEN, "float32", "bfloat16", True)
    yield prepare_case(rows, HIDDEN, "float32", "int8", True)
    yield prepare_case(rows, HIDDEN, "float32", "float8_e4m3fn", True)
    yield prepare_case(rows, HIDDEN, "bfloat16", "int8", False)
    yield prepare_case(rows, HIDDEN, "bfloat16", "float8_e4m3fn", False, 128)
    yield norm_add_case(rows)
    yield activation_case(rows, "bfloat16")
    yield activation_case(rows, "int8")
    yield embedding_case(rows, "BF16", 2 * HIDDEN)
    yield embedding_case(rows, "Q4_1", HIDDEN // 32 * 20)
    yield gather_case(rows)
    for kv_dtype in ("bf16", "fp8", "int8", "int8:int4", "int4-plain", "int4:int4-plain", "int4"):
        yield append_case(rows, kv_dtype)
    yield append_case(rows, "bf16", has_norms=True)
    if rows >= 64:
        yield copy_pages_case(rows // 64)


def measure(gpu, case: Case, num_runs: int) -> Measurement:
    kernel, name, rows, num_bytes, make = case
    is_timed = gpu.world == "cuda"
    num_buffers = min(96, max(2, int(2.2 * gpu.l2_bytes / num_bytes) + 1)) if is_timed else 1
    launches = [make(Arrays(gpu, seed)) for seed in range(num_buffers)]
    cold = statistics.median(_native.time_gpu_launches(gpu, launches, num_runs))
    warm = statistics.median(_native.time_gpu_launches(gpu, launches[:1] * 16, num_runs)) if is_timed else 0.0
    speed = gpu.memory_gb_per_second
    return Measurement(kernel, name, rows, num_bytes, 1e3 * cold, 1e3 * warm, num_bytes / speed * 1e-3 if speed else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="cuda", choices=("cuda", "simt"))
    parser.add_argument("--rows", default="64,2048", help="tokens of a step, comma-separated (default: 64,2048)")
    parser.add_argument(
        "--only", help="one kernel: prepare_rows, norm_add, activation, embedding, append, copy_pages .."
    )
    parser.add_argument("--runs", type=int, default=20, help="replays whose median counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = _native.open_gpu(args.world)
    print(f"{gpu.name}, {gpu.num_sms} SMs, {gpu.memory_gb_per_second:.0f} GB/s, L2 {gpu.l2_bytes >> 20} MiB")
    measurements = []
    for rows in (int(text) for text in args.rows.split(",")):
        for case in cases(rows):
            if args.only in (None, case[0]):
                measurements.append(measure(gpu, case, args.runs))
                print(measurements[-1].line(), flush=True)
    comparisons = []
    for rows in sorted({m.rows for m in measurements if m.kernel == "append"}):
        times = {m.case: m for m in measurements if m.kernel == "append" and m.rows == rows}
        plain, rotated = times["int4-plain"], times["int4"]
        extra_us = NUM_LAYERS * (rotated.warm_us - plain.warm_us)
        weights_us = WEIGHT_BYTES / gpu.memory_gb_per_second * 1e-3 if gpu.memory_gb_per_second else 0.0
        share = extra_us / weights_us if weights_us else 0.0
        comparisons.append({"rows": rows, "extra_us_per_step": extra_us, "share_of_weight_read": share})
        print(
            f"append int4 over int4-plain, {rows} rows: {extra_us:+.2f} us a step of {NUM_LAYERS} layers, "
            f"{100 * share:+.2f} % of reading the weights once"
        )
    if args.json:
        properties = {"name": gpu.name, "num_sms": gpu.num_sms, "gb_per_second": gpu.memory_gb_per_second}
        cases_out = [asdict(m) for m in measurements]
        args.json.write_text(
            json.dumps({"gpu": properties, "cases": cases_out, "append": comparisons}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
