"""Times GPU linears on a model's shapes beside their floor and, where torch sees the GPU, its bf16 linear.

    PYTHONPATH=python python bench/kernels/bench_gpu_gemm.py [--shapes model_shapes.json] [--models Llama-3-8B]
        [--kinds w4a16-g128,...] [--tokens 1,16,...] [--json out.json]

A kind is a weight, its groups and an activation type; `--list` prints them. Time of one call from a replayed graph of
many, over copies of the weight that together are more than twice the L2, median of the replays. The roofline is the
larger of bytes at the data sheet's bandwidth and operations at its dense tensor rate for the activation type; `ratio` is
torch's time of the same shape in the same run over ours: its bf16 matmul, for FP8 its scaled matmul. --candidates times
every kernel that could serve, not only the chosen one. --codes adds gate and up to int8 codes, in the epilogue and by a
pass of its own. --world simt runs the same on the host, on small shapes, to see that the script works; it has no clock.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch_matmul import MIN_REPLAYS, TorchMatmulTimes

from runtime import _native
from runtime.ops.gemm import CanonicalWeight, canonical_weight, pack_linear_gpu
from runtime.ops.norm import prepare_rows

# hidden, ffn, heads, kv_heads, head_dim: what model_shapes.json says of them, for a machine without the file
MODELS = {"Llama-3-8B": (4096, 14336, 32, 8, 128), "Llama-3-70B": (8192, 28672, 64, 8, 128)}
ARRAY_NAMES = {"f16": "float16", "bf16": "bfloat16", "int8": "int8", "e4m3": "float8_e4m3fn"}
ACTIVATION_BYTES = {"f16": 2, "bf16": 2, "int8": 1, "e4m3": 1}
# 1e12 operations per second, dense, 16-bit activations (bytes: twice that), from data sheets
TENSOR_TERA = {80: 312.0, 89: 165.2, 90: 989.0}


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
    peer: str  # what torch_microseconds is of

    def line(self) -> str:
        us = self.microseconds
        rate = (lambda amount: amount / us) if us else (lambda _: 0.0)
        ratio = f"{self.torch_microseconds / us:6.2f}x {self.peer}" if us and self.torch_microseconds else ""
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


def candidate_names(linear) -> list[str]:
    """Kernels that this device could run this weight with, those that no default would take among them."""
    ranked = re.findall(r"^  (\S+) +[0-9.]+ us predicted", linear.describe_choice(1), re.MULTILINE)
    passed_over = re.findall(r"^  (\S+): never ran", linear.reason, re.MULTILINE)
    return [*dict.fromkeys(ranked + passed_over)]


def table_of(gpu, kind: Kind, weight: CanonicalWeight, shape: tuple[int, int], kernel: str, tokens: list[int]) -> str:
    """Lines that name this kernel for every number of tokens, with the splits that the cost model gives it."""
    lines = [f"{shape[0]} {shape[1]} {count} {kernel} 1" for count in sorted(tokens)]
    named = pack_linear_gpu(gpu, [weight], kind.activations, selection_table="\n".join(lines))
    splits = []
    for count in sorted(tokens):
        found = re.search(rf"^  {re.escape(kernel)} .*?(\d+) splits", named.describe_choice(count), re.MULTILINE)
        splits.append(found[1] if found else "1")
    return "\n".join(f"{line[:-1]}{split}" for line, split in zip(lines, splits, strict=True))


def measure_candidates(
    gpu, kind: Kind, model: str, layer: str, rows: int, cols: int, token_counts: list[int], peer: TorchMatmulTimes
) -> list[Measurement]:
    """Every candidate at every number of tokens, and the selection table of the quickest."""
    weight = random_weight(np.random.default_rng(0), kind, rows, cols)
    measurements, winners = [], {}
    for kernel in candidate_names(pack_linear_gpu(gpu, [weight], kind.activations)):
        table = table_of(gpu, kind, weight, (rows, cols), kernel, token_counts)
        measured = measure_layer(gpu, kind, model, layer, rows, cols, token_counts, peer, table)
        measurements += measured
        for line, m in zip(table.splitlines(), sorted(measured, key=lambda m: m.tokens), strict=True):
            if m.microseconds and (m.tokens not in winners or m.microseconds < winners[m.tokens][0]):
                winners[m.tokens] = (m.microseconds, line)
    for _, (_, line) in sorted(winners.items()):
        print(f"table: {line}", flush=True)
    return measurements


def measure_layer(
    gpu, kind: Kind, model: str, layer: str, rows: int, cols: int, token_counts: list[int], peer: TorchMatmulTimes,
    selection_table: str = "",
) -> list[Measurement]:  # fmt: skip
    rng = np.random.default_rng(0)
    weight = random_weight(rng, kind, rows, cols)
    first = pack_linear_gpu(gpu, [weight], kind.activations, selection_table=selection_table)
    copies = max(2, math.ceil(2.5 * gpu.l2_bytes / first.packed_bytes)) if gpu.world == "cuda" else 2
    linears = [first]
    for _ in range(copies - 1):
        linears.append(pack_linear_gpu(gpu, [weight], kind.activations, selection_table=selection_table))
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
        named = re.search(rf"^{rows} {cols} {tokens} (\S+) ", selection_table, re.MULTILINE)
        choice = named[1] if named else first.describe_choice(tokens).splitlines()[1].split()[0]
        torch_us = peer.microseconds(kind.activations, rows, cols, tokens)
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
                peer.name(kind.activations),
            )
        )
        print(measurements[-1].line(), flush=True)
    return measurements


def measure_codes(gpu, kind: Kind, model: str, rows: int, cols: int, token_counts: list[int]) -> list[Measurement]:
    """Gate and up whose outputs become int8 codes: in the epilogue, and as bf16 with a pass over the rows behind."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, kind, rows, cols)
    measurements = []
    for name, quantises in (("gate_up>i8", True), ("gate_up+row", False)):
        make = partial(
            pack_linear_gpu, gpu, [weight], kind.activations, interleaves_gate=True, quantises_output=quantises
        )
        linears = [make()]
        copies = max(2, math.ceil(2.5 * gpu.l2_bytes / linears[0].packed_bytes)) if gpu.world == "cuda" else 2
        linears += [make() for _ in range(copies - 1)]
        workspace = array_of(gpu, np.zeros(linears[0].workspace_bytes(max(token_counts)), np.uint8), "uint8")
        for tokens in token_counts:
            x = activations_array(gpu, rng, kind, tokens, cols)
            codes, values = (_native.GpuArray(gpu, [tokens, rows // 2], dtype) for dtype in ("int8", "bfloat16"))
            scales = array_of(gpu, np.full(tokens, 0.01, np.float32), "float32")
            sums = array_of(gpu, np.zeros(tokens, np.int32), "int32")
            out_scale, out_sum = (_native.GpuArray(gpu, [tokens], dtype) for dtype in ("float32", "int32"))

            def launch(stream, linear, x=x, codes=codes, values=values, scales=scales, sums=sums, out_scale=out_scale,
                       out_sum=out_sum, quantises=quantises, workspace=workspace):  # fmt: skip
                shared = {"gate": "silu", "x_scale": scales, "x_sum": sums, "stream": stream}
                if quantises:
                    linear.run(x, codes, workspace, out_code_scale=0.5, out_scale=out_scale, out_sum=out_sum, **shared)
                else:
                    linear.run(x, values, workspace, **shared)
                    prepare_rows(values, codes, scale=out_scale, code_sum=out_sum, stream=stream)

            microseconds = median_us(gpu, [partial(launch, linear=linear) for linear in linears])
            num_bytes = linears[0].packed_bytes + tokens * cols + tokens * rows // 2 * (1 if quantises else 5)
            speed = gpu.memory_gb_per_second
            measurements.append(
                Measurement(
                    model, name, kind.name, tokens, rows, cols, microseconds, 0.0, 2.0 * tokens * rows * cols, num_bytes,
                    num_bytes / speed * 1e-3 if speed else 0.0, linears[0].kernel, "",
                )
            )  # fmt: skip
            print(measurements[-1].line(), flush=True)
    return measurements


def print_summary(measurements: list[Measurement]) -> None:
    """For each model, kind and number of tokens: geometric mean of the ratio to torch over the layers that torch ran,
    and, of 4-bit weights with int8 activations, their time as a share of 8-bit ones'."""
    groups: dict[tuple[str, str, int], list[Measurement]] = {}
    for m in measurements:
        if m.microseconds:
            groups.setdefault((m.model, m.kind, m.tokens), []).append(m)
    for (model, kind, tokens), cases in groups.items():
        notes = []
        if ratios := [m.torch_microseconds / m.microseconds for m in cases if m.torch_microseconds]:
            notes.append(f"{statistics.geometric_mean(ratios):5.2f}x {cases[0].peer}")
        eight_bit = {m.layer: m.microseconds for m in groups.get((model, "w8a8", tokens), [])}
        shares = [m.microseconds / eight_bit[m.layer] for m in cases if m.layer in eight_bit]
        if kind.startswith("w4a8") and shares:
            notes.append(f"{statistics.geometric_mean(shares):5.2f} of the time of w8a8")
        if notes:
            print(f"{model:<12} {kind:<15} T {tokens:5d}: {', '.join(notes)} (geometric means)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, help="model_shapes.json")
    parser.add_argument("--models", default="Llama-3-8B,Llama-3-70B")
    parser.add_argument("--kinds", default="w4a16-g128,w8a8,w4a8-qoq,fp8,bf16")
    parser.add_argument("--layers", default="qkv,o,gate_up,down")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument(
        "--candidates", action="store_true", help="time every candidate and print the selection table of the quickest"
    )
    parser.add_argument(
        "--codes", action="store_true", help="also gate and up to int8 codes, in the epilogue and by a pass of its own"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="no layer starts after this long")
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
    peer = TorchMatmulTimes(gpu, gpu.l2_bytes)
    tokens = [int(count) for count in arguments.tokens.split(",")]
    measurements = []
    deadline_s = time.monotonic() + arguments.seconds
    for model in arguments.models.split(","):
        shapes = layer_shapes(arguments.shapes, model)
        if gpu.world == "simt":  # a corner of each: the host executes every instruction
            shapes = {layer: (min(rows, 128), min(cols, 256)) for layer, (rows, cols) in shapes.items()}
        for kind in arguments.kinds.split(","):
            for layer in arguments.layers.split(","):
                if time.monotonic() > deadline_s:
                    print(f"{model} {kind} {layer}: not measured, {arguments.seconds:.0f} s are over")
                    continue
                rows, cols = shapes[layer]
                measure = measure_candidates if arguments.candidates else measure_layer
                measurements += measure(gpu, KINDS[kind], model, layer, rows, cols, tokens, peer)
        if arguments.codes and time.monotonic() < deadline_s:
            for kind in arguments.kinds.split(","):
                if KINDS[kind].activations == "int8":
                    measurements += measure_codes(gpu, KINDS[kind], model, *shapes["gate_up"], tokens)
    print_summary(measurements)
    if arguments.json:
        device = {"name": gpu.name, "num_sms": gpu.num_sms, "memory_gb_per_second": gpu.memory_gb_per_second}
        cases = [asdict(m) for m in measurements]
        arguments.json.write_text(json.dumps({"device": device, "cases": cases}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
