"""Fused append on a GPU: pages and q have the very bits of the CPU's append, for every codec, head and position."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime import _native
from runtime.ops.attention import append, append_gpu, rope_table
from tests.kernels.attention_cases import CODECS
from tests.kit.gpu_arrays import DTYPES, download, upload

# Every width of a head's lanes, heads that end within a lane (24, 40, 88), rotations of 8, 16, 32, 64, 128 and 256.
HEAD_DIMS = [8, 24, 40, 64, 80, 88, 96, 128, 192, 256]


@dataclasses.dataclass
class AppendCase:
    head_dim: int = 64
    kv_dtype: str = "int4"
    num_q_heads: int = 4
    num_kv_heads: int = 2
    page_size: int = 16
    rotary_dim: int | None = None  # None: the whole head; 0: no rotation of positions
    has_norms: bool = True
    qkv_dtype: str = "float32"
    requests: tuple[tuple[int, int], ...] = ((0, 5), (30, 1), (14, 4))  # (context_start, num_tokens)
    seed: int = 30

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.layout = _native.KvGroupLayout(2, self.num_kv_heads, self.head_dim, self.page_size, self.kv_dtype)
        num_tokens = sum(count for _, count in self.requests)
        width = (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        x = rng.standard_normal((num_tokens, width)) * np.exp(rng.uniform(-2, 2, (num_tokens, 1)))
        self.qkv = x.astype(DTYPES[self.qkv_dtype])
        self.norms = [rng.uniform(0.5, 2, self.head_dim).astype(np.float32) for _ in "qk"] if self.has_norms else None
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        self.rope = rope_table(10000.0 ** -np.linspace(0, 1, rotary_dim // 2), 64) if rotary_dim else None
        ends = [start + count for start, count in self.requests]
        num_pages = [-(-end // self.page_size) for end in ends]
        ids = rng.permutation(sum(num_pages) + 2).astype(np.int32)
        self.page_tables = np.full((len(ends), max(num_pages)), -7, np.int32)
        for r, count in enumerate(num_pages):
            self.page_tables[r, :count] = ids[sum(num_pages[:r]) :][:count]
        self.arena = np.full((len(ids), self.layout.page_bytes()), 0xFF, np.uint8)
        self.positions = np.concatenate([np.arange(s, s + n) for s, n in self.requests]).astype(np.int32)
        self.token_requests = np.repeat(np.arange(len(ends)), [n for _, n in self.requests]).astype(np.int32)

    def on_cpu(self) -> tuple[np.ndarray, np.ndarray]:
        """(q, arena), q in fp32."""
        qkv, arena = self.qkv.astype(np.float32), self.arena.copy()
        cu_seqlens = np.concatenate([[0], np.cumsum([n for _, n in self.requests])]).astype(np.int32)
        starts = np.array([s for s, _ in self.requests], np.int32)
        norms = dict(zip(("q_norm_weight", "k_norm_weight"), self.norms, strict=True)) if self.norms else {}
        append(
            qkv, arena, cu_seqlens, starts, self.page_tables, self.layout, num_q_heads=self.num_q_heads, layer=1,
            rope=self.rope, norm_eps=1e-5, num_threads=1, **norms,
        )  # fmt: skip
        return qkv[:, : self.num_q_heads * self.head_dim], arena

    def on_gpu(self, gpu, **arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(q, k and v, arena)"""
        qkv, arena = upload(gpu, arguments.pop("qkv", self.qkv)), upload(gpu, self.arena)
        positions = upload(gpu, arguments.pop("positions", self.positions))
        if self.norms:
            arguments |= {n: upload(gpu, w) for n, w in zip(("q_norm_weight", "k_norm_weight"), self.norms)}
        if self.rope:
            rows = [self.rope.row(p) for p in range(self.rope.num_positions)]
            arguments["cos"] = upload(gpu, np.array([row[0] for row in rows], np.float32))
            arguments["sin"] = upload(gpu, np.array([row[1] for row in rows], np.float32))
        append_gpu(
            qkv, arena, positions, upload(gpu, self.token_requests), upload(gpu, self.page_tables), self.layout,
            num_q_heads=self.num_q_heads, layer=1, norm_eps=1e-5, **arguments,
        )  # fmt: skip
        out, q_width = download(qkv), self.num_q_heads * self.head_dim
        return out[:, :q_width], out[:, q_width:], download(arena)

    def check(self, gpu, **arguments) -> None:
        q, kv, arena = self.on_gpu(gpu, **arguments)
        want_q, want_arena = self.on_cpu()
        np.testing.assert_array_equal(arena, want_arena)
        assert (arena != self.arena).any()
        np.testing.assert_array_equal(q.view(np.uint8), want_q.astype(q.dtype).view(np.uint8))
        np.testing.assert_array_equal(kv.view(np.uint8), self.qkv[:, q.shape[1] :].view(np.uint8))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", ["int4", "int8:fp32"])
def test_every_head_dim(gpu, head_dim, kv_dtype):
    AppendCase(head_dim=head_dim, kv_dtype=kv_dtype).check(gpu, exact=True)


@pytest.mark.parametrize("kv_dtype", [*CODECS, "int8:int4", "int4:bf16", "int4-plain:int8", "fp8:int4", "bf16:fp8"])
@pytest.mark.parametrize("qkv_dtype", ["float32", "float16", "bfloat16"])
def test_every_codec(gpu, kv_dtype, qkv_dtype):
    AppendCase(kv_dtype=kv_dtype, qkv_dtype=qkv_dtype, head_dim=48, seed=31).check(gpu)
    AppendCase(kv_dtype=kv_dtype, qkv_dtype=qkv_dtype, head_dim=128, num_q_heads=6, num_kv_heads=3, seed=32).check(gpu)


