"""Paged attention: pages and their codecs, rotary tables, append and attend.

The face of csrc/attention and csrc/rope. Nothing here computes; csrc/attention/README.md has the mathematics, the byte
image of a page and what the arithmetic promises.

A step is described by the same arrays in ``append`` and ``attend`` (R requests, T token rows in all):

    arena           [num_pages, page_bytes] uint8, page_bytes a multiple of 64, at least ``layout.page_bytes()``
    cu_seqlens_q    [R + 1] int32, token rows of request r are [cu_seqlens_q[r], cu_seqlens_q[r + 1])
    context_starts  [R] int32, absolute position of each request's first token row
    page_tables     [R, max_pages] int32, entry p holds positions [p * page_size, (p + 1) * page_size); the rest padding
    qkv             [T, (Hq + 2 * Hkv) * D] float32, rows contiguous: q heads, then k heads, then v heads
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from runtime import _native

__all__ = [
    "GpuAttentionPlan",
    "KvGroupLayout",
    "RopeTable",
    "append",
    "append_gpu",
    "attend",
    "attend_gpu",
    "copy_pages",
    "decode_kv_rows",
    "decode_page_stream",
    "encode_kv_rows",
    "gpu_attention_plan",
    "kv_group_layout",
    "rope_table",
    "swap_pages",
]


class KvGroupLayout(Protocol):
    """Byte image of one KV group's page: for each layer the K stream, then the V stream."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int
    k_codec: str
    v_codec: str

    def k_stream_bytes(self) -> int: ...
    def v_stream_bytes(self) -> int: ...
    def layer_bytes(self) -> int: ...
    def page_bytes(self) -> int: ...
    def k_offset(self, layer: int) -> int:
        """Bytes from the page's start to the layer's K stream."""

    def v_offset(self, layer: int) -> int:
        """Bytes from the page's start to the layer's V stream."""


class RopeTable(Protocol):
    """Cosines and sines of every position, float32 [num_positions, rotary_dim / 2] each."""

    num_positions: int
    rotary_dim: int

    def row(self, position: int) -> tuple[list[float], list[float]]:
        """(cosines, sines) of one position."""


def kv_group_layout(
    num_layers: int, num_kv_heads: int, head_dim: int, *, page_size: int = 64, kv_dtype: str = "bf16", window: int = 0
) -> KvGroupLayout:
    """Sizes and places of one KV group's pages.

    Args:
        head_dim: a multiple of 8 from 8 to 256.
        page_size: tokens, 16, 32, 64 or 128.
        kv_dtype: a codec (fp32, bf16, fp16, fp8, int8, int4, int4-plain) or a pair ``k:v``. ``int4`` holds the head
            rotated by a Hadamard matrix, K and V alike; ``int4-plain`` does not. ``fp8`` is float8_e4m3fn without a
            scale: what is larger than 448 is stored as 448.
        window: tokens that a query sees, itself included; 0 for all.

    Raises:
        ValueError: names the field, what came and what was wanted.
    """
    return _native.KvGroupLayout(num_layers, num_kv_heads, head_dim, page_size, kv_dtype, window)


def rope_table(inv_freq: Sequence[float], num_positions: int, *, attention_factor: float = 1.0) -> RopeTable:
    """Rotary tables as Hugging Face transformers computes them, for half-split ("neox") pairs.

    Args:
        inv_freq: [rotary_dim / 2] inverse frequencies, any scaling already applied.
        num_positions: rows of the table; positions past it are refused by ``append``.
        attention_factor: multiplies cosines and sines (YaRN, LongRoPE).

    Raises:
        ValueError: an empty or non-finite ``inv_freq``, ``num_positions`` out of range.
    """
    return _native.RopeTableStorage(list(inv_freq), num_positions, attention_factor)


def append(
    qkv: Any,
    arena: Any,
    cu_seqlens_q: Any,
    context_starts: Any,
    page_tables: Any,
    layout: KvGroupLayout,
    *,
    num_q_heads: int,
    layer: int = 0,
    rope: RopeTable | None = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    norm_eps: float = 1e-6,
    num_threads: int = 0,
) -> None:
    """Norms, ropes and rotates q in place; norms, ropes, rotates and encodes k and v into their page slots.

    Args:
        qkv: overwritten: the q part with what ``attend`` reads, the k and v parts with intermediate values.
        q_norm_weight, k_norm_weight: [D] float32, RMS norm of each head before the rotation, or None.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: shapes that do not fit, page ids outside the arena, positions past the rotary table.
    """
    _native.attention_append(
        qkv, arena, cu_seqlens_q, context_starts, page_tables, layout, layer=layer, num_q_heads=num_q_heads, rope=rope,
        q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, norm_eps=norm_eps, num_threads=num_threads,
    )  # fmt: skip


