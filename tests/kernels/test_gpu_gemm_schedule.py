"""GPU linears: splits, epilogues, soft partitions, batch invariance, orders of warps, mutations, bad arguments."""

from pathlib import Path

import numpy as np
import pytest

from runtime import _native as native
from tests.kernels.gemm_cases import RandomWeight, relative_error
from tests.kernels.gpu_gemm_cases import Runner, random_codes, random_plain, random_two_levels
from tests.kernels.test_gpu_gemm import check_half, half_inputs, int8_inputs, packed


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# ---- split-K


@pytest.mark.parametrize("kernel", ["u4_bf16_t8", "u4_bf16_t16", "u4_bf16_t64", "plain_f16_t16", "u8_bf16_t128"])
@pytest.mark.parametrize("splits", [2, 3])
def test_splits(gpu, kernel, splits):
    kind, dtype, _ = kernel.split("_")
    rng = np.random.default_rng(splits)
    cols = 2000
    if kind == "plain":
        weight = random_plain(rng, 200, cols, dtype)
    else:
        weight = random_codes(rng, kind, 200, cols, 32, "zero", dtype)
    run = Runner(gpu, packed(gpu, [weight.native], dtype, kernel, splits))
    x = half_inputs(rng, 19, cols, dtype)
    first = run(x, out_type=dtype)
    check_half(first, x, weight.values, dtype)
    # The same bits again, in another order of CTAs and warps: nothing is added in the order of arrival.
    np.testing.assert_array_equal(run(x, out_type=dtype, num_ctas=3), first)
    np.testing.assert_array_equal(run(x, out_type=dtype, num_ctas=1), first)


def test_number_of_ctas_changes_no_bit(gpu):
    rng = np.random.default_rng(0)
    weight = random_codes(rng, "u4", 400, 256, 64, "symmetric", "bf16")
    run = Runner(gpu, packed(gpu, [weight.native], "bf16", "u4_bf16_t8"))
    x = half_inputs(rng, 21, 256, "bf16")
    whole = run(x)
    for num_ctas in (1, 2, 5, 1000):
        np.testing.assert_array_equal(run(x, num_ctas=num_ctas), whole)


# ---- epilogue


