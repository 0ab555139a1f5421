"""The machine code of the sm_90a kernels: the instructions that they exist for are in it. Needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "python" / "runtime" / "libpartita_cuda.so"
sys.path.insert(0, str(ROOT / "tools"))

import sass_report  # noqa: E402


@pytest.fixture(scope="module")
def cutlass_kernels() -> list[sass_report.KernelCode]:
    """The sm_90a kernels of the CUDA library that was built here."""
    if not LIBRARY.exists():
        pytest.skip("no CUDA library was built here (tools/develop.sh with nvcc)")
    if reason := sass_report.missing_tools():
        pytest.skip(reason)
    kernels = sass_report.read_kernels(sass_report.disassemble(LIBRARY, "sm_90a"))
    found = [kernel for kernel in kernels if "cutlass_" in kernel.name]
    if not found:
        pytest.skip("the CUDA library was built without the CUTLASS kernels")
    return found


def test_hopper_kernels_use_wgmma_and_tma(cutlass_kernels: list[sass_report.KernelCode]) -> None:
    for kernel in cutlass_kernels:
        wanted = "QGMMA" if "fp8" in kernel.name else "IGMMA" if "int8" in kernel.name else "HGMMA"
        assert kernel.counts[wanted] > 0, f"{kernel.name}: no {wanted}"
        assert kernel.counts["UTMALDG"] > 0, f"{kernel.name}: no load through TMA"
        assert kernel.counts["HMMA"] == 0, f"{kernel.name}: falls back to mma.sync"


def test_hopper_kernels_keep_their_sums_in_registers(cutlass_kernels: list[sass_report.KernelCode]) -> None:
    for kernel in cutlass_kernels:
        assert not kernel.counts["STL"] and not kernel.counts["LDL"], f"{kernel.name}: uses local memory"
