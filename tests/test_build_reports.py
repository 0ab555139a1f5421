"""tools/ptxas_report.py and tools/sass_report.py over texts of the tools that they read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import ptxas_report  # noqa: E402
import sass_report  # noqa: E402

PTXAS_LOG = """\
[1/2] Building CUDA object gemm.o
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z16gemm_tile_kernelv' for 'sm_80'
ptxas info    : Function properties for _Z16gemm_tile_kernelv
    {sm_80}
ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z16gemm_tile_kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z16gemm_tile_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers
ptxas info    : Compiling entry function '_Z17naive_gemm_kernelv' for 'sm_80'
ptxas info    : Function properties for _Z17naive_gemm_kernelv
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
"""
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
SPILLING = "40 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads"


def run_ptxas_report(log: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "ptxas_report.py")]
    return subprocess.run(command, input=log, capture_output=True, text=True)


def test_ptxas_report_reads_each_architecture() -> None:
    first, second, naive = ptxas_report.read_reports(PTXAS_LOG.replace("{sm_80}", SPILLING))
    assert (first.arch, first.registers, first.shared_bytes, first.stack_bytes) == ("sm_80", 128, 1024, 40)
    assert (first.spill_stores, first.spill_loads, first.is_hot) == (12, 20, True)
    assert (second.arch, second.registers, second.spills) == ("sm_90a", 96, False)
    assert naive.spills and not naive.is_hot


def test_ptxas_report_fails_for_a_hot_kernel_that_spills() -> None:
    clean = run_ptxas_report(PTXAS_LOG.replace("{sm_80}", CLEAN))
    assert clean.returncode == 0, clean.stdout
    assert "3 kernels, 2 of them hot, 0 hot ones spill" in clean.stdout
    spilling = run_ptxas_report(PTXAS_LOG.replace("{sm_80}", SPILLING))
    assert spilling.returncode == 1
    assert "12/20" in spilling.stdout and spilling.stdout.count("SPILLS") == 1


def test_ptxas_report_says_when_there_is_nothing_to_read() -> None:
    empty = run_ptxas_report("ninja: no work to do.\n")
    assert empty.returncode == 2
    assert "no ptxas report" in empty.stdout


SASS = """\
\t\tFunction : _Z3fp8v
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/                   STL [R1+0x4], R5 ;
"""


def test_sass_report_counts_instructions_of_each_kernel() -> None:
    (kernel,) = sass_report.read_kernels("arch = sm_90a\n" + SASS)
    assert (kernel.symbol, kernel.arch, kernel.name) == ("_Z3fp8v", "sm_90a", "fp8()")
    assert dict(kernel.counts) == {"QGMMA": 1, "STL": 1}
