"""The packed layouts of the sm_90a matmuls, on any machine.

What a kernel does with packed bytes is played here in NumPy from the documentation of wgmma's register fragments, not
with the packer's own functions: packing and reading must meet in the middle.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from runtime import _native as native

HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value - reference‖ / ‖reference‖."""
    return float(np.linalg.norm(value.astype(np.float64) - reference) / np.linalg.norm(reference))


class FourBitWeight:
    """A random u4 matrix with one kind of offset, its exact values and its packed form."""

    def __init__(self, seed: int, rows: int, cols: int, group: int, offset: str, activations: str):
        rng = np.random.default_rng(seed)
        self.rows, self.cols, self.activations = rows, cols, activations
        self.group = cols if group < 0 else group
        groups = -(-cols // self.group)
        self.codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
        self.scales = (rng.uniform(0.5, 1.5, (rows, groups)) * 0.01).astype(np.float32)
        self.zeros = rng.integers(0, 16, (rows, groups), dtype=np.uint8) if offset == "zero" else None
        self.mins = (-8 * self.scales * rng.uniform(0.7, 1.3, (rows, groups))).astype(np.float32)
        self.mins = self.mins if offset == "min" else None
        self.common_zero = 8 if offset == "common" else 0
        zero = self.zeros if self.zeros is not None else np.full_like(self.scales, self.common_zero)
        min_value = self.mins if self.mins is not None else np.zeros_like(self.scales)
        self.values = self.spread(self.scales) * (self.codes - self.spread(zero).astype(np.float32))
        self.values = self.values + self.spread(min_value)
        self.packed = native.HostPackedWeight(
            "sm90_w4",
            activations,
            "u4",
            self.codes.tobytes(),
            rows,
            cols,
            self.scales.reshape(-1).tolist(),
            group,
            1,
            self.common_zero,
            [] if self.zeros is None else self.zeros.reshape(-1).tolist(),
            [] if self.mins is None else self.mins.reshape(-1).tolist(),
        )

    def spread(self, cells: np.ndarray) -> np.ndarray:
        """[N, groups] -> [N, K]."""
        return np.repeat(cells, self.group, axis=1)[:, : self.cols]


def read_fragments(codes: bytes, rows: int, cols: int) -> np.ndarray:
    """What the lanes of the warps see of `sm90_w4`: signed codes [padded N, padded K].

    Memory holds, for each 16 inputs and within them for each 16 channels, 32 words, one a lane. A lane masks
    0x000F000F out of its word shifted by 0, 4, 8 and 12: operand-A registers 0..3, whose low half is the first of two
    neighbouring inputs. Register r of lane l: channel l / 4 + 8 (r % 2), inputs 2 (l % 4) + 8 (r / 2) and the next.
    """
    words = np.frombuffer(codes, np.uint32).reshape(cols // 16, rows // 16, 32)
    lane = np.arange(32)
    values = np.empty((cols // 16, rows // 16, 16, 16), np.int8)  # [k block, slab, channel, input]
    for register in range(4):
        pair = (words >> np.uint32(4 * register)) & np.uint32(0x000F000F)
        for half in range(2):
            nibble = ((pair >> np.uint32(16 * half)) & np.uint32(15)).astype(np.int8)
            signed = np.where(nibble >= 8, nibble - 16, nibble)
            values[:, :, lane // 4 + 8 * (register % 2), 2 * (lane % 4) + 8 * (register // 2) + half] = signed
    return values.transpose(1, 2, 0, 3).reshape(rows, cols)


def widened(weight: FourBitWeight) -> np.ndarray:
    """The weights that reach the tensor cores: one fused multiply-add in the activation type.  -> [padded N, padded K]"""
    half = HALVES[weight.activations]
    rows, cols = weight.packed.shape
    params = np.frombuffer(weight.packed.group_params, half).reshape(2, weight.packed.num_groups, rows)
    spread = np.repeat(params.astype(np.float32), weight.group, axis=1)  # [2, K, N]
    full = np.zeros((2, cols, rows), np.float32)
    full[:, : spread.shape[1]] = spread[:, :cols]
    codes = read_fragments(weight.packed.codes, rows, cols).astype(np.float32)
    return (codes * full[0].T + full[1].T).astype(half).astype(np.float32)


SHAPES = [(128, 64, 64), (200, 320, 64), (136, 384, 128), (96, 192, -1), (256, 200, 128)]


@pytest.mark.parametrize("activations", ["bf16", "f16"])
@pytest.mark.parametrize("offset", ["common", "zero", "min"])
@pytest.mark.parametrize(("rows", "cols", "group"), SHAPES)
def test_four_bit_weights_come_back(rows: int, cols: int, group: int, offset: str, activations: str) -> None:
    weight = FourBitWeight(rows + cols, rows, cols, group, offset, activations)
    data, scales, zeros, mins, got_group, group_rows, common_zero = weight.packed.unpack()
    np.testing.assert_array_equal(np.frombuffer(data, np.uint8).reshape(rows, cols), weight.codes)
    half = HALVES[activations]
    np.testing.assert_array_equal(np.float32(scales), weight.scales.astype(half).astype(np.float32).reshape(-1))
    assert (got_group, group_rows) == (group, 1)
    assert common_zero == (8 if offset == "common" else 0)
    assert zeros == ([] if weight.zeros is None else weight.zeros.reshape(-1).tolist())
    if weight.mins is None:
        assert mins == []
    else:
        # min + 8 scales, rounded to the activation type, less 8 scales
        tolerance = 2.0 ** (-8 if activations == "bf16" else -11) * np.abs(weight.mins).max()
        np.testing.assert_allclose(mins, weight.mins.reshape(-1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("activations", ["bf16", "f16"])
@pytest.mark.parametrize("offset", ["common", "zero", "min"])
@pytest.mark.parametrize(("rows", "cols", "group"), SHAPES)
def test_matmul_over_packed_bytes(rows: int, cols: int, group: int, offset: str, activations: str) -> None:
    weight = FourBitWeight(7 * rows + cols, rows, cols, group, offset, activations)
    half = HALVES[activations]
    seen = widened(weight)
    assert np.all(seen[rows:] == 0), "padded channels"
    rng = np.random.default_rng(cols)
    x = rng.standard_normal((9, cols)).astype(half).astype(np.float64)
    exact = x @ weight.values.T.astype(np.float64)
    # The same precision without packing: weights dequantised exactly, then rounded once.
    plain = relative_error(x @ weight.values.astype(half).astype(np.float64).T, exact)
    error = relative_error(x @ seen[:rows, :cols].T.astype(np.float64), exact)
    # An output in the activation type is rounded as well; the common measure of both.
    rounding = relative_error(exact.astype(half), exact)
    assert error <= 2 * np.hypot(plain, rounding), (error, plain, rounding)


def test_reading_notices_a_swapped_nibble() -> None:
    """The test of the test: one nibble in another place is another weight."""
    weight = FourBitWeight(3, 128, 64, 64, "common", "bf16")
    moved = bytearray(weight.packed.codes)
    place = next(i for i, byte in enumerate(moved) if byte & 15 != byte >> 4)
    moved[place] = moved[place] >> 4 | (moved[place] & 15) << 4
    before = read_fragments(weight.packed.codes, 128, 64)
    assert np.count_nonzero(read_fragments(bytes(moved), 128, 64) != before) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group": 32, "scales": [0.1] * 256}, "groups of 64, 128 or the whole row"),
        ({"activations": "int8"}, "wants f16 or bf16 activations"),
        ({"codes": "u8"}, "wants u4 codes"),
        ({"activations": "f16", "scales": [1e6] * 128}, "beyond the activation type"),
        ({"layout": "sm90_e4m3"}, "wants e4m3 activations"),
        ({"layout": "sm90_half"}, "wants elements of the activation type"),
        ({"layout": "nowhere"}, "layout: got 'nowhere'"),
    ],
)
def test_refusals_say_why(change: dict, sentence: str) -> None:
    arguments = {
        "layout": "sm90_w4",
        "activations": "bf16",
        "codes": "u4",
        "data": bytes(128 * 64),
        "out_features": 128,
        "in_features": 64,
        "scales": [0.1] * 128,
        "group": 64,
        **change,
    }
    with pytest.raises(ValueError, match=sentence):
        native.HostPackedWeight(**arguments)


@pytest.mark.parametrize("has_blocks", [False, True])
def test_fp8_rows_and_scales(has_blocks: bool) -> None:
    rows, cols = 200, 384
    rng = np.random.default_rng(11)
    data = rng.integers(0, 0x7E, (rows, cols), dtype=np.uint8)
    scales = rng.uniform(0.1, 2, (2, 3) if has_blocks else (rows, 1)).astype(np.float32)
    packed = native.HostPackedWeight(
        "sm90_e4m3",
        "e4m3",
        "e4m3",
        data.tobytes(),
        rows,
        cols,
        scales.reshape(-1).tolist(),
        group=128 if has_blocks else -1,
        group_rows=128 if has_blocks else 1,
    )
    assert packed.shape == (256, 384)
    codes = np.frombuffer(packed.codes, np.uint8).reshape(256, 384)
    np.testing.assert_array_equal(codes[:rows], data)
    assert not codes[rows:].any()
    if has_blocks:  # what the collective multiplies a block of 128 channels x 128 inputs with
        np.testing.assert_array_equal(np.frombuffer(packed.group_params, np.float32).reshape(2, 3), scales)
    else:
        np.testing.assert_array_equal(np.float32(packed.channel_scale), [*scales[:, 0], *[0] * 56])
    unpacked, unpacked_scales, _, _, group, group_rows, _ = packed.unpack()
    assert unpacked == data.tobytes()
    np.testing.assert_array_equal(np.float32(unpacked_scales), scales.reshape(-1))
    assert (group, group_rows) == ((128, 128) if has_blocks else (-1, 1))


def test_int8_rows_and_scales() -> None:
    rows, cols = 130, 200
    rng = np.random.default_rng(13)
    data = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
    scales = rng.uniform(0.1, 2, rows).astype(np.float32)
    packed = native.HostPackedWeight("sm90_s8", "int8", "s8", data.tobytes(), rows, cols, scales.tolist())
    assert packed.shape == (256, 256)
    held = np.frombuffer(packed.codes, np.int8).reshape(256, 256)
    np.testing.assert_array_equal(held[:rows, :cols], data)
    assert not held[rows:].any() and not held[:, cols:].any()
    np.testing.assert_array_equal(np.float32(packed.channel_scale), [*scales, *[0] * 126])
    unpacked, unpacked_scales, *_ = packed.unpack()
    assert unpacked == data.tobytes()
    np.testing.assert_array_equal(np.float32(unpacked_scales), scales)


@pytest.mark.parametrize("activations", ["bf16", "f16"])
def test_half_rows_are_padded_with_zeros(activations: str) -> None:
    rows, cols = 130, 72
    values = np.random.default_rng(5).standard_normal((rows, cols)).astype(HALVES[activations])
    packed = native.HostPackedWeight("sm90_half", activations, activations, values.tobytes(), rows, cols)
    assert packed.shape == (256, 128)
    held = np.frombuffer(packed.codes, np.uint16).reshape(256, 128)
    np.testing.assert_array_equal(held[:rows, :cols], values.view(np.uint16))
    assert not held[rows:].any() and not held[:, cols:].any()
    assert packed.unpack()[0] == values.tobytes()
