"""Turns one request's Deltas into text: detokenisation, stop strings, finish reasons. For front and LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.messages import Delta, TokenLogprobs
from runtime.sampling_params import SamplingParams


@dataclass(slots=True)
class OutputPiece:
    """What was added since the last piece was taken."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


class OutputAssembler:
    """Owns the text of one running output.

    Text is held back while it ends in an incomplete UTF-8 sequence or may be the beginning of a stop string; token ids
    and logprobs never are. ``hit_stop_string`` turns true when the front has to abort the engine's request.
    """

    __slots__ = (
        "_decoder",
        "_logprobs",
        "_matcher",
        "_text",
        "_token_ids",
        "cumulative_logprob",
        "error",
        "finish_reason",
        "hit_stop_string",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "sampling",
        "stop_reason",
    )  # fmt: skip

    def __init__(self, tokenizer, sampling: SamplingParams, num_prompt_tokens: int) -> None:
        from runtime.tokenizer import (
            IncrementalDecoder,
            StopStringMatcher,
        )  # not at import: keeps ``import runtime`` light

        self.sampling = sampling
        self.num_tokens = 0
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.hit_stop_string = False
        self._decoder = IncrementalDecoder(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens, continuation=True
        )
        self._matcher = (
            StopStringMatcher(sampling.stop, include_stop=sampling.include_stop_str_in_output)
            if sampling.stop
            else None
        )
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if sampling.logprobs is None else []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, delta: Delta) -> None:
        """Takes what a step added. Deltas after the end are ignored (tokens that were in flight when it stopped)."""
        if self.finish_reason is not None:
            return
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        self._token_ids += delta.token_ids
        if self._logprobs is not None and delta.logprobs is not None:
            self._logprobs += delta.logprobs
            self.cumulative_logprob += sum(entry.logprob for entry in delta.logprobs)
        shown = delta.token_ids
        if delta.stop_token_id is not None and not self.sampling.include_stop_str_in_output:
            shown = shown[:-1]
        if self._matcher is None:
            self.num_tokens += len(delta.token_ids)
            text = self._decoder.push(shown)
            if text:
                self._text.append(text)
        elif self._push_matched(shown, len(delta.token_ids)):
            return
        if delta.finish_reason is not None:
            self._finish(delta)

    def _push_matched(self, shown: Sequence[int], num_tokens: int) -> bool:
        """Token by token: the stop string ends the output at the token that completes it, not at the step's last."""
        before = self.num_tokens
        for position, token_id in enumerate(shown):
            self.num_tokens += 1
            if self._emit(self._decoder.push((token_id,))):
                num_dropped = num_tokens - position - 1
                if num_dropped:
                    del self._token_ids[-num_dropped:]
                    if self._logprobs:
                        del self._logprobs[-num_dropped:]
                return True
        self.num_tokens = before + num_tokens
        return False

    def _emit(self, text: str) -> bool:
        """True if a stop string ended the output."""
        matcher = self._matcher
        if matcher is None or self.num_tokens < self.sampling.min_tokens:
            if text:
                self._text.append(text)
            return False
        if text:
            self._text.append(matcher.push(text))
            if matcher.matched is not None:
                self._stop_at(matcher.matched)
                return True
        return False

    def _stop_at(self, stop_string: str) -> None:
        self.finish_reason = "stop"
        self.stop_reason = stop_string
        self.hit_stop_string = True

    def _finish(self, delta: Delta) -> None:
        if delta.finish_reason != "error" and self._emit(self._decoder.flush()):
            self.hit_stop_string = False  # the engine has ended it already
            return
        if self._matcher is not None:
            self._text.append(self._matcher.flush())
        self.finish_reason = delta.finish_reason
        self.error = delta.error
        if delta.stop_token_id is not None and delta.stop_token_id in self.sampling.stop_token_ids:
            self.stop_reason = delta.stop_token_id

    def fail(self, reason: str, error: str | None = None) -> None:
        """Ends the output from outside: an abort, or an error of the front's own."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.error = error

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would bring text, logprobs or the end. Silent token ids alone are no news."""
        return self.finish_reason is not None or any(self._text) or bool(self._logprobs)

    def take(self) -> OutputPiece:
        """Everything since the last call, coalesced; the finish_reason is in every piece after the end."""
        text = self._text[0] if len(self._text) == 1 else "".join(self._text)
        piece = OutputPiece(text, self._token_ids, self._logprobs, self.finish_reason, self.stop_reason)
        self._text = []
        self._token_ids = []
        if self._logprobs is not None:
            self._logprobs = []
        return piece
