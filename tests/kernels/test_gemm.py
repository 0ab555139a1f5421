"""PackedLinear on every instruction set that this machine has."""

import numpy as np
import pytest

from runtime import _native as native
from tests.kernels.gemm_cases import (
    FORMATS,
    ISAS,
    QUANTIZED,
    RandomWeight,
    int8_reference,
    relative_error,
    rms_norm,
    run,
    to_bf16,
)

FP32_ERROR = 2e-6  # one fp32 accumulator over up to 1536 inputs


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.active_cpu_isa()
    native.set_active_cpu_isa(request.param)
    yield request.param
    native.set_active_cpu_isa(before)


def rows(rng, tokens, cols, scale=1.0):
    return (rng.standard_normal((tokens, cols)) * scale).astype(np.float32)


def cols_of(fmt, small):
    return 512 if fmt in ("Q4_K", "Q6_K") else small


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 7, 37])
def test_int8_equals_the_integer_emulation(isa, fmt, tokens):
    rng = np.random.default_rng(tokens)
    weight = RandomWeight(rng, fmt, 85, cols_of(fmt, 160))
    linear = native.pack_linear([weight.native], "int8")
    assert linear.kernel == f"int8_{isa}"
    x = rows(rng, tokens, weight.cols)
    x[0, :32] = 0  # a group without scale
    # Only the fp32 sum over groups may differ: the dots are exact.
    assert relative_error(run(linear, x), int8_reference(x, weight)) < 5e-7


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 26])
def test_exact_mode_equals_fp64(isa, fmt, tokens):
    rng = np.random.default_rng(tokens)
    weight = RandomWeight(rng, fmt, 53, cols_of(fmt, 416))
    linear = native.pack_linear([weight.native], "fp32")
    assert linear.kernel == f"fp32_{isa}"
    x = rows(rng, tokens, weight.cols)
    reference = x.astype(np.float64) @ weight.values.astype(np.float64).T
    assert relative_error(run(linear, x), reference) < FP32_ERROR


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 26])
def test_bf16_equals_fp64_on_rounded_inputs(isa, fmt, tokens):
    rng = np.random.default_rng(tokens)
    weight = RandomWeight(rng, fmt, 53, cols_of(fmt, 416))
    linear = native.pack_linear([weight.native], "bf16")
    assert linear.kernel == f"bf16_{isa}"
    x = rows(rng, tokens, weight.cols)
    reference = to_bf16(x).astype(np.float64) @ to_bf16(weight.values).astype(np.float64).T
    assert relative_error(run(linear, x), reference) < FP32_ERROR


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("activations", ["bf16", "fp32"])
@pytest.mark.parametrize("cols", [1, 15, 33, 257])
def test_float_weights_of_any_width(isa, fmt, activations, cols):
    rng = np.random.default_rng(cols)
    weight = RandomWeight(rng, fmt, 19, cols)
    x = rows(rng, 14, cols)
    norm = rows(rng, 1, cols)[0] + 1
    linear = native.pack_linear([weight.native], activations)
    if activations == "bf16":
        reference = to_bf16(x).astype(np.float64) @ to_bf16(weight.values).astype(np.float64).T
    else:
        reference = x.astype(np.float64) @ weight.values.astype(np.float64).T
    assert relative_error(run(linear, x), reference) < FP32_ERROR
    if activations == "fp32":
        reference = rms_norm(x, norm, 1e-3) @ weight.values.astype(np.float64).T
        assert relative_error(run(linear, x, norm_weight=norm, norm_eps=1e-3), reference) < FP32_ERROR


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_int8_bits_are_the_same_on_every_isa(fmt):
    """Norm, quantisation, dot, bias, gate and residual: equal bits on every instruction set."""
    rng = np.random.default_rng(11)
    weight = RandomWeight(rng, fmt, 90, cols_of(fmt, 576))
    x, norm = rows(rng, 21, weight.cols, 3.0), rows(rng, 1, weight.cols)[0]
    bias, before = rows(rng, 1, 90)[0], rows(rng, 21, 45)
    results = []
    active = native.active_cpu_isa()
    for name in ISAS:
        native.set_active_cpu_isa(name)
        linear = native.pack_linear([weight.native], "int8")
        outs = [run(linear, x, norm_weight=norm)]
        for gate in ("silu", "gelu_tanh"):
            outs.append(run(linear, x, bias=bias, norm_weight=norm, gate=gate, add_to_out=True, out=before.copy()))
        results.append(outs)
    native.set_active_cpu_isa(active)
    for other in results[1:]:
        for got, wanted in zip(other, results[0]):
            assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("activations", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("fmt", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_batch_invariance(isa, activations, fmt):
    """A token's row has the same bits alone and in any batch, on any number of threads."""
    rng = np.random.default_rng(3)
    tokens, out_rows = (33, 40) if isa == "portable" else (100, 72)
    weight = RandomWeight(rng, fmt, out_rows, 1536 if fmt in ("Q4_1", "Q4_K") and isa != "portable" else 512)
    linear = native.pack_linear([weight.native], activations)
    x = rows(rng, tokens, weight.cols)
    alone = np.concatenate([run(linear, x[t : t + 1]) for t in range(tokens)])
    gated_alone = np.concatenate([run(linear, x[t : t + 1], out_rows // 2, gate="silu") for t in range(tokens)])
    counts = [2, 5, 8, 9, 33] if isa == "portable" else [*range(1, 34), 100]
    for count in counts:
        first = int(rng.integers(0, tokens - count + 1))
        batch = run(linear, x[first : first + count], num_threads=1 + count % 3)
        assert np.array_equal(batch.view(np.uint32), alone[first : first + count].view(np.uint32)), count
        gated = run(linear, x[first : first + count], out_rows // 2, gate="silu", num_threads=1 + count % 2)
        assert np.array_equal(gated.view(np.uint32), gated_alone[first : first + count].view(np.uint32)), count


@pytest.mark.parametrize("activations", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("formats", [("Q4_K", "Q6_K", "Q4_K"), ("Q4_0", "Q8_0", "Q5_0"), ("Q4_1", "Q4_1", "Q6_K")])
@pytest.mark.parametrize("tokens", [1, 19])
def test_segments_of_mixed_formats(isa, activations, formats, tokens):
    rng = np.random.default_rng(tokens)
    weights = [RandomWeight(rng, fmt, n, 512) for fmt, n in zip(formats, (37, 16, 5))]
    linear = native.pack_linear([w.native for w in weights], activations, num_threads=2)
    assert (linear.out_features, linear.in_features) == (58, 512)
    x = rows(rng, tokens, 512)
    # Each segment alone gives the same bits as in the fused linear.
    alone = [run(native.pack_linear([w.native], activations), x) for w in weights]
    assert np.array_equal(run(linear, x, num_threads=3), np.concatenate(alone, 1))


@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("split", [(48, 48), (23, 23), (46,), (10, 20, 30), (50, 8, 2)])
def test_gated(isa, activations, gate, split):
    """Any way of splitting the two halves into segments, edges inside tiles included."""
    rng = np.random.default_rng(sum(split))
    formats = ["Q8_0", "Q4_0", "Q4_1"]
    weights = [RandomWeight(rng, formats[i], n, 96) for i, n in enumerate(split)]
    linear = native.pack_linear([w.native for w in weights], activations)
    half = sum(split) // 2
    for tokens in (1, 13):
        x, bias = rows(rng, tokens, 96), rows(rng, 1, sum(split))[0]
        plain = run(linear, x, bias=bias).astype(np.float64)
        g, up = plain[:, :half], plain[:, half:]
        if gate == "silu":
            reference = g / (1 + np.exp(-g)) * up
        else:
            reference = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up
        assert relative_error(run(linear, x, half, gate=gate, bias=bias), reference) < 1e-6


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gate_activation_is_accurate_over_its_range(isa, gate):
    """The weights pass x through, so that the function itself is seen: -100 to 100, tiny values and zero."""
    matrix = np.array([[1, 0], [0, 1]], np.float32)
    linear = native.pack_linear([native.Weight(matrix, "F32", 2, 2)], "fp32")
    g = np.concatenate([np.linspace(-100, 100, 4001), np.logspace(-30, 0, 50), -np.logspace(-30, 0, 50), [0]])
    x = np.stack([g, np.ones_like(g)], 1).astype(np.float32)
    out = run(linear, x, 1, gate=gate)[:, 0].astype(np.float64)
    g = x[:, 0].astype(np.float64)
    z = -g if gate == "silu" else -2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    reference = g / (1 + np.exp(np.minimum(z, 700)))
    near = z < 80
    # z itself is rounded to fp32, which e^z turns into a relative error of |z| * 2^-24 or so.
    limit = (1e-6 + 3e-7 * np.abs(z)) * np.abs(reference) + 1e-37
    assert np.all(np.abs(out - reference)[near] <= limit[near])
    assert np.all(np.abs(out[~near]) < 1e-30)


def test_bias_residual_and_norm(isa):
    rng = np.random.default_rng(0)
    weight = RandomWeight(rng, "Q4_1", 70, 576)
    x, bias, norm = rows(rng, 11, 576, 5.0), rows(rng, 1, 70)[0], rows(rng, 1, 576)[0]
    before = rows(rng, 11, 70)
    for activations, limit in (("fp32", FP32_ERROR), ("int8", 1e-2), ("bf16", 1e-2)):
        linear = native.pack_linear([weight.native], activations)
        reference = rms_norm(x, norm, 1e-5) @ weight.values.astype(np.float64).T + bias + before
        out = run(linear, x, bias=bias, norm_weight=norm, norm_eps=1e-5, add_to_out=True, out=before.copy())
        assert relative_error(out, reference) < limit, activations


def test_row_order_reaches_the_packed_rows(isa):
    rng = np.random.default_rng(4)
    weight = RandomWeight(rng, "Q4_0", 40, 64)
    order = rng.permutation(40)
    ordered = native.Weight(weight.data, "Q4_0", 40, 64, row_order=order.tolist())
    x = rows(rng, 3, 64)
    for activations in ("int8", "bf16", "fp32"):
        plain = run(native.pack_linear([weight.native], activations), x)
        assert np.array_equal(run(native.pack_linear([ordered], activations), x), plain[:, order])


@pytest.mark.parametrize("out_rows", [1, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("tokens", [1, 9])
def test_output_tails_do_not_touch_neighbours(isa, out_rows, tokens):
    rng = np.random.default_rng(out_rows)
    weight = RandomWeight(rng, "Q8_0", out_rows, 64)
    linear = native.pack_linear([weight.native], "int8")
    x = rows(rng, tokens, 64)
    guarded = np.full(tokens * out_rows + 64, 12345.0, np.float32)
    out = guarded[32 : 32 + tokens * out_rows].reshape(tokens, out_rows)
    out[:] = np.nan
    linear.run(x, out)
    assert relative_error(out, int8_reference(x, weight)) < 5e-7
    assert (guarded[:32] == 12345).all() and (guarded[32 + tokens * out_rows :] == 12345).all()


def test_int8_of_a_float_weight_falls_back_to_bf16_and_says_so(isa):
    rng = np.random.default_rng(8)
    weights = [RandomWeight(rng, "Q4_0", 20, 64), RandomWeight(rng, "F16", 20, 64)]
    linear = native.pack_linear([w.native for w in weights], "int8")
    assert linear.kernel == f"bf16_{isa}"
    assert "segment 1 is F16" in linear.reason and "int8 was asked for" in linear.reason
    x = rows(rng, 4, 64)
    values = np.concatenate([w.values for w in weights])
    reference = to_bf16(x).astype(np.float64) @ to_bf16(values).astype(np.float64).T
    assert relative_error(run(linear, x), reference) < FP32_ERROR


def test_extreme_activations(isa):
    """Huge, tiny and empty groups stay finite; a NaN or infinity is not swallowed."""
    rng = np.random.default_rng(6)
    weight = RandomWeight(rng, "Q4_1", 16, 96)
    linear = native.pack_linear([weight.native], "int8")
    x = rows(rng, 4, 96)
    x[0] *= 1e30
    x[1] *= 1e-30
    x[2] = 1e-42
    x[3] = 0
    out = run(linear, x)
    assert relative_error(out[:1], int8_reference(x[:1], weight)) < 1e-6
    assert relative_error(out[1:2], int8_reference(x[1:2], weight)) < 1e-6
    assert (out[2:] == 0).all()
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = rows(rng, 2, 96)
        poisoned[1, 40] = bad
        result = np.zeros((2, 16), np.float32)
        linear.run(poisoned, result)
        assert np.isfinite(result[0]).all() and not np.isfinite(result[1]).any()


def test_no_tokens(isa):
    linear = native.pack_linear([RandomWeight(np.random.default_rng(0), "Q8_0", 4, 32).native], "int8")
    linear.run(np.zeros((0, 32), np.float32), np.zeros((0, 4), np.float32))


def test_describes_itself():
    weight = RandomWeight(np.random.default_rng(0), "Q4_0", 48, 64)
    linear = native.pack_linear([weight.native], "int8")
    assert linear.packed_bytes == 48 * 64 * 18 // 32 and len(linear.reason.splitlines()) >= 3
    assert "chosen" in linear.reason


def test_bad_input():
    rng = np.random.default_rng(0)
    a, b = RandomWeight(rng, "Q4_0", 17, 64), RandomWeight(rng, "Q4_0", 16, 96)
    with pytest.raises(ValueError, match="in_features 96, wanted 64"):
        native.pack_linear([a.native, b.native], "int8")
    with pytest.raises(ValueError, match="no segments"):
        native.pack_linear([], "int8")
    with pytest.raises(ValueError, match="activations: got 'int4', wanted int8, bf16 or fp32"):
        native.pack_linear([a.native], "int4")
    linear = native.pack_linear([a.native], "int8")
    x, out = np.zeros((2, 64), np.float32), np.zeros((2, 17), np.float32)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 32\], wanted \[\*, 64\]"):
        linear.run(x[:, :32].copy(), out)
    with pytest.raises(ValueError, match="x: got a strided array"):
        linear.run(np.zeros((2, 128), np.float32)[:, ::2], out)
    with pytest.raises(TypeError, match="x: got dtype float64, wanted float32"):
        linear.run(x.astype(np.float64), out)
    with pytest.raises(ValueError, match=r"out: got shape \[2, 16\], wanted \[2, 17\]"):
        linear.run(x, out[:, :16].copy())
    with pytest.raises(ValueError, match="bias: got shape"):
        linear.run(x, out, bias=np.zeros(16, np.float32))
    with pytest.raises(ValueError, match="norm_weight: got shape"):
        linear.run(x, out, norm_weight=np.zeros(63, np.float32))
    with pytest.raises(ValueError, match="norm_eps"):
        linear.run(x, out, norm_weight=np.zeros(64, np.float32), norm_eps=-1.0)
    with pytest.raises(ValueError, match="gate: got 'relu'"):
        linear.run(x, out, gate="relu")
    with pytest.raises(ValueError, match="17 rows, wanted an even number"):
        linear.run(x, out, gate="silu")
    read_only = out.copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out: got a read-only array"):
        linear.run(x, read_only)
    with pytest.raises(ValueError, match="num_tokens"):
        native.bench_linear([linear], 0, 1)
    with pytest.raises(ValueError, match="seconds"):
        native.machine_peaks(1, 0.0)


def test_machine_peaks_reports_every_figure():
    peaks = native.machine_peaks(1, 0.05)
    assert set(peaks) == {"int8_gops", "bf16_gflops", "fp32_gflops", "read_gb_per_second"}
    assert peaks["int8_gops"] > 0 and peaks["fp32_gflops"] > 0 and peaks["read_gb_per_second"] > 0
