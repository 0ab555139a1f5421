"""Matmuls whose epilogue stores codes: bit for bit what prepare_rows makes of the same outputs in fp32."""

import numpy as np
import pytest

from runtime import _native as native
from runtime.ops.norm import prepare_rows
from tests.kernels.gemm_cases import RandomWeight
from tests.kernels.gpu_gemm_cases import ARRAY_NAMES, DTYPES, Runner, random_codes, random_two_levels, upload
from tests.kernels.test_gpu_gemm import half_inputs, int8_inputs, packed
from tests.kit.gpu_arrays import download, poisoned

KERNELS = ["u4_bf16_t8", "u4_f16_t128", "s8_int8_t16", "s8_int8_t128", "u4_channel_int8_t128", "u4_two_level_int8_t16",
           "s8_group32_int8_t64", "gemm_wgmma_s8_int8_t128_sm90"]  # fmt: skip


def weights_of(rng, kernel: str, rows: int, cols: int) -> list:
    """Two segments that the kernel takes."""
    halves = (rows // 2 + 8, rows - rows // 2 - 8)
    if "two_level" in kernel:
        return [random_two_levels(rng, n, cols, 128, False) for n in halves]
    if "channel" in kernel:
        return [random_codes(rng, "u4", n, cols, -1, "zero", "f16") for n in halves]
    if "s8" in kernel:
        return [random_codes(rng, "s8", n, cols, 32 if "group32" in kernel else -1, "symmetric", "f16") for n in halves]
    return [random_codes(rng, "u4", n, cols, 32, "min", "f16") for n in halves]


def inputs_of(rng, activations: str, tokens: int, cols: int) -> tuple[np.ndarray, dict]:
    if activations != "int8":
        return half_inputs(rng, tokens, cols, activations), {}
    x, scale, sums = int8_inputs(rng, tokens, cols)
    return x, {"x_scale": scale * np.float32(0.003), "x_sum": sums}


def coded_run(gpu, linear, x, out_type: str, code_scale: float, padding: int = 0, wants_sums: bool = True, **keywords):
    """(codes, scales, sums) of a linear packed with quantises_output."""
    gated = keywords.get("gate") is not None
    columns = linear.out_features // (2 if gated else 1)
    tokens = len(x)
    out = poisoned(gpu, (tokens, columns + padding), ARRAY_NAMES[out_type])
    workspace = upload(gpu, np.zeros(linear.workspace_bytes(tokens), np.uint8), "uint8")
    scales = poisoned(gpu, (tokens,), "float32")
    sums = poisoned(gpu, (tokens,), "int32") if out_type == "int8" and wants_sums else None
    dtypes = {"bias": "float32", "x_scale": "float32", "x_sum": "int32"}
    arrays = {name: upload(gpu, keywords.pop(name), dtype) for name, dtype in dtypes.items() if name in keywords}
    linear.run(
        upload(gpu, x.astype(DTYPES[linear.activations]), ARRAY_NAMES[linear.activations]), out, workspace,
        out_code_scale=code_scale, out_scale=scales, out_sum=sums, **arrays, **keywords,
    )  # fmt: skip
    counters = np.empty(workspace.shape, np.uint8)
    workspace.download(counters)
    assert not counters[: 16384 * 4].any()
    got = download(out).view(np.uint8)
    assert (got[:, columns:] == 0xFF).all(), "wrote past the outputs"
    return got[:, :columns], download(scales), sums and download(sums)


def separately(gpu, values: np.ndarray, out_type: str, code_scale: float):
    """The same by prepare_rows over fp32 outputs."""
    out = poisoned(gpu, values.shape, ARRAY_NAMES[out_type])
    scales = poisoned(gpu, (len(values),), "float32")
    sums = poisoned(gpu, (len(values),), "int32") if out_type == "int8" else None
    prepare_rows(upload(gpu, values, "float32"), out, scale=scales, code_sum=sums, code_scale=code_scale)
    return download(out).view(np.uint8), download(scales), sums and download(sums)


def check_equal(got, wanted) -> None:
    for one, other in zip(got, wanted, strict=True):
        if other is None:
            assert one is None
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("out_type", ["int8", "e4m3"])
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
def test_codes_are_those_of_a_separate_pass(gpu, kernel, out_type, gate):
    """Residual tiles, odd rows, biases, splits, and values beyond the type's ends."""
    rng = np.random.default_rng(len(kernel))
    rows, cols = (168, 1040) if "sm90" not in kernel else (168, 512)
    activations = next(name for name in ("int8", "bf16", "f16") if name in kernel)
    weights = weights_of(rng, kernel, rows, cols)
    for tokens, splits, padding in ((9, 1, 3), (3, 2, 4)):
        if splits > 1 and "sm90" in kernel:
            continue
        x, keywords = inputs_of(rng, activations, tokens, cols)
        bias = rng.standard_normal(rows).astype(np.float32) * 0.1
        linears = [
            packed(
                gpu, [w.native for w in weights], activations, kernel, splits,
                interleaves_gate=gate is not None, quantises_output=quantises,
            )
            for quantises in (False, True)
        ]  # fmt: skip
        values = Runner(gpu, linears[0])(x, gate=gate, bias=bias, **keywords)
        code_scale = float(np.float32(np.abs(values).max() / (200 if out_type == "int8" else 700)))
        got = coded_run(gpu, linears[1], x, out_type, code_scale, padding, gate=gate, bias=bias, **keywords)
        check_equal(got, separately(gpu, values, out_type, code_scale))
        again = coded_run(
            gpu, linears[1], x, out_type, code_scale, padding, gate=gate, bias=bias, num_ctas=1, **keywords
        )
        check_equal(again, got)
        assert len(np.unique(got[0])) > 40


def test_the_naive_kernel_stores_codes_too(gpu):
    rng = np.random.default_rng(5)
    weight = RandomWeight(rng, "Q4_1", 42, 96)
    x = rng.standard_normal((6, 96)).astype(np.float32)
    for gate in (None, "silu"):
        plain, coded = (
            packed(gpu, [weight.native], "f32", interleaves_gate=gate is not None, quantises_output=quantises)
            for quantises in (False, True)
        )
        assert coded.kernel == "naive_f32"
        values = Runner(gpu, plain)(x, gate=gate)
        for out_type in ("int8", "e4m3"):
            check_equal(coded_run(gpu, coded, x, out_type, 0.02, gate=gate), separately(gpu, values, out_type, 0.02))


def test_segments_of_different_formats_share_a_row_of_codes(gpu):
    """Two launches: both add to the sums, the first sets the scales."""
    rng = np.random.default_rng(8)
    weights = [RandomWeight(rng, fmt, rows, 256).native for fmt, rows in (("Q4_K", 40), ("Q6_K", 19))]
    plain, coded = (packed(gpu, weights, "bf16", quantises_output=quantises) for quantises in (False, True))
    assert coded.num_parts == 2
    x = half_inputs(rng, 9, 256, "bf16")
    check_equal(coded_run(gpu, coded, x, "int8", 0.05), separately(gpu, Runner(gpu, plain)(x), "int8", 0.05))


def test_a_chain_of_two_layers_without_a_pass_between(gpu):
    """W8A8 gate and up, then W4A8 with zeros, which meet the sums: as with the rows quantised apart."""
    rng = np.random.default_rng(3)
    gate_up = [random_codes(rng, "s8", 128, 256, -1, "symmetric", "f16").native for _ in range(2)]
    down = packed(gpu, [random_codes(rng, "u4", 72, 128, -1, "zero", "f16").native], "int8")
    plain, coded = (
        packed(gpu, gate_up, "int8", interleaves_gate=True, quantises_output=quantises) for quantises in (False, True)
    )
    x, keywords = inputs_of(rng, "int8", 5, 256)
    values = Runner(gpu, plain)(x, gate="silu", **keywords)
    code_scale = float(np.float32(np.abs(values).max() / 127))
    outputs = []
    for codes, scales, sums in (
        coded_run(gpu, coded, x, "int8", code_scale, gate="silu", **keywords),
        separately(gpu, values, "int8", code_scale),
    ):
        outputs.append(Runner(gpu, down)(codes.view(np.int8), x_scale=scales, x_sum=sums))
    np.testing.assert_array_equal(*outputs)
    assert np.abs(outputs[0]).max() > 0


def test_nan_and_what_is_too_large(gpu):
    weight = native.CanonicalWeight("f16", np.eye(64, dtype=np.float16).view(np.uint8), 64, 64)
    linear = packed(gpu, [weight], "f16", quantises_output=True)
    x = np.zeros((1, 64), np.float32)
    x[0, :4] = 30000, -30000, 127.5, -128.5
    codes, _, sums = coded_run(gpu, linear, x, "int8", 1.0)
    assert codes.view(np.int8)[0, :5].tolist() == [127, -128, 127, -128, 0] and sums[0] == -2
    codes = coded_run(gpu, linear, x, "e4m3", 1.0)[0].view(DTYPES["e4m3"]).astype(np.float32)
    assert codes[0, :5].tolist() == [448, -448, 128, -128, 0]
    x[:] = np.nan
    assert (coded_run(gpu, linear, x, "int8", 1.0)[0].view(np.int8) == -128).all()
    assert np.isnan(coded_run(gpu, linear, x, "e4m3", 1.0)[0].view(DTYPES["e4m3"]).astype(np.float32)).all()


def test_bad_arguments(gpu):
    rng = np.random.default_rng(1)
    weight = random_codes(rng, "u4", 64, 128, 32, "zero", "bf16").native
    plain, coded = (packed(gpu, [weight], "bf16", quantises_output=quantises) for quantises in (False, True))
    x = half_inputs(rng, 2, 128, "bf16")
    with pytest.raises(ValueError, match="packed with quantises_output"):
        Runner(gpu, coded)(x)
    with pytest.raises(ValueError, match="codes where it was packed"):
        coded_run(gpu, plain, x, "int8", 1.0)
    with pytest.raises(ValueError, match="out_code_scale: got 0"):
        coded_run(gpu, coded, x, "int8", 0.0)
    with pytest.raises(ValueError, match="out_code_scale"):
        coded_run(gpu, coded, x, "e4m3", 1e-40)
    with pytest.raises(ValueError, match="add_to_out"):
        coded_run(gpu, coded, x, "int8", 1.0, add_to_out=True)
    with pytest.raises(ValueError, match="code_scale: got .* group"):
        prepare_rows(
            poisoned(gpu, (1, 32), "float32"), poisoned(gpu, (1, 32), "int8"), scale=poisoned(gpu, (1, 1), "float32"),
            group=32, code_scale=1.0,
        )  # fmt: skip
