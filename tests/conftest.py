"""For every test: the level of the native code in the log's head, and a gate for tests that need a GPU."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def has_cuda_device() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not has_cuda_device():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    """The device of each world: host execution of the CUDA sources, and a real GPU where there is one."""
    from runtime import _native

    return _native.open_gpu(request.param)


def pytest_report_header() -> str:
    """The level that the native code runs at, in the first lines of every log."""
    try:
        from runtime import _native
    except ImportError as error:
        return f"partita: the extension is not importable ({error})"
    levels = f"{_native.active_cpu_isa()} in use, {_native.detected_cpu_isa()} detected"
    return f"partita: {levels}, {_native.usable_cores()} cores"
