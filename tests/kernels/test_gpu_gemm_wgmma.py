"""The hand-written wgmma matmuls: on simt, where wgmma is played through mma.sync, and on a Hopper GPU.

They read the packed layouts of the sm_80 family, whose decoders they share; selection takes them on simt only when a
table names them.
"""

import numpy as np
import pytest
import torch

from runtime import _native as native
from tests.kernels.gemm_cases import relative_error
from tests.kernels.gpu_gemm_cases import DTYPES, Runner, random_codes, random_two_levels

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def packed(gpu, weight, activations, kernel, splits=1, **keywords):
    if gpu.world == "cuda" and gpu.compute_capability != 90:
        pytest.skip(f"code for compute capability 9.0 alone, this is {gpu.compute_capability / 10}")
    table = f"{weight.out_features} {weight.in_features} 1000000 {kernel} {splits}"
    linear = native.pack_linear_gpu(gpu, [weight], activations, selection_table=table, **keywords)
    assert f"table: {kernel}, {splits} splits" in linear.describe_choice(1), linear.reason
    return linear


def check_half(out, x, values, dtype):
    """At most twice the error of torch's linear of the same precision."""
    reference = x.astype(np.float64) @ values.T
    x_torch = torch.from_numpy(x).to(TORCH[dtype])
    expected = torch.nn.functional.linear(x_torch, torch.from_numpy(values).to(TORCH[dtype])).double().numpy()
    assert relative_error(out, reference) <= 2 * relative_error(expected, reference)


def half_inputs(rng, tokens, cols, dtype):
    return rng.standard_normal((tokens, cols)).astype(DTYPES[dtype]).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "min"])
def test_u4(gpu, dtype, offset):
    # One K tile, fewer than stages, more than stages; tiles of tokens and channels with a rest.
    for group, rows, cols, tokens in ((32, 80, 64, 5), (64, 200, 200, 129), (128, 33, 712, 3), (-1, 136, 328, 66)):
        rng = np.random.default_rng(cols)
        weight = random_codes(rng, "u4", rows, cols, group, offset, dtype)
        run = Runner(gpu, packed(gpu, weight.native, dtype, f"gemm_wgmma_u4_{dtype}_t128_sm90"))
        x = half_inputs(rng, tokens, cols, dtype)
        check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_u4_wide_token_tile(gpu, dtype):
    rng = np.random.default_rng(1)
    weight = random_codes(rng, "u4", 72, 264, 64, "zero", dtype)
    run = Runner(gpu, packed(gpu, weight.native, dtype, f"gemm_wgmma_u4_{dtype}_t256_sm90"))
    x = half_inputs(rng, 259, 264, dtype)
    check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("codes, offset", [("u8", "zero"), ("s8", "symmetric")])
def test_u8(gpu, dtype, codes, offset):
    rng = np.random.default_rng(2)
    weight = random_codes(rng, codes, 140, 208, 32, offset, dtype, scale=0.001)
    run = Runner(gpu, packed(gpu, weight.native, dtype, f"gemm_wgmma_u8_{dtype}_t128_sm90"))
    x = half_inputs(rng, 17, 208, dtype)
    check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("codes, kernel", [("s8", "s8_int8"), ("u4", "u4_channel_int8")])
def test_int8_sums_are_exact(gpu, codes, kernel, splits):
    rng = np.random.default_rng(splits)
    rows, cols, tokens = 130, 912, 21
    low, high = (0, 16) if codes == "u4" else (-128, 128)
    raw = rng.integers(low, high, (rows, cols))
    zeros = rng.integers(0, 16, (rows, 1)) if codes == "u4" else np.zeros((rows, 1), np.int64)
    keywords = {"zeros": zeros.astype(np.uint8)} if codes == "u4" else {}
    storage = raw.astype(np.uint8) if codes == "u4" else raw.astype(np.int8).view(np.uint8)
    weight = native.CanonicalWeight(codes, storage, rows, cols, scales=np.ones((rows, 1), np.float32), **keywords)
    run = Runner(gpu, packed(gpu, weight, "int8", f"gemm_wgmma_{kernel}_t128_sm90", splits))
    x = rng.integers(-127, 128, (tokens, cols)).astype(np.int8)
    exact = x.astype(np.int64) @ (raw - zeros).T
    assert np.abs(exact).max() < 2**24
    out = run(x, x_scale=np.ones(tokens, np.float32), x_sum=x.sum(1, dtype=np.int32))
    np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_two_level_sums_are_exact(gpu, group):
    rng = np.random.default_rng(group)
    weight = random_two_levels(rng, 140, 272, group, unit_scales=True)
    run = Runner(gpu, packed(gpu, weight.native, "int8", "gemm_wgmma_u4_two_level_int8_t128_sm90"))
    x = rng.integers(-127, 128, (19, 272)).astype(np.int8)
    out = run(x, x_scale=np.ones(19, np.float32), x_sum=x.sum(1, dtype=np.int32))
    np.testing.assert_array_equal(out, x.astype(np.int64) @ weight.codes.T)


def test_gated_epilogue(gpu):
    rng = np.random.default_rng(5)
    weight = random_codes(rng, "u4", 160, 136, 64, "zero", "bf16")
    kernel = "gemm_wgmma_u4_bf16_t128_sm90"
    run = Runner(gpu, packed(gpu, weight.native, "bf16", kernel, interleaves_gate=True))
    x = half_inputs(rng, 9, 136, "bf16")
    sums = x.astype(np.float64) @ weight.values.T
    gate, up = sums[:, :80], sums[:, 80:]
    assert relative_error(run(x, gate="silu"), gate / (1 + np.exp(-gate)) * up) < 2e-2


@pytest.mark.parametrize("splits", [1, 2])
def test_one_cta_does_every_tile(gpu, splits):
    rng = np.random.default_rng(7)
    weight = random_codes(rng, "u4", 200, 328, 64, "zero", "bf16")
    run = Runner(gpu, packed(gpu, weight.native, "bf16", "gemm_wgmma_u4_bf16_t128_sm90", splits))
    x = half_inputs(rng, 130, 328, "bf16")
    np.testing.assert_array_equal(run(x, num_ctas=1), run(x))


def test_every_wait_and_barrier_is_needed():
    """With any one of them switched off, some order of warps is reported or gives other sums."""
    gpu = native.open_gpu("simt")
    rng = np.random.default_rng(6)
    weight = random_codes(rng, "u4", 128, 520, 64, "zero", "bf16")
    run = Runner(gpu, packed(gpu, weight.native, "bf16", "gemm_wgmma_u4_bf16_t128_sm90"))
    x = half_inputs(rng, 128, 520, "bf16")
    native.simt_take_visited_sites()
    right = run(x)
    sites = [site for site in native.simt_take_visited_sites() if "wgmma_tile_sm90.cuh" in site]
    assert len(sites) == 9, sites  # two waits for copies and their fences, the products' wait, four barriers
    try:
        for site in sites:
            native.simt_set_disabled_site(site)
            noticed = False
            for seed in range(4):
                native.simt_set_seed(seed)
                try:
                    noticed = noticed or not np.array_equal(run(x), right)
                except RuntimeError:
                    noticed = True
                if noticed:
                    break
            assert noticed, site
    finally:
        native.simt_set_disabled_site("")
        native.simt_set_seed(0)
