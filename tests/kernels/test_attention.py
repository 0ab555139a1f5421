"""Paged attention against float64 NumPy, for every codec, instruction set and shape that the contract names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from runtime import _native
from tests.kernels.attention_cases import CODECS, Step, isas, relative_error

# Exact mode is fp32 throughout; otherwise integer codecs compute with 16-bit fixed-point q and p on AVX-512.
EXACT_ERROR = 1e-5
INTEGER_ERROR = 5e-4
MIXED = ["int8:int4", "bf16:int4-plain", "int4:bf16", "fp32:int8", "int8:fp16", "int4-plain:int8", "fp8:int8"]


@pytest.fixture(params=isas())
def isa(request):
    before = _native.active_cpu_isa()
    _native.set_active_cpu_isa(request.param)
    yield request.param
    _native.set_active_cpu_isa(before)


def error_bound(step: Step) -> float:
    is_integer = any(c.startswith("int") for c in (step.layout.k_codec, step.layout.v_codec))
    return INTEGER_ERROR if is_integer and not step.exact else EXACT_ERROR


def check(step: Step) -> None:
    assert max(step.errors(step.run())) < error_bound(step)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kv_dtype", [*CODECS, *MIXED])
def test_matches_float64_for_every_codec(isa, kv_dtype, exact):
    check(Step([(0, 37), (300, 1), (61, 5), (511, 2)], num_q_heads=6, kv_dtype=kv_dtype, exact=exact, seed=1))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4", "fp32"])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 256])
def test_matches_float64_for_every_head_dim(isa, head_dim, kv_dtype):
    check(Step([(0, 19), (97, 3)], head_dim=head_dim, kv_dtype=kv_dtype, seed=2))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8:int4"])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16])
def test_matches_float64_for_every_group(isa, group, kv_dtype):
    check(Step([(130, 1), (0, 11)], num_q_heads=2 * group, head_dim=32, kv_dtype=kv_dtype, seed=3))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_matches_float64_for_every_page_size(isa, page_size, kv_dtype):
    check(Step([(0, 133), (page_size - 1, 2), (page_size, 1)], page_size=page_size, head_dim=32, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4:int8"])
@pytest.mark.parametrize("window", [1, 7, 64, 200])
def test_sliding_window(isa, window, kv_dtype):
    check(Step([(0, 90), (700, 3), (255, 2)], head_dim=32, window=window, kv_dtype=kv_dtype, seed=4))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "fp32"])
def test_soft_cap(isa, kv_dtype, exact):
    step = Step([(0, 70), (200, 1)], head_dim=32, soft_cap=5.0, spread=2.0, kv_dtype=kv_dtype, exact=exact, seed=5)
    check(step)


def test_partial_rotary_and_no_rotary(isa):
    for rotary_dim in (0, 8, 20):
        check(Step([(0, 40)], head_dim=32, rotary_dim=rotary_dim, seed=6))


def test_query_and_key_norm(isa):
    step = Step([(0, 40), (70, 2)], head_dim=48, kv_dtype="fp32", seed=7)
    rng = np.random.default_rng(7)
    step.norms = tuple(1 + 0.1 * rng.standard_normal(48).astype(np.float32) for _ in range(2))
    outputs = step.run()
    assert max(step.errors(outputs)) < EXACT_ERROR
    k = step.split_qkv(0)[1].swapaxes(0, 1)
    assert relative_error(step.cached(0, "k"), k) < 1e-5


def test_long_context_is_split_and_merged(isa):
    for kv_dtype in ("bf16", "int8"):
        check(Step([(2100, 1), (3, 1), (1023, 4)], head_dim=32, kv_dtype=kv_dtype, seed=8))


def test_many_workers_agree_with_one():
    step = Step([(1500, 1), (800, 1), (0, 50)], kv_dtype="int8:int4", seed=9)
    one = step.run(num_threads=1)
    for _ in range(5):
        for a, b in zip(one, step.run(num_threads=7)):
            np.testing.assert_array_equal(a, b)


def chunked(step: Step, lengths) -> list[list[tuple[int, int]]]:
    """Steps that compute every request from position 0, cutting chunks of the given lengths in turn."""
    steps, at = [], [0] * len(step.tokens)
    lengths = itertools.cycle(lengths)
    while any(begin < len(x) for begin, x in zip(at, step.tokens, strict=True)):
        length = next(lengths)
        ends = [min(len(x), begin + length) for begin, x in zip(at, step.tokens)]
        steps.append(list(zip(at, ends)))
        at = ends
    return steps


@pytest.mark.parametrize(("kv_dtype", "window", "soft_cap", "exact"), [
    ("fp32", 0, 0.0, True), ("bf16", 0, 0.0, False), ("fp16", 0, 0.0, False), ("int8", 0, 0.0, False),
    ("int4", 0, 0.0, False), ("int4-plain", 0, 0.0, False), ("int8:int4", 0, 0.0, True), ("bf16:int4", 0, 4.0, False),
    ("fp8", 0, 0.0, False), ("bf16", 100, 0.0, False), ("int8", 100, 0.0, False), ("int8:bf16", 37, 3.0, False),
])  # fmt: skip
def test_a_token_does_not_depend_on_its_chunk(isa, kv_dtype, window, soft_cap, exact):
    """Bit for bit: the same tokens in chunks of 1, 7, 64 and all at once, alone and beside another request."""
    ends = [330, 75]
    case = {
        "num_q_heads": 6, "head_dim": 32, "page_size": 32, "kv_dtype": kv_dtype, "window": window, "soft_cap": soft_cap,
        "exact": exact, "seed": 10, "num_layers": 1, "layer": 0,
    }  # fmt: skip
    step = Step([(0, end) for end in ends], **case)
    whole = step.run([[(0, end) for end in ends]])
    for lengths in ([64], [7], [1], [3, 130, 1, 40]):
        again = Step([(0, end) for end in ends], **case)
        assert np.array_equal(again.tokens[0], step.tokens[0])
        for a, b in zip(whole, again.run(chunked(again, lengths))):
            np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
        np.testing.assert_array_equal(again.arena[again.page_tables[0, :10]], step.arena[step.page_tables[0, :10]])


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_decode_token_does_not_depend_on_the_batch(isa, kv_dtype):
    """2048-token prefill in one chunk, its last token again as a decode row alone and among 31 others."""
    case = {"num_q_heads": 3, "num_kv_heads": 1, "kv_dtype": kv_dtype, "seed": 11, "num_layers": 1, "layer": 0}
    step = Step([(0, 2048)] + [(0, 70)] * 31, **case)
    whole = step.run([[(0, len(x)) for x in step.tokens]])[0][-1]
    many = step.run([[(len(x) - 1, len(x)) for x in step.tokens]])[0][-1]
    np.testing.assert_array_equal(whole, many)
    idle = [(len(x), len(x)) for x in step.tokens[1:]]
    np.testing.assert_array_equal(whole, step.run([[(2047, 2048), *idle]])[0][-1])


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_row_of_one_split_has_the_bits_of_one_that_walks_two(isa, kv_dtype):
    """Rows before position 256 in a tile that reaches past it merge a split they do not see; alone they have one split."""
    case = {"num_q_heads": 6, "num_kv_heads": 2, "kv_dtype": kv_dtype, "seed": 16, "num_layers": 1, "layer": 0}
    step = Step([(0, 262)], **case)
    both = step.run([[(0, 250)], [(250, 262)]])[0]
    again = Step([(0, 262)], **case)
    alone = again.run([[(0, 250)], *([(at, at + 1)] for at in range(250, 262))])[0]
    np.testing.assert_array_equal(both.view(np.int32), alone.view(np.int32))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "int4:bf16"])
@pytest.mark.parametrize(("page_size", "window"), [(16, 0), (64, 0), (128, 90)])
def test_a_wrong_guess_of_the_next_item_changes_nothing(isa, kv_dtype, page_size, window):
    """A worker asks memory for the item `num_threads` further on: right with one thread, mostly wrong or past the end with
    many. Nobody owns the arena's first and last pages, and page tables end in -1."""
    ends = [(140, 141), (15, 16), (64, 65), (0, 1), (300, 301), (63, 64), (129, 130)]
    case = {"page_size": page_size, "window": window, "kv_dtype": kv_dtype, "seed": 17}
    step = Step([(start, end - start) for start, end in ends], **case)
    one = step.run(num_threads=1)
    assert all(np.isfinite(out).all() for out in one)
    for num_threads in (2, 3, 50):
        for a, b in zip(one, step.run(num_threads=num_threads)):
            np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


