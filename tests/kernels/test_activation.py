"""Gated activations against fp64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.ops.activation import gated_activation

ISAS = ("portable", "avx2", "avx512")
SHAPES = [(1, 1), (3, 7), (2, 16), (5, 17), (1, 63), (20, 1536), (300, 40)]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test under each instruction set that the machine has."""
    before = _native.active_cpu_isa()
    if ISAS.index(request.param) > ISAS.index(_native.detected_cpu_isa()):
        pytest.skip(f"this machine has no {request.param}")
    _native.set_active_cpu_isa(request.param)
    yield request.param
    _native.set_active_cpu_isa(before)


@pytest.fixture
def rng():
    return np.random.default_rng()


def reference(x, activation):
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    # x (1 + tanh u) / 2 without its cancellation where tanh u is nearly -1
    return gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def test_the_reference_is_torch_gelu(rng):
    torch = pytest.importorskip("torch")
    gate = rng.standard_normal((4, 50)) * 3
    want = torch.nn.functional.gelu(torch.from_numpy(gate), approximate="tanh").numpy()
    got = reference(np.hstack([gate, np.ones_like(gate)]), "gelu_tanh")
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(isa, rng, shape, activation):
    x = (rng.standard_normal((shape[0], 2 * shape[1])) * 3).astype(np.float32)
    out = np.full(shape, np.nan, np.float32)
    gated_activation(x, out, activation=activation, num_threads=2)
    # Far out on the negative side e^-2u magnifies the rounding of u; a few large values drown that, a lone one may not.
    assert relative_error(out, reference(x, activation)) < (3e-7 if out.size > 100 else 2e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_every_magnitude(isa, activation):
    gate = np.concatenate([sign * np.logspace(-30, 4, 3000) for sign in (1, -1)]).astype(np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    out = np.full((1, len(gate)), np.nan, np.float32)
    gated_activation(x, out, activation=activation)
    with np.errstate(over="ignore"):
        want = reference(x, activation)
    np.testing.assert_allclose(out, want, rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_special_values(isa, activation):
    gate = np.array([0.0, -0.0, np.inf, np.nan, 1e38, -1e38], np.float32)
    out = np.empty((1, len(gate)), np.float32)
    gated_activation(np.concatenate([gate, np.ones_like(gate)])[None], out, activation=activation)
    np.testing.assert_array_equal(out[0, :5], [0, 0, np.inf, np.nan, np.float32(1e38)])
    assert -10 < out[0, 5] <= 0


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_is_the_same_to_the_bit_on_every_instruction_set(rng, activation):
    before = _native.active_cpu_isa()
    x = (rng.standard_normal((11, 2 * 77)) * 5).astype(np.float32)
    results = []
    for name in ISAS[: ISAS.index(_native.detected_cpu_isa()) + 1]:
        _native.set_active_cpu_isa(name)
        results.append(np.full((11, 77), np.nan, np.float32))
        gated_activation(x, results[-1], activation=activation)
    _native.set_active_cpu_isa(before)
    assert all((result == results[0]).all() for result in results)


def test_bad_input():
    x, out = np.zeros((2, 8), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="activation: got 'relu', wanted silu or gelu_tanh"):
        gated_activation(x, out, activation="relu")
    with pytest.raises(ValueError, match=r"x: got shape .*gate, then up"):
        gated_activation(np.zeros((2, 7), np.float32), out)
    with pytest.raises(ValueError, match="out: got shape"):
        gated_activation(x, np.zeros((2, 8), np.float32))
    with pytest.raises(TypeError, match="out: got dtype float16"):
        gated_activation(x, out.astype(np.float16))
    with pytest.raises(ValueError, match="width"):
        gated_activation(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32))
