"""KV codecs: the stored bytes are exactly what the contract's formulas say, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from tests.kernels.attention_cases import CODECS, LEVELS, Step, decode_page, e4m3_values, isas, rotate


@pytest.fixture(params=isas())
def isa(request):
    before = _native.active_cpu_isa()
    _native.set_active_cpu_isa(request.param)
    yield request.param
    _native.set_active_cpu_isa(before)


def code_bytes(codec: str, head_dim: int) -> int:
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "int4-plain": 4, "fp8": 8}[codec]
    return head_dim * bits // 8


def encode(codec: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.full((len(x), code_bytes(codec, x.shape[1])), 0xAA, np.uint8)
    params = np.full((len(x), 2), np.nan, np.float16)
    _native.encode_kv_rows(codec, x, codes, params)
    return codes, params


def decode(codec: str, codes: np.ndarray, params: np.ndarray, head_dim: int) -> np.ndarray:
    x = np.full((len(codes), head_dim), np.nan, np.float32)
    _native.decode_kv_rows(codec, codes, params, x)
    return x


def quantise(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The contract in NumPy fp32.  x: [N, D] -> codes [N, D], params [N, 2] fp16"""
    low = np.clip(x.min(1), -65504, 65504)
    high = np.clip(x.max(1), -65504, 65504)
    scale = ((high - low) / np.float32(levels)).astype(np.float16)
    low = low.astype(np.float16)
    divisor = np.where(scale > 0, scale.astype(np.float32), np.float32(np.inf))[:, None]
    codes = np.clip(np.rint((x - low.astype(np.float32)[:, None]) / divisor), 0, levels)
    return codes.astype(np.uint8), np.stack([scale, low], axis=1)


def rows(head_dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, head_dim)) * np.exp(rng.uniform(-12, 9, (64, 1))) + rng.standard_normal((64, 1))
    return x.astype(np.float32)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 256])
@pytest.mark.parametrize("codec", ["int8", "int4-plain"])
def test_integer_codes_are_the_formula(isa, codec, head_dim):
    x = rows(head_dim, 1)
    codes, params = encode(codec, x)
    want_codes, want_params = quantise(x, LEVELS[codec])
    np.testing.assert_array_equal(params.view(np.uint16), want_params.view(np.uint16))
    unpacked = codes if codec == "int8" else np.stack([codes & 15, codes >> 4], -1).reshape(x.shape)
    np.testing.assert_array_equal(unpacked, want_codes)
    values = unpacked.astype(np.float32) * params[:, :1].astype(np.float32) + params[:, 1:].astype(np.float32)
    np.testing.assert_array_equal(decode(codec, codes, params, head_dim), values)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
def test_int4_is_int4_plain_of_the_rotated_row(isa, head_dim):
    """Rotating in fp32 may move an element by an ulp and so, rarely, across a rounding border."""
    x = rows(head_dim, 2)
    codes, params = encode("int4", x)
    plain_codes, plain_params = encode("int4-plain", rotate(x).astype(np.float32))
    assert np.mean(codes != plain_codes) < 1e-2
    np.testing.assert_allclose(params.astype(np.float32), plain_params.astype(np.float32), rtol=2e-3, atol=1e-6)
    back = rotate(decode("int4-plain", codes, params, head_dim))
    np.testing.assert_allclose(decode("int4", codes, params, head_dim), back, rtol=1e-4, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_float_codecs_round_to_nearest_even(isa, codec):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((40, 64)) * np.exp(rng.uniform(-14, 9, (40, 64)))).astype(np.float32)
    dtype = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[codec]
    codes, params = encode(codec, x)
    np.testing.assert_array_equal(codes, x.astype(dtype).view(np.uint8).reshape(codes.shape))
    np.testing.assert_array_equal(decode(codec, codes, params, 64), x.astype(dtype).astype(np.float32))


