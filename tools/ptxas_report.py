"""What ptxas said of every kernel: registers, shared memory and spills, for each architecture.

    ninja -C build/develop -v 2>&1 | tee build.log; python tools/ptxas_report.py build.log

Reads build output that holds `-Xptxas=-v` reports (the CUDA targets ask for them; ninja prints them when a file is
compiled, so the log must be of a build from scratch). Prints a line for each kernel and architecture. Exit status 1:
a hot kernel spills registers to memory; 2: the log holds no report.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# A kernel whose name matches one of these runs in every step and may not spill; NAIVE takes a match back.
HOT_KERNELS = (
    r"gemm",
    r"device_kernel",  # every CUTLASS kernel
    r"attend",
    r"combine",
    r"append",
    r"prepare_row",
    r"gated_activation",
    r"embedding",
    r"gather_rows",
    r"norm_add",
    r"sample",
    r"logit",
    r"logprob",
)
NAIVE_KERNELS = r"naive|exact"

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class KernelReport:
    symbol: str
    arch: str
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    name: str = ""

    @property
    def is_hot(self) -> bool:
        return bool(re.search("|".join(HOT_KERNELS), self.name)) and not re.search(NAIVE_KERNELS, self.name)

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def read_reports(text: str) -> list[KernelReport]:
    """One entry for each kernel and architecture, in the order of the log; a later report replaces an earlier one."""
    reports: dict[tuple[str, str], KernelReport] = {}
    current: KernelReport | None = None
    properties_of = ""
    for line in text.splitlines():
        if match := ENTRY.search(line):
            current = KernelReport(match[1], match[2])
            reports[current.symbol, current.arch] = current
            properties_of = current.symbol
        elif match := PROPERTIES.search(line):
            properties_of = match[1]
        elif current is None:
            continue
        elif match := SPILLS.search(line):
            # A function that was not inlined reports too; it spills on behalf of the kernel that calls it.
            stack, stores, loads = (int(number) for number in match.groups())
            current.spill_stores += stores
            current.spill_loads += loads
            if properties_of == current.symbol:
                current.stack_bytes = stack
        elif match := USED.search(line):
            current.registers = int(match[1])
            shared = SHARED.search(line)
            current.shared_bytes = int(shared[1]) if shared else 0
    found = list(reports.values())
    for report, name in zip(found, demangle([report.symbol for report in found]), strict=True):
        report.name = name
    return found


def demangle(symbols: list[str]) -> list[str]:
    """Names as in the sources where c++filt is at hand, else the symbols."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = run.stdout.splitlines()
    return names if run.returncode == 0 and len(names) == len(symbols) else symbols


def short_name(name: str, width: int) -> str:
    """The part of a name that tells kernels apart: without return type, argument list and the namespace."""
    name = re.sub(r"^void ", "", name).replace("partita::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"\([^()]*\)$", "", name)
    collective = re.search(r"CollectiveMma<cutlass::gemm::(\w+?)<", name)
    if collective:  # a CUTLASS kernel: collective and tile, out of some thousand letters
        tile = re.search(r"tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)> ?>", name[collective.end() + 60 :])
        element = re.search(r"cutlass::(bfloat16_t|half_t|float_e4m3_t)", name)
        return " ".join([collective[1], "x".join(tile.groups()) if tile else "", element[1] if element else ""]).strip()
    return name if len(name) <= width else name[: width - 3] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="*", type=Path, help="build logs (default: standard input)")
    parser.add_argument("--all", action="store_true", help="kernels that are neither hot nor spill, too")
    arguments = parser.parse_args()
    text = "\n".join(log.read_text(errors="replace") for log in arguments.logs) if arguments.logs else sys.stdin.read()
    reports = read_reports(text)
    if not reports:
        print("no ptxas report in this log: wanted the output of a build from scratch with -Xptxas=-v")
        return 2
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spill st/ld':>12}  {'arch':<8} kernel")
    guilty = 0
    for report in sorted(reports, key=lambda report: (report.arch, report.name)):
        if not (arguments.all or report.is_hot or report.spills):
            continue
        spills = f"{report.spill_stores}/{report.spill_loads}" if report.spills else "none"
        verdict = "  SPILLS" if report.is_hot and report.spills else ""
        guilty += bool(verdict)
        print(
            f"{report.registers:>9} {report.shared_bytes:>7} {report.stack_bytes:>6} {spills:>12}  {report.arch:<8} "
            f"{short_name(report.name, 100)}{verdict}"
        )
    num_hot = sum(report.is_hot for report in reports)
    print(f"{len(reports)} kernels, {num_hot} of them hot, {guilty} hot ones spill")
    return 1 if guilty else 0


if __name__ == "__main__":
    sys.exit(main())