def test_bf16_error_is_at_most_twice_torch():
    torch = pytest.importorskip("torch")
    step = Step([(0, 200)], num_q_heads=4, num_kv_heads=4, kv_dtype="bf16", seed=12)
    out = step.run()[0]
    q, k, v = (x.swapaxes(0, 1) for x in step.split_qkv(0))
    ref = step.attend_reference(0, k, v)
    arrays = (torch.tensor(x[None]).to(torch.bfloat16) for x in (q, k, v))
    torch_out = torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=True)[0].float().numpy()
    torch_error = relative_error(torch_out.swapaxes(0, 1).reshape(200, -1), ref)
    assert relative_error(out, ref) < 2 * torch_error


def test_quantisation_orders_the_codecs():
    """What a user relies on: fp32 < bf16 < int8 < int4, and rotation helps keys that have loud channels."""
    errors = {}
    for kv_dtype in ("fp32", "bf16", "fp8", "int8", "int4", "int4-plain"):
        step = Step([(0, 300)], kv_dtype=kv_dtype, seed=13)
        out = step.run()[0]
        _, k, v = step.split_qkv(0)
        errors[kv_dtype] = relative_error(out, step.attend_reference(0, k.swapaxes(0, 1), v.swapaxes(0, 1)))
    assert errors["fp32"] < errors["bf16"] < errors["int4"] < errors["int4-plain"]
    assert errors["int8"] < 0.25 * errors["int4"]
    assert errors["bf16"] < errors["fp8"] < errors["int4"]


