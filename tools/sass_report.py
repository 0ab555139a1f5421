"""Which tensor-core instructions the machine code of a CUDA library holds, kernel by kernel.

    python tools/sass_report.py python/runtime/libpartita_cuda.so
    python tools/sass_report.py LIBRARY --kernel fp8 --wants QGMMA     # exit status 1 where one lacks it

Works without a GPU. It needs NVIDIA's cuobjdump and nvdisasm: from PATH, from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm, or from Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# HGMMA wgmma of 16-bit operands, QGMMA of fp8, IGMMA of int8; HMMA, IMMA the mma.sync of the sm_80 family; UTMALDG a
# load through TMA, LDGSTS cp.async; LDL and STL are local memory: spills or arrays that are indexed at run time.
INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "UTMALDG", "LDGSTS", "LDL", "STL")

ARCHITECTURE = re.compile(r"^\s*arch = (sm_\w+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
OPERATION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*)")


@dataclass
class KernelCode:
    symbol: str
    arch: str
    counts: Counter = field(default_factory=Counter)
    name: str = ""


def tool_folders() -> list[Path]:
    """Where the packages that carry NVIDIA's tools put them."""
    folders = []
    for package, inside in (("nvidia", ("*/bin", "cuda_*/bin")), ("triton", ("backends/nvidia/bin",))):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or [] if spec else []:
            for pattern in inside:
                folders += sorted(Path(root).glob(pattern))
    return folders


def find_tool(name: str) -> str | None:
    """The tool's path, or None where it is not on this machine."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, tool_folders())))


def missing_tools() -> str:
    """Why no machine code can be read here; empty where it can."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    return (
        f"{' and '.join(missing)} not found (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)" if missing else ""
    )


def disassemble(library: Path, arch: str | None = None) -> str:
    """The machine code as text. Raises RuntimeError with the tool's own words."""
    if missing := missing_tools():
        raise RuntimeError(missing)
    paths = [str(Path(find_tool("nvdisasm")).parent), os.environ.get("PATH", "")]
    command = [find_tool("cuobjdump"), "-sass", *(["-arch", arch] if arch else []), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": os.pathsep.join(paths)})
    if run.returncode != 0:
        raise RuntimeError(f"cuobjdump: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def read_kernels(text: str) -> list[KernelCode]:
    """Every function with how often it holds each instruction of INSTRUCTIONS."""
    kernels: list[KernelCode] = []
    arch = "?"
    for line in text.splitlines():
        if match := OPERATION.search(line):
            if kernels and match[1] in INSTRUCTIONS:
                kernels[-1].counts[match[1]] += 1
        elif match := ARCHITECTURE.match(line):
            arch = match[1]
        elif match := FUNCTION.match(line):
            kernels.append(KernelCode(match[1], arch))
    from ptxas_report import demangle

    for kernel, name in zip(kernels, demangle([kernel.symbol for kernel in kernels]), strict=True):
        kernel.name = name
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="a shared library or object file with CUDA machine code")
    parser.add_argument("--arch", help="only this architecture, such as sm_90a")
    parser.add_argument("--kernel", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument("--wants", action="append", default=[], help="an instruction that each of them must hold")
    arguments = parser.parse_args()
    if not arguments.library.exists():
        parser.error(f"library: got {arguments.library}, which is not there")
    try:
        kernels = read_kernels(disassemble(arguments.library, arguments.arch))
    except RuntimeError as error:
        print(error)
        return 2
    from ptxas_report import short_name

    chosen = [kernel for kernel in kernels if re.search(arguments.kernel, kernel.name)]
    lacking = 0
    for kernel in sorted(chosen, key=lambda kernel: (kernel.arch, kernel.name)):
        counts = " ".join(f"{name}:{kernel.counts[name]}" for name in INSTRUCTIONS if kernel.counts[name])
        lacks = [name for name in arguments.wants if not kernel.counts[name]]
        lacking += bool(lacks)
        verdict = f"  LACKS {' '.join(lacks)}" if lacks else ""
        print(f"{kernel.arch:<8} {short_name(kernel.name, 90):<90} {counts}{verdict}")
    print(f"{len(chosen)} of {len(kernels)} kernels")
    return 1 if lacking or (arguments.wants and not chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