@pytest.mark.parametrize("rotary_dim", [0, 2, 20, 32, 48, 64])
@pytest.mark.parametrize("has_norms", [False, True])
def test_parts_of_the_head_are_roped(gpu, rotary_dim, has_norms):
    """Pairs that lie a multiple of 8 elements apart come as vectors; 1 or 10 apart, one by one."""
    for head_dim, kv_dtype in ((64, "int8"), (80, "int4:fp16")):
        AppendCase(
            head_dim=head_dim, kv_dtype=kv_dtype, rotary_dim=rotary_dim, has_norms=has_norms, qkv_dtype="bfloat16"
        ).check(gpu)


def test_rows_that_need_nothing(gpu):
    """Without norm, RoPE and rotation q stays as it is."""
    AppendCase(kv_dtype="bf16", rotary_dim=0, has_norms=False).check(gpu)


def test_padded_rows_do_nothing(gpu):
    """Rows of position -1, and of positions past the rotary table, leave q and pages alone."""
    case = AppendCase(qkv_dtype="bfloat16")
    positions = case.positions.copy()
    positions[[0, 3, 9]] = -1, 64, -1
    q, _, arena = case.on_gpu(gpu, positions=positions)
    full_q, _, full_arena = case.on_gpu(gpu)
    kept = np.delete(np.arange(len(positions)), [0, 3, 9])
    np.testing.assert_array_equal(q[kept].view(np.uint16), full_q[kept].view(np.uint16))
    for row in (0, 3, 9):
        np.testing.assert_array_equal(q[row].view(np.uint16), case.qkv[row, : q.shape[1]].view(np.uint16))
    only = case.on_gpu(gpu, positions=np.where(np.isin(np.arange(len(positions)), [0, 3, 9]), case.positions, -1))[2]
    is_written = only != 0xFF
    np.testing.assert_array_equal(arena[~is_written], full_arena[~is_written])
    assert (arena[is_written] == 0xFF).all()


def test_few_thread_blocks(gpu):
    for num_ctas in (1, 3, 1000):
        AppendCase(num_q_heads=12, num_kv_heads=4, head_dim=128).check(gpu, num_ctas=num_ctas)


def test_wider_rows(gpu):
    """A stride that is no multiple of a vector goes element by element."""
    for extra in (8, 3):
        case = AppendCase(qkv_dtype="float16", kv_dtype="int8:int4")
        wide = np.full((len(case.qkv), case.qkv.shape[1] + extra), np.nan, np.float16)
        wide[:, : case.qkv.shape[1]] = case.qkv
        q, kv, arena = case.on_gpu(gpu, qkv=wide)
        want_q, want_arena = case.on_cpu()
        np.testing.assert_array_equal(arena, want_arena)
        np.testing.assert_array_equal(q, want_q.astype(np.float16))
        assert np.isnan(kv[:, -extra:]).all()


def test_flat_and_huge_rows(gpu):
    """Equal elements (scale 0), zeros of both signs, values past the fp16 range: the CPU's bytes too."""
    for kv_dtype in ("int4", "int8", "int4-plain", "fp16", "fp8"):
        case = AppendCase(kv_dtype=kv_dtype, has_norms=False, requests=((0, 6),))
        case.qkv[0] = 3.25
        case.qkv[1] = 0.0
        case.qkv[1, ::3] = -0.0
        case.qkv[2] *= 1e6
        case.qkv[3] *= 1e-9
        case.qkv[4, ::5] = np.inf if kv_dtype in ("int8", "int4-plain") else 1e4
        case.rope = None if kv_dtype in ("int8", "int4-plain") else case.rope
        case.check(gpu)


def test_warp_orders_do_not_matter():
    gpu = _native.open_gpu("simt")
    case = AppendCase(head_dim=256, qkv_dtype="bfloat16")
    try:
        for seed in (1, 2, 3):
            _native.simt_set_seed(seed)
            case.check(gpu)
    finally:
        _native.simt_set_seed(0)


def test_bad_append(gpu):
    case = AppendCase()
    with pytest.raises(ValueError, match="qkv"):
        case.on_gpu(gpu, qkv=case.qkv[:, :-1].copy())
    with pytest.raises(ValueError, match="exact"):
        case.on_gpu(gpu, qkv=case.qkv.astype(np.float16), exact=True)
    with pytest.raises(ValueError, match="token_positions"):
        case.on_gpu(gpu, positions=case.positions[1:])
    with pytest.raises(TypeError, match="token_positions"):
        case.on_gpu(gpu, positions=case.positions.astype(np.float32))
    with pytest.raises(ValueError, match="num_ctas"):
        case.on_gpu(gpu, num_ctas=-1)
    with pytest.raises(ValueError, match="num_q_heads"):
        odd = AppendCase(num_q_heads=4)
        odd.num_q_heads = 3
        odd.on_gpu(gpu)
    small = AppendCase()
    small.arena = small.arena[:, :-16].copy()
    with pytest.raises(ValueError, match="arena"):
        small.on_gpu(gpu)


def test_a_missing_barrier_shows():
    """A test of these tests: without the warp's barrier, lanes overwrite q before its other half is read."""
    gpu = _native.open_gpu("simt")
    case = AppendCase(head_dim=128, kv_dtype="int8", has_norms=False)
    _native.simt_take_visited_sites()
    case.check(gpu)
    (site,) = [site for site in _native.simt_take_visited_sites() if "append.cu" in site]
    try:
        _native.simt_set_disabled_site(site)
        with pytest.raises((AssertionError, RuntimeError)):
            case.check(gpu)
    finally:
        _native.simt_set_disabled_site("")