def append_gpu(
    qkv: Any,
    arena: Any,
    token_positions: Any,
    token_requests: Any,
    page_tables: Any,
    layout: KvGroupLayout,
    *,
    num_q_heads: int,
    layer: int = 0,
    cos: Any = None,
    sin: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    norm_eps: float = 1e-6,
    exact: bool = False,
    num_ctas: int = 0,
    stream: int | None = None,
) -> None:
    """``append`` on a GPU, in one launch. Every array lies there; equal fp32 rows give the CPU's bytes.

    Args:
        qkv: [T, (Hq + 2 * Hkv) * D or more] float32, float16 or bfloat16; only the q part is overwritten.
        arena: [num_pages, page_bytes] uint8, page_bytes a multiple of 16.
        token_positions: [T] int32, absolute; -1 (padded), or past the rotary table: nothing is read or written.
        token_requests: [T] int32, the row of ``page_tables`` that each token has.
        page_tables: [R, max_pages] int32.
        cos, sin: [num_positions, rotary_dim / 2] float32, or None: no rotation of positions.
        q_norm_weight, k_norm_weight: [D] float32, RMS norm of each head before the rotation, or None.
        exact: wants qkv in float32.
        num_ctas: most thread blocks; 0: as many as there is work for.
        stream: an address; None is the default stream.

    Raises:
        TypeError: an array of another dtype, or none on a GPU.
        ValueError: shapes that do not fit. Page ids and positions lie on the device and are not checked.
    """
    _native.attention_append_gpu(
        qkv, arena, token_positions, token_requests, page_tables, layout, layer=layer, num_q_heads=num_q_heads, cos=cos,
        sin=sin, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, norm_eps=norm_eps, exact=exact,
        num_ctas=num_ctas, stream=stream,
    )  # fmt: skip


class GpuAttentionPlan(Protocol):
    """Which kernels serve a KV group on a GPU, and how the last step that was built is cut for them."""

    kernels: list[str]
    workspace_bytes: int  # of device memory that one ``attend_gpu`` needs

    def build(
        self,
        cu_seqlens_q: Any,
        context_starts: Any,
        *,
        num_ctas: int = 0,
        batch_invariant: bool = False,
        graph_rows: int = 0,
        max_context: int = 0,
        shared_prefixes: Sequence[tuple[int, int, int]] = (),
    ) -> float:
        """Plans a step, once for all of its layers; microseconds it took.

        Args:
            cu_seqlens_q, context_starts: [R + 1], [R] int32 in host memory; a request that starts at -1 is padding.
            num_ctas: most thread blocks; 0: as many as the chip runs at once.
            batch_invariant: a token's bits depend on nothing else in the step.
            graph_rows: R of a decode graph (one token a request): sizes and grids then depend on it alone, and on
                max_context where the plan is batch invariant.
            shared_prefixes: (first_request, num_requests, num_tokens) of requests that begin with the same pages.
        """

    def tables(self) -> bytes:
        """int32 entries for the device."""

    def describe(self) -> str:
        """The kernels, each with the reason why it was taken or not, and what the last build made."""


def gpu_attention_plan(
    gpu: Any, layout: KvGroupLayout, num_q_heads: int, *, qkv_dtype: str = "bfloat16", exact: bool = False
) -> GpuAttentionPlan:
    """A plan for steps of one KV group.

    Args:
        qkv_dtype: float32, float16 or bfloat16; exact: float32.

    Raises:
        ValueError: a number of heads or a type that does not fit.
    """
    return _native.GpuAttentionPlan(gpu, layout, num_q_heads, qkv_dtype=qkv_dtype, exact=exact)


