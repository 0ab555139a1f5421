"""A server as a child process for the time of a measurement: start, wait until it answers, memory, stop."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """Runs `command` with {port} filled in; `started` is the moment of its start (time.perf_counter)."""

    def __init__(self, command: str, log: Path):
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.started = time.perf_counter()
            self._child = subprocess.Popen(
                shlex.split(command.format(port=self.port)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def first_token_s(self, limit_s: float = 300.0) -> float:
        """Asks for one token until there is one; seconds from the process's start. Raises RuntimeError if it dies."""
        model = None
        while time.perf_counter() - self.started < limit_s:
            if self._child.poll() is not None:
                tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
                raise RuntimeError(f"the server ended with status {self._child.returncode}: " + " | ".join(tail))
            try:
                model = model or self._json("/v1/models")["data"][0]["id"]
                self._json("/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 1})
                return time.perf_counter() - self.started
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.01)
        raise RuntimeError(f"the server gave no token within {limit_s:.0f} s")

    def peak_resident_bytes(self) -> int:
        """The largest resident set so far, of the server and its children together."""
        return self._memory_bytes("VmHWM:")

    def resident_bytes(self) -> int:
        """The resident set now, of the server and its children together."""
        return self._memory_bytes("VmRSS:")

    def _memory_bytes(self, field: str) -> int:
        waiting, total = [self._child.pid], 0
        while waiting:
            folder = Path("/proc") / str(waiting.pop())
            try:
                status = (folder / "status").read_text()
                children = (folder / "task" / folder.name / "children").read_text().split()
            except OSError:  # it has just ended
                continue
            waiting += [int(child) for child in children]
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
        return total

    def stop(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _json(self, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(
            self.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def partita_command(model: str, flags: str = "") -> str:
    """The server of this interpreter's Partita; a brace in the flags would be taken for {port}."""
    flags = flags.replace("{", "{{").replace("}", "}}")
    return f"{shlex.quote(sys.executable)} -m runtime.serve {shlex.quote(model)} --port {{port}} {flags}"
