"""Attention on the GPU against float64 over the page bytes: every tuned kernel, the fallback, what must not be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import _native
from tests.kernels.attention_cases import Step, rotate
from tests.kernels.gpu_attention_cases import GpuStep

TUNED = ["bf16", "fp16", "int8", "fp8", "int4", "int4:bf16", "int4:fp16", "int8:int4", "int4-plain"]
MIXED = [(0, 70), (130, 1), (61, 5), (66, 1), (1, 1)]
# Weights are rounded to 16 bits before they meet V (bf16 to 2^-9 of each, fp16 to 2^-12 on average less), queries and
# 16-bit pages as they came. The bound of bf16 is twice what torch's own attention in bf16 shows on these cases
# (test_no_worse_than_twice_torch measures it); fp16's has room for K and V of the prefill kernel, rounded to fp16.
BOUNDS = {"bf16": 3e-3, "fp16": 1e-3}
EXACT_BOUND = 2e-6


def bound(step: Step) -> float:
    is_bf16 = "bf16" in (step.layout.k_codec, step.layout.v_codec)
    return BOUNDS["bf16" if is_bf16 else "fp16"]


def check(gpu, step: Step, dtype: str = "bfloat16", **options) -> GpuStep:
    case = GpuStep(gpu, step, dtype)
    assert "attend_naive" not in case.plan.kernels, case.plan.describe()
    assert case.error(case.run("float32", **options)) < bound(step), case.plan.describe()
    return case


@pytest.mark.parametrize("kv_dtype", TUNED)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_mixed_batches_of_every_tuned_pair(gpu, kv_dtype, head_dim):
    case = check(gpu, Step(MIXED, head_dim=head_dim, num_q_heads=6, kv_dtype=kv_dtype, seed=1))
    assert any("decode" in name for name in case.plan.kernels)
    assert case.plan.decode["items"] and case.plan.prefill["items"]


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4", "fp8", "int4:fp16"])
@pytest.mark.parametrize("head_dim", [80, 96, 112, 256])
def test_padded_and_large_heads(gpu, kv_dtype, head_dim):
    """A few rows and many: both kernels. Rows of int4 at 80 and 112 are 40 and 56 bytes, copied in halves of a vector."""
    case = check(gpu, Step([(0, 49), (70, 1), (3, 2)], head_dim=head_dim, kv_dtype=kv_dtype, seed=2))
    assert case.plan.decode["items"] and case.plan.prefill["items"]


@pytest.mark.parametrize("kv_dtype", ["int4", "int4-plain", "int8:int4", "int4:bf16"])
@pytest.mark.parametrize("head_dim", [48, 80, 112, 144])
def test_int4_rows_that_are_no_whole_vectors(gpu, kv_dtype, head_dim):
    """Every pair, over several tiles and thread blocks, with windows, and with one page's rows beside unowned bytes."""
    for window, seed in ((0, 12), (70, 13)):
        step = Step(
            [(150, 1), (61, 4), (0, 50), (63, 1)], head_dim=head_dim, kv_dtype=kv_dtype, window=window, seed=seed
        )
        case = check(gpu, step, num_ctas=3)
        assert any(name.startswith("attend_decode") for name in case.plan.kernels), case.plan.describe()


def test_int4_rows_of_odd_words(gpu):
    """36 bytes at head_dim 72: no copy of a size that is aligned for every row, so the naive kernel, which says so."""
    case = GpuStep(gpu, Step([(0, 21), (70, 1)], head_dim=72, kv_dtype="int4", seed=2))
    assert case.plan.kernels == ["attend_naive"]
    assert "rows of int4 at head_dim 72 are 36 bytes, no multiple of 8" in case.plan.describe()
    assert case.error(case.run("float32")) < EXACT_BOUND


@pytest.mark.parametrize("kv_dtype", ["fp8", "bf16", "fp8:fp16", "fp16:fp8"])
@pytest.mark.parametrize("stream", ["k", "v"])
def test_nan_in_a_page_is_nan_in_what_sees_it(gpu, kv_dtype, stream):
    """Decode and prefill rows of one KV head; the other head and another request keep their values."""
    step = Step([(80, 1), (20, 60), (70, 2)], num_q_heads=4, num_kv_heads=2, kv_dtype=kv_dtype, seed=14)
    first = 4 * 64 if stream == "k" else 6 * 64  # KV head 0
    for request in (0, 1):
        step.tokens[request][7, first + 5] = np.nan  # in the context, which every row sees
    case = GpuStep(gpu, step)
    out = case.run("float32").reshape(-1, 4, 64)
    assert case.plan.prefill["items"] and bool(case.plan.decode["items"]) == (":" not in kv_dtype)
    wanted = np.concatenate(case.reference()).reshape(-1, 4, 64)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(wanted))
    assert np.isnan(wanted[:61, :2]).any() and not np.isnan(wanted[:, 2:]).any() and not np.isnan(wanted[61:]).any()
    real = ~np.isnan(wanted)
    assert np.linalg.norm(out[real] - wanted[real]) < BOUNDS["bf16"] * np.linalg.norm(wanted[real])


