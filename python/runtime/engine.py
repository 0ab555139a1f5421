"""The engine: one thread that turns messages into plans, plans into steps, and results into deltas.

    front ── Submit, Abort ──> inbox ─┐                                  ┌─> on_deltas(list[Delta])
                                      v                                  │   once per step
             lanes ── completions ──> step: events -> scheduler -> plans ┴─> launch on lanes

Between two steps there is nothing but this; all numbers are made by the lanes' workers, which need no GIL.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime import _native
from runtime.messages import Abort, Delta, Submit
from runtime.model_runner import ModelRunner
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import AbortRequest, Arrival, LaneFinished
from scheduler.step_shape import shape_of

logger = logging.getLogger("partita.engine")
# Builds a named tuple from its fields in order, at half its constructor's price; for what is made per request and step.
make_tuple = tuple.__new__
# Steps of which one refines the cost model: it costs some 20 microseconds, and neighbours are alike.
_OBSERVE_EVERY = 8


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the front needs to know of an engine."""

    model_name: str
    max_model_len: int  # tokens, prompt and output
    vocab_size: int
    eos_token_ids: frozenset[int]
    seed: int = 0
    kernels: str = ""  # for people: instruction set, threads, activation type


class Engine:
    """Continuous batching over one ModelRunner. ``submit`` and ``abort`` may be called from any thread."""

    def __init__(
        self, config: EngineConfig, scheduler: Scheduler, runner: ModelRunner,
        on_deltas: Callable[[list[Delta]], None], trace=None,
    ):  # fmt: skip
        self.config = config
        self._scheduler = scheduler
        self._cost_model = scheduler.cost_model
        self._runner = runner
        self._on_deltas = on_deltas
        self._trace = trace
        self._inbox: deque[Submit | Abort] = deque()
        self._logprob_requests: set[str] = set()
        self._sampling: dict[str, object] = {}  # request_id -> native parameters, until it ends
        self._num_prompt_tokens: dict[str, int] = {}
        self._seeds = random.Random(config.seed)
        self._num_steps = 0
        self._lane_ends_ns = [0, 0]  # when the latest plan of each lane ended
        self._num_step_tokens = 0
        self._last_step_s = time.monotonic()
        self._fatal: str | None = None  # why the thread died
        self._refusal: str | None = None  # why no message is taken any more; guarded by the lock below
        self._is_closing = False
        self._outstanding_lock = threading.Lock()
        self._outstanding: dict[str, int] = {}  # request id -> submissions without a finish_reason yet
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ any thread

    def submit(self, message: Submit) -> None:
        """Queues a request; its Deltas follow until one carries a finish_reason, at once if the engine has ended."""
        with self._outstanding_lock:
            refusal = self._refusal
            if refusal is None:
                self._outstanding[message.request_id] = self._outstanding.get(message.request_id, 0) + 1
                self._idle.clear()
                self._inbox.append(message)
        if refusal is None:
            self._runner.completions.notify()
        else:
            self._on_deltas([Delta(message.request_id, finish_reason="error", error=refusal)])

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Ends a request at the next step boundary; nothing happens when it has ended."""
        self._inbox.append(Abort(request_id, reason))
        self._runner.completions.notify()

    def stats(self) -> dict:
        """Counters and gauges for /metrics."""
        scheduler = self._scheduler.stats()
        return {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": scheduler.num_waiting + len(self._inbox),
            "kv_cache_usage": scheduler.kv_usage,
            "num_preemptions": scheduler.num_preemptions,
            "num_pauses": scheduler.num_pauses,
            "num_moves": scheduler.num_moves,
            "arrangements": scheduler.arrangements,
            "prefix_queries": scheduler.num_prefix_query_tokens,
            "prefix_hits": scheduler.num_prefix_hit_tokens,
            "goodput": scheduler.goodput._asdict(),
            "steps": self._num_steps,
            "step_tokens": self._num_step_tokens,
            "last_step_age_s": time.monotonic() - self._last_step_s,
            "fatal": self._fatal,
        }

    def describe(self) -> list[str]:
        """What was granted, in lines for a banner."""
        return [
            f"KV pool   {self._runner.kv_plan.describe()}",
            f"kernels   {self.config.kernels}",
            f"lanes     {self._runner.bank.describe()}",
        ]

    def describe_nano_batches(self) -> list[str]:
        """What was found of nano-batches, kind of step by kind; empty where they are off."""
        return self._scheduler.nano.describe() if self._scheduler.nano is not None else []

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Waits until no request is queued or running."""
        return self._idle.wait(timeout_s)

    def check_integrity(self) -> None:
        """Raises AssertionError when pages or rows are not conserved. Call it when idle."""
        self._scheduler.check_integrity()

    def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Waits up to ``drain_seconds`` for requests in flight, aborts the rest, ends the thread."""
        if self._thread.is_alive():
            if drain_seconds > 0:
                self.wait_idle(drain_seconds)
            self._is_closing = True
            self._runner.completions.notify()
            self._thread.join()
        trace, self._trace = self._trace, None
        if trace is not None:  # also of a thread that died: what it did last is worth reading
            trace.close()

    # ------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._step()
            self._abort_all("abort")
        except Exception as error:  # the loop itself is broken: say so to everybody instead of hanging them
            logger.exception("engine thread failed")
            with self._outstanding_lock:
                self._fatal = self._refusal = f"the engine stopped: {type(error).__name__}: {error}"
                request_ids = list(self._outstanding)
            self._publish([Delta(id, finish_reason="error", error=self._fatal) for id in request_ids])
            self._idle.set()

    def _step(self) -> None:
        """One turn: sleep until something happened, tell the scheduler, launch what it plans, say what came of it."""
        completions = self._runner.completions.wait_any(1.0)
        now = time.monotonic()
        events: list = []
        deltas: list[Delta] = []
        logprobs: dict[str, list] = {}
        for completion in filter(None, map(self._runner.gather, completions)):
            events.append(LaneFinished(self._finish(completion, now, logprobs)))
        while self._inbox:
            event = self._event_of(self._inbox.popleft(), deltas)
            if event is not None:
                events.append(event)
        if events:
            self._launch(self._scheduler.on_events(events, now))
            self._take_outputs(deltas, logprobs)
        self._publish(deltas)

    def _publish(self, deltas: list[Delta]) -> None:
        if deltas:
            self._on_deltas(deltas)
        with self._outstanding_lock:
            for delta in deltas:
                if delta.finish_reason is not None:
                    num_left = self._outstanding.pop(delta.request_id, 1) - 1
                    if num_left:
                        self._outstanding[delta.request_id] = num_left
            if not self._outstanding and not self._runner.num_in_flight:
                self._idle.set()

    def _finish(self, completion: dict, now: float, logprobs: dict[str, list]):
        """A completion's LaneResult; its log probabilities join those of this turn."""
        result, step_logprobs, plan = self._runner.finish(completion, self._logprob_requests.__contains__)
        for request_id, entry in step_logprobs.items():
            logprobs.setdefault(request_id, []).append(entry)
        if self._trace is not None:
            self._trace.add(completion, plan)
        if not completion["error"]:
            self._observe(completion, plan)
        self._num_steps += 1
        if completion["cursor"] == self._runner.program.num_nodes:  # a run in parts counts its tokens once, at its end
            self._num_step_tokens += plan.num_tokens
        self._last_step_s = now
        return result

    def _observe(self, completion: dict, plan) -> None:
        """What a step took that ran whole and alone: for the cost model and for nano-batches on trial."""
        lane, other = plan.lane, 1 - plan.lane
        was_alone = self._lane_ends_ns[other] <= completion["start_ns"] and not self._runner.has_in_flight(other)
        self._lane_ends_ns[lane] = completion["end_ns"]
        if not was_alone or plan.share < 1.0 or plan.node_range is not None or completion["was_stopped"]:
            return
        seconds = (completion["end_ns"] - completion["start_ns"]) / 1e9
        self._scheduler.hear_step(plan, seconds)
        if self._cost_model is not None and plan.nano is None and self._num_steps % _OBSERVE_EVERY == 0:
            self._cost_model.observe(shape_of(plan.requests, self._cost_model.window), seconds, plan.share)

    def _event_of(self, message: Submit | Abort, deltas: list[Delta]):
        """The scheduler's event; None when the request was refused here, with a Delta that says why."""
        if isinstance(message, Abort):
            return AbortRequest(message.request_id, message.reason)
        try:
            return Arrival(self._request_of(message))
        except (ValueError, TypeError) as error:
            deltas.append(Delta(message.request_id, finish_reason="error", error=str(error)))
            return None

    def _request_of(self, message: Submit) -> Request:
        """The scheduler's view of a request; its native sampling parameters are kept for admission."""
        if message.request_id in self._sampling:
            raise ValueError(f"request_id: {message.request_id!r} is already running")
        sampling = message.sampling
        num_prompt_tokens = len(message.prompt_token_ids)
        room = self.config.max_model_len - num_prompt_tokens
        if not 1 <= num_prompt_tokens < self.config.max_model_len:
            raise ValueError(f"prompt: got {num_prompt_tokens} tokens, wanted 1 to {self.config.max_model_len - 1}")
        worst = max(message.prompt_token_ids)
        if worst >= self.config.vocab_size or min(message.prompt_token_ids) < 0:
            raise ValueError(f"prompt: got a token id outside 0 to {self.config.vocab_size - 1}")
        stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self.config.eos_token_ids
        )
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed % 2**64
        native = _native_sampling(sampling, seed, stop_ids)
        self._runner.check_sampling(native)
        service = message.service
        request = Request(
            message.request_id, message.prompt_token_ids,
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            stop_token_ids=stop_ids, min_tokens=sampling.min_tokens, priority=service.priority,
            arrival_s=message.arrival_s, namespace=message.cache_salt, ttft_s=service.seconds("ttft_ms"),
            tpot_s=service.seconds("tpot_ms"), deadline_s=service.seconds("deadline_ms"), user=service.user,
        )  # fmt: skip
        self._sampling[message.request_id] = native
        self._num_prompt_tokens[message.request_id] = num_prompt_tokens
        if sampling.logprobs is not None:
            self._logprob_requests.add(message.request_id)
        return request

    def _launch(self, plans) -> None:
        for plan in plans:
            for admission in plan.admissions:
                self._runner.admit(
                    admission.row,
                    admission.token_ids,
                    admission.num_prompt_tokens,
                    self._sampling[admission.request_id],
                )
            self._runner.launch(plan)
        orders = self._scheduler.take_orders()
        if orders:
            self._runner.carry_out(orders)

    def _take_outputs(self, deltas: list[Delta], logprobs: dict) -> None:
        num_prompt_tokens, wants_logprobs = self._num_prompt_tokens, self._logprob_requests
        for output in self._scheduler.take_outputs():
            request_id, token_ids, finish_reason, stop_token_id, num_cached_tokens, error, first_scheduled = output
            token_logprobs = None
            if token_ids and request_id in wants_logprobs:
                entries = logprobs[request_id]
                token_logprobs = tuple(entries[: len(token_ids)])
                del entries[: len(token_ids)]
            fields = (
                request_id, token_ids, token_logprobs, finish_reason, stop_token_id,
                num_prompt_tokens.get(request_id, 0), num_cached_tokens, error, first_scheduled,
            )  # fmt: skip
            deltas.append(make_tuple(Delta, fields))
            if finish_reason is not None:
                self._sampling.pop(request_id, None)
                num_prompt_tokens.pop(request_id, None)
                wants_logprobs.discard(request_id)

    def _abort_all(self, reason: str) -> None:
        deltas: list[Delta] = []
        now = time.monotonic()
        with self._outstanding_lock:
            self._refusal = "the engine has shut down"  # nobody would read the inbox
            request_ids = list(self._outstanding)
        for request_id in request_ids:
            deltas.append(Delta(request_id, finish_reason=reason))
            self._scheduler.on_event(AbortRequest(request_id, reason), now)
        self._inbox.clear()
        self._sampling.clear()
        while self._runner.num_in_flight:  # lanes finish what they hold: frames must not die under them
            for completion in filter(None, map(self._runner.gather, self._runner.completions.wait_any(1.0))):
                self._runner.finish(completion, lambda _request_id: False)
        self._publish(deltas)


def _native_sampling(sampling, seed: int, stop_token_ids: frozenset[int]):
    """runtime.SamplingParams as the sampling node reads them; lengths and stop strings stay with others."""
    native = _native.SamplingParams()
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ):
        setattr(native, name, getattr(sampling, name))
    native.seed = seed
    native.num_logprobs = -1 if sampling.logprobs is None else sampling.logprobs
    native.min_tokens = sampling.min_tokens
    native.stop_token_ids = sorted(stop_token_ids)
    native.logit_bias = list(sampling.logit_bias)
    return native
