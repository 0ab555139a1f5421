"""For every test: the level of the native code in the log's head, and a gate for tests that need a GPU."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="cpu, cuda or simt: what engines run on whose test names no device"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        from tests.kit.engines import set_default_device

        set_default_device(config.getoption("--device"))


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

    request.node.user_properties.append(("world", request.param))
    return _native.open_gpu(request.param)


def pytest_terminal_summary(terminalreporter) -> None:
    """What ran where: device kernels on the host, on a GPU, or not at all."""
    counts: dict[tuple[str, str], int] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, world in getattr(report, "user_properties", ()):
                if name == "world":
                    counts[world, outcome] = counts.get((world, outcome), 0) + 1
    if not counts and not has_cuda_device():
        return
    from runtime import _native

    terminalreporter.section("device kernels: what ran where")
    for world, what in (("simt", "host execution (simt)"), ("cuda", "CUDA device")):
        line = ", ".join(f"{counts[world, o]} {o}" for o in ("passed", "failed", "skipped") if (world, o) in counts)
        terminalreporter.write_line(f"{what}: {line or 'no test'}")
    if _native.gpu_library("simt")["compiled"]:
        run = _native.simt_statistics()
        terminalreporter.write_line(
            f"simt: {run['num_launches']} launches, {run['num_threads']} threads, {run['num_checked_accesses']} loads "
            f"and stores checked, {run['num_reports']} reports (tests that plant an error included)"
        )
    if not has_cuda_device():
        terminalreporter.write_line("no CUDA device here: kernels that need TMA (CUTLASS, sm_90a) did not run at all")


def pytest_report_header() -> str:
    """The level that the native code runs at, in the first lines of every log."""
    try:
        from runtime import _native
    except ImportError as error:
        return f"partita: the extension is not importable ({error})"
    levels = f"{_native.active_cpu_isa()} in use, {_native.detected_cpu_isa()} detected"
    return f"partita: {levels}, {_native.usable_cores()} cores"
