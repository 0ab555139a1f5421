"""GPU linears of the sm_80 family: every kernel against fp64, integer paths exactly, on odd shapes."""

import numpy as np
import pytest
import torch

from runtime import _native as native
from tests.kernels.gemm_cases import FORMATS, QUANTIZED, RandomWeight, relative_error
from tests.kernels.gpu_gemm_cases import (
    DTYPES,
    Runner,
    dequantized,
    random_codes,
    random_plain,
    random_two_levels,
)

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}
# kernel: tokens of its tile
HALF_KERNELS = {"u4": [8, 16, 32, 64, 128], "u8": [16, 128], "plain": [16, 64, 128]}
INT8_KERNELS = ["s8_int8_t16", "s8_int8_t128", "u4_channel_int8_t16", "u4_channel_int8_t128"]
TWO_LEVEL_KERNELS = ["u4_two_level_int8_t16", "u4_two_level_int8_t128"]
GROUP_SUM_KERNELS = ["s8_group32_int8_t16", "s8_group32_int8_t64"]


def table(rows, cols, kernel, splits=1):
    """A selection table that leaves nothing but this kernel."""
    return f"{rows} {cols} 1000000 {kernel} {splits}"


def packed(gpu, weights, activations, kernel=None, splits=1, **keywords):
    if kernel:
        rows = sum(w.out_features for w in weights)
        keywords["selection_table"] = table(rows, weights[0].in_features, kernel, splits)
    linear = native.pack_linear_gpu(gpu, weights, activations, **keywords)
    if kernel:
        assert f"table: {kernel}, {splits} splits" in linear.describe_choice(1), linear.describe_choice(1)
    return linear


def half_inputs(rng, tokens, cols, dtype):
    return rng.standard_normal((tokens, cols)).astype(DTYPES[dtype]).astype(np.float32)


def check_half(out, x, values, dtype):
    """At most twice the error of torch's linear of the same precision, and of nothing where that is exact."""
    reference = x.astype(np.float64) @ values.T
    x_torch = torch.from_numpy(x).to(TORCH[dtype])
    expected = torch.nn.functional.linear(x_torch, torch.from_numpy(values).to(TORCH[dtype])).double().numpy()
    assert relative_error(out, reference) <= 2 * relative_error(expected, reference)


def tokens_around(tile):
    """A few, one tile with a rest, more than one tile."""
    return sorted({1, 3, tile - 1, tile + 1})


# ---- 16-bit activations


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "min"])
@pytest.mark.parametrize("tile", HALF_KERNELS["u4"])
def test_u4(gpu, dtype, offset, tile):
    # N and K leave residual tiles; groups of 128 are cut by the end of K, of 32 lie four to a K tile.
    for group, rows, cols in ((32, 80, 320), (64, 144, 200), (128, 33, 328), (-1, 64, 136)):
        rng = np.random.default_rng(group + 1000 * tile)
        weight = random_codes(rng, "u4", rows, cols, group, offset, dtype)
        run = Runner(gpu, packed(gpu, [weight.native], dtype, f"u4_{dtype}_t{tile}"))
        x = half_inputs(rng, tokens_around(tile)[group % 4], cols, dtype)
        check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("codes, offset", [("u8", "zero"), ("u8", "min"), ("s8", "symmetric")])
@pytest.mark.parametrize("tile", HALF_KERNELS["u8"])
def test_u8(gpu, dtype, codes, offset, tile):
    for group, rows, cols in ((16, 80, 208), (32, 48, 136), (128, 33, 264), (-1, 130, 64)):
        rng = np.random.default_rng(group + 1000 * tile)
        weight = random_codes(rng, codes, rows, cols, group, offset, dtype, scale=0.001)
        run = Runner(gpu, packed(gpu, [weight.native], dtype, f"u8_{dtype}_t{tile}"))
        x = half_inputs(rng, tokens_around(tile)[group % 4], cols, dtype)
        check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("tile", HALF_KERNELS["plain"])
def test_plain(gpu, dtype, tile):
    for tokens, rows, cols in ((1, 65, 72), (tile - 1, 48, 136), (tile + 3, 200, 64)):
        rng = np.random.default_rng(tokens)
        weight = random_plain(rng, rows, cols, dtype)
        run = Runner(gpu, packed(gpu, [weight.native], dtype, f"plain_{dtype}_t{tile}"))
        x = half_inputs(rng, tokens, cols, dtype)
        check_half(run(x, out_type=dtype), x, weight.values, dtype)