@pytest.mark.parametrize("kv_dtype", ["bf16", "int4"])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_every_group_size(gpu, kv_dtype, group):
    step = Step([(70, 1), (0, 49), (140, 2)], num_q_heads=2 * group, head_dim=64, kv_dtype=kv_dtype, seed=3)
    case = check(gpu, step)
    assert case.plan.decode["num_columns"] == (8 if 2 * group <= 8 else 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp16", "int8"])
def test_query_and_output_types(gpu, kv_dtype, dtype):
    step = Step([(70, 1), (0, 9)], kv_dtype=kv_dtype, seed=4)
    case = check(gpu, step, dtype)
    rounded = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 0}[dtype]
    assert case.error(case.run(dtype)) < bound(step) + rounded


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8:int4"])
def test_every_page_size(gpu, kv_dtype, page_size):
    check(gpu, Step([(0, 133), (page_size - 1, 2), (page_size, 1)], page_size=page_size, kv_dtype=kv_dtype, seed=5))


@pytest.mark.parametrize("window", [1, 7, 64, 200])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4:bf16"])
def test_sliding_window_reads_no_page_before_it(gpu, kv_dtype, window):
    """Pages that no query sees any more are given back: their entries are -1, as the scheduler leaves them."""
    step = Step([(0, 40), (300, 3), (255, 1)], window=window, page_size=16, kv_dtype=kv_dtype, seed=6)
    case = GpuStep(gpu, step)
    wanted = case.run("float32")
    assert case.error(wanted) < bound(step)
    first_seen = np.maximum(0, case.starts - window + 1) // 16
    for row, first in enumerate(first_seen):
        step.arena[step.page_tables[row, :first]] = 0xFF
        step.page_tables[row, :first] = -1
    case.arrays[0].upload(step.arena)
    case.arrays[3].upload(step.page_tables)
    np.testing.assert_array_equal(case.run("float32"), wanted)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_soft_cap(gpu, kv_dtype):
    check(gpu, Step([(0, 50), (200, 1)], soft_cap=5.0, spread=2.0, kv_dtype=kv_dtype, seed=7))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4", "int8:int4"])
def test_splits_and_their_number_do_not_matter(gpu, kv_dtype):
    """Long contexts over any number of thread blocks: each split differently, all within rounding of each other."""
    step = Step([(1400, 1), (90, 1), (700, 20)], kv_dtype=kv_dtype, seed=8)
    case = GpuStep(gpu, step)
    outputs, splits = [], set()
    for num_ctas in (1, 2, 5, 0):
        outputs.append(case.run("float32", num_ctas=num_ctas))
        assert case.error(outputs[-1]) < bound(step)
        splits.add(max((len(merge["parts"]) for merge in case.plan.merges), default=1))
    assert len(splits) >= 3
    for out in outputs[1:]:
        assert np.linalg.norm(out - outputs[0]) < bound(step) * np.linalg.norm(outputs[0])
    np.testing.assert_array_equal(outputs[-1], case.run("float32"))


def test_values_of_very_different_scale(gpu):
    """Tokens whose V is thousands of times another's, and exact zeros, keep their own precision under any order."""
    step = Step([(200, 1), (130, 3)], kv_dtype="int8", seed=9)
    for x in step.tokens:
        x[:, -128:] *= np.exp2(np.linspace(-14, 6, len(x)))[:, None].astype(np.float32)
        x[40:60, -128:] = 0
    check(gpu, step)
    for x in step.tokens:
        x[:, -128:] = x[::-1, -128:].copy()
    check(gpu, step)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8:fp16", "int4", "int4-plain:fp8"])
@pytest.mark.parametrize("head_dim", [8, 24, 40, 128])
def test_exact_mode(gpu, kv_dtype, head_dim):
    step = Step([(0, 19), (75, 1)], head_dim=head_dim, kv_dtype=kv_dtype, exact=True, window=50, soft_cap=8.0, seed=10)
    case = GpuStep(gpu, step, "float32")
    assert case.plan.kernels == ["attend_naive"]
    assert case.error(case.run("float32")) < EXACT_BOUND
    assert case.error(case.run("float32", num_ctas=2)) < EXACT_BOUND


