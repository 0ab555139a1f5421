"""The asyncio side of the engine: tokenizes, submits, routes each step's Deltas to those who wait, cancels, drains.

It speaks to the engine by messages only (runtime/messages.py) and knows nothing of HTTP. Everything here runs on the
event loop's thread except ``on_deltas``, which the engine thread calls once per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.messages import Delta, Submit
from runtime.output_assembler import OutputAssembler
from runtime.request_builder import INLINE_CHARS, Prompt, RequestBuilder, RequestError
from runtime.sampling_params import SamplingParams
from runtime.service_level import NO_TARGETS, ServiceLevel

logger = logging.getLogger("partita.front")

TICK_PERIOD_S = 1.0
PING_PERIOD_S = 12.0  # a stream says something after so long, lest proxies close it during a long prefill
STALL_LIMIT_S = 30.0  # a client that takes no byte for so long is dropped
STATS_LINE_PERIOD_S = 10.0


class EngineClient(Protocol):
    """What the front asks of an engine. ``submit`` and ``abort`` are thread-safe and never block."""

    config: object  # .max_model_len, .model_name, .seed

    def submit(self, submit: Submit) -> None: ...
    def abort(self, request_id: str, reason: str = "abort") -> None: ...
    def stats(self) -> dict: ...  # "fatal": why the engine thread died; "steps"; and the gauges of /metrics
    def shutdown(self, drain_seconds: float = 0.0) -> None: ...


class Observer:
    """Hears what the metrics count; the default hears nothing."""

    def stepped(self, num_prompt_tokens: int, num_generated_tokens: int) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, output: LiveOutput) -> None: ...


class LiveOutput(OutputAssembler):
    """One engine request: one of the n continuations of one prompt, while it runs."""

    __slots__ = (
        "arrival_s",
        "finished_s",
        "first_token_s",
        "generation",
        "index",
        "last_token_s",
        "prompt_index",
        "request_id",
        "scheduled_s",
    )  # fmt: skip

    def __init__(self, tokenizer, submit: Submit, index: int, prompt_index: int, generation: Generation) -> None:
        super().__init__(tokenizer, submit.sampling, len(submit.prompt_token_ids))
        self.request_id = submit.request_id
        self.index = index
        self.prompt_index = prompt_index
        self.generation = generation
        self.arrival_s = submit.arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.finished_s: float | None = None


class Generation:
    """One call in flight: some prompts, n outputs each. The caller alternates ``wait`` and ``OutputAssembler.take``.

    Always close it (``with generation:``): whatever has not finished by then is aborted in the engine.
    """

    def __init__(self, front: Front, request_id: str, prompts: Sequence[Prompt]) -> None:
        self.front = front
        self.request_id = request_id
        self.prompts = list(prompts)
        self.outputs: list[LiveOutput] = []
        self.num_running = 0
        self.cancelled: str | None = None
        self.stalled_task: asyncio.Task | None = None  # the writer, while it waits for the client to take bytes
        self.stalled_since_s = math.inf
        self.silent_since_s = math.inf  # while someone waits for news
        # Takes news in the waiting caller's stead, within the delivery of a step; False: the caller must be woken.
        # A task that is woken for each token costs more than what it does then.
        self.take_news: Callable[[], bool] | None = None
        self._news = False
        self._waiter: asyncio.Future | None = None

    @property
    def finished(self) -> bool:
        return self.num_running == 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(output.num_tokens for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        """Of each prompt the share found in the prefix cache by its first output."""
        n = len(self.outputs) // max(1, len(self.prompts))
        return sum(output.num_cached_tokens for output in self.outputs[::n]) if n else 0

    def wake(self) -> None:
        self._news = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def announce(self, now: float) -> None:
        """A step brought something."""
        waiter = self._waiter
        if self.take_news is not None and waiter is not None and self.num_running and not waiter.done():
            try:
                if self.take_news():
                    self.silent_since_s = now
                    return
            except Exception as error:  # the waiting caller's own failure, to be raised where it waits
                waiter.set_exception(error)
                return
        self.wake()

    async def wait(self) -> bool:
        """Returns when there is something to take, all is finished or the call was cancelled; False after a while of
        silence (``PING_PERIOD_S``, to the second: no timer is set for it, the front's tick looks around)."""
        if not self._news:
            self._waiter = self.front.loop.create_future()
            self.silent_since_s = time.monotonic()
            try:
                await self._waiter
            finally:
                self._waiter = None
                self.silent_since_s = math.inf
        arrived, self._news = self._news, False
        return arrived

    def end_silence(self) -> None:
        """Makes a ``wait`` return False."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self, reason: str) -> None:
        """Aborts what still runs (also while it is queued) and wakes the caller."""
        if self.cancelled is None and self.num_running:
            self.cancelled = reason
            self.front.abort_generation(self, reason)
        self.wake()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_exc) -> None:
        self.cancel("abort")
        self.front.forget(self)


class Front:
    """Owner of all calls in flight. Made before the engine is: ``attach`` brings the engine once it is loaded."""

    def __init__(self, *, max_queued_requests: int = 256, observer: Observer | None = None) -> None:
        self.max_queued_requests = max_queued_requests
        self.observer = observer or Observer()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine: EngineClient | None = None
        self.tokenizer = None
        self.chat_template = None
        self.builder: RequestBuilder | None = None
        self.default_sampling: dict = {}
        self.max_model_len = 0
        self.draining = False
        self.load_error: str | None = None
        self.fatal: str | None = None  # why the engine thread died
        self._live: dict[str, LiveOutput] = {}
        self._generations: set[Generation] = set()
        self._max_running = 1
        self._num_tokenizing = 0  # texts in the hands of threads
        self._mean_request_s = 1.0  # moving average, for Retry-After
        self._ticker: asyncio.Task | None = None
        self._last_step = (-1, time.monotonic())  # (stats()["steps"], when it was seen first)
        self._line_counts = [0, 0]  # prompt and generated tokens since the last line in the log

    # Life

    def start(self) -> None:
        """Binds the front to the running event loop."""
        self.loop = asyncio.get_running_loop()
        self._ticker = self.loop.create_task(self._tick())

    def attach(
        self, engine: EngineClient, tokenizer, chat_template, *, max_num_seqs: int, default_sampling: dict | None = None
    ) -> None:
        """Requests are accepted from here on. ``max_num_seqs``: how many the engine runs at once (the queue's limit);
        ``default_sampling``: the model's own defaults."""
        self.default_sampling = dict(default_sampling or {})
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_model_len = engine.config.max_model_len
        self._max_running = max_num_seqs
        self.builder = RequestBuilder(tokenizer, engine.config.max_model_len, engine.config.seed)
        self.engine = engine

    def start_draining(self) -> None:
        """Refuses new requests from now on; those in flight go on."""
        self.draining = True

    async def stop(self) -> None:
        """Aborts what is left."""
        self.draining = True
        for generation in list(self._generations):
            generation.cancel("shutdown")
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    # State

    @property
    def num_in_flight(self) -> int:
        return len(self._live)

    def unready_reason(self) -> tuple[str, str] | None:
        """(code, message) of why no request can be taken right now; None when one can."""
        if self.load_error is not None:
            return "load_failed", self.load_error
        if self.engine is None:
            return "loading", "the model is still being loaded"
        if self.draining:
            return "shutting_down", "the server is shutting down"
        if self.fatal is not None:
            return "engine_dead", f"the engine has stopped: {self.fatal}"
        return None

    def look_at_engine(self) -> dict:
        """Reads the engine's stats, and from them whether it lives and steps."""
        stats = self.engine.stats()
        self.fatal = stats.get("fatal")
        if stats.get("steps", 0) != self._last_step[0] or not self._live:
            self._last_step = (stats.get("steps", 0), time.monotonic())
        return stats

    def stuck_s(self) -> float:
        """Seconds without a step while requests run; 0 when all is well."""
        return max(0.0, time.monotonic() - self._last_step[1]) if self._live and self._last_step[0] >= 0 else 0.0

    def check_ready(self) -> EngineClient:
        reason = self.unready_reason()
        if reason is not None:
            raise RequestError(503, reason[0], reason[1], retry_after_s=1 if reason[0] == "loading" else 5)
        return self.engine

    # Prompts

    async def tokenize(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> tuple[int, ...]:
        """Token ids of a text; long texts are tokenized off the loop, so that streams go on."""
        encode = self.builder.encode
        # While a long text is being tokenized the tokenizer is locked: the loop must not wait for it.
        if len(text) <= INLINE_CHARS and not self._num_tokenizing:
            return encode(text, add_special_tokens=add_special_tokens, param=param)
        self._num_tokenizing += 1
        try:
            return await self.loop.run_in_executor(
                None, lambda: encode(text, add_special_tokens=add_special_tokens, param=param)
            )
        finally:
            self._num_tokenizing -= 1

    # Requests

    def check_queue(self, num_requests: int) -> None:
        """Raises RequestError (429) when the queue is full; cheap, so call it before any other work."""
        limit = self._max_running + self.max_queued_requests
        if len(self._live) + num_requests > limit:
            wait_s = len(self._live) / self._max_running * self._mean_request_s
            raise RequestError(
                429, "queue_full",
                f"The server has {len(self._live)} requests in flight and takes at most {limit} "
                f"({self._max_running} running, {self.max_queued_requests} queued). Try again later.",
                retry_after_s=int(min(60, max(1, wait_s))),
            )  # fmt: skip

    def generate(
        self,
        request_id: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        arrival_s: float,
        service: ServiceLevel = NO_TARGETS,
        cache_salt: str = "",
        param: str = "prompt",
    ) -> Generation:
        """Submits every prompt ``sampling.n`` times. Raises RequestError, and then has submitted nothing."""
        engine = self.check_ready()
        self.check_queue(len(prompts) * sampling.n)
        submits = self.builder.build(
            request_id, prompts, sampling, arrival_s=arrival_s, service=service, cache_salt=cache_salt, param=param
        )
        generation = Generation(self, request_id, prompts)
        for index, submit in enumerate(submits):
            generation.outputs.append(LiveOutput(self.tokenizer, submit, index, index // sampling.n, generation))
        # All checks are done: from here on every output is either live or finished.
        generation.num_running = len(submits)
        self._generations.add(generation)
        for output, submit in zip(generation.outputs, submits, strict=True):
            self._live[output.request_id] = output
            try:
                engine.submit(submit)
            except Exception as error:
                generation.cancel("error")
                self.forget(generation)
                raise RequestError(503, "engine_dead", f"the engine took no request: {error}") from error
        return generation

    def forget(self, generation: Generation) -> None:
        self._generations.discard(generation)

    def abort_generation(self, generation: Generation, reason: str) -> None:
        for output in generation.outputs:
            if not output.finished:
                self.engine.abort(output.request_id, reason)
                output.fail("abort", reason)
                self._retire(output)

    def _retire(self, output: LiveOutput) -> None:
        del self._live[output.request_id]
        output.finished_s = time.monotonic()
        self._mean_request_s += 0.05 * (output.finished_s - output.arrival_s - self._mean_request_s)
        generation = output.generation
        generation.num_running -= 1
        self.observer.finished(output)

    # Deltas

    def on_deltas(self, deltas: list[Delta]) -> None:
        """The engine thread's only way in: one wake-up of the loop per step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        num_prompt = num_generated = 0
        for delta in deltas:
            output = self._live.get(delta.request_id)
            if output is None:  # aborted meanwhile
                continue
            if delta.token_ids:
                num_generated += len(delta.token_ids)
                if output.first_token_s is None:
                    output.first_token_s = now
                    num_prompt += output.num_prompt_tokens
                    self.observer.first_token(now - output.arrival_s)
                else:
                    self.observer.inter_token(now - output.last_token_s)
                output.last_token_s = now
            if delta.scheduled_s is not None and output.scheduled_s is None:
                output.scheduled_s = delta.scheduled_s
            try:
                output.push(delta)
            except Exception:
                logger.exception("request %s: detokenisation failed", output.request_id)
                output.fail("error", "the output could not be turned into text")
                self.engine.abort(output.request_id, "error")
            if output.finished:
                if output.hit_stop_string:
                    self.engine.abort(output.request_id, "stop")
                self._retire(output)
            if output.has_news:
                output.generation.announce(now)
        self._line_counts[0] += num_prompt
        self._line_counts[1] += num_generated
        self.observer.stepped(num_prompt, num_generated)

    # Every tick

    async def _tick(self) -> None:
        last_line_s = time.monotonic()
        while True:
            await asyncio.sleep(TICK_PERIOD_S)
            try:
                now = time.monotonic()
                self._look_at_streams(now)
                if self.engine is None:
                    continue
                stats = self.look_at_engine()
                if self.fatal is not None:
                    self._fail_all(self.fatal)
                if now - last_line_s >= STATS_LINE_PERIOD_S:
                    self._log_line(stats, now - last_line_s)
                    last_line_s = now
            except Exception:
                logger.exception("the front's periodic check failed")

    def _look_at_streams(self, now: float) -> None:
        for generation in list(self._generations):
            if now - generation.silent_since_s > PING_PERIOD_S:
                generation.end_silence()
            if now - generation.stalled_since_s > STALL_LIMIT_S and generation.stalled_task is not None:
                logger.warning(
                    "request %s: the client took nothing for %.0f s; dropped", generation.request_id, STALL_LIMIT_S
                )
                generation.cancel("stalled client")
                generation.stalled_task.cancel()

    def _fail_all(self, reason: str) -> None:
        for output in list(self._live.values()):
            output.fail("error", f"the engine has stopped: {reason}")
            self._retire(output)
            output.generation.wake()

    def _log_line(self, stats: dict, seconds: float) -> None:
        num_prompt, num_generated = self._line_counts
        self._line_counts = [0, 0]
        if not (num_prompt or num_generated or self._live):
            return
        queries = stats.get("prefix_queries", 0)
        logger.info(
            "prompt %.1f tok/s, generation %.1f tok/s, running %d, waiting %d, KV %.1f %%, prefix hits %.1f %%",
            num_prompt / seconds, num_generated / seconds, stats.get("num_requests_running", 0),
            stats.get("num_requests_waiting", 0), 100 * stats.get("kv_cache_usage", 0.0),
            100 * stats.get("prefix_hits", 0) / queries if queries else 0.0,
        )  # fmt: skip
