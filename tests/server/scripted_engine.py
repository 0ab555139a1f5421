"""An engine that answers with scripted tokens on a thread of its own: the front's contract without a model."""

from __future__ import annotations

import collections
import threading
import time
from types import SimpleNamespace

from runtime.messages import Abort, Delta, Submit, TokenLogprobs


def parrot(submit: Submit, eos_token_id: int) -> list[int]:
    """The prompt's tokens again and again, beginning at a place that the seed chooses when the temperature is not 0."""
    prompt = list(submit.prompt_token_ids)
    start = 0 if submit.sampling.temperature == 0 else submit.sampling.seed % len(prompt)
    return prompt[start:] + prompt[:start] + [eos_token_id]


class _Running:
    def __init__(self, submit: Submit, script: list[int]) -> None:
        self.submit, self.script = submit, script
        self.num_tokens = 0
        self.started_s: float | None = None
        self.prefill_steps = 1 + len(submit.prompt_token_ids) // 64


class ScriptedEngine:
    """Steps every ``step_s`` seconds; each running request gets its script's next token, beginning anew at the end
    unless it ends in EOS. ``fail_request(request_id) -> str | None`` makes requests end in an error."""

    def __init__(
        self, tokenizer, on_deltas, *, max_model_len=512, max_num_seqs=32, step_s=0.0, script=parrot, fail_request=None
    ):
        self.config = SimpleNamespace(max_model_len=max_model_len, model_name="scripted", seed=0)
        self.max_num_seqs = max_num_seqs
        self.fatal: str | None = None
        self.paused = threading.Event()  # set: nothing is scheduled
        self.aborts: list[Abort] = []
        self.submits: list[Submit] = []
        self._tokenizer, self._on_deltas, self._script, self._fail = tokenizer, on_deltas, script, fail_request
        self._step_s = step_s
        self._inbox: collections.deque = collections.deque()
        self._wake = threading.Event()
        self._waiting: dict[str, _Running] = {}
        self._running: dict[str, _Running] = {}
        self._num_steps = 0
        self._stop = False
        self._thread = threading.Thread(target=self._loop, name="scripted-engine", daemon=True)
        self._thread.start()

    def submit(self, submit: Submit) -> None:
        self._inbox.append(submit)
        self._wake.set()

    def abort(self, request_id: str, reason: str = "abort") -> None:
        self._inbox.append(Abort(request_id, reason))
        self._wake.set()

    def stats(self) -> dict:
        held = len(self._running) / self.max_num_seqs
        return {
            "num_requests_running": len(self._running), "num_requests_waiting": len(self._waiting),
            "kv_cache_usage": held,
            "num_preemptions": 0, "prefix_queries": 10, "prefix_hits": 4, "steps": self._num_steps,
            "num_pauses": 3, "num_moves": 2, "arrangements": {"50:50 token": 6, "one lane, token": 1},
            "fatal": self.fatal, "goodput": {"num_good_tokens": 70, "num_ttft_targets": 5, "num_ttft_kept": 3},
        }  # fmt: skip

    def shutdown(self, drain_seconds: float = 0.0) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stop:
            if not self._inbox and not (self._running or self._waiting):
                self._wake.wait(timeout=0.5)
            self._wake.clear()
            self._read_inbox()
            if self.paused.is_set():
                time.sleep(0.002)
                continue
            while self._waiting and len(self._running) < self.max_num_seqs:
                request_id = next(iter(self._waiting))
                self._running[request_id] = self._waiting.pop(request_id)
            deltas = [delta for running in list(self._running.values()) if (delta := self._step(running)) is not None]
            if self._running or deltas:
                self._num_steps += 1
                time.sleep(self._step_s)
            if deltas:
                self._on_deltas(deltas)

    def _read_inbox(self) -> None:
        ended = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Submit):
                self.submits.append(message)
                self._waiting[message.request_id] = _Running(
                    message, self._script(message, self._tokenizer.eos_token_ids[0])
                )
            else:
                self.aborts.append(message)
                found = self._waiting.pop(message.request_id, None) or self._running.pop(message.request_id, None)
                if found is not None:
                    ended.append(Delta(message.request_id, finish_reason=message.reason))
        if ended:
            self._on_deltas(ended)

    def _step(self, running: _Running) -> Delta | None:
        submit = running.submit
        sampling = submit.sampling
        first = running.started_s is None
        if first:
            running.started_s = time.monotonic()
        error = self._fail(submit.request_id) if self._fail is not None else None
        if error is not None:
            del self._running[submit.request_id]
            return Delta(submit.request_id, finish_reason="error", error=error)
        if running.prefill_steps > 1:
            running.prefill_steps -= 1
            return None
        token_id = running.script[running.num_tokens % len(running.script)]
        eos_ids = self._tokenizer.eos_token_ids
        if token_id in eos_ids and (sampling.ignore_eos or running.num_tokens < sampling.min_tokens):
            # A script may hold nothing else: a parrot's prompt of random tokens can begin with it.
            token_id = next(id for id in (*running.script, max(eos_ids) + 1) if id not in eos_ids)
        running.num_tokens += 1
        stops = token_id in sampling.stop_token_ids or (token_id in eos_ids and not sampling.ignore_eos)
        reason = "stop" if stops else "length" if running.num_tokens >= sampling.max_tokens else None
        if reason is not None:
            del self._running[submit.request_id]
        logprobs = None
        if sampling.logprobs is not None:
            others = tuple(((token_id + i) % self._tokenizer.vocab_size, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = (TokenLogprobs(token_id, -0.5, 1, others),)
        return Delta(
            submit.request_id, (token_id,), logprobs, reason, token_id if stops else None,
            num_prompt_tokens=len(submit.prompt_token_ids), num_cached_tokens=1 if first else 0,
            scheduled_s=running.started_s,
        )  # fmt: skip
