"""Embedding lookup: exact rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from runtime.ops.embedding import embedding


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "hidden", "num_tokens"), [(1, 1, 1), (50, 7, 3), (300, 576, 200), (90, 33, 1000)]
)
def test_gathers_rows_exactly(rng, dtype, vocab_size, hidden, num_tokens):
    table = rng.standard_normal((vocab_size, hidden)).astype(dtype)
    token_ids = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
    token_ids[[0, -1]] = vocab_size - 1, 0
    out = np.full((num_tokens, hidden), np.nan, np.float32)
    embedding(table, token_ids, out, num_threads=2)
    assert (out == table[token_ids].astype(np.float32)).all()


def test_scales_every_element(rng):
    table = rng.standard_normal((40, 640)).astype(ml_dtypes.bfloat16)
    token_ids = rng.integers(0, 40, 9).astype(np.int32)
    scale = float(np.sqrt(640).astype(ml_dtypes.bfloat16))
    out = np.full((9, 640), np.nan, np.float32)
    embedding(table, token_ids, out, scale=scale)
    assert (out == table[token_ids].astype(np.float32) * np.float32(scale)).all()


@pytest.mark.parametrize("weight_format", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_gathers_rows_of_gguf_blocks(rng, weight_format):
    gguf = pytest.importorskip("gguf")
    quantization = gguf.GGMLQuantizationType[weight_format]
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    table = rng.integers(0, 256, (200, 3 * 256 // block_length * block_bytes)).astype(np.uint8)
    with np.errstate(invalid="ignore"):  # random bytes make some scales infinite
        want = gguf.quants.dequantize(table, quantization)
    finite = np.isfinite(want).all(axis=1)
    token_ids = np.flatnonzero(finite)[::-1].astype(np.int32)
    assert len(token_ids) > 2
    out = np.full((len(token_ids), 768), np.nan, np.float32)
    embedding(table, token_ids, out, weight_format=weight_format)
    np.testing.assert_allclose(out, want[token_ids], rtol=1e-6)


def test_no_tokens():
    embedding(np.zeros((4, 8), np.float32), np.zeros(0, np.int32), np.zeros((0, 8), np.float32))


def test_bad_input():
    table, out = np.zeros((4, 8), np.float32), np.zeros((3, 8), np.float32)
    good = np.zeros(3, np.int32)
    for bad_id in (-1, 4, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"token_ids\[1\]: got {bad_id}, wanted an id in \[0, 4\)"):
            embedding(table, np.array([0, bad_id, 0], np.int32), out)
    with pytest.raises(TypeError, match="token_ids: got dtype int64"):
        embedding(table, good.astype(np.int64), out)
    with pytest.raises(ValueError, match="out: got shape"):
        embedding(table, good, np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="table: got shape"):
        embedding(table, good, np.zeros((3, 9), np.float32))
    with pytest.raises(ValueError, match="table: got shape"):
        embedding(table[0], good, out)
    with pytest.raises(TypeError, match="table: got dtype int32"):
        embedding(table.astype(np.int32), good, out)
    with pytest.raises(TypeError, match="wanted uint8 with a weight_format"):
        embedding(table, good, out, weight_format="Q4_1")
    with pytest.raises(ValueError):
        embedding(np.zeros((4, 33), np.uint8), good, np.zeros((3, 32), np.float32), weight_format="Q8_0")
    for scale in (np.nan, np.inf):
        with pytest.raises(ValueError, match="scale"):
            embedding(table, good, out, scale=scale)
