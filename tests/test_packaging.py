"""What pyproject.toml promises: few dependencies, one entry point, pinned tools that CI can read."""

from __future__ import annotations

import ast
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


def imported_names(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_every_import_of_the_package_is_a_declared_dependency():
    found = set().union(*(imported_names(path) for path in (ROOT / "python").rglob("*.py")))
    declared = {*listed("dependencies"), *listed("hub"), *listed("plot")}
    declared |= {"starlette", "pydantic", "h11"}  # what fastapi and uvicorn are made of
    assert not found - declared - {"runtime", "scheduler"} - set(sys.stdlib_module_names)


def test_every_declared_dependency_is_imported():
    found = set().union(*(imported_names(path) for path in (ROOT / "python").rglob("*.py")))
    assert not {*listed("dependencies")} - found


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