def test_fp8_is_e4m3fn(isa):
    """Every code, the borders between each two and their neighbours; saturating at 448, where the judge gives NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = e4m3_values().astype(np.float32)
    np.testing.assert_array_equal(
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32), values
    )
    finite = np.sort(values[np.isfinite(values)])
    borders = (finite[1:] + finite[:-1]) / 2
    points = np.concatenate([finite, borders, np.nextafter(borders, -np.inf), np.nextafter(borders, np.inf)])
    random = np.random.default_rng(8).standard_normal(4096) * np.exp(np.random.default_rng(9).uniform(-9, 7, 4096))
    x = np.concatenate([points, random, [1e-45, -1e-45, 0.0, -0.0]]).astype(np.float32)
    x = np.pad(x, (0, -len(x) % 40)).reshape(-1, 40)
    codes, params = encode("fp8", x)
    want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes, want.view(np.uint8))
    np.testing.assert_array_equal(decode("fp8", codes, params, 40), want.astype(np.float32))

    odd = np.zeros((1, 8), np.float32)
    odd[0, :7] = [449, -1e30, np.inf, -np.inf, 464.1, np.nan, -np.nan]
    codes, params = encode("fp8", odd)
    assert codes[0, :5].tolist() == [0x7E, 0xFE, 0x7E, 0xFE, 0x7E]
    assert (codes[0, 5:7] & 0x7F == 0x7F).all()
    back = decode("fp8", codes, params, 8)
    assert back[0, :5].tolist() == [448, -448, 448, -448, 448]
    assert np.isnan(back[0, 5:7]).all()


@pytest.mark.parametrize("codec", CODECS)
def test_extreme_rows_stay_finite(isa, codec):
    x = np.zeros((9, 32), np.float32)
    x[1] = 3.25
    x[2] = -1e-9
    x[3, 0] = 1e-9
    x[4] = np.linspace(-1e30, 1e30, 32)
    x[5] = np.linspace(0, 70000, 32)
    x[6] = 1000 + np.linspace(0, 1e-3, 32)
    x[7] = -70000
    x[8, 5] = np.inf
    codes, params = encode(codec, x)
    y = decode(codec, codes, params, 32)
    assert np.isfinite(y[:4]).all()
    assert np.isfinite(y[6]).all()
    np.testing.assert_allclose(y[1], 3.25, rtol=1e-3)
    np.testing.assert_allclose(y[6], x[6].clip(max=448) if codec == "fp8" else x[6], rtol=2e-3)
    assert np.abs(y[:1]).max() == 0
    assert np.abs(y[2:4]).max() < 1e-6
    if codec in ("fp16", "int8", "int4-plain"):
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y[7], -65504)


@pytest.mark.parametrize("codec", ["int8", "int4", "int4-plain"])
def test_error_is_within_half_a_step(isa, codec):
    x = np.random.default_rng(4).standard_normal((200, 128)).astype(np.float32)
    codes, params = encode(codec, x)
    error = np.linalg.norm(decode(codec, codes, params, 128) - x, axis=1) / np.sqrt(128)
    half_step = 0.5 * params[:, 0].astype(np.float32)
    assert (error < half_step * 1.02 + 2e-3).all()


@pytest.mark.parametrize("kv_dtype", [*CODECS, "int8:int4"])
def test_page_bytes_are_the_same_on_every_isa(kv_dtype):
    pages = []
    before = _native.active_cpu_isa()
    try:
        for name in isas():
            _native.set_active_cpu_isa(name)
            step = Step([(0, 100), (40, 3)], head_dim=80, page_size=32, kv_dtype=kv_dtype, rotary_dim=40, seed=5)
            step.norms = (np.linspace(0.5, 2, 80, dtype=np.float32), np.linspace(2, 0.5, 80, dtype=np.float32))
            step.run()
            pages.append(step.arena.copy())
    finally:
        _native.set_active_cpu_isa(before)
    for other in pages[1:]:
        np.testing.assert_array_equal(pages[0], other)


@pytest.mark.parametrize("kv_dtype", [*CODECS, "bf16:int4"])
def test_decode_page_stream_reads_the_documented_image(isa, kv_dtype):
    step = Step([(0, 64)], head_dim=48, page_size=32, kv_dtype=kv_dtype, seed=6)
    step.run()
    for stream in ("k", "v"):
        for page in step.page_tables[0, :2]:
            want = decode_page(step.layout, step.arena[page], 1, stream)
            for head in range(2):
                out = np.full((32, 48), np.nan, np.float32)
                _native.decode_page_stream(step.layout, step.arena, int(page), 1, head, stream, out)
                np.testing.assert_allclose(out, want[head], rtol=1e-4, atol=2e-5)
    layer_bytes = step.layout.layer_bytes()
    assert (step.arena[:, :layer_bytes] == 0xFF).all(), "append wrote outside its layer"


def test_layout_sizes():
    layout = _native.KvGroupLayout(3, 3, 64, 64, "int8:int4", 0)
    assert layout.k_stream_bytes() == 3 * 64 * (64 + 4)
    assert layout.v_stream_bytes() == 3 * 64 * (32 + 4)
    assert layout.page_bytes() == 3 * layout.layer_bytes()
    assert layout.v_offset(2) == 2 * layout.layer_bytes() + layout.k_stream_bytes()
    assert (layout.k_codec, layout.v_codec) == ("int8", "int4")
    odd = _native.KvGroupLayout(1, 1, 8, 16, "int4-plain")
    assert odd.k_stream_bytes() == 128
    assert odd.k_stream_bytes() % 64 == 0


def test_bad_codec_arguments():
    x = np.zeros((2, 64), np.float32)
    params = np.zeros((2, 2), np.float16)
    with pytest.raises(ValueError, match="int5"):
        _native.encode_kv_rows("int5", x, np.zeros((2, 64), np.uint8), params)
    with pytest.raises(ValueError, match="codes"):
        _native.encode_kv_rows("int4", x, np.zeros((2, 64), np.uint8), params)
    with pytest.raises(TypeError, match="params"):
        _native.encode_kv_rows("int8", x, np.zeros((2, 64), np.uint8), params.astype(np.float32))
    with pytest.raises(ValueError, match="head_dim"):
        _native.encode_kv_rows("int8", x[:, :60].copy(), np.zeros((2, 60), np.uint8), params)
    layout = _native.KvGroupLayout(1, 1, 64)
    arena = np.zeros((1, layout.page_bytes()), np.uint8)
    out = np.zeros((64, 64), np.float32)
    for arguments, message in (((1, 0, 0, "k"), "page_id"), ((0, 1, 0, "k"), "layer"), ((0, 0, 1, "k"), "kv_head"),
                               ((0, 0, 0, "q"), "stream")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _native.decode_page_stream(layout, arena, *arguments, out)