def test_one_workspace_serves_plans_of_any_shape():
    """The counters of every plan lie in the same first bytes, so no plan's partials ever leave one of them non-zero."""
    layout = _native.KvGroupLayout(1, 3, 64)
    sizes = []
    for starts in ([5000], [9000, 9000, 9000], [100] * 40):
        cu = np.arange(len(starts) + 1, dtype=np.int32)
        plan = _native.attention_plan(cu, np.array(starts, np.int32), layout, num_q_heads=9)
        counters = {(item["request"], item["kv_head"]) for item in plan["items"] if item["num_items"] > 1}
        assert len(counters) <= 48
        sizes.append((plan["workspace_bytes"], plan["counter_bytes"]))
    assert sizes[0][1] == sizes[1][1] > 0
    assert sizes[2] == (0, 0)


def test_requests_without_tokens_and_empty_steps():
    step = Step([(5, 0), (0, 3), (9, 0)], head_dim=16, seed=14)
    check(step)
    out = np.zeros((0, 64), np.float32)
    empty = np.zeros(0, np.int32)
    arrays = (step.arena, np.zeros(1, np.int32), empty, np.zeros((0, 1), np.int32), step.layout)
    qkv = np.zeros((0, 128), np.float32)
    _native.attention_append(qkv, *arrays, num_q_heads=4)
    _native.attention_attend(qkv, out, *arrays, num_q_heads=4, scale=1.0)


def test_strided_rows():
    step = Step([(0, 9)], head_dim=16, seed=15)
    want = step.run()[0]
    wide = np.full((9, 200), np.nan, np.float32)
    qkv, out = wide[:, :128], np.full((9, 100), np.nan, np.float32)[:, :64]
    qkv[:] = step.tokens[0]
    arrays = (step.arena, np.array([0, 9], np.int32), np.zeros(1, np.int32), step.page_tables, step.layout)
    _native.attention_append(qkv, *arrays, layer=1, num_q_heads=4, rope=step.rope)
    _native.attention_attend(qkv, out, *arrays, layer=1, num_q_heads=4, scale=step.scale)
    np.testing.assert_array_equal(out, want)
    assert np.isnan(wide[:, 128:]).all()
    assert np.isnan(out.base[:, 64:]).all()