@pytest.mark.parametrize("kernel", ["u4_f16_t8", "u4_f16_t128", "u4_two_level_int8_t16", "u4_channel_int8_t128"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gated(gpu, kernel, splits, gate):
    """Halves whose rows are no multiple of eight, cut into segments at odd places."""
    rng = np.random.default_rng(splits)
    cols, half = 1040, 84
    kind, activations = kernel.rsplit("_", 2)[0], kernel.split("_")[-2]
    if "two_level" in kind:
        weights = [random_two_levels(rng, rows, cols, 128, False) for rows in (84, 84)]
    elif "channel" in kind:
        weights = [random_codes(rng, "u4", rows, cols, -1, "zero", "f16") for rows in (100, 68)]
    else:
        weights = [random_codes(rng, "u4", rows, cols, 32, "min", "f16") for rows in (50, 70, 48)]
    values = np.concatenate([w.values for w in weights])
    linear = packed(gpu, [w.native for w in weights], activations, kernel, splits, interleaves_gate=True)
    bias = rng.standard_normal(2 * half).astype(np.float32) * 0.1
    keywords = {}
    if activations == "int8":
        x, scale, sums = int8_inputs(rng, 9, cols)
        scale *= np.float32(0.003)
        keywords = {"x_scale": scale, "x_sum": sums}
        product = (x.astype(np.float64) @ values.T) * scale[:, None] + bias
    else:
        x = half_inputs(rng, 9, cols, activations)
        product = x.astype(np.float64) @ values.T + bias
    activation = silu if gate == "silu" else gelu_tanh
    expected = activation(product[:, :half]) * product[:, half:]
    out = Runner(gpu, linear)(x, gate=gate, bias=bias, out_padding=3, **keywords)
    assert relative_error(out, expected) < (1e-5 if activations == "int8" else 2e-3)


def test_gated_of_different_formats(gpu):
    """Q4_K gate with a Q6_K up: one matrix of bytes with mins."""
    rng = np.random.default_rng(1)
    weights = [RandomWeight(rng, fmt, 40, 256) for fmt in ("Q4_K", "Q6_K")]
    linear = packed(gpu, [w.native for w in weights], "f16", interleaves_gate=True)
    assert linear.kernel == "mma_u8_group" and "different kinds" in linear.reason
    x = half_inputs(rng, 3, 256, "f16")
    product = x.astype(np.float64) @ np.concatenate([w.values for w in weights]).T
    out = Runner(gpu, linear)(x, gate="silu")
    assert relative_error(out, silu(product[:, :40]) * product[:, 40:]) < 2e-3


def test_gated_exact_mode(gpu):
    rng = np.random.default_rng(1)
    weights = [RandomWeight(rng, "Q4_1", 21, 96) for _ in range(2)]
    linear = packed(gpu, [w.native for w in weights], "f32", interleaves_gate=True)
    x = rng.standard_normal((6, 96)).astype(np.float32)
    product = x.astype(np.float64) @ np.concatenate([w.values for w in weights]).T.astype(np.float64)
    bias = rng.standard_normal(42).astype(np.float32)
    product += bias
    out = Runner(gpu, linear)(x, gate="gelu_tanh", bias=bias)
    assert relative_error(out, gelu_tanh(product[:, :21]) * product[:, 21:]) < 1e-6


@pytest.mark.parametrize("kernel", ["u4_bf16_t16", "u4_bf16_t64"])
@pytest.mark.parametrize("out_padding", [0, 1, 4])
def test_bias_and_residual(gpu, kernel, out_padding):
    """Rows of 33 outputs and odd strides: vectors of four where they are aligned, single outputs where not."""
    rng = np.random.default_rng(2)
    weight = random_codes(rng, "u4", 36 if out_padding else 33, 192, 64, "zero", "bf16")
    rows = weight.native.out_features
    run = Runner(gpu, packed(gpu, [weight.native], "bf16", kernel))
    x = half_inputs(rng, 5, 192, "bf16")
    bias = rng.standard_normal(rows).astype(np.float32)
    before = rng.standard_normal((5, rows)).astype(np.float32)
    plain = run(x, out_padding=out_padding)
    # Each addition is one rounding in fp32.
    np.testing.assert_array_equal(run(x, bias=bias, out_padding=out_padding), plain + bias)
    added = run(x, bias=bias, out=before, add_to_out=True, out_padding=out_padding)
    np.testing.assert_array_equal(added, before + (plain + bias))


@pytest.mark.parametrize("out_type", ["f16", "bf16"])
@pytest.mark.parametrize("out_padding", [0, 1])
def test_output_types(gpu, out_type, out_padding):
    from tests.kernels.gpu_gemm_cases import DTYPES

    rng = np.random.default_rng(3)
    weight = random_plain(rng, 70, 128, "f16")
    run = Runner(gpu, packed(gpu, [weight.native], "f16"))
    x = half_inputs(rng, 4, 128, "f16")
    rounded = run(x).astype(DTYPES[out_type]).astype(np.float32)
    np.testing.assert_array_equal(run(x, out_type=out_type, out_padding=out_padding), rounded)


# ---- batch invariance


@pytest.mark.parametrize(
    "codes, activations, choices",
    [
        ("u4", "bf16", [("u4_bf16_t64", 1), ("u4_bf16_t128", 1)]),
        ("plain", "f16", [("plain_f16_t128", 1), ("plain_f16_t64", 1)]),
        ("s8", "int8", [("s8_int8_t16", 1), ("s8_int8_t16", 2), ("s8_int8_t128", 2)]),
    ],
)
def test_batch_invariance(gpu, codes, activations, choices):
    """A token's bits at every number of tokens, through kernels of different tiles; integers through splits too."""
    rng = np.random.default_rng(4)
    if codes == "plain":
        weight = random_plain(rng, 96, 1104, activations)
    elif codes == "u4":
        weight = random_codes(rng, codes, 96, 1104, 32, "zero", activations)
    else:
        weight = random_codes(rng, codes, 96, 1104, -1, "symmetric", "f16")
    limits = [6, 20, 1000]
    text = "".join(f"96 1104 {limit} {name} {splits}\n" for limit, (name, splits) in zip(limits, choices))
    linear = packed(gpu, [weight.native], activations, batch_invariant=True, selection_table=text)
    run = Runner(gpu, linear)
    if activations == "int8":
        x, scale, sums = int8_inputs(rng, 150, 1104)
    else:
        x = half_inputs(rng, 150, 1104, activations)
    outputs = {}
    for tokens in (1, 5, 17, 70, 150):
        keywords = {"x_scale": scale[:tokens], "x_sum": sums[:tokens]} if activations == "int8" else {}
        outputs[tokens] = run(x[:tokens], **keywords)
    for name, splits in choices:
        assert any(f"table: {name}, {splits} splits" in linear.describe_choice(t) for t in (1, 17, 150)), name
    for tokens, out in outputs.items():
        np.testing.assert_array_equal(out, outputs[150][:tokens])


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_batch_invariance_of_the_choice_itself(gpu, tokens):
    rng = np.random.default_rng(5)
    weight = random_codes(rng, "u4", 160, 512, 128, "zero", "bf16")
    run = Runner(gpu, packed(gpu, [weight.native], "bf16", batch_invariant=True))
    x = half_inputs(rng, 200, 512, "bf16")
    np.testing.assert_array_equal(run(x[:tokens]), run(x)[:tokens])


def test_batch_invariance_leaves_other_orders_out(gpu):
    rng = np.random.default_rng(5)
    weight = random_codes(rng, "u4", 64, 128, 32, "zero", "f16")
    linear = packed(gpu, [weight.native], "f16", batch_invariant=True)
    assert "u4_f16_t8: batch invariance" in linear.reason
    assert "u4_f16_t8 " not in linear.describe_choice(1)


# ---- what selection says


def test_describe_choice(gpu):
    rng = np.random.default_rng(6)
    linear = packed(gpu, [random_codes(rng, "u4", 512, 2048, 128, "zero", "bf16").native], "bf16")
    few, many = linear.describe_choice(1), linear.describe_choice(4096)
    assert few.splitlines()[1].split()[0] == "u4_bf16_t8"
    assert many.splitlines()[1].split()[0] in ("u4_bf16_t64", "u4_bf16_t128")
    assert "us predicted" in few and "never ran on hardware" in few
    assert "mma_u8_group: wants u8 or s8 codes" in few


def test_selection_table(gpu):
    rng = np.random.default_rng(7)
    weight = random_codes(rng, "u4", 64, 512, 32, "zero", "f16")
    text = "# by hand\n64 512 4 u4_f16_t16 2\n64 512 100 u4_f16_t64 1  # more\n64 512 200 no_such_kernel 1\n"
    linear = packed(gpu, [weight.native], "f16", selection_table=text)
    assert "table: u4_f16_t16, 2 splits" in linear.describe_choice(4)
    assert "table: u4_f16_t64, 1 splits" in linear.describe_choice(5)
    assert "table: no_such_kernel is no candidate" in linear.describe_choice(101)
    assert "table" not in linear.describe_choice(201)


# ---- races


@pytest.fixture
def seeds():
    def set_seed(seed):
        native.simt_set_seed(seed)

    yield set_seed
    native.simt_set_seed(0)


CASES = {
    "u4_bf16_t8": (lambda rng: random_codes(rng, "u4", 64, 1100, 64, "zero", "bf16"), "bf16", 5, 2),
    "u4_f16_t32": (lambda rng: random_codes(rng, "u4", 80, 600, 32, "min", "f16"), "f16", 33, 1),
    "u4_bf16_t128": (lambda rng: random_codes(rng, "u4", 128, 448, 32, "zero", "bf16"), "bf16", 129, 1),
    "plain_f16_t64": (lambda rng: random_plain(rng, 64, 448, "f16"), "f16", 64, 2),
    "u4_two_level_int8_t16": (lambda rng: random_two_levels(rng, 64, 2048, 128, False), "int8", 9, 2),
    "s8_group32_int8_t64": (lambda rng: random_codes(rng, "s8", 64, 640, 32, "symmetric", "f16"), "int8", 9, 1),
}


def case_of(gpu, kernel):
    """-> a function that runs the case and gives its output."""
    make, activations, tokens, splits = CASES[kernel]
    rng = np.random.default_rng(8)
    weight = make(rng)
    cols = weight.native.in_features
    run = Runner(gpu, packed(gpu, [weight.native], activations, kernel, splits), tokens)
    # One CTA for all work items, so that one follows another in the same shared memory.
    if activations == "int8":
        x, scale, sums = int8_inputs(rng, tokens, cols)
        return lambda: run(x, x_scale=scale, x_sum=sums, num_ctas=1)
    x = half_inputs(rng, tokens, cols, activations)
    return lambda: run(x, x_padding=-cols % 8, num_ctas=1)


@pytest.mark.parametrize("kernel", CASES)
def test_orders_of_warps(gpu, seeds, kernel):
    run = case_of(gpu, kernel)
    first = run()
    for seed in (1, 2, 3):
        seeds(seed)
        np.testing.assert_array_equal(run(), first)


def source_line(site):
    path, line = site.rsplit(":", 1)
    return (Path(__file__).parents[2] / "csrc" / path).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("kernel", ["u4_bf16_t8", "u4_f16_t32", "plain_f16_t64"])
def test_every_barrier_and_wait_is_needed(kernel):
    """With any one of them off, some order of warps reports a race or gives another result.

    But one: the barrier before the count of a split, which orders memory between CTAs; here they run one after another.
    """
    gpu = native.open_gpu("simt")
    run = case_of(gpu, kernel)
    native.simt_take_visited_sites()
    right = run()
    sites = [site for site in native.simt_take_visited_sites() if "gemm" in site]
    assert len(sites) >= 5, sites
    unnoticed = []
    try:
        for site in sites:
            native.simt_set_disabled_site(site)
            for seed in range(4):
                native.simt_set_seed(seed)
                try:
                    if not np.array_equal(case_of(gpu, kernel)(), right):
                        break
                except (RuntimeError, AssertionError):
                    break
            else:
                unnoticed.append(site)
    finally:
        native.simt_set_disabled_site("")
        native.simt_set_seed(0)
    unnoticed = [site for site in unnoticed if "other CTAs" not in source_line(site)]
    assert not unnoticed, unnoticed
    np.testing.assert_array_equal(run(), right)


# ---- bad arguments


def test_bad_arguments(gpu):
    rng = np.random.default_rng(9)
    weight = random_codes(rng, "u4", 48, 96, 32, "zero", "bf16").native
    run = Runner(gpu, packed(gpu, [weight], "bf16"))
    x = half_inputs(rng, 2, 96, "bf16")
    with pytest.raises(ValueError, match="x: got rows of 88, wanted in_features = 96"):
        run(x[:, :88])
    with pytest.raises(ValueError, match="x: got rows that do not begin at multiples of 16"):
        run(x, x_padding=3)
    with pytest.raises(ValueError, match="out: got rows of 40, wanted 48"):
        run(x, columns=40)
    with pytest.raises(ValueError, match="gate: got one, but was packed for runs without a gate"):
        run(x, gate="silu")
    with pytest.raises(ValueError, match="gate: got 'relu'"):
        run(x, gate="relu", columns=48)
    with pytest.raises(ValueError, match="add_to_out: wanted a float32 out"):
        run(x, out_type="bf16", add_to_out=True)
    with pytest.raises(ValueError, match="num_ctas: got -1"):
        run(x, num_ctas=-1)
    with pytest.raises(ValueError, match="workspace: got 256 bytes"):
        run.workspace = native.GpuArray(gpu, [256], "uint8")
        run(x)


def test_bad_int8_arguments(gpu):
    rng = np.random.default_rng(10)
    run = Runner(gpu, packed(gpu, [random_codes(rng, "u4", 48, 96, -1, "zero", "f16").native], "int8"))
    x, scale, sums = int8_inputs(rng, 2, 96)
    with pytest.raises(ValueError, match="x_scale: got none"):
        run(x, x_sum=sums)
    with pytest.raises(ValueError, match="x_sum: got none"):
        run(x, x_scale=scale)
    with pytest.raises(ValueError, match="x_scale: got float32"):
        run(x, x_scale=scale[:1], x_sum=sums)


def test_bad_packing(gpu):
    rng = np.random.default_rng(11)
    weight = random_codes(rng, "u4", 8, 64, 32, "zero", "f16").native
    other = random_codes(rng, "u4", 8, 96, 32, "zero", "f16").native
    with pytest.raises(ValueError, match=r"segments\[1\]: got in_features 96, wanted 64"):
        packed(gpu, [weight, other], "f16")
    with pytest.raises(ValueError, match="segments: got none"):
        packed(gpu, [], "f16")
    with pytest.raises(ValueError, match="activations: got 'int4'"):
        packed(gpu, [weight], "int4")
    with pytest.raises(ValueError, match="selection_table: got line 2"):
        packed(gpu, [weight], "f16", selection_table="\n8 64 u4_f16_t8 1")
    odd = random_codes(rng, "u4", 9, 64, 32, "zero", "f16").native
    with pytest.raises(ValueError, match="segments: got 9 rows, wanted an even number"):
        packed(gpu, [odd], "f16", interleaves_gate=True)
    with pytest.raises(ValueError, match="weight.group: got 48"):
        native.CanonicalWeight("u4", np.zeros(64, np.uint8), 1, 64, group=48, scales=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="weight.data: got code 16"):
        native.CanonicalWeight("u4", np.full(64, 16, np.uint8), 1, 64, scales=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="weight.scales: got 1 values, wanted 2"):
        native.CanonicalWeight("u4", np.zeros(64, np.uint8), 1, 64, group=32, scales=np.ones(1, np.float32))
