"""RMS norm, and rows made ready for a matrix product on a GPU."""

from __future__ import annotations

from typing import Any

from runtime import _native


def rms_norm(
    x: Any,
    weight: Any,
    out: Any,
    *,
    eps: float = 1e-6,
    add_to_out: bool = False,
    num_threads: int = 1,
    stream: int | None = None,
) -> None:
    """out = x / sqrt(mean(x^2, last axis) + eps) * weight, row by row (Zhang and Sennrich, 2019).

    Runs where ``x`` lies. On a GPU ``x`` may be float16 or bfloat16 too and, without ``add_to_out``, so may ``out``.

    Args:
        x: [T, H] float32, contiguous.
        weight: [H] float32.
        out: [T, H] float32, written; may be ``x`` unless ``add_to_out``.
        eps: added to the mean square; finite, at least 0.
        add_to_out: add to ``out`` instead of replacing it (a post-norm added to the residual, as in Gemma).
        num_threads: CPU workers; 0 or less: every usable core. Changes no bit of the result, nor does the CPU's ISA.
        stream: of the GPU, an address; None is its default stream.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: a wrong shape, a strided or read-only array, a bad ``eps``.
    """
    if _native.is_on_gpu(x):
        _native.rms_norm_gpu(x, weight, out, eps, add_to_out, stream)
    else:
        _native.rms_norm(x, weight, out, eps, add_to_out, num_threads)


def prepare_rows(
    x: Any,
    out: Any,
    *,
    norm_weight: Any = None,
    eps: float = 1e-6,
    scale: Any = None,
    code_sum: Any = None,
    group: int = 0,
    width: int | None = None,
    code_scale: float = 0.0,
    stream: int | None = None,
) -> None:
    """Rows of the residual, or of any layer's output, as the next GEMM reads them: normed, then converted. GPU only.

    Args:
        x: [T, K or more] float32, float16 or bfloat16.
        out: [T, K or more], written: float32, float16, bfloat16 (rounded to nearest even), int8 (codes of
            127 / absmax) or float8_e4m3fn (448 / absmax).
        norm_weight: [K] float32, or None: no norm.
        scale: int8 and float8_e4m3fn: float32, one for each row, or for each ``group`` values of it, row by row.
        code_sum: int8: int32, as many: the sums of the codes; or None.
        group: 0 (the whole row), 32 or 128.
        code_scale: above 0: the scale of all codes, known beforehand, in the place of each row's own; ``scale`` may then
            be None. What lies beyond the type is held to its ends (a NaN: -128 in int8, NaN in float8_e4m3fn).
        width: K, where ``x`` and ``out`` are wider; None: all of ``x``.
        stream: an address; None is the default stream.

    Raises:
        TypeError: an array of another dtype, or none on a GPU.
        ValueError: a wrong shape or group, a scale that is missing or not wanted.
    """
    _native.prepare_rows(x, out, norm_weight, eps, scale, code_sum, group, width, code_scale, stream)
