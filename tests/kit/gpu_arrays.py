"""NumPy arrays to a device and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from runtime import _native

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "int32": np.int32,
    "uint8": np.uint8,
}


def upload(gpu, array: np.ndarray):
    """A GpuArray with the values of ``array``."""
    target = _native.GpuArray(gpu, list(array.shape), array.dtype.name)
    target.upload(np.ascontiguousarray(array))
    return target


def poisoned(gpu, shape: tuple[int, ...], dtype: str):
    """A GpuArray whose bytes are all 0xff: NaN, -1, or what no right result holds."""
    return upload(gpu, np.full((*shape, np.dtype(DTYPES[dtype]).itemsize), 0xFF, np.uint8).view(DTYPES[dtype])[..., 0])


def download(array) -> np.ndarray:
    target = np.empty(array.shape, DTYPES[array.dtype])
    array.download(target)
    return target
