"""What a bug report should carry: this machine, the versions of what Partita stands on, the switches that are set.

    python tools/env_report.py

Prints text without host names, user names or paths. `partita doctor` measures the machine; this only names it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_line(*command: str) -> str:
    """The first line that a command prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not found"
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = (run.stdout or run.stderr).strip().splitlines()
    return lines[0] if lines else f"status {run.returncode}"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def direct_requirements() -> list[str]:
    """Names of the packages that pyproject.toml asks for, extras too."""
    text = (ROOT / "pyproject.toml").read_text()
    return sorted(set(re.findall(r'^\s*"([A-Za-z0-9_.-]+)(?:[<>=!~]=?[^"]*)"', text, re.MULTILINE)))


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def native_level() -> str:
    try:
        from runtime import _native
    except ImportError as error:
        return f"not built ({error.msg})"
    return f"{_native.active_cpu_isa()} in use, {_native.detected_cpu_isa()} detected, {_native.usable_cores()} cores"


def main() -> None:
    libc = " ".join(platform.libc_ver()) or "unknown"
    rows = [
        ("commit", first_line("git", "describe", "--always", "--dirty")),
        ("system", f"{platform.system()} {platform.release()}, libc {libc}"),
        ("processor", cpu_model()),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("compiler", first_line(os.environ.get("CXX", "c++"), "--version")),
        ("CMake", first_line("cmake", "--version")),
        ("GPU", first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")),
        ("extension", native_level()),
        ("partita", installed("partita")),
        *((name, installed(name)) for name in direct_requirements()),
        *((name, os.environ[name]) for name in sorted(os.environ) if re.fullmatch(r"PARTITA_(?!API_KEY)\w+", name)),
    ]
    for name, value in rows:
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
