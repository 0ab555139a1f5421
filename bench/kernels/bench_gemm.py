"""Packed linears at a model's shapes against this machine's measured peaks.

    PYTHONPATH=python python bench/kernels/bench_gemm.py --activations int8 --threads 2

Each case runs over enough copies of its weights to leave the inner caches, on threads that live for the whole timing
and claim chunks as a lane's workers do. The figure is the best of --repeats: other load on the machine only adds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import Measurement, machine_lines, write_json

from runtime import _native

BLOCK_BYTES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}
PEAK_OF = {"int8": "int8_gops", "bf16": "fp32_gflops", "fp32": "fp32_gflops"}  # bf16 values are multiplied as fp32


@dataclass(frozen=True)
class Case:
    name: str
    out_features: int
    in_features: int
    format: str
    gate: str | None = None
    max_tokens: int = 1 << 30


SMOLLM2 = [
    Case("qkv 960x576", 960, 576, "Q4_1"),
    Case("o 576x576", 576, 576, "Q4_1"),
    Case("gate_up 3072x576", 3072, 576, "Q4_1", gate="silu"),
    Case("down 576x1536", 576, 1536, "Q4_1"),
    Case("head 49152x576", 49152, 576, "Q8_0", max_tokens=32),
]


def random_weight(case: Case, format: str) -> _native.Weight:
    """Random codes under small scales."""
    rng = np.random.default_rng(0)
    values, size = BLOCK_BYTES[format]
    blocks = rng.integers(0, 256, (case.out_features * case.in_features // values, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for offset in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(format, (0,)):
        blocks[:, offset : offset + 2] = scale
    return _native.Weight(blocks.reshape(-1), format, case.out_features, case.in_features)


def measure(case: Case, format: str, activations: str, token_counts: list[int], threads: int, repeats: int):
    weight = random_weight(case, format)
    first = _native.pack_linear([weight], activations)
    copies = min(96, max(1, int(100e6 / first.packed_bytes)))
    linears = [first] + [_native.pack_linear([weight], activations) for _ in range(copies - 1)]
    for tokens in token_counts:
        if tokens > case.max_tokens:
            continue
        operations = 2.0 * tokens * case.out_features * case.in_features
        seconds_guess = max(operations / (4e11 if activations == "int8" else 1e11), first.packed_bytes / 30e9)
        iterations = max(1, int(0.01 / seconds_guess))
        best, peaks = (
            float("inf"),
            dict.fromkeys(("int8_gops", "bf16_gflops", "fp32_gflops", "read_gb_per_second"), 0.0),
        )
        for repeat in range(repeats):
            best = min(best, _native.bench_linear(linears, tokens, iterations, threads, case.gate) / iterations)
            if repeat % 5 == 0:  # beside the timings, so that both see the same machine
                peaks = {key: max(peaks[key], value) for key, value in _native.machine_peaks(threads, 0.1).items()}
        yield (
            peaks,
            Measurement(
                f"{case.name} {format} {activations} M={tokens}",
                best * 1e6,
                operations,
                first.packed_bytes,
                peaks[PEAK_OF[activations]],
                peaks["read_gb_per_second"],
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", choices=["int8", "bf16", "fp32"], default="int8")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--threads", type=int, default=_native.usable_cores())
    parser.add_argument("--format", choices=sorted(BLOCK_BYTES), help="instead of the model's own")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    machine_peaks = _native.machine_peaks(arguments.threads, 1.0)
    measurements = []
    for case in SMOLLM2:
        format = arguments.format or case.format
        if arguments.only not in case.name or case.in_features % BLOCK_BYTES[format][0]:
            continue
        for peaks, measurement in measure(
            case, format, arguments.activations, arguments.tokens, arguments.threads, arguments.repeats
        ):
            machine_peaks = {key: max(machine_peaks[key], value) for key, value in peaks.items()}
            measurements.append(measurement)
            print(measurement.line(), flush=True)
    print(machine_lines(machine_peaks, arguments.threads))
    if arguments.json:
        write_json(arguments.json, machine_peaks, measurements)


if __name__ == "__main__":
    main()
