"""The memory plan: what fits, what is said when it does not, how layers fall into KV groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from runtime.kv_plan import available_memory_bytes, kv_groups, plan_kv

SMOLLM2 = SimpleNamespace(
    num_layers=30, num_kv_heads=3, head_dim=64, layer_types=("full",) * 30, sliding_window=None,
    max_position_embeddings=8192,
)  # fmt: skip
TOKEN_BYTES = 30 * 3 * 64 * 2 * 2  # K and V in bf16


def plan(config=SMOLLM2, **overrides):
    arguments = {
        "k_codec": "bf16", "v_codec": "bf16", "page_size": 64, "kv_memory": None, "max_model_len": None, "max_num_seqs": 4,
        "available_bytes": 8 << 30,
    }  # fmt: skip
    return plan_kv(config, **{**arguments, **overrides})


def test_a_page_is_what_its_layers_heads_and_codecs_need():
    assert plan().page_bytes == 64 * TOKEN_BYTES
    halved = plan(k_codec="int8", v_codec="int8").page_bytes
    assert 0.5 < halved / plan().page_bytes < 0.54  # codes are half, and 4 bytes of scale and min a head
    assert plan(k_codec="int8", v_codec="int4").page_bytes < halved


def test_without_a_size_the_pool_holds_a_context_or_every_request_at_an_ordinary_length():
    assert plan().max_cached_tokens == 8192
    assert plan(max_num_seqs=40).max_cached_tokens == 40 * 256
    assert plan(available_bytes=400 << 20).arena_bytes <= 200 << 20


def test_without_a_size_ordinary_requests_get_no_more_than_the_weights_or_256_mib():
    small = plan(max_num_seqs=64, weight_bytes=98 << 20)
    assert small.arena_bytes <= 256 << 20 < small.arena_bytes + small.page_bytes
    assert small.max_cached_tokens >= 32 * 256  # 32 clients of 128 in, 128 out are not preempted
    large = plan(max_num_seqs=64, weight_bytes=4 << 30)
    assert large.max_cached_tokens == 64 * 256
    assert plan(max_num_seqs=64, max_model_len=64).max_cached_tokens == 64 * 64


def test_bytes_and_shares_are_budgets():
    assert plan(kv_memory=100 << 20).arena_bytes <= 100 << 20
    assert plan(kv_memory=100 << 20).num_pages == (100 << 20) // (64 * TOKEN_BYTES)
    assert plan(kv_memory=0.05).num_pages == int((8 << 30) * 0.05) // (64 * TOKEN_BYTES)


def test_an_automatic_context_is_the_largest_that_fits():
    assert plan().max_model_len == 8192
    small = plan(kv_memory=50 << 20)
    assert small.max_model_len == small.num_pages * 64 < 8192


def test_what_does_not_fit_is_said_with_what_would():
    with pytest.raises(
        ValueError, match=r"8192 tokens of KV take 180 MiB and 50 MiB are granted: \d+ tokens would fit"
    ):
        plan(kv_memory=50 << 20, max_model_len=8192)
    with pytest.raises(ValueError, match="got 10000, the model was made for at most 8192"):
        plan(max_model_len=10000)
    with pytest.raises(ValueError, match="one page of 64 tokens takes"):
        plan(kv_memory=1 << 20)
    with pytest.raises(ValueError, match="only 8.00 GiB of memory is free"):
        plan(kv_memory=9 << 30)


def test_full_and_sliding_layers_are_groups_of_their_own():
    config = SimpleNamespace(
        num_layers=4, num_kv_heads=1, head_dim=32, layer_types=("sliding", "sliding", "full", "sliding"),
        sliding_window=16, max_position_embeddings=512,
    )  # fmt: skip
    groups, layers = kv_groups(config, "int8", "int4", 16)
    assert [(group.num_layers, group.window) for group in groups] == [(3, 16), (1, 0)]
    assert [(layer.group, layer.layer_in_group) for layer in layers] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    two = plan(config, page_size=16, max_num_seqs=1)
    assert two.num_groups == 2
    assert two.page_bytes == max((group.page_bytes() + 63) // 64 * 64 for group in two.groups)
    assert two.max_cached_tokens == two.num_pages // 2 * 16 == 512


def test_available_memory_is_a_plausible_number():
    assert 1 << 20 < available_memory_bytes() < 1 << 50
