"""A pytest run that survives what a GPU does to it: another process goes on where a lost device or a hang ended it.

    python -m pytest -p tests.kit.resumable --record FILE [--shard 2/8] [--test-seconds 60] ...

After an illegal access or a failed launch no call of the process reaches its device any more, so every later test would
fail of it; a kernel that waits for ever would take the time of all others. Here the process ends at once, and the record
says which test it was: started again with the same record, pytest leaves out every test that has begun. tools/gpu_tests.py
does that, for several shards side by side.

The record has a line of JSON for each event: {"begin": test}, {"end": test, "outcome", "seconds", "error"},
{"lost": test} (its process has no device any more), {"collection": file, "error"}, {"finished": true}.
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path

import pytest


def device_is_lost() -> bool:
    """Whether this process used a CUDA device that answers no more. An error that is over does not count."""
    from runtime import _native

    try:
        if _native.gpu_library("cuda")["num_devices"] == 0:
            return False
        _native.open_gpu("cuda").synchronize()
    except RuntimeError:
        return True
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resumable")
    group.addoption("--record", type=Path, help="file of events; tests that have begun in it are left out")
    group.addoption("--shard", default="0/1", help="I/N: every Nth test, from the Ith on")
    group.addoption("--test-seconds", type=float, default=120, help="a test that takes longer ends the process")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        config.pluginmanager.register(Recorder(config, path), "partita-recorder")


class Recorder:
    def __init__(self, config: pytest.Config, path: Path):
        index, count = config.getoption("--shard").split("/")
        self._index, self._count = int(index), int(count)
        self._test_s = config.getoption("--test-seconds")
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._begun = {event["begin"] for event in events if "begin" in event}
        self._file = path.open("a")
        self._stacks = path.with_suffix(".stacks").open("a")  # of a test that took too long
        self._seconds, self._outcome, self._error = 0.0, "passed", ""

    def _write(self, **event) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items[self._index :: self._count] if item.nodeid not in self._begun]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(collection=report.nodeid, error=report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._seconds, self._outcome, self._error = 0.0, "passed", ""
        self._write(begin=nodeid)
        self._stacks.write(f"{nodeid}\n")
        self._stacks.flush()
        faulthandler.dump_traceback_later(self._test_s, exit=True, file=self._stacks)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.failed:
            self._outcome = "failed"
            self._error += report.longreprtext + "\n"
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write(end=nodeid, outcome=self._outcome, seconds=round(self._seconds, 3), error=self._error)
        if self._outcome == "failed" and device_is_lost():
            self._write(lost=nodeid)
            os._exit(75)  # without teardown: what is left of engines would wait for the device

    def pytest_sessionfinish(self) -> None:
        self._write(finished=True)
