"""This engine, without HTTP: token ids in, deltas out, on its own thread as in the server."""

from __future__ import annotations

import itertools
import queue
import time
from importlib import metadata

from bench.peers.workload import Workload
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_engine
from runtime.messages import Delta, Submit
from runtime.sampling_params import SamplingParams

# Requests run on a few tokens past the timed steps, so that none ends and thins the batch while the clock runs.
_MARGIN_TOKENS = 64


def load(model: str, threads: int, kv_dtype: str) -> Partita:
    return Partita(model, threads, kv_dtype)


class Partita:
    def __init__(self, model: str, threads: int, kv_dtype: str):
        arguments = EngineArgs(
            model=model, threads=threads, kv_dtype=kv_dtype, max_num_seqs=32, enable_prefix_caching=False
        )
        self._deltas: queue.SimpleQueue[tuple[float, list[Delta]]] = queue.SimpleQueue()
        self._engine, *_ = load_engine(
            arguments.check(), lambda deltas: self._deltas.put((time.perf_counter(), deltas))
        )
        self._request_ids = itertools.count()

    def version(self) -> str:
        return f"Partita {metadata.version('partita')}" if _is_installed() else "Partita (source tree)"

    def measure(self, workload: Workload, prompts: list[list[int]]) -> float:
        sampling = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=workload.num_steps + 1 + _MARGIN_TOKENS * (not workload.is_prefill),
        )
        submits = [Submit(f"bench-{next(self._request_ids)}", tuple(prompt), sampling) for prompt in prompts]
        started = time.perf_counter()
        for submit in submits:
            self._engine.submit(submit)
        try:
            return self._time(workload, {submit.request_id for submit in submits}, started)
        finally:
            for submit in submits:
                self._engine.abort(submit.request_id)
            self._engine.wait_idle(60)
            while not self._deltas.empty():
                self._deltas.get()

    def top_logprobs(self, prompt: list[int]) -> list[tuple[int, float]]:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1, logprobs=20)
        self._engine.submit(Submit(f"bench-{next(self._request_ids)}", tuple(prompt), sampling))
        found: list[tuple[int, float]] = []
        while True:
            for delta in self._deltas.get(timeout=300)[1]:
                if delta.error:
                    raise RuntimeError(delta.error)
                if delta.logprobs:
                    found = list(delta.logprobs[0].top)
                if delta.finish_reason is not None:
                    return found

    def _time(self, workload: Workload, waiting: set[str], started: float) -> float:
        """Seconds of the timed part, by the moments at which steps handed their deltas over."""
        num_decoded = 0
        while True:
            moment, deltas = self._deltas.get(timeout=300)
            if errors := [delta.error for delta in deltas if delta.error]:
                raise RuntimeError(errors[0])
            if not waiting:
                num_decoded += sum(len(delta.token_ids) for delta in deltas)
                if num_decoded >= workload.num_requests * workload.num_steps:
                    return (moment - started) * workload.timed_tokens / num_decoded
                continue
            waiting -= {delta.request_id for delta in deltas if delta.token_ids}
            if not waiting:  # the last prompt is done: the clock of the decode steps starts here
                if workload.is_prefill:
                    return moment - started
                started = moment


def _is_installed() -> bool:
    try:
        metadata.version("partita")
    except metadata.PackageNotFoundError:
        return False
    return True
