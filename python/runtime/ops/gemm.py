"""Linear layers: weights as a file holds them, packed once for this machine, then multiplied.

The face of csrc/gemm. Nothing here computes; see csrc/gemm/README.md for the mathematics and the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from runtime import _native

__all__ = ["PackedLinear", "Weight", "bench_linear", "pack_linear", "weight"]


class Weight(Protocol):
    """One matrix [out_features, in_features] in a GGUF format; borrows its buffer and holds a reference to it."""

    format: str
    out_features: int
    in_features: int
    num_bytes: int

    def dequantize(self, out: Any, num_threads: int = 1) -> None:
        """Writes the exact values into `out`, float32 [out_features, in_features]."""

    def dequantize_row(self, row: int, out: Any) -> None:
        """Writes the exact values of one row into `out`, float32 [in_features]."""


class PackedLinear(Protocol):
    """Row segments (Q|K|V, gate|up) laid out for one kernel family of this machine."""

    out_features: int
    in_features: int
    kernel: str  # the chosen candidate, such as "int8_avx512"
    reason: str  # one line per candidate: chosen, or why not
    packed_bytes: int

    def run(
        self,
        x: Any,
        out: Any,
        bias: Any = None,
        norm_weight: Any = None,
        norm_eps: float = 1e-5,
        gate: str | None = None,
        add_to_out: bool = False,
        num_threads: int = 1,
    ) -> None:
        """out = epilogue(norm(x) @ W.T), in place.

        x: float32 [T, in_features]. norm_weight: float32 [in_features]; x is first divided by its root mean square
        (norm_eps added to the mean square) and multiplied by it. bias: float32 [out_features].
        out: float32 [T, out_features]; with `gate` ("silu" or "gelu_tanh") [T, out_features / 2] = f(first half) *
        second half. add_to_out adds to what `out` holds. A token's result is the same bits in any batch and on any
        number of threads; in int8 also on any instruction set.

        Raises TypeError for a wrong dtype; ValueError for a wrong shape, a strided or read-only array, an unknown
        gate or a negative norm_eps, naming the argument, what came and what was wanted.
        """


def weight(
    data: Any, format: str, out_features: int, in_features: int, row_order: Sequence[int] | None = None
) -> Weight:
    """A matrix as the file holds it.

    data: any contiguous buffer (bytes, mmap view, NumPy or DLPack array) of exactly the matrix's bytes; not copied.
    format: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K or Q6_K, with GGUF's block layouts.
    row_order: row i of the matrix is row row_order[i] of the data.
    Raises ValueError when the size does not match the shape, or in_features is not a multiple of the block.
    """
    return _native.Weight(data, format, out_features, in_features, row_order)


def pack_linear(weights: Sequence[Weight], activations: str, num_threads: int = 0) -> PackedLinear:
    """Packs row segments of equal in_features for the active instruction set.

    activations: "int8" (scales per group of 32 inputs; a float weight falls back to bf16, recorded in `reason`),
    "bf16", or "fp32" (the exact mode). num_threads: 0 means all usable cores.
    Raises ValueError for no segments, unequal in_features or an unknown activation type.
    """
    return _native.pack_linear(list(weights), activations, num_threads)


def bench_linear(
    linears: Sequence[PackedLinear], num_tokens: int, iterations: int, num_threads: int = 0, gate: str | None = None
) -> float:
    """Seconds of `iterations` runs over prepared random rows; run i uses linears[i % len(linears)].

    Threads live for the whole call. Copies that together exceed the caches make it a measurement of memory.
    """
    return _native.bench_linear(list(linears), num_tokens, iterations, num_threads, gate)
