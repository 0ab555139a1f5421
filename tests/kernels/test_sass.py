"""The machine code of the sm_90a kernels: the instructions that they exist for are in it. Needs no GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from runtime import _native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(_native.__file__).parent / "libpartita_cuda.so"
sys.path.insert(0, str(ROOT / "tools"))

import sass_report  # noqa: E402


@pytest.fixture(scope="module")
def hopper_kernels() -> list[sass_report.KernelCode]:
    """The sm_90a kernels of the CUDA library that was built here."""
    if not LIBRARY.exists():
        pytest.skip("no CUDA library was built here (tools/develop.sh with nvcc)")
    if reason := sass_report.missing_tools():
        pytest.skip(reason)
    kernels = sass_report.read_kernels(sass_report.disassemble(LIBRARY, "sm_90a"))
    found = [kernel for kernel in kernels if re.search("cutlass_|gemm_wgmma_kernel", kernel.name)]
    if not found:
        pytest.skip("the CUDA library was built without sm_90a matmuls")
    return found


def test_hopper_matmuls_use_wgmma(hopper_kernels: list[sass_report.KernelCode]) -> None:
    for kernel in hopper_kernels:
        takes_int8 = re.search("int8|SignedBytes|Nibbles", kernel.name)
        wanted = "QGMMA" if "fp8" in kernel.name else "IGMMA" if takes_int8 else "HGMMA"
        assert kernel.counts[wanted] > 0, f"{kernel.name}: no {wanted}"
        assert kernel.counts["HMMA"] + kernel.counts["IMMA"] == 0, f"{kernel.name}: falls back to mma.sync"
        assert "cutlass_" not in kernel.name or kernel.counts["UTMALDG"] > 0, f"{kernel.name}: no load through TMA"


def test_hopper_kernels_keep_their_sums_in_registers(hopper_kernels: list[sass_report.KernelCode]) -> None:
    for kernel in hopper_kernels:
        assert not kernel.counts["STL"] and not kernel.counts["LDL"], f"{kernel.name}: uses local memory"
