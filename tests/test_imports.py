"""What importing a package costs: nothing heavy comes along uninvited. Each case runs in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules after running `code`, and full names of our own modules."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    names = json.loads(run.stdout.splitlines()[-1])
    return {name if name.startswith(("runtime", "scheduler")) else name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def always_there() -> set[str]:
    """What this interpreter loads at start anyway (site hooks of the environment)."""
    return modules_after("pass")


HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "tokenizers", "numpy", "jinja2", "pydantic", "safetensors"}


@pytest.mark.parametrize(
    "code",
    [
        "import runtime",
        "import runtime.command_line",
        "import runtime.messages",
        "from runtime import SamplingParams",
    ],
)
def test_the_package_alone_is_light(code, always_there):
    assert not (modules_after(code) & HEAVY) - always_there


def test_the_scheduler_needs_neither_extension_nor_arrays(always_there):
    modules = modules_after(
        "import importlib, pkgutil, scheduler\n"
        "for module in pkgutil.iter_modules(scheduler.__path__):\n"
        "    importlib.import_module('scheduler.' + module.name)"
    )
    assert "scheduler.scheduler" in modules
    assert not {name for name in modules if name.partition(".")[0] == "runtime"}
    assert not (modules & HEAVY) - always_there


def test_no_command_needs_torch(always_there):
    modules = modules_after("import runtime.serve, runtime.generate, runtime.chat, runtime.engine_loader, runtime.llm")
    assert not (modules & {"torch", "transformers", "gguf"}) - always_there


def test_the_check_sees_what_is_imported():
    assert "numpy" in modules_after("import numpy")
