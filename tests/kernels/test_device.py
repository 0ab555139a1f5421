"""Every wrapper of csrc/device against NumPy: its twin on the host, and the instruction where there is a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.device_cases import run

SEEDS = range(3)


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, size=shape, dtype=np.uint32)


def halves(words: np.ndarray) -> np.ndarray:
    """[n] u32 -> [n, 2] u16, low half first."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


# ---- one thread's registers ------------------------------------------------------------------------------------------


def test_bits(gpu):
    rng = np.random.default_rng(1)
    n = 1000
    a, b, c = random_words(rng, n), random_words(rng, n), random_words(rng, n)
    a[:40] = 1 << (np.arange(40, dtype=np.uint32) % 32)
    a[40] = 0
    a[41:60] = (np.arange(19, dtype=np.float32) * 0.5 - 4).view(np.uint32)  # ties of the rounding
    out = run(gpu, "bits", [a, b, c], np.zeros((n, 13), np.uint32), [n])

    table = np.zeros((3, n), np.uint32)
    for row, code in enumerate((0xEA, 0x96, 0x35)):
        for bit in range(32):
            index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
            table[row] |= (code >> index & 1) << bit
    for row in range(3):
        np.testing.assert_array_equal(out[:, row], table[row])

    pool = np.concatenate([a[:, None].view(np.uint8).reshape(n, 4), b[:, None].view(np.uint8).reshape(n, 4)], axis=1)
    picked = np.zeros((n, 4), np.uint8)
    for i in range(4):
        nibble = c >> (4 * i) & 15
        byte = pool[np.arange(n), nibble & 7]
        picked[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    np.testing.assert_array_equal(out[:, 3], picked.view(np.uint32)[:, 0])

    both = b.astype(np.uint64) << 32 | a
    np.testing.assert_array_equal(out[:, 4], (both >> (c & 31)).astype(np.uint32))
    signed_a = a[:, None].view(np.int8).reshape(n, 4).astype(np.int64)
    unsigned_a = a[:, None].view(np.uint8).reshape(n, 4).astype(np.int64)
    signed_b = b[:, None].view(np.int8).reshape(n, 4).astype(np.int64)
    np.testing.assert_array_equal(out[:, 5], (c + (signed_a * signed_b).sum(1)).astype(np.uint32))
    np.testing.assert_array_equal(out[:, 6], (c + (unsigned_a * signed_b).sum(1)).astype(np.uint32))

    texts = [f"{value:032b}" for value in a]
    np.testing.assert_array_equal(out[:, 7], [text.count("1") for text in texts])
    np.testing.assert_array_equal(out[:, 8], [text[::-1].find("1") + 1 for text in texts])
    np.testing.assert_array_equal(out[:, 9], [(text + "1").find("1") for text in texts])
    np.testing.assert_array_equal(out[:, 10], [int(text[::-1], 2) for text in texts])
    np.testing.assert_array_equal(out[:, 11], (a.astype(np.uint64) * b >> 32).astype(np.uint32))
    with np.errstate(invalid="ignore"):  # signalling NaN
        as_float = a.view(np.float32).astype(np.float64)
    rounded = np.where(np.isnan(as_float), 0, np.clip(np.rint(as_float), -(2.0**31), 2.0**31 - 1))
    np.testing.assert_array_equal(out[:, 12].view(np.int32), np.nan_to_num(rounded).astype(np.int64).astype(np.int32))


def exact_fma(dtype, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once: in exact rational arithmetic, element by element."""
    from fractions import Fraction

    mantissa, lowest, largest = (11, -24, 65504.0) if dtype == np.float16 else (8, -133, float.fromhex("0x1.fep127"))
    result = np.empty(a.shape, np.float64)
    for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if exact == 0:
            result[i] = float(x) * float(y) + float(z)
            continue
        numerator, denominator = abs(exact.numerator), exact.denominator
        exponent = numerator.bit_length() - denominator.bit_length()
        if Fraction(numerator, denominator) < Fraction(2) ** exponent:
            exponent -= 1
        quantum = Fraction(2) ** max(exponent - mantissa + 1, lowest)
        value = float(round(exact / quantum) * quantum)  # round() is to nearest even
        result[i] = value if abs(value) <= largest else np.copysign(np.inf, value)
    return result.astype(np.float32).astype(dtype)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("spread", ["near", "far"])
def test_packed_halves(gpu, kind, spread):
    rng = np.random.default_rng(2)
    n = 3000
    dtype = np.dtype(np.float16) if kind == "float16" else np.dtype(ml_dtypes.bfloat16)
    if spread == "near":
        values = [rng.normal(size=(n, 2)).astype(np.float32).astype(dtype) for _ in range(3)]
    else:  # any finite bits: overflow, subnormals, cancellation, sums that differ by many orders
        bits = [rng.integers(0, 1 << 16, size=(n, 2), dtype=np.uint16) for _ in range(3)]
        values = [np.where(np.isfinite(b.view(dtype).astype(np.float32)), b, 0x8000).astype(np.uint16) for b in bits]
        values = [v.view(dtype) for v in values]
        # Products that tie, and an addend too small to see: a second rounding would show.
        values[0][:500], values[1][:500] = 1 + np.float32(2.0**-7), 1 + np.float32(2.0**-3)
        values[2][:500] = np.float32(2.0**-24)
    a, b, c = (np.ascontiguousarray(v).view(np.uint32)[:, 0] for v in values)
    out = halves(run(gpu, "half", [a, b, c], np.zeros((n, 12), np.uint32), [n]))
    first = 0 if kind == "float16" else 6
    x, y, z = (v.reshape(-1) for v in values)

    one, minus_one, minus_zero = (np.full(x.shape, v, np.float32).astype(dtype) for v in (1.0, -1.0, -0.0))
    wanted = {
        "fma": exact_fma(dtype, x, y, z),
        "add": exact_fma(dtype, x, one, y),
        "sub": exact_fma(dtype, y, minus_one, x),
        "mul": exact_fma(dtype, x, y, minus_zero),
        "min": np.where(x.astype(np.float32) < y.astype(np.float32), x, y),
        "max": np.where(x.astype(np.float32) > y.astype(np.float32), x, y),
    }
    for i, name in enumerate(wanted):
        got = np.ascontiguousarray(out[:, first + i]).view(dtype).reshape(-1)
        # As numbers: the sign of a zero sum is the rounding mode's, and equal operands of min may differ in it.
        np.testing.assert_array_equal(got.astype(np.float32), wanted[name].astype(np.float32), err_msg=name)


def test_min_and_max_pass_over_nan(gpu):
    a = np.array([0x7E007E00, 0x3C003C00, 0x7FC07FC0, 0x3F803F80], np.uint32)  # f16 NaN, 1; bf16 NaN, 1
    b = np.array([0x3C003C00, 0x7E007E00, 0x3F803F80, 0x7FC07FC0], np.uint32)
    out = run(gpu, "half", [a, b, a], np.zeros((4, 12), np.uint32), [4])
    np.testing.assert_array_equal(out[:2, 4:6], 0x3C003C00)
    np.testing.assert_array_equal(out[2:, 10:12], 0x3F803F80)


def all_exponents(rng: np.random.Generator, n: int) -> np.ndarray:
    """Floats of any bits, and ties and borders of the narrow formats."""
    values = random_words(rng, n).view(np.float32)
    borders = np.array(
        [65504, 65519.99, 65520, 448, 463.99, 464, 2.0**-24, 2.0**-25, 2.0**-9, 2.0**-10, 0, np.inf], np.float32
    )
    ties = np.ldexp(
        1 + np.arange(256, dtype=np.float32) / 128 + np.float32(2.0**-8), rng.integers(-20, 20, 256)
    ).astype(np.float32)
    small = np.arange(200, dtype=np.float32) * np.float32(2.0**-12)
    special = np.concatenate([borders, -borders, ties, small, -small])
    values[: special.size] = special
    return values


def test_narrowing(gpu):
    rng = np.random.default_rng(3)
    n = 20000
    lo, hi = all_exponents(rng, n), all_exponents(rng, n)[::-1].copy()
    out = run(gpu, "narrow", [lo, hi], np.zeros((n, 5), np.uint32), [n])

    def wanted(dtype, values):
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype == ml_dtypes.float8_e4m3fn:  # saturates, where a plain cast gives NaN
                values = np.where(np.isnan(values), values, np.clip(values, -448, 448))
            return values.astype(dtype).astype(np.float32)

    for column, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16)):
        got = np.ascontiguousarray(halves(out[:, column])).view(dtype).astype(np.float32)
        np.testing.assert_array_equal(got[:, 0], wanted(dtype, lo))
        np.testing.assert_array_equal(got[:, 1], wanted(dtype, hi))
    codes = out[:, 2].astype(np.uint16).view(np.uint8).reshape(n, 2).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(codes[:, 0], wanted(ml_dtypes.float8_e4m3fn, lo))
    np.testing.assert_array_equal(codes[:, 1], wanted(ml_dtypes.float8_e4m3fn, hi))
    for column, dtype in ((3, np.float16), (4, ml_dtypes.bfloat16)):
        got = out[:, column].astype(np.uint16).view(dtype).astype(np.float32)
        np.testing.assert_array_equal(got, wanted(dtype, lo))


def test_widening_of_every_code(gpu):
    codes = np.arange(1 << 16, dtype=np.uint16)
    out = run(gpu, "widen", [codes], np.zeros((codes.size, 4), np.uint32), [codes.size])
    np.testing.assert_array_equal(out[:, 0].view(np.float32), codes.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(out[:, 1].view(np.float32), codes.view(ml_dtypes.bfloat16).astype(np.float32))
    pairs = codes.view(np.uint8).reshape(-1, 2)
    wanted = pairs.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.isnan(wanted).sum() == 4 * 256
    for column, factor in ((2, 1), (3, 2**-8)):  # NaN is NaN on every architecture
        got = np.ascontiguousarray(halves(out[:, column])).view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got, wanted * np.float32(factor))


def test_approximations(gpu):
    x = np.concatenate([np.linspace(-20, 20, 4001), [1e-3, 3e4, -7e-5]]).astype(np.float32)
    x = x[x != 0]
    out = run(gpu, "math", [x], np.zeros((x.size, 5), np.float32), [x.size]).astype(np.float64)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out[:, 0], np.exp2(wide).astype(np.float32), rtol=2.0**-21)
    np.testing.assert_allclose(out[:, 1], np.log2(np.abs(wide)), rtol=2.0**-20, atol=2.0**-21)
    np.testing.assert_allclose(out[:, 2], 1 / wide, rtol=2.0**-22)
    np.testing.assert_allclose(out[:, 3], 1 / np.sqrt(np.abs(wide)), rtol=2.0**-22)
    np.testing.assert_allclose(out[:, 4], np.tanh(wide), rtol=2.0**-10)


# ---- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mma_of_floats(gpu, kind, seed):
    rng = np.random.default_rng(seed)
    dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
    a = rng.normal(size=(16, 16)).astype(np.float32).astype(dtype)
    b = rng.normal(size=(8, 16)).astype(np.float32).astype(dtype)
    d = rng.normal(size=(16, 8)).astype(np.float32)
    out = run(gpu, f"mma_{kind}", [a.view(np.uint16), b.view(np.uint16), d], np.full((16, 8), np.nan, np.float32))
    exact = d + a.astype(np.float64) @ b.astype(np.float64).T
    magnitude = np.abs(d) + np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).T
    assert (np.abs(out - exact) <= 16 * 2.0**-23 * magnitude).all()


def test_mma_of_subnormal_halves(gpu):
    a = np.full((16, 16), 2.0**-24, np.float16)
    b = np.full((8, 16), 2.0**-10, np.float16)
    out = run(
        gpu,
        "mma_f16",
        [a.view(np.uint16), b.view(np.uint16), np.zeros((16, 8), np.float32)],
        np.zeros((16, 8), np.float32),
    )
    np.testing.assert_array_equal(out, np.float32(2.0**-30))


@pytest.mark.parametrize("kind", ["s8", "u8s8", "s8u8"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mma_of_bytes(gpu, kind, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, size=(16, 32), dtype=np.uint8)
    b = rng.integers(0, 256, size=(8, 32), dtype=np.uint8)
    if seed == 0:
        a[:], b[:] = 255, 128
    d = rng.integers(-(1 << 31), 1 << 31, size=(16, 8)).astype(np.int32)  # the sums wrap
    out = run(gpu, f"mma_{kind}", [a, b, d], np.zeros((16, 8), np.int32))
    wide_a = a.view(np.uint8 if kind == "u8s8" else np.int8).astype(np.int64)
    wide_b = b.view(np.uint8 if kind == "s8u8" else np.int8).astype(np.int64)
    np.testing.assert_array_equal(out, (d + wide_a @ wide_b.T).astype(np.int32))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("suffix", ["", "_trans"])
def test_ldmatrix(gpu, count, suffix):
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 1 << 16, size=(32, 8), dtype=np.uint16)
    order = rng.permutation(32).astype(np.int32)
    out = run(gpu, f"ldmatrix_x{count}{suffix}", [rows, order], np.zeros((32, count), np.uint32))
    matrices = rows[order].reshape(4, 8, 8)[:count]
    if suffix:
        matrices = matrices.transpose(0, 2, 1)
    # [matrix, row, pair] -> lane 4 * row + pair
    wanted = np.ascontiguousarray(matrices).view(np.uint32).reshape(count, 32).T
    np.testing.assert_array_equal(out, wanted)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_loads_and_stores(gpu):
    a = random_words(np.random.default_rng(5), 32, 4)
    out = run(gpu, "memory", [a], np.zeros((32, 16), np.uint32))
    np.testing.assert_array_equal(out[:, :4], a)
    np.testing.assert_array_equal(out[:, 4:6], a[:, 2:])
    np.testing.assert_array_equal(out[:, 6], a[:, 3])
    np.testing.assert_array_equal(out[:, 7], a[:, 1] ^ a[:, 2])
    np.testing.assert_array_equal(out[:, 8:12], a)
    np.testing.assert_array_equal(out[:, 12:], a[:, [3, 0, 3, 3]])


def test_asynchronous_copies(gpu):
    source = random_words(np.random.default_rng(6), 64, 4)
    out = run(gpu, "copies", [source], np.zeros((7, 64, 4), np.uint32))
    for kind in (0, 1, 2, 3, 5):
        np.testing.assert_array_equal(out[kind], source)
    kept = source.copy().view(np.uint8).reshape(64, 16)
    kept[np.arange(16) >= (np.arange(64) % 17)[:, None]] = 0
    np.testing.assert_array_equal(out[4].view(np.uint8).reshape(64, 16), kept)
    kept = source.copy().view(np.uint8).reshape(64, 16)
    kept[:, :8][np.arange(8) >= (np.arange(64) % 9)[:, None]] = 0
    np.testing.assert_array_equal(out[6].view(np.uint8).reshape(64, 16), kept)


# ---- threads together ------------------------------------------------------------------------------------------------


def test_indices(gpu):
    out = run(gpu, "indices", [], np.zeros((12 * 60, 7), np.uint32))
    block, thread = np.divmod(np.arange(12 * 60), 60)
    wanted = np.stack(
        [thread % 5, thread // 5 % 3, thread // 15, block % 3, block // 3 % 2, block // 6, thread % 32], 1
    )
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("number", [0, 1, 5, 16, 31])
def test_shuffles_and_votes(gpu, width, number):
    values = random_words(np.random.default_rng(7), 32)
    out = run(gpu, "shuffle", [values], np.zeros((32, 8), np.uint32), [number, width])
    lane = np.arange(32)
    first = lane // width * width
    np.testing.assert_array_equal(out[:, 0], values[first + number % width])
    np.testing.assert_array_equal(out[:, 1], values[np.where(lane - number >= first, lane - number, lane)])
    np.testing.assert_array_equal(out[:, 2], values[np.where(lane + number < first + width, lane + number, lane) % 32])
    other = lane ^ number
    np.testing.assert_array_equal(out[:, 3], values[np.where(other < first + width, other, lane)])
    np.testing.assert_array_equal(out[:, 4], values[lane ^ 1] ^ (lane ^ 1))
    np.testing.assert_array_equal(out[:, 5], values[31 - lane] & 0x7FFFFF)
    halves_of_warp = np.where(lane < 16, 15 - lane, 16 + (lane ^ 5) % 16)
    np.testing.assert_array_equal(out[:, 6], values[halves_of_warp])
    ballot = int(((values & 1).astype(np.uint64) << lane.astype(np.uint64)).sum())
    if (values == 0).any():
        ballot ^= 0x10000
    if (values != 0).all():
        ballot ^= 1
    np.testing.assert_array_equal(out[:, 7], ballot)


def test_barriers_with_threads_that_leave_early(gpu):
    values = random_words(np.random.default_rng(8), 3, 160)
    out = run(gpu, "barriers", [values], np.zeros((3, 160), np.uint32), [3])
    sums = np.cumsum(values[:, ::-1], axis=1, dtype=np.uint32)[:, ::-1]
    wanted = sums.copy()
    wanted[:, 65:] += sums[:, 64:159]
    wanted[:, 64] += sums[:, 159]
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("pattern", ["some", "all", "none"])
def test_barrier_votes(gpu, pattern):
    values = {"some": np.arange(160) % 3, "all": np.arange(160) + 1, "none": np.zeros(160)}[pattern].astype(np.int32)
    out = run(gpu, "barrier_votes", [values], np.zeros((160, 3), np.int32))
    np.testing.assert_array_equal(
        out, np.broadcast_to([(values != 0).sum(), (values != 0).all(), (values != 0).any()], (160, 3))
    )


def test_named_barriers(gpu):
    values = random_words(np.random.default_rng(9), 7, 64)
    out = run(gpu, "named_barriers", [values], np.zeros(64, np.uint32), [7])
    np.testing.assert_array_equal(out, values.sum(axis=0, dtype=np.uint32))


def test_atomics(gpu):
    values = random_words(np.random.default_rng(10), 3, 160)
    start = np.array([0, 0, 0xFFFFFFFF, 0, 0, 0, 0, 0], np.uint32)
    out = run(gpu, "atomics", [values], start, [3])
    assert out[0] == values.sum(dtype=np.uint32)
    assert out[1] == values.max() and out[2] == values.min()
    assert out[3] == np.bitwise_xor.reduce(values, axis=None)
    assert out[4] == values.size
    assert out[5:6].view(np.float32)[0] == (values & 0xFF).sum()
    assert out[6:].view(np.uint64)[0] == (values.astype(np.uint64) << 8).sum()


@pytest.mark.parametrize("num_blocks", [1, 2, 9])
def test_blocks_that_wait_for_each_other(gpu, num_blocks):
    out = run(gpu, "block_chain", [], np.zeros(2 * num_blocks, np.uint32), [num_blocks])
    np.testing.assert_array_equal(out[:num_blocks], np.cumsum(np.arange(num_blocks)[::-1])[::-1])
    np.testing.assert_array_equal(out[num_blocks:], 1)


def test_the_last_block_adds_up(gpu):
    out = run(gpu, "last_block", [], np.zeros(12, np.uint32), [10])
    assert out[10] == 10 and out[11] == (np.arange(10) ** 2).sum()


@pytest.mark.parametrize("shape", [(64, 64, 32), (64, 128, 96), (128, 64, 224)])
def test_a_pipelined_matrix_product(gpu, shape):
    rows, columns, depth = shape
    rng = np.random.default_rng(11)
    a = rng.normal(size=(rows, depth)).astype(np.float16)
    b = rng.normal(size=(columns, depth)).astype(np.float16)
    out = run(
        gpu, "pipeline", [a.view(np.uint16), b.view(np.uint16)], np.full((rows, columns), np.nan, np.float32), shape
    )
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    assert np.linalg.norm(out - exact) <= 1e-6 * np.linalg.norm(exact)
