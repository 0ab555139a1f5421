"""tools/gpu_tests.py: what a GPU does to a process ends that process's tests only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONFTEST = """
from tests.kit import resumable

lost = []  # as a device is: for the rest of the process
resumable.device_is_lost = lambda: bool(lost)
"""
TESTS = """
import os, time
from conftest import lost

def test_first(): pass
def test_wrong(): assert 1 == 2
def test_loses_the_device():
    lost.append(True)
    raise RuntimeError("cudaEventSynchronize: an illegal memory access was encountered (700)")
def test_behind_it(): assert not lost
def test_waits_for_ever(): time.sleep(3600)
def test_behind_the_wait(): pass
def test_crashes(): os.abort()
def test_last(): pass
"""


def run(tmp_path, *arguments: str) -> tuple[int, dict, str]:
    command = [sys.executable, ROOT / "tools/gpu_tests.py", "--out", tmp_path / "out", "--name", "all", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads((tmp_path / "out/all.json").read_text()), done.stdout


def test_goes_on_behind_a_lost_device_a_hang_and_a_crash(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_cases.py").write_text(TESTS)
    (folder / "test_unreadable.py").write_text("import no_such_module_anywhere\n")
    status, report, text = run(tmp_path, "--shards", "2", "--seconds", "300", "--test-seconds", "5", "--", str(folder))
    assert status == 1
    assert (report["passed"], report["was_cut"]) == (4, False)
    assert {failure["test"].split("::")[1] for failure in report["failed"]} == {"test_wrong", "test_loses_the_device"}
    ended = {test.split("::")[1] for test in report["ended_a_process"]}
    assert ended == {"test_loses_the_device", "test_waits_for_ever", "test_crashes"}
    assert [entry["file"].split("/")[-1] for entry in report["collection_errors"]] == ["test_unreadable.py"]
    assert "illegal memory access" in text and "no_such_module_anywhere" in text
    assert "test_waits_for_ever" in (tmp_path / "out/all_pytest.log").read_text()  # with its stack


def test_is_well_only_when_something_passed_and_nothing_failed(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_cases.py").write_text("def test_it(): pass\n")
    assert run(tmp_path, "--shards", "2", "--seconds", "300", "--", str(folder))[0] == 0
    status, report, _ = run(tmp_path, "--shards", "1", "--seconds", "300", "--", str(folder), "-k", "no_such_test")
    assert status == 1 and report["passed"] == 0
