"""Times GPU linears on a model's shapes beside their floor and, where torch sees the GPU, its bf16 linear.

    PYTHONPATH=python python bench/kernels/bench_gpu_gemm.py [--shapes model_shapes.json] [--models Llama-3-8B]
        [--kinds w4a16-g128,...] [--tokens 1,16,...] [--json out.json]

A kind is a weight, its groups and an activation type; `--list` prints them. Time of one call from a replayed graph of
many, over copies of the weight that together are more than twice the L2, median of the replays. The roofline is the
larger of bytes at the data sheet's bandwidth and operations at its dense tensor rate for the activation type; `ratio` is
torch's bf16 time of the same shape in the same run over ours. --world simt runs the same on the host, on small shapes,
to see that the script works; it has no clock.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime import _native
from runtime.ops.gemm import CanonicalWeight, canonical_weight, pack_linear_gpu

# hidden, ffn, heads, kv_heads, head_dim: what model_shapes.json says of them, for a machine without the file
MODELS = {"Llama-3-8B": (4096, 14336, 32, 8, 128), "Llama-3-70B": (8192, 28672, 64, 8, 128)}
ARRAY_NAMES = {"f16": "float16", "bf16": "bfloat16", "int8": "int8", "e4m3": "float8_e4m3fn"}
ACTIVATION_BYTES = {"f16": 2, "bf16": 2, "int8": 1, "e4m3": 1}
# 1e12 operations per second, dense, 16-bit activations (bytes: twice that), from data sheets
TENSOR_TERA = {80: 312.0, 89: 165.2, 90: 989.0}
MIN_REPLAYS = 50


@dataclass
class Kind:
    """How the weight is held and what meets it."""

    name: str
    activations: str
    codes: str
    group: int
    offset: str  # "zero", "symmetric", "two levels", "plain", "blocks"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("w4a16-g128", "bf16", "u4", 128, "zero"),
        Kind("w4a16-g128-f16", "f16", "u4", 128, "zero"),
        Kind("w4a16-g32", "bf16", "u4", 32, "symmetric"),
        Kind("w8a16-g128", "bf16", "u8", 128, "symmetric"),
        Kind("bf16", "bf16", "bf16", -1, "plain"),
        Kind("w8a8", "int8", "s8", -1, "symmetric"),
        Kind("w4a8-channel", "int8", "u4", -1, "zero"),
        Kind("w4a8-qoq", "int8", "u4", 128, "two levels"),
        Kind("fp8", "e4m3", "e4m3", -1, "plain codes"),
    )
}


@dataclass
class Measurement:
    """One case: times in microseconds, 0 where nothing was timed."""

    model: str
    layer: str
    kind: str
    tokens: int
    out_features: int
    in_features: int
    microseconds: float
    torch_microseconds: float
    operations: float
    bytes: float
    floor_microseconds: float
    choice: str

    def line(self) -> str:
        us = self.microseconds
        rate = (lambda amount: amount / us) if us else (lambda _: 0.0)
        ratio = f"{self.torch_microseconds / us:6.2f}x torch bf16" if us and self.torch_microseconds else ""
        return (
            f"{self.model:<12} {self.layer:<8} {self.kind:<15} T {self.tokens:5d} {us:9.2f} us "
            f"{rate(self.operations) * 1e-6:7.1f} TFLOP/s {rate(self.bytes) * 1e-3:7.1f} GB/s "
            f"{100 * rate(self.floor_microseconds):5.1f} % of the roofline {ratio} {self.choice}"
        )


def layer_shapes(path: Path | None, model: str) -> dict[str, tuple[int, int]]:
    """Layer -> (N, K)."""
    hidden, ffn, heads, kv_heads, head_dim = MODELS.get(model, (0, 0, 0, 0, 0))
    if path:
        found = [m for m in json.loads(path.read_text())["models"] if m["name"] == model]
        if not found:
            raise SystemExit(f"--models: got {model}, which {path} does not name")
        hidden, ffn, heads, kv_heads, head_dim = (
            found[0][key] for key in ("hidden", "ffn", "heads", "kv_heads", "head_dim")
        )
    elif not hidden:
        raise SystemExit(f"--models: got {model}, wanted one of {', '.join(MODELS)}, or --shapes")
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }


def random_weight(rng: np.random.Generator, kind: Kind, rows: int, cols: int) -> CanonicalWeight:
    groups = 1 if kind.group < 0 else math.ceil(cols / kind.group)
    tile = 1 << 20  # random bytes are repeated: what they are changes no time
    if kind.offset == "plain":
        values = np.resize((rng.standard_normal(tile) * 0.05).astype(np.float32), rows * cols)
        return canonical_weight("bf16", (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), rows, cols)
    limit = 16 if kind.codes == "u4" else 119 if kind.codes == "e4m3" else 256
    codes = np.resize(rng.integers(0, limit, tile, dtype=np.uint8), (rows, cols))
    scales = np.resize(rng.uniform(0.001, 0.002, tile).astype(np.float32), (rows, groups))
    if kind.offset == "two levels":
        ones = np.full((rows, groups), 8, np.uint8)
        return canonical_weight(
            "u4", codes, rows, cols, group=kind.group, scales=scales[:, :1].copy(), zeros=ones, sub_scales=ones
        )
    if kind.offset == "zero":
        zeros = np.resize(rng.integers(0, 16, tile, dtype=np.uint8), (rows, groups))
        return canonical_weight(kind.codes, codes, rows, cols, group=kind.group, scales=scales, zeros=zeros)
    zero = {"u4": 8, "u8": 128}.get(kind.codes, 0)
    return canonical_weight(kind.codes, codes, rows, cols, group=kind.group, scales=scales, common_zero=zero)


def array_of(gpu, values: np.ndarray, dtype: str):
    array = _native.GpuArray(gpu, list(values.shape), dtype)
    array.upload(values)
    return array


def activations_array(gpu, rng: np.random.Generator, kind: Kind, tokens: int, cols: int):
    if kind.activations in ("int8", "e4m3"):
        codes = rng.integers(0, 100, (tokens, cols), dtype=np.uint8)
        if kind.activations == "int8":
            return array_of(gpu, codes.view(np.int8), "int8")
        import ml_dtypes

        return array_of(gpu, codes.view(ml_dtypes.float8_e4m3fn), "float8_e4m3fn")
    values = rng.standard_normal((tokens, cols), dtype=np.float32)
    if kind.activations == "f16":
        return array_of(gpu, values.astype(np.float16), "float16")
    import ml_dtypes

    return array_of(gpu, values.astype(ml_dtypes.bfloat16), "bfloat16")


def median_us(gpu, launches: list[Callable[[int], None]]) -> float:
    if gpu.world != "cuda":  # the host's time says nothing
        for launch in launches:
            launch(gpu.default_stream)
        return 0.0
    times = _native.time_gpu_launches(gpu, launches, max(3, math.ceil(MIN_REPLAYS / len(launches))))
    return statistics.median(times) * 1e3


class TorchTimes:
    """torch.nn.functional.linear in bf16, once for each shape and number of tokens."""

    def __init__(self, gpu, l2_bytes: int):
        self.torch = None
        if gpu.world == "cuda":
            try:
                import torch

                self.torch = torch if torch.cuda.is_available() else None
            except ImportError:
                pass
        self.l2_bytes = l2_bytes
        self.times: dict[tuple[int, int, int], float] = {}

    def microseconds(self, rows: int, cols: int, tokens: int) -> float:
        if self.torch is None:
            return 0.0
        key = (rows, cols, tokens)
        if key not in self.times:
            self.times[key] = self._measure(rows, cols, tokens)
        return self.times[key]

    def _measure(self, rows: int, cols: int, tokens: int) -> float:
        torch = self.torch
        copies = max(2, math.ceil(2.5 * self.l2_bytes / (rows * cols * 2)))
        weights = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.mm(x, weights[0].t(), out=out)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for weight in weights:
                    torch.mm(x, weight.t(), out=out)
        times = []
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(max(3, math.ceil(MIN_REPLAYS / copies)) + 1):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / copies * 1e3)
        return statistics.median(times[1:])  # the first replay warms up


def measure_layer(
    gpu, kind: Kind, model: str, layer: str, rows: int, cols: int, token_counts: list[int], peer: TorchTimes
) -> list[Measurement]:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, kind, rows, cols)
    first = pack_linear_gpu(gpu, [weight], kind.activations)
    copies = max(2, math.ceil(2.5 * gpu.l2_bytes / first.packed_bytes)) if gpu.world == "cuda" else 2
    linears = [first] + [pack_linear_gpu(gpu, [weight], kind.activations) for _ in range(copies - 1)]
    workspace = array_of(gpu, np.zeros(first.workspace_bytes(max(token_counts)), np.uint8), "uint8")
    measurements = []
    for tokens in token_counts:
        x = activations_array(gpu, rng, kind, tokens, cols)
        out = _native.GpuArray(gpu, [tokens, rows], "bfloat16")
        extra = {}
        if kind.activations in ("int8", "e4m3"):
            extra["x_scale"] = array_of(gpu, np.full(tokens, 0.01, np.float32), "float32")
        if kind.activations == "int8":
            extra["x_sum"] = array_of(gpu, np.zeros(tokens, np.int32), "int32")
        launches = [
            lambda stream, linear=linear, x=x, out=out, extra=extra: linear.run(
                x, out, workspace, stream=stream, **extra
            )
            for linear in linears
        ]
        microseconds = median_us(gpu, launches)
        element = ACTIVATION_BYTES[kind.activations]
        num_bytes = first.packed_bytes + tokens * cols * element + tokens * rows * 2
        operations = 2.0 * tokens * rows * cols
        tera = TENSOR_TERA.get(gpu.compute_capability, 0.0) * 2 / element
        floor = max(
            num_bytes / gpu.memory_gb_per_second * 1e-3 if gpu.memory_gb_per_second else 0.0,
            operations / tera * 1e-6 if tera else 0.0,
        )
        choice = first.describe_choice(tokens).splitlines()[1].split()[0]
        torch_us = peer.microseconds(rows, cols, tokens)
        measurements.append(
            Measurement(
                model,
                layer,
                kind.name,
                tokens,
                rows,
                cols,
                microseconds,
                torch_us,
                operations,
                num_bytes,
                floor,
                choice,
            )
        )
        print(measurements[-1].line(), flush=True)
    return measurements


def print_summary(measurements: list[Measurement]) -> None:
    """Geometric mean of the ratio to torch for each model, kind and number of tokens."""
    groups: dict[tuple[str, str, int], list[float]] = {}
    for m in measurements:
        if m.microseconds and m.torch_microseconds:
            groups.setdefault((m.model, m.kind, m.tokens), []).append(m.torch_microseconds / m.microseconds)
    for (model, kind, tokens), ratios in groups.items():
        print(f"{model:<12} {kind:<15} T {tokens:5d}: {statistics.geometric_mean(ratios):5.2f}x torch bf16, geomean")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, help="model_shapes.json")
    parser.add_argument("--models", default="Llama-3-8B,Llama-3-70B")
    parser.add_argument("--kinds", default="w4a16-g128,bf16,w8a8,w4a8-qoq")
    parser.add_argument("--layers", default="qkv,o,gate_up,down")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--world", default="cuda", choices=["cuda", "simt"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="print the kinds")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.list:
        for kind in KINDS.values():
            print(kind)
        return 0
    unknown = [name for name in arguments.kinds.split(",") if name not in KINDS]
    if unknown:
        raise SystemExit(f"--kinds: got {', '.join(unknown)}, wanted some of {', '.join(KINDS)}")
    gpu = _native.open_gpu(arguments.world)
    print(f"{gpu.name}, {gpu.num_sms} SMs, {gpu.memory_gb_per_second:.0f} GB/s by data sheet", flush=True)
    peer = TorchTimes(gpu, gpu.l2_bytes)
    tokens = [int(count) for count in arguments.tokens.split(",")]
    measurements = []
    for model in arguments.models.split(","):
        shapes = layer_shapes(arguments.shapes, model)
        if gpu.world == "simt":  # a corner of each: the host executes every instruction
            shapes = {layer: (min(rows, 128), min(cols, 256)) for layer, (rows, cols) in shapes.items()}
        for kind in arguments.kinds.split(","):
            for layer in arguments.layers.split(","):
                rows, cols = shapes[layer]
                measurements += measure_layer(gpu, KINDS[kind], model, layer, rows, cols, tokens, peer)
    print_summary(measurements)
    if arguments.json:
        device = {"name": gpu.name, "num_sms": gpu.num_sms, "memory_gb_per_second": gpu.memory_gb_per_second}
        cases = [asdict(m) for m in measurements]
        arguments.json.write_text(json.dumps({"device": device, "cases": cases}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
