"""What pyproject.toml promises: few dependencies, one entry point, pinned tools that CI can read."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def listed(key: str) -> list[str]:
    """Package names of one list of requirements."""
    body = re.search(rf"^{key} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)
    return re.findall(r'"([A-Za-z0-9_.-]+)', body)


def test_at_most_ten_direct_dependencies_and_no_torch():
    dependencies = listed("dependencies")
    assert 0 < len(dependencies) <= 10
    assert not {name.lower() for name in dependencies} & {"torch", "transformers", "gguf", "huggingface_hub"}


def test_every_import_of_the_package_is_a_declared_dependency():
    module_of = {"prometheus_client": "prometheus_client", "ml_dtypes": "ml_dtypes"}
    declared = {module_of.get(name, name) for name in (*listed("dependencies"), *listed("hub"), *listed("plot"))}
    # What fastapi stands on and we name: its own requirements.
    declared |= {"starlette", "pydantic"}
    own = {"runtime", "scheduler", "bench"}
    found = set()
    for path in (ROOT / "python").rglob("*.py"):
        for names, name in re.findall(
            r"^\s*(?:import ([\w., ]+)|from (\w+)[\w.]* import)", path.read_text(), re.MULTILINE
        ):
            found |= {part.strip().split(".")[0].split(" ")[0] for part in names.split(",") if part} | ({name} - {""})
    assert not found - declared - own - set(sys.stdlib_module_names)


def test_the_lint_tools_are_pinned_on_one_line():
    line = re.search(r"^dev = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    assert line, ".ci/run reads this list from one line"
    assert all("==" in tool for tool in line.group(1).split(","))


def test_the_console_script_and_modules_answer():
    target = re.search(r'^partita = "([\w.]+):(\w+)"', PYPROJECT, re.MULTILINE)
    assert callable(getattr(importlib.import_module(target.group(1)), target.group(2)))
    for command in ("serve", "chat", "generate", "bench", "doctor"):
        run = subprocess.run(
            [sys.executable, "-m", f"runtime.{command}", "--help"], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        assert "usage:" in run.stdout


def test_the_installed_version_is_the_one_declared():
    try:
        version = importlib.metadata.version("partita")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree")
    assert f'version = "{version}"' in PYPROJECT


def test_the_extension_is_multi_versioned():
    """Only files whose names end in a level are compiled for it; no global -march may creep in."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "-march" not in text
    assert not re.search(r"add_compile_options\([^)]*-m(?:avx|fma|f16c)", text)


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in PYPROJECT
