"""Gated activations (SwiGLU, GeGLU)."""

from __future__ import annotations

from typing import Any

from runtime import _native


def gated_activation(
    x: Any,
    out: Any,
    *,
    activation: str = "silu",
    num_threads: int = 1,
    scale: Any = None,
    code_sum: Any = None,
    group: int = 0,
    code_scale: float = 0.0,
    stream: int | None = None,
) -> None:
    """out = f(gate) * up, where each row of ``x`` is gate, then up (Shazeer, 2020).

    Runs where ``x`` lies. On a GPU ``x`` may be float16 or bfloat16 too, and ``out`` anything that
    ``norm.prepare_rows`` writes, with its ``scale``, ``code_sum``, ``group`` and ``code_scale``.

    Args:
        x: [T, 2F] float32, contiguous.
        out: [T, F] float32, written.
        activation: ``"silu"``: f(x) = x / (1 + e^-x); ``"gelu_tanh"``: the tanh form of GELU.
        num_threads: CPU workers; 0 or less: every usable core. Changes no bit of the result, nor does the CPU's ISA.
        stream: of the GPU, an address; None is its default stream.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: a wrong shape, a strided or read-only array, an unknown activation.
    """
    if _native.is_on_gpu(x):
        _native.gated_activation_gpu(x, out, activation, scale, code_sum, group, code_scale, stream)
    else:
        _native.gated_activation(x, out, activation, num_threads)