def test_plan_covers_every_row_and_split_once():
    layout = _native.KvGroupLayout(1, 3, 64, window=600)
    cu = np.array([0, 1, 1, 200, 201], np.int32)
    starts = np.array([5000, 3, 100, 77], np.int32)
    plan = _native.attention_plan(cu, starts, layout, num_q_heads=9)
    seen = {}
    for item in plan["items"]:
        for token in range(*item["tokens"]):
            assert cu[item["request"]] <= token < cu[item["request"] + 1]
            for split in range(*item["splits"]):
                key = (token, item["kv_head"], split)
                assert key not in seen
                seen[key] = item
    pairs = 0
    for request, token in ((0, 0), (2, 50), (2, 199), (3, 200)):
        position = starts[request] + token - cu[request]
        first = max(0, position - 600 + 1) // 256
        splits = {split for t, head, split in seen if t == token and head == 1}
        assert splits >= set(range(first, position // 256 + 1))
    for request in range(4):
        for token in range(cu[request], cu[request + 1]):
            pairs += min(600, starts[request] + token - cu[request] + 1)
    assert plan["score_pairs"] == pairs


def test_a_long_decode_row_is_shared_by_many_workers():
    layout = _native.KvGroupLayout(1, 3, 64)
    cu, starts = np.array([0, 1], np.int32), np.array([5000], np.int32)
    items = _native.attention_plan(cu, starts, layout, num_q_heads=9)["items"]
    assert len(items) >= 32
    assert all(item["num_items"] == len(items) // 3 for item in items)
    for head in range(3):
        splits = sorted(s for item in items if item["kv_head"] == head for s in range(*item["splits"]))
        assert splits == list(range(20))


@pytest.mark.parametrize(("change", "message"), [
    ({"num_q_heads": 5}, "num_q_heads"),
    ({"scale": float("nan")}, "scale"),
    ({"scale": -1.0}, "scale"),
    ({"soft_cap": -2.0}, "soft_cap"),
    ({"layer": 2}, "layer"),
    ({"out": np.zeros((3, 60), np.float32)}, "out"),
    ({"out": np.zeros((3, 64), np.float64)}, "out"),
    ({"qkv": np.zeros((2, 128), np.float32)}, "qkv"),
    ({"cu_seqlens_q": np.array([0, 4, 3], np.int32)}, "cu_seqlens_q"),
    ({"cu_seqlens_q": np.array([1, 2, 3], np.int32)}, "cu_seqlens_q"),
    ({"context_starts": np.array([0, -1], np.int32)}, "context_starts"),
    ({"context_starts": np.array([0, 0], np.int64)}, "context_starts"),
    ({"context_starts": np.array([0, 4000], np.int32)}, "page_tables"),
    ({"page_tables": np.array([[99], [1]], np.int32)}, "page_tables"),
    ({"page_tables": np.array([[-1], [1]], np.int32)}, "page_tables"),
    ({"arena": np.zeros((4, 64), np.uint8)}, "arena"),
])  # fmt: skip
def test_bad_input_names_the_argument(change, message):
    layout = _native.KvGroupLayout(2, 2, 16, 64)
    good = {
        "qkv": np.zeros((3, 128), np.float32),
        "out": np.zeros((3, 64), np.float32),
        "arena": np.zeros((4, layout.page_bytes()), np.uint8),
        "cu_seqlens_q": np.array([0, 2, 3], np.int32),
        "context_starts": np.array([0, 0], np.int32),
        "page_tables": np.array([[0], [1]], np.int32),
        "layout": layout,
        "layer": 0,
        "num_q_heads": 4,
        "scale": 1.0,
    }
    _native.attention_attend(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        _native.attention_attend(**{**good, **change})


def test_positions_past_the_rotary_table_are_refused():
    layout = _native.KvGroupLayout(1, 1, 16, 16)
    rope = _native.RopeTableStorage([1.0] * 8, 20)
    arrays = (np.zeros((2, layout.page_bytes()), np.uint8), np.array([0, 2], np.int32), np.array([19], np.int32))
    with pytest.raises(ValueError, match="rotary table"):
        _native.attention_append(
            np.zeros((2, 48), np.float32), *arrays, np.array([[0, 1]], np.int32), layout, num_q_heads=1, rope=rope
        )


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 1, 64), "num_layers"), ((1, 0, 64), "num_kv_heads"), ((1, 1, 60), "head_dim"), ((1, 1, 264), "head_dim"),
    ((1, 1, 64, 48), "page_size"), ((1, 1, 64, 64, "int3"), "int3"), ((1, 1, 64, 64, "bf16", -1), "window"),
])  # fmt: skip
def test_bad_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.KvGroupLayout(*arguments)


def test_rope_table_is_what_transformers_computes():
    torch = pytest.importorskip("torch")
    inv_freq = 1.0 / (100000.0 ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64))
    rope = _native.RopeTableStorage(inv_freq.tolist(), 4096, 0.75)
    assert (rope.num_positions, rope.rotary_dim) == (4096, 64)
    for position in (0, 1, 777, 4095):
        angles = torch.tensor([float(position)]) * inv_freq
        cos, sin = rope.row(position)
        np.testing.assert_allclose(cos, (angles.cos() * 0.75).numpy(), atol=1e-7)
        np.testing.assert_allclose(sin, (angles.sin() * 0.75).numpy(), atol=1e-7)
    for bad in (([], 4), ([1.0], 0), ([float("nan")], 4), ([1.0], 4, float("inf"))):
        with pytest.raises(ValueError):
            _native.RopeTableStorage(*bad)
    with pytest.raises(ValueError, match="position"):
        rope.row(4096)
