"""Gated activations (SwiGLU, GeGLU)."""

from __future__ import annotations

from typing import Any

from runtime import _native


def gated_activation(x: Any, out: Any, *, activation: str = "silu", device: str = "cpu", num_threads: int = 1) -> None:
    """out = f(gate) * up, where each row of ``x`` is gate, then up (Shazeer, 2020).

    Args:
        x: [T, 2F] float32, contiguous.
        out: [T, F] float32, written.
        activation: ``"silu"``: f(x) = x / (1 + e^-x); ``"gelu_tanh"``: the tanh form of GELU.
        device: ``"cpu"``, or ``"cuda"``: copies to the first GPU, runs there and copies back.
        num_threads: CPU workers; 0 or less: every usable core. Changes no bit of the result, nor does the CPU's ISA.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: a wrong shape, a strided or read-only array, an unknown activation or device.
        RuntimeError: ``"cuda"`` without CUDA in this build, or a CUDA call that failed (it says which).
    """
    _native.gated_activation(x, out, activation, device, num_threads)
