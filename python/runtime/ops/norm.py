"""RMS norm."""

from __future__ import annotations

from typing import Any

from runtime import _native


def rms_norm(
    x: Any, weight: Any, out: Any, *, eps: float = 1e-6, add_to_out: bool = False, num_threads: int = 1
) -> None:
    """out = x / sqrt(mean(x^2, last axis) + eps) * weight, row by row (Zhang and Sennrich, 2019).

    Args:
        x: [T, H] float32, contiguous.
        weight: [H] float32.
        out: [T, H] float32, written; may be ``x`` unless ``add_to_out``.
        eps: added to the mean square; finite, at least 0.
        add_to_out: add to ``out`` instead of replacing it (a post-norm added to the residual, as in Gemma).
        num_threads: workers; 0 or less: every usable core. Changes no bit of the result, nor does the CPU's ISA.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: a wrong shape, a strided or read-only array, a bad ``eps``.
    """
    _native.rms_norm(x, weight, out, eps, add_to_out, num_threads)
