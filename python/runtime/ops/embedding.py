"""Embedding lookup."""

from __future__ import annotations

from typing import Any

from runtime import _native


def embedding(
    table: Any, token_ids: Any, out: Any, *, scale: float = 1.0, weight_format: str | None = None, num_threads: int = 1
) -> None:
    """out[t] = table[token_ids[t]] * scale, the table's rows read exactly.

    Args:
        table: [V, H] float32, float16 or bfloat16; or [V, bytes per row] uint8, the blocks of a GGUF format.
        token_ids: [T] int32, each in [0, V).
        out: [T, H] float32, written.
        scale: of every element; Gemma's is sqrt(H), rounded to bfloat16 by the caller.
        weight_format: name of that format ("Q4_1", "Q8_0", ...) where ``table`` is uint8.
        num_threads: workers; 0 or less: every usable core.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: an id outside the vocabulary (its position is named), a wrong shape, a bad scale or format.
    """
    _native.embedding(table, token_ids, out, scale, weight_format, num_threads)
