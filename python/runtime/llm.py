"""The engine from Python, without a server: ``LLM(...).generate(...)``, shaped as vLLM's users know it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from runtime.engine_args import EngineArgs
from runtime.messages import Delta, Submit
from runtime.output_assembler import OutputAssembler, OutputPiece
from runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from runtime.request_builder import Prompt, RequestBuilder
from runtime.sampling_params import SamplingParams
from runtime.service_level import ServiceLevel

_ALIASES = {"kv_cache_dtype": "kv_dtype", "kv_cache_memory_bytes": "kv_memory", "block_size": "page_size"}

PromptLike = str | Mapping[str, Any] | Sequence[int] | Prompt


class _Live:
    """One output while it runs."""

    def __init__(self, tokenizer, submit: Submit, index: int) -> None:
        self.assembler = OutputAssembler(tokenizer, submit.sampling, len(submit.prompt_token_ids))
        self.output = CompletionOutput(index)
        self.metrics = RequestMetrics(submit.arrival_s)

    def take(self, tokenizer) -> OutputPiece:
        piece = self.assembler.take()
        output = self.output
        output.text += piece.text
        output.token_ids += piece.token_ids
        if piece.logprobs is not None:
            output.logprobs = (output.logprobs or []) + [
                Logprob.by_token_id(tokenizer, entry) for entry in piece.logprobs
            ]
            output.cumulative_logprob = self.assembler.cumulative_logprob
        output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
        return piece


class LLM:
    """A loaded model with its engine. Close it, or use it as a context manager; calls of several threads take turns.

    ``model``: alias, folder, GGUF file or hub id. Keyword arguments are the fields of EngineArgs (vLLM's names for
    them are read too). Raises ValueError or TypeError naming the argument, or what is wrong with the model's files.
    """

    def __init__(self, model: str = "smollm2", **engine_args) -> None:
        known = {field.name for field in fields(EngineArgs)}
        values = {_ALIASES.get(name, name): value for name, value in engine_args.items()}
        for name in values:
            if name not in known:
                raise TypeError(f"LLM has no argument {name!r}; it takes {', '.join(sorted(known))}")
        from runtime.engine_loader import load_engine

        self._start(load_engine, EngineArgs(model=model, **values).check())

    @classmethod
    def from_engine_args(cls, args: EngineArgs, load_engine=None) -> LLM:
        """``load_engine(args, on_deltas) -> (engine, tokenizer, chat_template, model_config)``; None: the real one."""
        if load_engine is None:
            from runtime.engine_loader import load_engine
        llm = cls.__new__(cls)
        llm._start(load_engine, args)
        return llm

    def _start(self, load_engine, args: EngineArgs) -> None:
        self._deltas: queue.SimpleQueue[list[Delta]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self.args = args
        self.engine, self.tokenizer, self.chat_template, self.model_config = load_engine(args, self._deltas.put)
        self.builder = RequestBuilder(self.tokenizer, self.engine.config.max_model_len, args.seed)

    # Life

    def close(self) -> None:
        """Stops the engine; the object is of no use afterwards."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.shutdown(0.0)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    @property
    def max_model_len(self) -> int:
        return self.builder.max_model_len

    def get_tokenizer(self):
        return self.tokenizer

    @property
    def default_sampling(self) -> dict[str, Any]:
        """What the model's own files recommend, as fields of SamplingParams."""
        return dict(getattr(self.model_config, "default_sampling", None) or {})

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(**self.default_sampling)

    def ordinary_token_ids(self) -> list[int]:
        """Ids that stand for text: what random prompts are drawn from."""
        special = set(self.tokenizer.special_ids)
        return [token_id for token_id in range(self.builder.vocab_size) if token_id not in special]

    # Prompts

    def _read_prompt(self, prompt: PromptLike) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is None and text is None:
                raise ValueError("a prompt given as a mapping needs prompt or prompt_token_ids")
            if ids is not None:
                return Prompt(tuple(ids), text)
            prompt = text
        if isinstance(prompt, str):
            return Prompt(self.builder.encode(prompt, add_special_tokens=True), prompt)
        if isinstance(prompt, Sequence) and all(isinstance(token_id, int) for token_id in prompt):
            return Prompt(tuple(prompt))
        raise TypeError(f"a prompt must be a text, token ids or a mapping, got {type(prompt).__name__}")

    def _read_prompts(self, prompts: PromptLike | Sequence[PromptLike]) -> list[Prompt]:
        if isinstance(prompts, (str, Mapping, Prompt)) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        return [self._read_prompt(prompt) for prompt in prompts]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_kwargs) -> str:
        """The text that the chat template makes of ``messages``."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template: give one with chat_template=, or use generate()")
        template_kwargs.setdefault("add_generation_prompt", True)
        return self.chat_template.render([dict(message) for message in messages], **template_kwargs)

    def read_conversation(self, messages: Sequence[Mapping[str, Any]], **template_kwargs) -> Prompt:
        """The prompt that the chat template makes of ``messages``."""
        text = self.chat_prompt(messages, **template_kwargs)
        template_kwargs.setdefault("add_generation_prompt", True)
        ids = self.chat_template.encode(self.tokenizer, [dict(message) for message in messages], **template_kwargs)
        return Prompt(tuple(ids), text)

    # Generation

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        service_level: ServiceLevel | Sequence[ServiceLevel] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the answers are in the order of the prompts.

        A prompt is a text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``. One SamplingParams
        serves all, a list one each; so do ServiceLevels
        (targets, priority, user). ``use_tqdm`` shows a progress line. Raises ValueError before anything runs if a
        prompt is empty or does not fit, RuntimeError if generation fails.
        """
        return self._run(self._read_prompts(prompts), sampling_params, use_tqdm, service_level)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        service_level: ServiceLevel | Sequence[ServiceLevel] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.read_conversation(one, **(chat_template_kwargs or {})) for one in conversations]
        return self._run(prompts, sampling_params, use_tqdm, service_level)

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[OutputPiece]:
        """Yields what each step adds to one answer; closing the iterator early aborts it."""
        return self._stream(self._read_prompt(prompt), sampling_params)

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[OutputPiece]:
        return self._stream(self.read_conversation(messages), sampling_params)

    def _stream(self, prompt: Prompt, sampling: SamplingParams | None) -> Iterator[OutputPiece]:
        sampling = sampling or self.get_default_sampling_params()
        if sampling.n != 1:
            raise ValueError(f"n must be 1 to stream, got {sampling.n}")
        with self._lock, self._submitted([prompt], [sampling], [ServiceLevel()]) as live:
            one = next(iter(live.values()))
            while not one.output.finished:
                self._take_step(live)
                if one.assembler.has_news:
                    yield one.take(self.tokenizer)
                self._check_failure(one)

    def _run(self, prompts: list[Prompt], sampling_params, use_tqdm: bool, service_level) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        each = (
            [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else list(sampling_params)
        )
        if len(each) != len(prompts):
            raise ValueError(f"sampling_params has {len(each)} entries for {len(prompts)} prompts")
        levels = service_level or ServiceLevel()
        levels = [levels] * len(prompts) if isinstance(levels, ServiceLevel) else list(levels)
        if len(levels) != len(prompts):
            raise ValueError(f"service_level has {len(levels)} entries for {len(prompts)} prompts")
        with self._lock, self._submitted(prompts, each, levels) as live:
            num_total, started_s = len(live), time.monotonic()
            while any(not one.assembler.finished for one in live.values()):
                self._take_step(live)
                if use_tqdm:
                    self._show_progress(live, num_total, started_s)
            outputs = list(live.values())
        for one in outputs:
            one.take(self.tokenizer)
            self._check_failure(one)
        answers, position = [], 0
        for prompt, sampling in zip(prompts, each, strict=True):
            group = outputs[position : position + sampling.n]
            position += sampling.n
            answers.append(
                RequestOutput(
                    str(next(self._ids)), prompt.text, list(prompt.token_ids), [one.output for one in group], True,
                    group[0].assembler.num_cached_tokens, group[0].metrics,
                )
            )  # fmt: skip
        return answers

    @contextlib.contextmanager
    def _submitted(
        self, prompts: list[Prompt], each: list[SamplingParams], levels: list[ServiceLevel]
    ) -> Iterator[dict[str, _Live]]:
        """All checks first, then submits; what has not finished on the way out is aborted."""
        now = time.monotonic()
        submits: list[tuple[int, Submit]] = []
        for prompt, sampling, service in zip(prompts, each, levels, strict=True):
            request_id = f"llm-{next(self._ids)}"
            built = self.builder.build(request_id, [prompt], sampling, arrival_s=now, service=service)
            submits += enumerate(built)
        live = {submit.request_id: _Live(self.tokenizer, submit, index) for index, submit in submits}
        try:
            for _, submit in submits:
                self.engine.submit(submit)
            yield live
        finally:
            for request_id, one in live.items():
                if not one.assembler.finished:
                    self.engine.abort(request_id, "abort")

    def _take_step(self, live: dict[str, _Live]) -> None:
        while True:
            try:
                deltas = self._deltas.get(timeout=1.0)
                break
            except queue.Empty:
                fatal = self.engine.stats().get("fatal")
                if fatal is not None:
                    raise RuntimeError(f"the engine has stopped: {fatal}") from None
        now = time.monotonic()
        for delta in deltas:
            one = live.get(delta.request_id)
            if one is None or one.assembler.finished:  # of an earlier, aborted call
                continue
            metrics = one.metrics
            if delta.scheduled_s is not None and metrics.scheduled_s is None:
                metrics.scheduled_s = delta.scheduled_s
            if delta.token_ids and metrics.first_token_s is None:
                metrics.first_token_s = now
            one.assembler.push(delta)
            if one.assembler.hit_stop_string:
                self.engine.abort(delta.request_id, "stop")
            if one.assembler.finished:
                metrics.finished_s = now

    @staticmethod
    def _check_failure(one: _Live) -> None:
        if one.output.finish_reason == "error":
            raise RuntimeError(f"generation failed: {one.assembler.error or 'unknown error'}")

    @staticmethod
    def _show_progress(live: dict[str, _Live], num_total: int, started_s: float) -> None:
        if not sys.stderr.isatty():
            return
        num_done = sum(one.assembler.finished for one in live.values())
        num_tokens = sum(one.assembler.num_tokens for one in live.values())
        rate = num_tokens / max(1e-9, time.monotonic() - started_s)
        end = "\n" if num_done == num_total else ""
        sys.stderr.write(f"\r{num_done}/{num_total} requests, {num_tokens} tokens, {rate:.1f} tok/s {end}")
        sys.stderr.flush()
