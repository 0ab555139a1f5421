"""What a finished or growing request looks like to a Python caller. Names follow vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int  # 1 = most likely
    decoded_token: str

    @staticmethod
    def by_token_id(tokenizer, entry: TokenLogprobs) -> dict[int, Logprob]:
        """The sampled token and its alternatives at one position, keyed by token id."""

        def shown(token_id: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, tokenizer.token_bytes(token_id).decode("utf-8", "replace"))

        logprobs = {token_id: shown(token_id, logprob, i + 1) for i, (token_id, logprob) in enumerate(entry.top)}
        logprobs[entry.token_id] = shown(entry.token_id, entry.logprob, entry.rank)
        return logprobs


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` continuations of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # when logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # per token id, the sampled one and the most likely ones
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it runs
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for EOS

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, ``time.monotonic()`` seconds; None where they have not."""

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with all its continuations."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
