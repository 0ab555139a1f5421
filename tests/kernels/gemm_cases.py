"""Random weights in every format, and the NumPy references of the matmul."""

from __future__ import annotations

import gguf
import numpy as np

from runtime import _native as native

# format: (inputs per block, bytes per block)
BLOCK = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
QUANTIZED = list(BLOCK)
FORMATS = ["F32", "F16", "BF16", *QUANTIZED]
# byte offsets of fp16 fields in a block
_HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
ISAS = ["portable", "avx2", "avx512"]
ISAS = ISAS[: ISAS.index(native.detected_cpu_isa()) + 1]


def random_weight_bytes(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> np.ndarray:
    """Valid bytes of [rows, cols] weights: every code and sub-scale occurs, values of order 0.1."""
    if fmt == "F32":
        return (rng.standard_normal((rows, cols)) * 0.1).astype(np.float32).view(np.uint8).reshape(-1)
    if fmt == "F16":
        return (rng.standard_normal((rows, cols)) * 0.1).astype(np.float16).view(np.uint8).reshape(-1)
    if fmt == "BF16":
        values = (rng.standard_normal((rows, cols)) * 0.1).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    values, size = BLOCK[fmt]
    blocks = rng.integers(0, 256, (rows * cols // values, size), dtype=np.uint8)
    magnitude = {"Q4_0": 0.02, "Q4_1": 0.02, "Q5_0": 0.01, "Q8_0": 0.001, "Q4_K": 0.0005, "Q6_K": 0.0001}[fmt]
    for offset in _HALVES[fmt]:
        scale = (rng.standard_normal(len(blocks)) * magnitude).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def dequantize(data: np.ndarray, fmt: str, rows: int, cols: int) -> np.ndarray:
    """gguf's own values.  -> [rows, cols] fp32"""
    return gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[fmt]).astype(np.float32)


class RandomWeight:
    """One matrix: its bytes, its exact values, and the native Weight."""

    def __init__(self, rng: np.random.Generator, fmt: str, rows: int, cols: int):
        self.fmt, self.rows, self.cols = fmt, rows, cols
        self.data = random_weight_bytes(rng, fmt, rows, cols)
        self.values = dequantize(self.data, fmt, rows, cols)
        self.native = native.Weight(self.data, fmt, rows, cols)

    def codes_and_parameters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Signed codes [N, K], fp32 scales and mins [N, K / group], group size: value = scale * code + min."""
        values_per_block, size = BLOCK[self.fmt]
        blocks = self.data.reshape(-1, size)

        def half(offset: int) -> np.ndarray:
            return blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)[:, 0]

        group = 16 if self.fmt == "Q6_K" else 32
        # The block's values with scale 1 and min 0 are its codes: the same dequantiser gives them.
        plain = blocks.copy()
        one = np.float16(1).tobytes()
        plain[:, _HALVES[self.fmt][0] : _HALVES[self.fmt][0] + 2] = np.frombuffer(one, np.uint8)
        if len(_HALVES[self.fmt]) == 2:
            plain[:, 2:4] = 0
        codes = dequantize(plain.reshape(-1), self.fmt, self.rows, self.cols)
        scale, minimum = half(_HALVES[self.fmt][0]), np.zeros(len(blocks), np.float32)
        if self.fmt == "Q4_1":
            minimum = half(2)
        groups = values_per_block // group
        if self.fmt in ("Q4_K", "Q6_K"):
            sub_scale, sub_min = self._sub_scales(blocks)
            codes = (codes.reshape(-1, group) / np.where(sub_scale == 0, 1, sub_scale).reshape(-1, 1)).reshape(
                codes.shape
            )
            raw = self._raw_codes(blocks)  # where a sub-scale is zero the division cannot tell the code
            codes = np.where(np.repeat(sub_scale.reshape(-1), group).reshape(codes.shape) == 0, raw, codes)
            scales = scale[:, None] * sub_scale
            mins = -(half(2)[:, None] * sub_min) if self.fmt == "Q4_K" else np.zeros_like(scales)
        else:
            scales, mins = np.repeat(scale[:, None], groups, 1), np.repeat(minimum[:, None], groups, 1)
        shape = (self.rows, self.cols // group)
        return np.rint(codes).astype(np.int64), scales.reshape(shape), mins.reshape(shape), group

    def _sub_scales(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.fmt == "Q6_K":
            return blocks[:, 192:208].view(np.int8).astype(np.float32), np.zeros((len(blocks), 16), np.float32)
        s = blocks[:, 4:16].astype(np.int32)
        scale = np.concatenate([s[:, 0:4] & 63, (s[:, 8:12] & 15) | ((s[:, 0:4] >> 6) << 4)], 1)
        minimum = np.concatenate([s[:, 4:8] & 63, (s[:, 8:12] >> 4) | ((s[:, 4:8] >> 6) << 4)], 1)
        return scale.astype(np.float32), minimum.astype(np.float32)

    def _raw_codes(self, blocks: np.ndarray) -> np.ndarray:
        unit = blocks.copy()
        unit[:, _HALVES[self.fmt][0] : _HALVES[self.fmt][0] + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        if self.fmt == "Q6_K":
            unit[:, 192:208] = 1
        else:  # scale 1, min 0 in all eight 6-bit fields
            unit[:, 2:4] = 0
            unit[:, 4:8], unit[:, 8:12], unit[:, 12:16] = 1, 0, 1
        return dequantize(unit.reshape(-1), self.fmt, self.rows, self.cols)


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [T, K] and fp32 scales [T, K / 32] as the int8 path defines them, in fp32 arithmetic."""
    groups = x.astype(np.float32).reshape(len(x), -1, 32)
    absmax = np.abs(groups).max(-1)
    scale = absmax / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(absmax < np.float32(1e-36), np.float32(0), np.float32(127) / absmax)
    codes = np.rint(groups * inverse[..., None]).astype(np.int64)
    return codes.reshape(x.shape), np.where(absmax < np.float32(1e-36), np.float32(0), scale)


def int8_reference(x: np.ndarray, weight: RandomWeight) -> np.ndarray:
    """Exact integer dots of each group, scaled and summed in fp64.  -> [T, N]"""
    codes, scales, mins, group = weight.codes_and_parameters()
    a_codes, a_scales = quantize_activations(x)
    a_groups = a_codes.reshape(len(x), -1, group)
    w_groups = codes.reshape(weight.rows, -1, group)
    a_scales = np.repeat(a_scales, 32 // group, 1).astype(np.float64)
    dots = np.einsum("tgk,ngk->tng", a_groups, w_groups)
    sums = a_groups.sum(-1)
    return (dots * scales[None] * a_scales[:, None]).sum(-1) + ((sums * a_scales)[:, None] * mins[None]).sum(-1)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as fp32."""
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """In fp64.  -> [T, K]"""
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """|out - reference| / |reference|, Frobenius norms in fp64."""
    return float(np.linalg.norm(out.astype(np.float64) - reference) / np.linalg.norm(reference))


def run(linear, x: np.ndarray, columns: int | None = None, out: np.ndarray | None = None, **kwargs) -> np.ndarray:
    """linear.run into a poisoned output."""
    if out is None:
        out = np.full((len(x), columns or linear.out_features), np.nan, np.float32)
    linear.run(x, out, **kwargs)
    assert np.isfinite(out).all(), "an output was not written"
    return out
