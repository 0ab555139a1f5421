"""Embedding lookup, and rows gathered by index."""

from __future__ import annotations

from typing import Any

from runtime import _native


def embedding(
    table: Any,
    token_ids: Any,
    out: Any,
    *,
    scale: float = 1.0,
    weight_format: str | None = None,
    num_threads: int = 1,
    stream: int | None = None,
) -> None:
    """out[t] = table[token_ids[t]] * scale, the table's rows read exactly.

    Runs on a GPU where ``table`` is what ``gpu_embedding_table`` made; an id outside [0, V) then gives a row of zeros.

    Args:
        table: [V, H] float32, float16 or bfloat16; or [V, bytes per row] uint8, the blocks of a GGUF format.
        token_ids: [T] int32, each in [0, V).
        out: [T, H] float32, written.
        scale: of every element; Gemma's is sqrt(H), rounded to bfloat16 by the caller.
        weight_format: name of that format ("Q4_1", "Q8_0", ...) where ``table`` is uint8.
        num_threads: CPU workers; 0 or less: every usable core.
        stream: of the GPU, an address; None is its default stream.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: an id outside the vocabulary (its position is named), a wrong shape, a bad scale or format.
    """
    if isinstance(table, _native.GpuEmbeddingTable):
        _native.embedding_gpu(table, token_ids, out, scale, stream)
    else:
        _native.embedding(table, token_ids, out, scale, weight_format, num_threads)


def gpu_embedding_table(gpu: Any, weight: Any) -> Any:
    """The rows of a ``runtime.ops.gemm`` weight in a GPU's memory, as their file holds them.

    Raises:
        ValueError: a format whose rows cannot be read one at a time.
    """
    return _native.GpuEmbeddingTable(gpu, weight)


def gather_rows(x: Any, row_idxs: Any, out: Any, *, stream: int | None = None) -> None:
    """out[s] = x[row_idxs[s]], zeros where the index is outside [0, T). GPU only.

    Args:
        x: [T, H] float32.
        row_idxs: [S] int32.
        out: [S, H] float32, written; apart from ``x``.
        stream: an address; None is the default stream.

    Raises:
        TypeError: an array of another dtype, or none on a GPU.
        ValueError: a wrong shape.
    """
    _native.gather_rows(x, row_idxs, out, stream)
