"""One engine in one process: loads a model, then measures the workloads that come as JSON lines on stdin.

Not run by hand: bench/peers/compare.py starts it as `python -m bench.peers.worker ENGINE --model FILE ...`.
Each answer is one JSON line on the stdout that the process was started with; whatever the engine's
libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
from typing import Protocol

from bench.peers.workload import Workload


class Engine(Protocol):
    """What an adapter in bench/peers/engines offers."""

    def version(self) -> str:
        """Name and version, as the table's footer prints it."""

    def measure(self, workload: Workload, prompts: list[list[int]]) -> float:
        """Runs the workload once and returns the seconds that its timed part took."""

    def top_logprobs(self, prompt: list[int]) -> list[tuple[int, float]]:
        """The most likely next tokens after the prompt, 20 or more, with their log probabilities."""


def die_with_parent() -> None:
    """A paused process cannot see that its stdin was closed: have Linux end it when compare.py is gone."""
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", help="a module of bench.peers.engines")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-dtype", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    arguments = parser.parse_args()

    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    started = time.perf_counter()
    try:
        adapter = importlib.import_module(f"bench.peers.engines.{arguments.engine}")
        engine: Engine = adapter.load(arguments.model, arguments.threads, arguments.kv_dtype)
    except ImportError as error:
        answer(missing=str(error))
        return
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(version=engine.version(), load_s=time.perf_counter() - started)

    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            try:
                answer(top_logprobs=engine.top_logprobs(request["prompt"]))
            except Exception as error:
                answer(error=f"{type(error).__name__}: {error}")
            continue
        workload = Workload(**request["workload"])
        try:
            seconds = engine.measure(workload, workload.prompts(request["seed"], arguments.vocab_size))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            continue
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer(seconds=seconds, tokens_per_s=workload.timed_tokens / seconds, peak_resident_bytes=peak_bytes)


if __name__ == "__main__":
    main()
