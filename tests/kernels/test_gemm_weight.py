"""Weight: every GGUF format against PyPI `gguf`'s dequantiser, bit for bit; bad input."""

import mmap

import gguf
import numpy as np
import pytest

from runtime import _native as native
from tests.kernels.gemm_cases import BLOCK, FORMATS, QUANTIZED, random_weight_bytes


def dequantized(data, fmt, rows, cols, **kwargs):
    out = np.full((rows, cols), np.nan, np.float32)
    native.Weight(data, fmt, rows, cols, **kwargs).dequantize(out)
    return out


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 3, 17, 130])
def test_dequantize_equals_gguf_bit_for_bit(fmt, rows):
    rng = np.random.default_rng(rows)
    cols = BLOCK[fmt][0] * 3
    data = random_weight_bytes(rng, fmt, rows, cols)
    wanted = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[fmt])
    got = dequantized(data, fmt, rows, cols)
    assert np.array_equal(got.view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32))


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_float_formats_are_exact(fmt):
    rng = np.random.default_rng(5)
    data = random_weight_bytes(rng, fmt, 7, 33)
    got = dequantized(data, fmt, 7, 33)
    if fmt == "BF16":
        wanted = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(7, 33)
    else:
        wanted = data.view({"F32": np.float32, "F16": np.float16}[fmt]).astype(np.float32).reshape(7, 33)
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_all_fp16_scales_are_exact():
    """Every finite fp16 as the scale of a Q8_0 block: subnormals and both zeros included."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    blocks = np.zeros((len(halves), 34), np.uint8)
    blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = np.arange(32, dtype=np.uint8) * 8
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    got = dequantized(blocks, "Q8_0", len(halves), 32)
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_row_order_and_single_rows():
    rng = np.random.default_rng(9)
    data = random_weight_bytes(rng, "Q4_1", 12, 64)
    order = rng.permutation(12).astype(np.int32)
    plain = dequantized(data, "Q4_1", 12, 64)
    got = dequantized(data, "Q4_1", 12, 64, row_order=order.tolist())
    assert np.array_equal(got, plain[order])
    row = np.full(64, np.nan, np.float32)
    native.Weight(data, "Q4_1", 12, 64, row_order=order.tolist()).dequantize_row(5, row)
    assert np.array_equal(row, plain[order[5]])


def test_any_buffer_is_borrowed(tmp_path):
    rng = np.random.default_rng(2)
    data = random_weight_bytes(rng, "Q8_0", 4, 64)
    wanted = dequantized(data, "Q8_0", 4, 64)
    assert np.array_equal(dequantized(data.tobytes(), "Q8_0", 4, 64), wanted)
    assert np.array_equal(dequantized(memoryview(data.tobytes()), "Q8_0", 4, 64), wanted)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0" * 7 + data.tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)[7:]  # not aligned to anything
        got = np.full((4, 64), np.nan, np.float32)
        weight = native.Weight(view, "Q8_0", 4, 64)
        weight.dequantize(got)
        assert np.array_equal(got, wanted)
        del weight
        view.release()


def test_properties():
    weight = native.Weight(bytes(4 * 18), "Q4_0", 4, 32)
    assert (weight.format, weight.out_features, weight.in_features, weight.num_bytes) == ("Q4_0", 4, 32, 72)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((bytes(10), "Q4_0", 1, 32), "got 10 bytes, wanted 18"),
        ((bytes(18), "Q4_0", 1, 31), "in_features 31, wanted a multiple of 32"),
        ((bytes(144), "Q4_K", 1, 32), "wanted a multiple of 256"),
        ((bytes(18), "Q9_9", 1, 32), "format: got 'Q9_9', wanted one of F32, F16"),
        ((bytes(18), "Q4_0", 0, 32), "out_features 0"),
        ((bytes(18), "Q4_0", 1, -32), "in_features -32"),
        ((bytes(18), "Q4_0", 2**40, 32), "out_features 1099511627776"),
        ((bytes(18), "Q4_0", 1, 32, [1]), "row_order entry 1"),
        ((bytes(18), "Q4_0", 1, 32, [0, 0]), "row_order of 2 entries"),
        ((bytes(18), "Q4_0", 1, 32, []), "row_order: got no entries"),
    ],
)
def test_bad_weights_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        native.Weight(*arguments)


def test_wrong_types():
    with pytest.raises(TypeError, match="data"):
        native.Weight(3.5, "Q4_0", 1, 32)
    weight = native.Weight(bytes(18), "Q4_0", 1, 32)
    with pytest.raises(TypeError, match="out: got dtype float64"):
        weight.dequantize(np.zeros((1, 32)))
    with pytest.raises(ValueError, match="out: got shape"):
        weight.dequantize(np.zeros((2, 32), np.float32))
    with pytest.raises(ValueError, match="row: got 1"):
        weight.dequantize_row(1, np.zeros(32, np.float32))
    strided = np.zeros((36, 2), np.uint8)[:, 0]
    with pytest.raises(ValueError, match="strided"):
        native.Weight(strided, "Q4_0", 2, 32)


def test_format_list_is_complete():
    assert set(FORMATS) == {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}
