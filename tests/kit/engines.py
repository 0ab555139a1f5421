"""Engines for tests: submit token ids, collect what comes back.

They run on the CPU, or on the device of ``pytest --device`` (cuda, simt) where a test names none.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from runtime.engine_args import EngineArgs
from runtime.engine_loader import LoadedModel, load_model, start_engine
from runtime.messages import Delta, Submit
from runtime.sampling_params import SamplingParams

_default_device = "cpu"


def set_default_device(device: str) -> None:
    """What engines run on whose test names no device."""
    global _default_device
    _default_device = device


def engine_args(model, **args) -> EngineArgs:
    """Checked arguments. On a GPU answers must not depend on the batch, or equal answers could not be asked for."""
    args.setdefault("device", _default_device)
    if args["device"] != "cpu":
        args.setdefault("batch_invariant", True)
    return EngineArgs(model=str(model), **args).check()


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_deltas: int = 0


class EngineUnderTest:
    """An engine with a synchronous face. ``answers`` fill as deltas arrive."""

    def __init__(self, loaded: LoadedModel, args: EngineArgs, trace=None):
        self.answers: dict[str, Answer] = {}
        self.finished: list[str] = []  # request ids in the order in which they ended
        self._changed = threading.Condition()
        self.engine = start_engine(loaded, args, self._receive, trace)
        self._num_submitted = 0

    def _receive(self, deltas: list[Delta]) -> None:
        with self._changed:
            for delta in deltas:
                answer = self.answers[delta.request_id]
                answer.token_ids.extend(delta.token_ids)
                answer.logprobs.extend(delta.logprobs or ())
                answer.num_cached_tokens = max(answer.num_cached_tokens, delta.num_cached_tokens)
                answer.num_deltas += 1
                if delta.finish_reason is not None:
                    assert answer.finish_reason is None, "a request ended twice"
                    answer.finish_reason, answer.error = delta.finish_reason, delta.error
                    self.finished.append(delta.request_id)
            self._changed.notify_all()

    def submit(self, prompt, **sampling) -> str:
        request_id = f"r{self._num_submitted}"
        self._num_submitted += 1
        self.answers[request_id] = Answer()
        priority = sampling.pop("priority", 0)
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling})
        self.engine.submit(Submit(request_id, tuple(prompt), params, priority))
        return request_id

    def wait(self, request_id: str, timeout_s: float = 120.0) -> Answer:
        answer = self.answers[request_id]
        self.wait_until(lambda: answer.finish_reason is not None, timeout_s)
        return answer

    def wait_until(self, condition, timeout_s: float = 120.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the engine did not answer in time"

    def run(self, prompts, **sampling) -> list[list[int]]:
        """Submits all at once; the token ids of each."""
        ids = [self.submit(prompt, **sampling) for prompt in prompts]
        answers = [self.wait(id) for id in ids]
        assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
        return [answer.token_ids for answer in answers]


@contextmanager
def running_engine(model, *, loaded: LoadedModel | None = None, trace=None, **args):
    """``model``: path or alias; ``args``: EngineArgs. Checks at the end that every page and row came back."""
    checked = engine_args(model, **args)
    under_test = EngineUnderTest(loaded or load_model(checked), checked, trace)
    try:
        yield under_test
        assert under_test.engine.wait_idle(60), "requests are left"
        under_test.engine.check_integrity()
    finally:
        under_test.engine.shutdown()


def load(model, **args) -> LoadedModel:
    return load_model(engine_args(model, **args))
