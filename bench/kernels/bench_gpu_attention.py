"""Times paged attention on a GPU beside its floor, its own bf16 and, where torch sees the GPU, torch's attention.

    PYTHONPATH=python python bench/kernels/bench_gpu_attention.py [--only decode] [--seconds 90] [--json out.json]

Decode: K and V of one layer, read once, at the memory's data-sheet speed; launches rotate over layers that together are
more than twice the L2. Each line ends with the ratio to our bf16 of the same shape (`of bf16`: how much less time).
Mixed: a long prefill beside short and long decode rows, against the sum of the parts' floors. Cascade: requests with one
long prefix, read once for all against once for each. Plan: microseconds on the host. Prefill: TFLOP/s of Q K and P V over
the visible pairs, beside torch's scaled_dot_product_attention on the same sizes (FlashAttention-2, cuDNN), unpaged.
--world simt runs tiny shapes on the host, to see that the script works; its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime import _native

PAGE_SIZE = 64
KV_DTYPES = ["bf16", "fp8", "int8", "int8:int4", "int4:bf16", "int4"]


@dataclass
class Measurement:
    kind: str
    kv_dtype: str
    shape: str
    microseconds: float
    bytes: float  # of K and V that must be read, once
    operations: float  # of Q K and P V over visible pairs
    bandwidth_share: float  # of the data sheet's; 0 where the device names none
    ratio_to_bf16: float  # our bf16's time over this one's; 0: not measured
    torch_us: dict[str, float]  # backend -> its time
    kernels: list[str]

    def line(self) -> str:
        rates = f"{self.bytes / self.microseconds * 1e-3:8.1f} GB/s {100 * self.bandwidth_share:5.1f} %"
        rates += f" {self.operations / self.microseconds * 1e-6:7.1f} TFLOP/s" if self.kind == "prefill" else ""
        ratio = f" {self.ratio_to_bf16:5.2f}x of bf16" if self.ratio_to_bf16 else ""
        peers = "".join(f" {name} {us:8.1f} us ({us / self.microseconds:4.2f}x)" for name, us in self.torch_us.items())
        return f"{self.kind:<8} {self.kv_dtype:<9} {self.shape:<46} {self.microseconds:9.1f} us {rates}{ratio}{peers}"


@dataclass(frozen=True)
class Shape:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    requests: tuple[tuple[int, int], ...]  # (context before the step, tokens in it)

    def __str__(self) -> str:
        contexts = [start for start, _ in self.requests]
        tokens = [count for _, count in self.requests]
        spread = f"{min(contexts)}..{max(contexts)}" if len(set(contexts)) > 1 else f"{contexts[0]}"
        return (
            f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}, {len(tokens)} requests of {sum(tokens)} tokens "
            f"at {spread}"
        )

    def pairs(self) -> float:
        return sum(n * start + n * (n + 1) / 2 for start, n in self.requests)

    def kv_tokens(self) -> int:
        return sum(start + n for start, n in self.requests)


def decode_shapes(is_tiny: bool) -> list[Shape]:
    if is_tiny:
        return [Shape(8, 2, 64, ((100, 1), (30, 1)))]
    shapes = []
    for heads in ((32, 8, 128), (64, 8, 128), (28, 4, 128), (32, 8, 64), (16, 8, 256)):
        sizes = [(1, 8192), (1, 131072), (16, 1024), (16, 8192), (64, 4096), (256, 1024)]
        for num_requests, context in sizes if heads == (32, 8, 128) else [(16, 8192)]:
            shapes.append(Shape(*heads, ((context - 1, 1),) * num_requests))
    return shapes


def mixed_shapes(is_tiny: bool) -> list[Shape]:
    if is_tiny:
        return [Shape(8, 2, 64, ((100, 1), (0, 70), (30, 1)))]
    rng = np.random.default_rng(0)
    ragged = tuple((int(length), 1) for length in np.exp(rng.normal(7, 1.2, 128)).clip(16, 65536))
    return [
        Shape(32, 8, 128, ragged),
        Shape(32, 8, 128, ((65535, 1), *((255, 1),) * 63)),
        Shape(32, 8, 128, (*((8191, 1),) * 127, (4096, 512))),
    ]


def prefill_shapes(is_tiny: bool) -> list[Shape]:
    if is_tiny:
        return [Shape(4, 2, 64, ((0, 130),))]
    shapes = [Shape(32, 8, 128, ((0, length),) * (16384 // length)) for length in (512, 2048, 8192, 16384)]
    shapes += [Shape(32, 8, 128, ((14336, 2048),)), Shape(32, 8, 64, ((0, 8192),)), Shape(16, 8, 256, ((0, 8192),))]
    return shapes


class Bench:
    def __init__(self, gpu, num_runs: int, is_tiny: bool):
        self.gpu, self.num_runs, self.is_tiny = gpu, num_runs, is_tiny
        self.rng = np.random.default_rng(1)

    def upload(self, values: np.ndarray):
        array = _native.GpuArray(self.gpu, list(values.shape), values.dtype.name)
        array.upload(np.ascontiguousarray(values))
        return array

    def arena(self, layout, num_pages: int):
        """Pages of random codes with sane parameters: random bytes below what reads as infinity or NaN."""
        page = self.rng.integers(0, 256, layout.page_bytes(), np.uint8)
        for layer in range(layout.num_layers):
            for codec, offset, size in (
                (layout.k_codec, layout.k_offset(layer), layout.k_stream_bytes()),
                (layout.v_codec, layout.v_offset(layer), layout.v_stream_bytes()),
            ):
                stream = page[offset : offset + size]
                if codec in ("bf16", "fp16"):
                    values = self.rng.standard_normal(size // 2).astype(np.float32)
                    stream[:] = (
                        (values.view(np.uint32) >> 16).astype(np.uint16)
                        if codec == "bf16"
                        else values.astype(np.float16)
                    ).view(np.uint8)
                elif codec == "fp8":
                    stream[:] = self.rng.integers(0, 0x40, size, np.uint8)
                else:
                    codes = layout.num_kv_heads * layout.page_size * layout.head_dim // (1 if codec == "int8" else 2)
                    count = layout.num_kv_heads * layout.page_size
                    levels = 255 if codec == "int8" else 15
                    pairs = np.tile(np.array([6.0 / levels, -3.0], np.float16), count)
                    stream[codes : codes + 4 * count] = pairs.view(np.uint8)
        arena = _native.GpuArray(self.gpu, [num_pages, len(page)], "uint8")
        arena.upload(np.broadcast_to(page, (num_pages, len(page))).copy())
        return arena

    def measure(self, kind: str, kv_dtype: str, shape: Shape, prefixes=()) -> Measurement:
        heads, kv_heads, dim = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
        one_layer = _native.KvGroupLayout(1, kv_heads, dim, PAGE_SIZE, kv_dtype)
        pages = [-(-(start + n) // PAGE_SIZE) for start, n in shape.requests]
        shared_pages = prefixes[0][2] // PAGE_SIZE if prefixes else 0
        num_pages = sum(pages) - shared_pages * max(0, len(pages) - 1)
        bytes_of_layer = (
            one_layer.page_bytes() / PAGE_SIZE * (shape.kv_tokens() - (len(pages) - 1) * shared_pages * PAGE_SIZE)
        )
        num_layers = (
            max(1, min(16, math.ceil(2 * self.gpu.l2_bytes / max(bytes_of_layer, 1)))) if not self.is_tiny else 2
        )
        layout = _native.KvGroupLayout(num_layers, kv_heads, dim, PAGE_SIZE, kv_dtype)
        tables = np.full((len(pages), max(pages)), -1, np.int32)
        ids = self.rng.permutation(num_pages).astype(np.int32)
        at = shared_pages
        for row, count in enumerate(pages):
            own = count - shared_pages
            tables[row, :shared_pages] = ids[:shared_pages]
            tables[row, shared_pages:count] = ids[at : at + own]
            at += own
        counts = [n for _, n in shape.requests]
        cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        starts = np.array([start for start, _ in shape.requests], np.int32)
        plan = _native.GpuAttentionPlan(self.gpu, layout, heads)
        plan.build(cu, starts, shared_prefixes=list(prefixes))
        total = int(cu[-1])
        qkv = self.upload((self.rng.standard_normal((total, (heads + 2 * kv_heads) * dim)) * 0.3).astype(np.float32)
                          .view(np.uint32).__rshift__(16).astype(np.uint16).view(_bfloat16()))  # fmt: skip
        out = _native.GpuArray(self.gpu, [total, heads * dim], "bfloat16")
        positions = self.upload(np.concatenate([np.arange(s, s + n) for s, n in shape.requests]).astype(np.int32))
        requests = self.upload(np.repeat(np.arange(len(counts)), counts).astype(np.int32))
        device_tables = self.upload(np.frombuffer(plan.tables(), np.int32).copy())
        workspace = _native.GpuArray(self.gpu, [max(1, plan.workspace_bytes)], "uint8")
        arena, page_tables = self.arena(layout, num_pages), self.upload(tables)

        def launch(layer: int):
            def run(stream: int) -> None:
                _native.attend_gpu(
                    plan, qkv, out, arena, positions, requests, page_tables, device_tables, workspace, layer=layer,
                    scale=dim**-0.5, stream=stream,
                )  # fmt: skip

            return run

        times = _native.time_gpu_launches(self.gpu, [launch(layer) for layer in range(num_layers)], self.num_runs)
        microseconds = max(statistics.median(times) * 1e3, 1e-3)
        peak = self.gpu.memory_gb_per_second
        return Measurement(
            kind, kv_dtype, str(shape), microseconds, bytes_of_layer, 4 * heads * dim * shape.pairs(),
            bytes_of_layer / microseconds * 1e-3 / peak if peak else 0.0, 0.0, {}, list(plan.kernels),
        )  # fmt: skip


def _bfloat16():
    import ml_dtypes

    return ml_dtypes.bfloat16


def torch_times(shape: Shape, num_runs: int) -> dict[str, float]:
    """Microseconds of torch's backends on contiguous K and V of the same sizes; empty without a GPU that torch sees."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available() or len(set(shape.requests)) != 1 or shape.requests[0][0] != 0:
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, length = len(shape.requests), shape.requests[0][1]
    group = shape.num_q_heads // shape.num_kv_heads
    q = torch.randn(batch, shape.num_q_heads, length, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, shape.num_kv_heads, length, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        .repeat_interleave(group, 1)
        .contiguous()
        for _ in range(2)
    )
    times = {}
    for name, backend in (("flash2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
                for _ in range(3):
                    run()
                events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                          for _ in range(num_runs)]  # fmt: skip
                for begin, end in events:
                    begin.record()
                    run()
                    end.record()
                torch.cuda.synchronize()
                times[name] = statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3
        except RuntimeError as error:
            print(f"torch {name}: {str(error).splitlines()[0]}")
    return times


def plan_line(gpu, num_requests: int) -> str:
    plan = _native.GpuAttentionPlan(gpu, _native.KvGroupLayout(1, 8, 128), 32)
    arrays = np.arange(num_requests + 1, dtype=np.int32), 500 + 37 * np.arange(num_requests, dtype=np.int32)
    best = min(plan.build(*arrays) for _ in range(50))
    return (
        f"plan     {num_requests:4d} decode requests of 8 KV heads: {best:7.1f} us, {len(plan.tables()) // 4} entries"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="cuda", choices=["cuda", "simt"])
    parser.add_argument("--only", choices=["plan", "decode", "mixed", "cascade", "prefill"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=100, help="no case starts after this long")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = _native.open_gpu(args.world)
    is_tiny = args.world == "simt"
    bench = Bench(gpu, 1 if is_tiny else args.runs, is_tiny)
    print(
        f"{gpu.name}: {gpu.num_sms} SMs, L2 {gpu.l2_bytes >> 20} MiB, {gpu.memory_gb_per_second:.0f} GB/s (data sheet)"
    )
    begin, done, plans = time.monotonic(), [], []

    def wants(kind: str) -> bool:
        return args.only in (None, kind) and time.monotonic() - begin < args.seconds

    def report(measurement: Measurement) -> Measurement:
        done.append(measurement)
        print(measurement.line(), flush=True)
        return measurement

    if wants("plan"):
        plans = [plan_line(gpu, count) for count in (1, 32, 256)]
        print("\n".join(plans))
    for kind, shapes in (("decode", decode_shapes(is_tiny)), ("mixed", mixed_shapes(is_tiny))):
        for shape in shapes:
            own = 0.0
            for kv_dtype in KV_DTYPES if kind == "decode" else ("bf16", "int4"):
                if not wants(kind):
                    continue
                measured = bench.measure(kind, kv_dtype, shape)
                own = own or measured.microseconds
                measured.ratio_to_bf16 = own / measured.microseconds
                report(measured)
    prefix = 128 if is_tiny else 16384
    for kv_dtype in ("bf16", "int4"):
        shape = Shape(8, 2, 64, ((150, 1),) * 3) if is_tiny else Shape(32, 8, 128, ((prefix + 511, 1),) * 32)
        if wants("cascade"):
            report(bench.measure("plain", kv_dtype, shape))
            report(bench.measure("cascade", kv_dtype, shape, [(0, len(shape.requests), prefix)]))
    for shape in prefill_shapes(is_tiny):
        for kv_dtype in ("bf16", "int8", "int4"):
            if not wants("prefill"):
                continue
            measured = bench.measure("prefill", kv_dtype, shape)
            if kv_dtype == "bf16" and not is_tiny:
                measured.torch_us = torch_times(shape, args.runs)
            report(measured)
    if args.json:
        cases = [asdict(m) | {"gb_per_second": m.bytes / m.microseconds * 1e-3,
                              "tflops": m.operations / m.microseconds * 1e-6} for m in done]  # fmt: skip
        device = {"name": gpu.name, "num_sms": gpu.num_sms, "gb_per_second": gpu.memory_gb_per_second}
        args.json.write_text(json.dumps({"device": device, "plans": plans, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
