"""Tests for a GPU that is there for minutes: several processes side by side, started again after what ends one.

    python tools/gpu_tests.py --out FOLDER --name kernels [--shards 8] [--seconds 150] [--test-seconds 60] -- tests/kernels

What follows `--` goes to pytest. tests/kit/resumable.py is the half inside of pytest. Leaves <name>.json (counts, every
failure with its traceback, what ended a process) and <name>_pytest.log (pytest's own output, the stacks of tests that
took too long). Exits with 0 when every test was run and none failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "tests.kit.resumable"
LAST_LINES = 400  # of each process's output, in the log


@dataclass
class Shard:
    """One of the processes, and the files that it leaves."""

    record: Path
    log: Path
    command: list[str]
    process: subprocess.Popen | None = None
    num_starts: int = 0
    num_begun: int = -1  # when it was last started
    is_over: bool = False

    def events(self) -> list[dict]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:  # killed while it wrote
                continue
        return events

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
        self.num_starts += 1

    def step(self) -> None:
        """Starts the process, and again when it ended before its last test. A process that began none is given up."""
        if self.is_over or (self.process is not None and self.process.poll() is None):
            return
        events = self.events()
        num_begun = sum("begin" in event for event in events)
        if any("finished" in event for event in events) or num_begun == self.num_begun:
            self.is_over = True
            return
        self.num_begun = num_begun
        self.start()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Outcome:
    passed: int = 0
    skipped: int = 0
    failed: list[dict] = field(default_factory=list)  # test, error
    ended_a_process: list[str] = field(default_factory=list)  # lost the device, took too long, or crashed
    collection_errors: list[dict] = field(default_factory=list)
    was_cut: bool = False  # time was up
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def is_well(self) -> bool:
        return not (self.failed or self.ended_a_process or self.collection_errors or self.was_cut) and self.passed > 0


def outcome_of(shards: list[Shard]) -> Outcome:
    outcome = Outcome(was_cut=any(not shard.is_over for shard in shards))
    files: dict[str, dict] = {}
    for shard in shards:
        events = shard.events()
        ended = {event["end"] for event in events if "end" in event}
        lost = {event["lost"] for event in events if "lost" in event}
        begun = [event["begin"] for event in events if "begin" in event]
        outcome.ended_a_process += [test for test in begun if test not in ended or test in lost]
        for event in events:
            if "collection" in event:
                files[event["collection"]] = {"file": event["collection"], "error": event["error"]}
            if "end" not in event:
                continue
            outcome.slowest.append((event["seconds"], event["end"]))
            if event["outcome"] == "failed":
                outcome.failed.append({"test": event["end"], "error": event["error"]})
            else:
                outcome.passed += event["outcome"] == "passed"
                outcome.skipped += event["outcome"] == "skipped"
        if not begun and not any("finished" in event for event in events):
            outcome.collection_errors.append({"file": shard.log.name, "error": "pytest began no test"})
    outcome.collection_errors += files.values()
    outcome.slowest = sorted(outcome.slowest, reverse=True)[:10]
    return outcome


def last_line(error: str) -> str:
    """What a traceback comes to."""
    lines = [line for line in error.splitlines() if line.startswith("E ")]
    return (lines[0][1:] if lines else error.strip().splitlines()[-1] if error.strip() else "").strip()[:200]


def print_outcome(name: str, outcome: Outcome, seconds: float) -> None:
    for failure in outcome.failed:
        print(f"FAILED {failure['test']}: {last_line(failure['error'])}")
    for entry in outcome.collection_errors:
        print(f"NOT COLLECTED {entry['file']}: {last_line(entry['error'])}")
    for test in outcome.ended_a_process:
        print(f"ENDED ITS PROCESS {test}")
    print(
        f"{name}: {outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped, "
        f"{len(outcome.ended_a_process)} ended their process, {len(outcome.collection_errors)} files not collected"
        f"{', time was up before the last test' if outcome.was_cut else ''}; {seconds:.0f} s"
    )


def main() -> int:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    own, pytest_arguments = words[:split], words[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--shards", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--test-seconds", type=float, default=60)
    options = parser.parse_args(own)
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out / f"{options.name}_shards"
    work.mkdir(exist_ok=True)
    shards = []
    for i in range(options.shards):
        record, log = work / f"{i}.jsonl", work / f"{i}.log"
        for stale in (record, log, record.with_suffix(".stacks")):
            stale.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN,
            "--rootdir", str(ROOT),  # else it follows from which files exist, and test names change with it
            "--continue-on-collection-errors", "--record", str(record), "--shard", f"{i}/{options.shards}",
            "--test-seconds", str(options.test_seconds), *pytest_arguments,
        ]  # fmt: skip
        shards.append(Shard(record, log, command))
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < options.seconds and not all(shard.is_over for shard in shards):
            for shard in shards:
                shard.step()
            time.sleep(0.2)
    finally:
        for shard in shards:
            shard.stop()
    outcome, seconds = outcome_of(shards), time.monotonic() - begin
    with (options.out / f"{options.name}_pytest.log").open("w") as log:
        for shard in shards:
            for path in (shard.log, shard.record.with_suffix(".stacks")):
                text = path.read_text(errors="replace").splitlines() if path.exists() else []
                log.write(f"==== {path.name}, {shard.num_starts} starts\n" + "\n".join(text[-LAST_LINES:]) + "\n")
    report = {"name": options.name, "seconds": round(seconds, 1), **outcome.__dict__}
    (options.out / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print_outcome(options.name, outcome, seconds)
    return 0 if outcome.is_well() else 1


if __name__ == "__main__":
    sys.exit(main())