def attend_gpu(
    plan: GpuAttentionPlan,
    qkv: Any,
    out: Any,
    arena: Any,
    token_positions: Any,
    token_requests: Any,
    page_tables: Any,
    tables: Any,
    workspace: Any = None,
    *,
    scale: float,
    layer: int = 0,
    soft_cap: float = 0.0,
    num_ctas: int = 0,
    stream: int | None = None,
) -> None:
    """``attend`` on a GPU, after ``append_gpu`` on the same stream. Every array lies there.

    Args:
        plan: built for this step.
        qkv, arena, token_positions, token_requests, page_tables: as ``append_gpu`` has left them.
        out: [T, Hq * D] float32, float16 or bfloat16; rows of position -1 are not written.
        tables: the plan's, int32.
        workspace: ``plan.workspace_bytes`` of uint8; None where that is 0.
        scale, soft_cap: as in ``attend``.

    Raises:
        TypeError, ValueError: as above.
    """
    _native.attend_gpu(
        plan, qkv, out, arena, token_positions, token_requests, page_tables, tables, workspace, layer=layer, scale=scale,
        soft_cap=soft_cap, num_ctas=num_ctas, stream=stream,
    )  # fmt: skip


def copy_pages(arena: Any, pairs: Any, *, num_pairs: Any = None, stream: int | None = None) -> None:
    """Copies pages inside a GPU's arena, all pairs at once.

    Args:
        arena: [num_pages, page_bytes] uint8, page_bytes a multiple of 16.
        pairs: [N, 2] int32 (source, target) on the device; a pair with -1 is skipped.
        num_pairs: [1] int32 on the device: how many count; None: all.

    Raises:
        TypeError, ValueError: as above.
    """
    _native.copy_pages(arena, pairs, num_pairs, stream)


def swap_pages(
    arena: Any,
    host_arena: Any,
    device_page_ids: Sequence[int],
    host_page_ids: Sequence[int],
    *,
    is_out: bool,
    stream: int | None = None,
) -> int:
    """Moves pages between a GPU's arena and the host's, waits, and returns how many copies that took.

    Pages that are neighbours on both sides go in one copy; of two with one target the later in the lists stays.

    Args:
        arena: [num_pages, page_bytes] uint8.
        host_arena: [num_host_pages, page_bytes] uint8 in host memory.
        device_page_ids, host_page_ids: of ``arena`` and of ``host_arena``, as many; page ``i`` of one list goes with
            page ``i`` of the other.
        is_out: from the GPU to the host; else back.
        stream: an address; None is the default stream.

    Raises:
        TypeError, ValueError: as above.
    """
    return _native.swap_pages(arena, host_arena, list(device_page_ids), list(host_page_ids), is_out, stream)


def attend(
    qkv: Any,
    out: Any,
    arena: Any,
    cu_seqlens_q: Any,
    context_starts: Any,
    page_tables: Any,
    layout: KvGroupLayout,
    *,
    num_q_heads: int,
    scale: float,
    layer: int = 0,
    soft_cap: float = 0.0,
    exact: bool = False,
    num_threads: int = 0,
) -> None:
    """Causal attention of every token row over its request's pages, its own token included.

    Args:
        qkv: as ``append`` left it.
        out: [T, Hq * D] float32, rows contiguous, written.
        scale: of the scores, usually D ** -0.5.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 for none.
        exact: fp32 arithmetic for integer codecs too.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: shapes that do not fit, page ids outside the arena, a scale or cap out of range.
    """
    _native.attention_attend(
        qkv, out, arena, cu_seqlens_q, context_starts, page_tables, layout, layer=layer, num_q_heads=num_q_heads,
        scale=scale, soft_cap=soft_cap, exact=exact, num_threads=num_threads,
    )  # fmt: skip


def encode_kv_rows(codec: str, x: Any, codes: Any, params: Any) -> None:
    """Rows to codes as ``append`` writes them (``int4`` rotates first).

    Args:
        x: [N, D] float32.
        codes: [N, row bytes of the codec] uint8, written.
        params: [N, 2] float16 (scale, min), written by integer codecs.

    Raises:
        TypeError, ValueError: as above.
    """
    _native.encode_kv_rows(codec, x, codes, params)


def decode_kv_rows(codec: str, codes: Any, params: Any, x: Any) -> None:
    """Codes back to values, code * scale + min (``int4`` rotates back); arrays as in ``encode_kv_rows``."""
    _native.decode_kv_rows(codec, codes, params, x)


def decode_page_stream(
    layout: KvGroupLayout, arena: Any, page_id: int, layer: int, kv_head: int, stream: str, out: Any
) -> None:
    """Values of one head of one stream ("k" or "v") of a page into ``out``, float32 [page_size, D].

    Raises:
        TypeError, ValueError: as above.
    """
    _native.decode_page_stream(layout, arena, page_id, layer, kv_head, stream, out)
