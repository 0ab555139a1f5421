"""RMS norm against fp64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.ops.norm import rms_norm

ISAS = ("portable", "avx2", "avx512")
SHAPES = [(1, 1), (3, 7), (2, 15), (5, 16), (1, 17), (4, 33), (1, 63), (40, 576), (3, 960), (2, 4096), (300, 64)]


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


def reference(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def inputs(rng, shape):
    x = (rng.standard_normal(shape) * rng.choice([1e-3, 1.0, 50.0])).astype(np.float32)
    return x, rng.standard_normal(shape[1]).astype(np.float32)


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_equals_the_reference(isa, rng, shape, eps):
    x, weight = inputs(rng, shape)
    out = np.full_like(x, np.nan)
    rms_norm(x, weight, out, eps=eps)
    assert relative_error(out, reference(x, weight, eps)) < 5e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_adds_into_the_residual(isa, rng, shape):
    x, weight = inputs(rng, shape)
    residual = rng.standard_normal(shape).astype(np.float32)
    out = residual.copy()
    rms_norm(x, weight, out, add_to_out=True)
    normed = np.empty_like(x)
    rms_norm(x, weight, normed)
    assert (out == residual + normed).all()


def test_in_place(isa, rng):
    x, weight = inputs(rng, (7, 576))
    want = np.empty_like(x)
    rms_norm(x, weight, want)
    rms_norm(x, weight, x)
    assert (x == want).all()


def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(isa, rng):
    x, weight = inputs(rng, (101, 577))
    together = np.empty_like(x)
    rms_norm(x, weight, together, num_threads=2)
    for row in (0, 13, 100):
        alone = np.empty((1, 577), np.float32)
        rms_norm(x[row : row + 1], weight, alone)
        assert (alone[0] == together[row]).all()


def test_is_the_same_to_the_bit_on_every_instruction_set(rng):
    before = _native.active_cpu_isa()
    x, weight = inputs(rng, (9, 333))
    results = []
    for name in ISAS[: ISAS.index(_native.detected_cpu_isa()) + 1]:
        _native.set_active_cpu_isa(name)
        results.append(np.full_like(x, np.nan))
        rms_norm(x, weight, results[-1])
    _native.set_active_cpu_isa(before)
    assert all((result == results[0]).all() for result in results)


def test_nan_stays_in_its_row(isa, rng):
    x, weight = inputs(rng, (3, 100))
    x[1, 40] = np.nan
    out = np.empty_like(x)
    rms_norm(x, weight, out)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_no_rows(rng):
    rms_norm(np.zeros((0, 8), np.float32), np.zeros(8, np.float32), np.zeros((0, 8), np.float32))


def test_bad_input():
    x, weight, out = np.zeros((2, 8), np.float32), np.zeros(8, np.float32), np.zeros((2, 8), np.float32)
    with pytest.raises(TypeError, match="x: got dtype float64, wanted float32"):
        rms_norm(x.astype(np.float64), weight, out)
    with pytest.raises(TypeError, match="x: got list"):
        rms_norm([[1.0]], weight, out)
    with pytest.raises(ValueError, match=r"weight: got shape \[7\], wanted \[8\]"):
        rms_norm(x, weight[:7], out)
    with pytest.raises(ValueError, match="out: got shape"):
        rms_norm(x, weight, np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match="x: got a strided array"):
        rms_norm(np.zeros((2, 16), np.float32)[:, ::2], weight, out)
    with pytest.raises(ValueError, match="hidden"):
        rms_norm(np.zeros((2, 0), np.float32), np.zeros(0, np.float32), np.zeros((2, 0), np.float32))
    for eps in (np.nan, np.inf, -1e-6):
        with pytest.raises(ValueError, match="eps"):
            rms_norm(x, weight, out, eps=eps)
    with pytest.raises(ValueError, match="out: is `in`"):
        rms_norm(x, weight, x, add_to_out=True)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: got a read-only array"):
        rms_norm(x, weight, out)