@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 65])
def test_chosen_kernels(gpu, tokens):
    """What selection itself takes."""
    rng = np.random.default_rng(tokens)
    weight = random_codes(rng, "u4", 208, 448, 128, "zero", "bf16")
    linear = packed(gpu, [weight.native], "bf16")
    x = half_inputs(rng, tokens, 448, "bf16")
    check_half(Runner(gpu, linear)(x, out_type="bf16"), x, weight.values, "bf16")


# ---- int8 activations


def int8_inputs(rng, tokens, cols):
    x = rng.integers(-127, 128, (tokens, cols)).astype(np.int8)
    return x, rng.uniform(0.5, 2, tokens).astype(np.float32), x.sum(1, dtype=np.int32)


def exact_codes(rng, codes, rows, cols, offset):
    """One scale of 1 per channel, so that the outputs are the integers themselves."""
    weight = random_codes(rng, codes, rows, cols, -1, offset, "f16")
    low = 8 if codes == "u4" else 0
    zeros = rng.integers(0, 16, (rows, 1)) if offset == "zero" else np.full((rows, 1), low)
    keywords = {"zeros": zeros.astype(np.uint8)} if offset == "zero" else {"common_zero": low}
    raw = rng.integers(0, 16, (rows, cols)) if codes == "u4" else rng.integers(-128, 128, (rows, cols))
    storage = raw.astype(np.uint8) if codes == "u4" else raw.astype(np.int8).view(np.uint8)
    ones = np.ones((rows, 1), np.float32)
    del weight
    return native.CanonicalWeight(codes, storage, rows, cols, scales=ones, **keywords), raw - zeros


@pytest.mark.parametrize("kernel", INT8_KERNELS)
@pytest.mark.parametrize("splits", [1, 2])
def test_int8_sums_are_exact(gpu, kernel, splits):
    rng = np.random.default_rng(splits)
    codes = kernel[:2]
    for tokens, rows, cols in ((3, 80, 1040), (17, 130, 1536)):
        offset = "zero" if codes == "u4" else "symmetric"
        weight, centred = exact_codes(rng, codes, rows, cols, offset)
        run = Runner(gpu, packed(gpu, [weight], "int8", kernel, splits))
        x, _, sums = int8_inputs(rng, tokens, cols)
        exact = x.astype(np.int64) @ centred.T
        assert np.abs(exact).max() < 2**24
        out = run(x, x_scale=np.ones(tokens, np.float32), x_sum=sums)
        np.testing.assert_array_equal(out.astype(np.int64), exact)


@pytest.mark.parametrize("kernel", TWO_LEVEL_KERNELS)
@pytest.mark.parametrize("group, cols", [(128, 1040), (64, 1100), (32, 1024)])
def test_two_level_sums_are_exact(gpu, kernel, group, cols):
    rng = np.random.default_rng(group)
    for tokens, splits in ((3, 1), (18, 2)):
        weight = random_two_levels(rng, 72, cols, group, unit_scales=True)
        run = Runner(gpu, packed(gpu, [weight.native], "int8", kernel, splits))
        x, _, _ = int8_inputs(rng, tokens, cols)
        out = run(x, x_scale=np.ones(tokens, np.float32), x_padding=-cols % 16)
        np.testing.assert_array_equal(out.astype(np.int64), x.astype(np.int64) @ weight.codes.T)


@pytest.mark.parametrize("kernel", GROUP_SUM_KERNELS)
def test_group_sums(gpu, kernel):
    """Integers of each group exactly; fp32 sums over the groups."""
    rng = np.random.default_rng(1)
    for tokens, rows, cols in ((1, 80, 288), (19, 65, 160)):
        weight = random_codes(rng, "s8", rows, cols, 32, "symmetric", "f16", scale=0.001)
        run = Runner(gpu, packed(gpu, [weight.native], "int8", kernel))
        x, scale, _ = int8_inputs(rng, tokens, cols)
        reference = (x.astype(np.float64) @ weight.values.T) * scale[:, None].astype(np.float64)
        assert relative_error(run(x, x_scale=scale), reference) < 3e-7


@pytest.mark.parametrize("kernel", INT8_KERNELS + TWO_LEVEL_KERNELS)
def test_int8_scales(gpu, kernel):
    rng = np.random.default_rng(2)
    if "two_level" in kernel:
        weight = random_two_levels(rng, 40, 256, 128, unit_scales=False)
    else:
        weight = random_codes(rng, kernel[:2], 40, 256, -1, "zero" if kernel[0] == "u" else "symmetric", "f16")
    x, scale, sums = int8_inputs(rng, 5, 256)
    reference = (x.astype(np.float64) @ weight.values.T) * scale[:, None].astype(np.float64)
    out = Runner(gpu, packed(gpu, [weight.native], "int8", kernel))(x, x_scale=scale, x_sum=sums)
    assert relative_error(out, reference) < 2e-7


