"""Random canonical weights, and linears run on the device of a test."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from runtime import _native as native

DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "e4m3": ml_dtypes.float8_e4m3fn,
}
ARRAY_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": "int8", "e4m3": "float8_e4m3fn"}


@dataclass
class Canonical:
    """A random canonical weight: the native object and its exact values."""

    native: native.CanonicalWeight
    values: np.ndarray  # [N, K] fp64
    codes: np.ndarray  # [N, K], less their zeros where those are integers
    scales: np.ndarray | None  # [N, G] fp32


def half_values(rng: np.random.Generator, shape, scale: float, dtype: str) -> np.ndarray:
    """fp32 numbers that the 16-bit type holds exactly, positive and of one order."""
    return (rng.uniform(0.5, 1.5, shape) * scale).astype(DTYPES[dtype]).astype(np.float32)


def expand(cells: np.ndarray, group: int, cols: int) -> np.ndarray:
    """[N, G] of groups -> [N, K]."""
    return np.repeat(cells, cols if group < 0 else group, axis=1)[:, :cols]


def random_codes(
    rng: np.random.Generator, codes: str, rows: int, cols: int, group: int, offset: str, dtype: str, scale: float = 0.01
) -> Canonical:
    """u4, u8 or s8 codes with scales (and zeros or mins) that the 16-bit type `dtype` holds exactly."""
    low, high = {"u4": (0, 16), "u8": (0, 256), "s8": (-128, 128)}[codes]
    data = rng.integers(low, high, (rows, cols))
    groups = 1 if group < 0 else -(-cols // group)
    scales = half_values(rng, (rows, groups), scale, dtype)
    middle = {"u4": 8, "u8": 128, "s8": 0}[codes]
    keywords = {}
    zeros = np.full((rows, groups), middle)
    mins = np.zeros((rows, groups), np.float32)
    if offset == "symmetric":
        keywords["common_zero"] = middle
    elif offset == "zero":
        zeros = rng.integers(low, high, (rows, groups))
        keywords["zeros"] = zeros.astype(np.uint8)
    else:
        zeros[:] = 0
        mins = -half_values(rng, (rows, groups), scale * middle, dtype)
        keywords["mins"] = mins
    storage = data.astype(np.int8).view(np.uint8) if codes == "s8" else data.astype(np.uint8)
    weight = native.CanonicalWeight(codes, storage, rows, cols, group=group, scales=scales, **keywords)
    centred = data - expand(zeros, group, cols)
    values = expand(scales, group, cols).astype(np.float64) * centred + expand(mins, group, cols)
    return Canonical(weight, values, centred, scales)


def random_two_levels(rng: np.random.Generator, rows: int, cols: int, group: int, unit_scales: bool) -> Canonical:
    """QoQ: u4 codes, integer scales up to 17 and zeros so that every byte fits, an fp16 scale per channel."""
    groups = -(-cols // group)
    sub_scales = rng.integers(1, 18, (rows, groups))
    zeros = rng.integers(0, 16, (rows, groups))
    data = rng.integers(0, 16, (rows, cols))
    steps = expand(sub_scales, group, cols)
    wide_zeros = expand(zeros, group, cols)
    lowest = np.ceil(-128 / steps) + wide_zeros
    highest = np.floor(127 / steps) + wide_zeros
    data = np.clip(data, np.maximum(lowest, 0), np.minimum(highest, 15)).astype(np.int64)
    scales = np.ones((rows, 1), np.float32) if unit_scales else half_values(rng, (rows, 1), 0.001, "f16")
    weight = native.CanonicalWeight(
        "u4",
        data.astype(np.uint8),
        rows,
        cols,
        group=group,
        scales=scales,
        zeros=zeros.astype(np.uint8),
        sub_scales=sub_scales.astype(np.uint8),
    )
    codes = (data - wide_zeros) * steps
    return Canonical(weight, codes * scales.astype(np.float64), codes, scales)


def random_plain(rng: np.random.Generator, rows: int, cols: int, dtype: str) -> Canonical:
    data = (rng.standard_normal((rows, cols)) * 0.1).astype(DTYPES[dtype])
    return Canonical(
        native.CanonicalWeight(dtype, data.view(np.uint8), rows, cols), data.astype(np.float64), data, None
    )


def dequantized(weight: native.CanonicalWeight) -> np.ndarray:
    out = np.empty((weight.out_features, weight.in_features), np.float32)
    weight.dequantize(out)
    return out


def upload(gpu, host: np.ndarray, name: str) -> native.GpuArray:
    array = native.GpuArray(gpu, list(host.shape), name)
    array.upload(host)
    return array


class Runner:
    """Runs a packed linear on host arrays, with poisoned outputs and one workspace whose counters must stay zero."""

    def __init__(self, gpu, linear, max_tokens: int = 300):
        self.gpu, self.linear = gpu, linear
        bytes_wanted = linear.workspace_bytes(max_tokens)
        self.workspace = upload(gpu, np.zeros(bytes_wanted, np.uint8), "uint8")

    def __call__(
        self,
        x: np.ndarray,
        out_type: str = "f32",
        columns: int | None = None,
        out: np.ndarray | None = None,
        x_padding: int = 0,
        out_padding: int = 0,
        bias: np.ndarray | None = None,
        x_scale: np.ndarray | None = None,
        x_sum: np.ndarray | None = None,
        **keywords,
    ) -> np.ndarray:
        activations = self.linear.activations
        gated = keywords.get("gate") is not None
        columns = columns or (self.linear.out_features // 2 if gated else self.linear.out_features)
        wide_x = np.concatenate([x, np.full((len(x), x_padding), 77, x.dtype)], 1) if x_padding else x
        host = np.full((len(x), columns + out_padding), np.nan, DTYPES[out_type])
        if out is not None:
            host[:, :columns] = out
        device_out = upload(self.gpu, host, ARRAY_NAMES[out_type])
        arrays = {}
        for name, value, dtype in (
            ("bias", bias, "float32"),
            ("x_scale", x_scale, "float32"),
            ("x_sum", x_sum, "int32"),
        ):
            if value is not None:
                arrays[name] = upload(self.gpu, value, dtype)
        self.linear.run(
            upload(self.gpu, np.ascontiguousarray(wide_x.astype(DTYPES[activations])), ARRAY_NAMES[activations]),
            device_out,
            self.workspace,
            **arrays,
            **keywords,
        )
        device_out.download(host)
        assert np.isnan(host[:, columns:].astype(np.float32)).all(), "wrote past the outputs"
        counters = np.empty(self.workspace.shape, np.uint8)
        self.workspace.download(counters)
        assert not counters[: 16384 * 4].any(), "the counters are not zero after the run"
        return host[:, :columns].astype(np.float32)
