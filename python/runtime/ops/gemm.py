"""Linear layers: weights as a file holds them, packed once for this machine, then multiplied.

The face of csrc/gemm. Nothing here computes; see csrc/gemm/README.md for the mathematics and the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from runtime import _native

__all__ = [
    "CanonicalWeight",
    "GpuPackedLinear",
    "PackedLinear",
    "Weight",
    "bench_linear",
    "canonical_weight",
    "pack_linear",
    "pack_linear_gpu",
    "weight",
]


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


class CanonicalWeight(Protocol):
    """One matrix as codes, scales, and zeros or mins: value = scale * (code - zero) + min."""

    codes: str  # "u4", "u8", "s8", "e4m3", "f16", "bf16", "f32"
    out_features: int
    in_features: int
    group: int  # inputs that share a scale; -1: the row
    common_zero: int
    data: bytes  # one element each, nibbles too
    scales: bytes  # float32 [N, G]
    zeros: bytes  # uint8 [N, G], or empty
    mins: bytes  # float32 [N, G], or empty
    sub_scales: bytes  # uint8 [N, G] where there are two levels, or empty

    def dequantize(self, out: Any) -> None:
        """Writes the exact values into `out`, float32 [out_features, in_features]."""


class GpuPackedLinear(Protocol):
    """Row segments in a GPU's memory, laid out for its kernels and one activation type."""

    out_features: int
    in_features: int
    activations: str
    kernel: str  # packed layouts, one for each run of segments of one kind
    reason: str  # why these, and why not the others
    packed_bytes: int
    num_parts: int

    def workspace_bytes(self, max_tokens: int) -> int:
        """Of a workspace for any number of tokens up to this; zeroed once, it serves every linear of a stream."""

    def describe_choice(self, num_tokens: int) -> str:
        """The kernels that can multiply so many tokens, by predicted time, and why others cannot."""

    def unpack(self, part: int = 0) -> CanonicalWeight:
        """What the packed bytes hold, for tests: scales are as they were rounded."""

    def run(
        self,
        x: Any,
        out: Any,
        workspace: Any,
        x_scale: Any = None,
        x_sum: Any = None,
        bias: Any = None,
        gate: str | None = None,
        add_to_out: bool = False,
        out_code_scale: float = 0.0,
        out_scale: Any = None,
        out_sum: Any = None,
        num_ctas: int = 0,
        stream: int | None = None,
    ) -> None:
        """out = epilogue(x @ W.T), enqueued on the stream (None: the GPU's default one).

        x: [T, in_features or more] of the activation type, each row at a multiple of 16 bytes. out: [T, out_features
        or more] float32, float16 or bfloat16; with `gate` [T, out_features / 2 or more]. workspace: uint8, at least
        workspace_bytes(T). x_scale: float32 [T] of int8 and e4m3 codes; x_sum: int32 [T], the sum of a token's codes,
        where the weight has zeros per channel. bias: float32 [out_features]. add_to_out: float32 only, no gate.
        Packed with `quantises_output`, out is int8 or float8_e4m3fn: the codes of the outputs over out_code_scale, as
        `norm.prepare_rows` with that code_scale makes them; out_scale float32 [T] is set to it and out_sum int32 [T] to
        the sums of the int8 codes, where they are given: x_scale and x_sum of the next linear.
        num_ctas: most thread blocks to use; 0: as many as the chip runs.

        Raises TypeError and ValueError as PackedLinear.run does.
        """


def canonical_weight(
    codes: str,
    data: Any,
    out_features: int,
    in_features: int,
    *,
    group: int = -1,
    scales: Any = None,
    zeros: Any = None,
    common_zero: int = 0,
    mins: Any = None,
    sub_scales: Any = None,
    input_order: Any = None,
    group_rows: int = 1,
) -> CanonicalWeight:
    """A matrix from its parts, copied.

    data: one element each, [out_features, in_features]; bytes for integer and e4m3 codes. scales: float32 [N, G];
    zeros: uint8 [N, G], or common_zero for all; mins: float32 [N, G]. sub_scales: uint8 [N, G], with scales [N, 1]
    per row (QoQ). input_order: int32 [K], column i meets input input_order[i] (GPTQ's act-order). group_rows: 128 for
    e4m3 in blocks of 128 x 128, whose scales are [ceil(N / 128), ceil(K / 128)].
    Raises ValueError naming the part that does not fit.
    """
    return _native.CanonicalWeight(
        codes,
        data,
        out_features,
        in_features,
        group=group,
        scales=scales,
        zeros=zeros,
        common_zero=common_zero,
        mins=mins,
        sub_scales=sub_scales,
        input_order=input_order,
        group_rows=group_rows,
    )


def pack_linear_gpu(
    gpu: Any,
    weights: Sequence[Weight | CanonicalWeight],
    activations: str,
    *,
    batch_invariant: bool = False,
    interleaves_gate: bool = False,
    quantises_output: bool = False,
    selection_table: str = "",
) -> GpuPackedLinear:
    """Packs row segments of equal in_features into the memory of a GPU (`_native.open_gpu`).

    activations: "f32" (the exact mode), "f16", "bf16", "int8" or "e4m3". batch_invariant: a token's bits do not depend
    on the number of tokens. interleaves_gate: the segments are gate|up and every run has a gate. quantises_output:
    every run's out is int8 or float8_e4m3fn. selection_table:
    lines "out_features in_features max_tokens kernel num_splits" that overrule the cost model.
    Raises ValueError for no segments, unequal in_features, an unknown activation type or a bad table.
    """
    return _native.pack_linear_gpu(
        gpu,
        list(weights),
        activations,
        batch_invariant=batch_invariant,
        interleaves_gate=interleaves_gate,
        quantises_output=quantises_output,
        selection_table=selection_table,
    )
