"""From a prompt and SamplingParams to engine requests: every check that a request must pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.messages import Submit
from runtime.sampling_params import SamplingParams
from runtime.service_level import NO_TARGETS, ServiceLevel

INLINE_CHARS = 4096  # about a millisecond to tokenize; longer texts are worth a thread
PROBE_CHARS_PER_TOKEN = 8  # a text of more characters than this times the context hardly ever fits


class RequestError(ValueError):
    """A request that never reached the engine. ``code`` is stable; ``status`` is the HTTP status that fits."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s = (
            status,
            code,
            message,
            param,
            retry_after_s,
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None = None  # None when it came as token ids


class RequestBuilder:
    """Knows the limits of one loaded model. Raises RequestError naming the parameter, what came and what can be."""

    def __init__(self, tokenizer, max_model_len: int, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = tokenizer.vocab_size
        self._seeds = random.Random(seed)  # of requests that bring none

    def is_far_too_long(self, num_chars: int) -> bool:
        """So many characters that only a look at the beginning is worth its time."""
        return num_chars > PROBE_CHARS_PER_TOKEN * self.max_model_len

    def encode(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> tuple[int, ...]:
        """Token ids of a text. One that is far too long for the context is refused after looking at its beginning."""
        probe_chars = PROBE_CHARS_PER_TOKEN * self.max_model_len
        if len(text) > probe_chars:
            num_tokens = len(self._encode(text[:probe_chars], add_special_tokens))
            if num_tokens > self.max_model_len + 64:  # cutting a text adds a token or two, no more
                num_at_least = int(num_tokens * (len(text) / probe_chars))
                raise RequestError(
                    400, "context_length_exceeded",
                    f"This model's maximum context length is {self.max_model_len} tokens, and {param} came to about "
                    f"{num_at_least} tokens ({len(text)} characters). Please shorten it.", param,
                )  # fmt: skip
        return tuple(self._encode(text, add_special_tokens))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        # The backend gives the GIL away for a batch, not for one text: the engine thread must go on stepping.
        return self.tokenizer.encode_batch([text, ""], add_special_tokens=add_special_tokens)[0]

    def resolve_max_tokens(self, num_prompt_tokens: int, max_tokens: int | None, param: str = "prompt") -> int:
        """How many tokens may be generated; None means the rest of the context. Never truncates."""
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                400, "context_length_exceeded",
                f"This model's maximum context length is {self.max_model_len} tokens, and {param} came to "
                f"{num_prompt_tokens} tokens; at least one more is needed for the output. Please shorten it.", param,
            )  # fmt: skip
        if max_tokens is not None and max_tokens > room:
            raise RequestError(
                400, "context_length_exceeded",
                f"This model's maximum context length is {self.max_model_len} tokens; {param} came to "
                f"{num_prompt_tokens} tokens and max_tokens asks for {max_tokens}, {num_prompt_tokens + max_tokens} in "
                "all. Lower one of them.", "max_tokens",
            )  # fmt: skip
        return room if max_tokens is None else max_tokens

    def check_prompt(self, token_ids: Sequence[int], param: str = "prompt") -> None:
        if not token_ids:
            raise RequestError(400, "empty_prompt", f"The {param} is empty: at least one token is needed.", param)
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    400, "invalid_value",
                    f"{param} holds token id {token_id}; ids of this model are 0 to {self.vocab_size - 1}.",
                    param,
                )  # fmt: skip

    def build(
        self,
        request_id: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        arrival_s: float,
        service: ServiceLevel = NO_TARGETS,
        cache_salt: str = "",
        param: str = "prompt",
    ) -> list[Submit]:
        """``len(prompts) * sampling.n`` requests, a prompt's outputs side by side."""
        try:
            sampling.check_vocabulary(self.vocab_size)
        except ValueError as error:
            raise RequestError(400, "invalid_value", f"{error}.", str(error).split(" ", 1)[0]) from None
        submits = []
        for prompt in prompts:
            self.check_prompt(prompt.token_ids, param)
            max_tokens = self.resolve_max_tokens(len(prompt.token_ids), sampling.max_tokens, param)
            min_tokens = min(sampling.min_tokens, max_tokens)
            for i in range(sampling.n):
                # The outputs of a seeded request differ, but each is reproducible.
                seed = self._seeds.getrandbits(63) if sampling.seed is None else (sampling.seed + i) % 2**64
                child = replace(sampling, n=1, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens)
                submits.append(
                    Submit(f"{request_id}-{len(submits)}", prompt.token_ids, child, service, cache_salt, arrival_s)
                )
        return submits