# ---- exact mode and what only the naive kernel takes


@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_mode(gpu, fmt):
    rng = np.random.default_rng(3)
    cols = 512 if fmt in ("Q4_K", "Q6_K") else 96
    weight = RandomWeight(rng, fmt, 70, cols)
    linear = packed(gpu, [weight.native], "f32")
    assert linear.kernel == "naive_f32"
    x = rng.standard_normal((5, cols)).astype(np.float32)
    out = Runner(gpu, linear)(x)
    sums = np.zeros((5, 70), np.float32)  # one fused multiply-add per input, K ascending: in fp64, rounded each time
    for k in range(cols):
        sums = (sums.astype(np.float64) + x[:, k : k + 1].astype(np.float64) * weight.values[:, k]).astype(np.float32)
    np.testing.assert_array_equal(out, sums)


@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K", "Q4_1"])
def test_int8_of_formats_without_an_integer_kernel(gpu, fmt):
    """Mins would need group sums of the input, groups of 16 half a K step: the naive kernel says so and is right."""
    rng = np.random.default_rng(4)
    weight = RandomWeight(rng, fmt, 40, 256)
    linear = packed(gpu, [weight.native], "int8")
    assert linear.kernel == "naive_f32"
    assert ("mins would need" if fmt != "Q6_K" else "wants groups of 32") in linear.reason
    x, scale, _ = int8_inputs(rng, 3, 256)
    reference = (x.astype(np.float64) @ weight.values.T.astype(np.float64)) * scale[:, None]
    assert relative_error(Runner(gpu, linear)(x, x_scale=scale), reference) < 1e-6


