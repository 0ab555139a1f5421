"""Times paged attention natively: prefill and decode at SmolLM2's and Llama-3-8B's shapes.

    PYTHONPATH=python python bench/kernels/bench_attention.py [--threads 2] [--rounds 15] [--only decode] [--json FILE]

Each line: shape, codec, microseconds per layer (median of the rounds; best in brackets), GFLOP/s of Q K and P V, GB/s
of K and V read from pages, and the share of the nearer floor: fp32 multiply-adds or read bandwidth, both measured here
first on as many threads (set OPENBLAS_NUM_THREADS=1). Integer codecs compute with integer dots, so prefill may pass
100 %. Decode walks 30 layers of distinct pages, more than the caches near a core hold.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict, dataclass

import numpy as np

from runtime import _native


@dataclass(frozen=True)
class Case:
    kind: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_requests: int
    num_tokens: int  # of each request in the step
    context: int  # before them
    num_layers: int


CASES = [
    Case("prefill", 9, 3, 64, 1, 2048, 0, 1),
    Case("prefill", 9, 3, 64, 1, 512, 8192, 1),
    Case("prefill", 32, 8, 128, 1, 1024, 0, 1),
    Case("decode", 9, 3, 64, 1, 1, 2047, 30),
    Case("decode", 9, 3, 64, 1, 1, 300, 30),
    Case("decode", 9, 3, 64, 32, 1, 140, 30),
    Case("decode", 9, 3, 64, 16, 1, 1023, 30),
    Case("decode", 9, 3, 64, 1, 1, 4095, 30),
    Case("decode", 9, 3, 64, 1, 1, 8191, 30),
    Case("decode", 9, 3, 64, 1, 1, 16383, 30),
    Case("decode", 32, 8, 128, 1, 1, 4095, 16),
]
KV_DTYPES = ["bf16", "int8", "int8:int4", "int4", "fp32"]


def read_bandwidth(num_threads: int) -> float:
    """Best GB/s of summing 512 MiB, each thread its own part."""
    parts = np.array_split(np.ones(1 << 26, np.float64), num_threads)
    best = 0.0
    for _ in range(6):
        threads = [threading.Thread(target=part.sum) for part in parts]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - begin) / 1e9)
    return best


def fma_rate(num_threads: int) -> float:
    """Best fp32 GFLOP/s of NumPy's matrix product, each thread its own (BLAS held to one thread by the caller)."""
    a, b = np.ones((768, 768), np.float32), np.ones((768, 768), np.float32)
    best = 0.0
    for _ in range(12):
        threads = [threading.Thread(target=lambda: [a @ b for _ in range(4)]) for _ in range(num_threads)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, num_threads * 4 * 2 * 768**3 / (time.perf_counter() - begin) / 1e9)
    return best


def run(case: Case, kv_dtype: str, args: argparse.Namespace, floors: tuple[float, float]) -> dict:
    layout = _native.KvGroupLayout(case.num_layers, case.num_kv_heads, case.head_dim, 64, kv_dtype)
    total = case.context + case.num_tokens
    pages = -(-total // 64)
    rng = np.random.default_rng(0)
    num_pages = pages * case.num_requests
    # Finite pages without the cost of encoding them: one random page row, in every page.
    arena = np.empty((num_pages, layout.page_bytes()), np.uint8)
    one = np.zeros((1, layout.page_bytes()), np.uint8)
    width = (case.num_q_heads + 2 * case.num_kv_heads) * case.head_dim
    for layer in range(case.num_layers):
        _native.attention_append(
            rng.standard_normal((64, width)).astype(np.float32), one, np.array([0, 64], np.int32),
            np.zeros(1, np.int32), np.zeros((1, 1), np.int32), layout, layer=layer, num_q_heads=case.num_q_heads,
        )  # fmt: skip
    arena[:] = one
    tables = rng.permutation(num_pages).astype(np.int32).reshape(case.num_requests, pages)
    cu = np.arange(case.num_requests + 1, dtype=np.int32) * case.num_tokens
    starts = np.full(case.num_requests, case.context, np.int32)
    qkv = rng.standard_normal((int(cu[-1]), width)).astype(np.float32)
    out = np.empty((len(qkv), case.num_q_heads * case.head_dim), np.float32)
    seconds = _native.attention_bench(
        qkv, out, arena, cu, starts, tables, layout, num_q_heads=case.num_q_heads, scale=case.head_dim**-0.5,
        exact=args.exact, num_threads=args.threads, num_rounds=args.rounds,
    )  # fmt: skip
    layer_s = np.array(seconds[1:] or seconds) / case.num_layers
    plan = _native.attention_plan(cu, starts, layout, num_q_heads=case.num_q_heads, num_builds=20)
    operations = 4 * case.num_q_heads * case.head_dim * plan["score_pairs"]
    num_bytes = case.num_requests * pages * layout.layer_bytes()
    floor_s = max(operations / floors[0] / 1e9, num_bytes / floors[1] / 1e9)
    median = float(np.median(layer_s))
    row = {
        **asdict(case),
        "kv_dtype": kv_dtype,
        "us": median * 1e6,
        "best_us": float(layer_s.min()) * 1e6,
        "gflops": operations / median / 1e9,
        "gbps": num_bytes / median / 1e9,
        "floor_percent": 100 * floor_s / median,
        "best_floor_percent": 100 * floor_s / float(layer_s.min()),
        "plan_us": plan["build_us"],
        "chunks": len(plan["items"]),
    }
    print(
        f"{case.kind:8s} Hq={case.num_q_heads:<3d} Hkv={case.num_kv_heads:<2d} D={case.head_dim:<4d} "
        f"R={case.num_requests:<3d} T={case.num_tokens:<5d} ctx={case.context:<6d} {kv_dtype:10s} "
        f"{row['us']:9.1f} us [{row['best_us']:9.1f}] {row['gflops']:7.1f} GFLOP/s {row['gbps']:6.2f} GB/s "
        f"{row['floor_percent']:4.0f}% [{row['best_floor_percent']:4.0f}%] of floor  plan {row['plan_us']:5.1f} us "
        f"{row['chunks']} items",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=_native.usable_cores())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--kv-dtype", nargs="*", default=KV_DTYPES)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    floors = (fma_rate(args.threads), read_bandwidth(args.threads))
    print(
        f"{_native.active_cpu_isa()}, {args.threads} threads: fp32 {floors[0]:.0f} GFLOP/s, read {floors[1]:.1f} GB/s"
    )
    cases = [case for case in CASES if args.only in (None, case.kind)]
    rows = [run(case, kv_dtype, args, floors) for case in cases for kv_dtype in args.kv_dtype]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"isa": _native.active_cpu_isa(), "threads": args.threads, "floors": floors, "rows": rows}, file)


if __name__ == "__main__":
    main()