def test_what_has_no_tuned_kernel_says_why(gpu):
    def reasons(kv_dtype="bf16", heads=4, head_dim=64, **more):
        layout = _native.KvGroupLayout(1, 1, head_dim, kv_dtype=kv_dtype)
        return _native.GpuAttentionPlan(gpu, layout, heads, **more).describe()

    assert "fp32 pages need fp32 arithmetic" in reasons("fp32:bf16")
    assert "17 query heads share a KV head" in reasons(heads=17)
    assert "exact mode computes in fp32" in reasons(qkv_dtype="float32", exact=True)
    assert "rows of int4 at head_dim 72 are 36 bytes, no multiple of 8" in reasons("int4", head_dim=72)
    assert "attend_decode_d128_int4_int4: taken for few rows" in reasons("int4", head_dim=80)
    assert "rows of int8 at head_dim 72 are 72 bytes, no multiple of 16" in reasons("int8", head_dim=72)
    assert "decode: no kernel for int8:bf16" in reasons("int8:bf16")
    assert "attend_decode_d128_bf16_bf16: taken for few rows" in reasons(head_dim=96)


def test_pairs_without_a_decode_kernel_take_the_tile_of_many_rows(gpu):
    case = check(gpu, Step(MIXED, kv_dtype="int8:bf16", seed=11))
    assert case.plan.kernels == ["attend_prefill_d64_converting"]
    check(gpu, Step(MIXED, kv_dtype="bf16:fp16", seed=11))


@pytest.mark.parametrize(("kv_dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                                       ("int8", torch.float16), ("int4", torch.float16)])  # fmt: skip
@pytest.mark.parametrize("requests", [[(511, 1)], [(100, 100)]], ids=["decode", "prefill"])
def test_no_worse_than_twice_torch(gpu, kv_dtype, torch_dtype, requests):
    """The error against float64 is at most twice that of torch's attention in the same precision on the same numbers."""
    step = Step(requests, num_q_heads=8, head_dim=128, kv_dtype=kv_dtype, seed=12)
    dtype = str(torch_dtype).removeprefix("torch.")
    case = GpuStep(gpu, step, dtype)
    wanted = case.reference()[0]
    (start, count), dim = requests[0], 128
    q = case.q[:, : 8 * dim].astype(np.float64).reshape(count, 8, dim)
    if kv_dtype == "int4":
        q = rotate(q)
    k, v = (torch.from_numpy(step.cached(0, stream)).to(torch_dtype) for stream in "kv")
    position = torch.arange(start, start + count)[:, None]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q.swapaxes(0, 1).copy()).to(torch_dtype)[None],
        k.repeat_interleave(4, 0)[None], v.repeat_interleave(4, 0)[None],
        attn_mask=(torch.arange(start + count)[None] <= position)[None, None],
    )[0].swapaxes(0, 1).reshape(count, -1).double().numpy()  # fmt: skip
    theirs_error = np.linalg.norm(theirs - wanted) / np.linalg.norm(wanted)
    assert case.error(case.run(dtype)) < 2 * theirs_error


def test_bad_arguments_are_named(gpu):
    case = GpuStep(gpu, Step([(70, 1), (0, 5)]))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        case.plan.build(np.array([0, 2, 1], np.int32), case.starts)
    with pytest.raises(ValueError, match="graph_rows"):
        case.plan.build(np.array([0, 1, 2], np.int32), case.starts, graph_rows=3)
    with pytest.raises(ValueError, match="wanted one in a decode graph"):
        case.plan.build(case.cu, case.starts, graph_rows=2)
    with pytest.raises(ValueError, match="shared_prefixes: got num_tokens 65"):
        case.plan.build(case.cu, case.starts, shared_prefixes=[(0, 1, 65)])
    with pytest.raises(ValueError, match="whose queries begin at 0"):
        case.plan.build(case.cu, case.starts, shared_prefixes=[(0, 2, 64)])
    with pytest.raises(ValueError, match="num_q_heads"):
        _native.GpuAttentionPlan(gpu, _native.KvGroupLayout(1, 2, 64), 3)
    with pytest.raises(ValueError, match="qkv_dtype"):
        _native.GpuAttentionPlan(gpu, _native.KvGroupLayout(1, 2, 64), 4, qkv_dtype="int8")
    with pytest.raises(ValueError, match="exact mode"):
        exact = Step([(3, 1)], exact=True)
        plan = _native.GpuAttentionPlan(gpu, exact.layout, 4, qkv_dtype="bfloat16", exact=True)
        GpuStep(gpu, exact, "bfloat16", plan=plan).run()