@pytest.mark.parametrize("in_blocks", [False, True])
def test_e4m3_where_no_kernel_is_built_for_it(gpu, in_blocks):
    """Scales per row and token, or of 128 x 128 blocks and of each 128 inputs of a token."""
    rng = np.random.default_rng(13)
    tokens, rows, cols = 5, 130, 320
    codes = (rng.standard_normal((rows, cols)) * 50).astype(DTYPES["e4m3"])
    cells = (-(-rows // 128), -(-cols // 128)) if in_blocks else (rows, 1)
    scales = rng.uniform(0.5, 2, cells).astype(np.float32)
    blocks = {"group": 128, "group_rows": 128} if in_blocks else {}
    weight = native.CanonicalWeight("e4m3", codes.view(np.uint8), rows, cols, scales=scales, **blocks)
    wide = np.repeat(np.repeat(scales, 128, 0)[:rows], 128, 1)[:, :cols] if in_blocks else scales
    values = codes.astype(np.float64) * wide
    np.testing.assert_array_equal(dequantized(weight), values.astype(np.float32))
    x = (rng.standard_normal((tokens, cols)) * 50).astype(DTYPES["e4m3"])
    x_scale = rng.uniform(0.5, 2, (tokens, -(-cols // 128)) if in_blocks else tokens).astype(np.float32)
    wide_scale = np.repeat(x_scale, 128, 1)[:, :cols] if in_blocks else x_scale[:, None]
    reference = (x.astype(np.float64) * wide_scale) @ values.T
    linear = packed(gpu, [weight], "e4m3")
    assert relative_error(Runner(gpu, linear)(x, x_scale=x_scale), reference) < 1e-6


# ---- GGUF


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_gguf_formats(gpu, fmt, dtype):
    rng = np.random.default_rng(5)
    cols = 512 if fmt in ("Q4_K", "Q6_K") else 160
    weight = RandomWeight(rng, fmt, 90, cols)
    linear = packed(gpu, [weight.native], dtype)
    assert linear.kernel == {"F32": "mma_plain16", "F16": "mma_plain16", "BF16": "mma_plain16"}.get(
        fmt, "mma_u4_group" if fmt.startswith("Q4") else "mma_u8_group"
    )
    x = half_inputs(rng, 4, cols, dtype)
    check_half(Runner(gpu, linear)(x, out_type=dtype), x, weight.values.astype(np.float64), dtype)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_canonical_form_is_exact(fmt):
    rng = np.random.default_rng(6)
    weight = RandomWeight(rng, fmt, 9, 512)
    canonical = native.CanonicalWeight.of(weight.native)
    np.testing.assert_array_equal(dequantized(canonical), weight.values)


@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_0", "Q5_0"])
def test_int8_of_symmetric_gguf_formats(gpu, fmt):
    rng = np.random.default_rng(7)
    weight = RandomWeight(rng, fmt, 40, 96)
    linear = packed(gpu, [weight.native], "int8")
    assert linear.kernel == "mma_s8_group32"
    x, scale, _ = int8_inputs(rng, 3, 96)
    reference = (x.astype(np.float64) @ weight.values.T.astype(np.float64)) * scale[:, None]
    assert relative_error(Runner(gpu, linear)(x, x_scale=scale), reference) < 3e-7


def test_segments_of_different_formats(gpu):
    """Neighbours of one kind share a matrix, others are launched apart; all write into one output."""
    rng = np.random.default_rng(8)
    weights = [RandomWeight(rng, fmt, rows, 256) for fmt, rows in (("Q4_K", 40), ("Q4_K", 24), ("Q6_K", 19))]
    linear = packed(gpu, [w.native for w in weights], "bf16")
    assert linear.kernel == "mma_u4_group, mma_u8_group" and linear.num_parts == 2
    values = np.concatenate([w.values for w in weights]).astype(np.float64)
    x = half_inputs(rng, 9, 256, "bf16")
    bias = rng.standard_normal(83).astype(np.float32)
    out = Runner(gpu, linear)(x, bias=bias)
    assert relative_error(out - bias, x.astype(np.float64) @ values.T) < 3e-3


# ---- packing


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("codes", ["u4", "u8"])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "min"])
def test_unpack_undoes_pack(gpu, dtype, codes, offset):
    rng = np.random.default_rng(9)
    for group, rows, cols in ((32, 80, 200), (128, 33, 264), (-1, 65, 70)):
        weight = random_codes(rng, codes, rows, cols, group, offset, dtype)
        packed_weight = packed(gpu, [weight.native], dtype).unpack()
        assert packed_weight.codes == codes and packed_weight.group == group
        for field in ("data", "scales", "zeros", "mins"):  # scales of this type: not rounded
            assert getattr(packed_weight, field) == getattr(weight.native, field), field
        assert packed_weight.common_zero == (0 if offset == "min" else weight.native.common_zero) or offset == "zero"


@pytest.mark.parametrize(
    "make, activations",
    [
        (lambda rng: random_plain(rng, 70, 90, "bf16"), "bf16"),
        (lambda rng: random_codes(rng, "s8", 70, 90, -1, "symmetric", "f16"), "int8"),
        (lambda rng: random_codes(rng, "s8", 70, 96, 32, "symmetric", "f16"), "int8"),
        (lambda rng: random_codes(rng, "u4", 70, 90, -1, "zero", "f16"), "int8"),
        (lambda rng: random_two_levels(rng, 70, 200, 128, False), "int8"),
        (lambda rng: random_codes(rng, "u4", 70, 90, 32, "min", "f16"), "f32"),
    ],
)
def test_unpacked_values(gpu, make, activations):
    weight = make(np.random.default_rng(10))
    np.testing.assert_array_equal(
        dequantized(packed(gpu, [weight.native], activations).unpack()), dequantized(weight.native)
    )


@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K", "Q4_0"])
@pytest.mark.parametrize("dtype, bits", [("f16", 11), ("bf16", 8)])
def test_rounding_of_packed_scales(gpu, fmt, dtype, bits):
    """The one place where packing rounds: scale and min of a group, each once, to the activation type."""
    rng = np.random.default_rng(11)
    weight = RandomWeight(rng, fmt, 40, 256)
    exact = native.CanonicalWeight.of(weight.native)
    rounded = packed(gpu, [weight.native], dtype).unpack()
    assert rounded.data == exact.data
    smallest = 2.0**-24 if dtype == "f16" else 0.0
    for field in ("scales", "mins"):
        before = np.frombuffer(getattr(exact, field), np.float32)
        after = np.frombuffer(getattr(rounded, field), np.float32)
        assert (np.abs(after - before) <= np.abs(before) * 2.0**-bits + smallest / 2).all()


def test_reordered_inputs(gpu):
    rng = np.random.default_rng(12)
    order = rng.permutation(200).astype(np.int32)
    plain = random_codes(rng, "u4", 40, 200, 64, "zero", "bf16")
    weight = native.CanonicalWeight(
        "u4",
        np.frombuffer(plain.native.data, np.uint8),
        40,
        200,
        group=64,
        scales=plain.scales,
        zeros=np.frombuffer(plain.native.zeros, np.uint8),
        input_order=order,
    )
    values = np.empty_like(plain.values)
    values[:, order] = plain.values
    np.testing.assert_array_equal(dequantized(weight), values.astype(np.float32))
    x = half_inputs(rng, 11, 200, "bf16")
    check_half(Runner(gpu, packed(gpu, [weight], "bf16"))(x, out_type="bf16", x_padding=8), x, values, "bf16")
