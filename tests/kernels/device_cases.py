"""What tests of csrc/device and csrc/simt share: running one of their kernels on arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime import _native


def run(
    gpu,
    name: str,
    inputs: Sequence[np.ndarray],
    output: np.ndarray,
    numbers: Sequence[int] = (),
) -> np.ndarray:
    """The output after the kernel; it begins as `output` is."""
    # Raw 16-bit numbers travel as float16, which arrays of a device know.
    inputs = [array.view(np.float16) if array.dtype == np.uint16 else array for array in inputs]
    held = [_native.GpuArray(gpu, array.shape, str(array.dtype)) for array in inputs]
    for device_array, array in zip(held, inputs, strict=True):
        device_array.upload(np.ascontiguousarray(array))
    target = _native.GpuArray(gpu, output.shape, str(output.dtype))
    target.upload(np.ascontiguousarray(output))
    _native.run_device_test(name, held, target, list(numbers))
    result = np.empty_like(output)
    target.download(result)
    return result
