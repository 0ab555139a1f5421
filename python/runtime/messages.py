"""What the HTTP front and the engine thread say to each other; the only things that cross between them.

The front sends ``Submit`` and ``Abort``; the engine answers with one list of ``Delta`` per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from runtime.sampling_params import SamplingParams
from runtime.service_level import NO_TARGETS, ServiceLevel


@dataclass(frozen=True, slots=True)
class Submit:
    """A request whose prompt is already token ids. The engine answers until a Delta carries a finish_reason."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams  # n is 1 here: the front fans out
    service: ServiceLevel = NO_TARGETS  # targets, priority, user
    cache_salt: str = ""  # namespace of the prefix cache
    arrival_s: float = 0.0  # time.monotonic() at the front


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str
    reason: str = "abort"  # becomes the finish_reason


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one generated position."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


class Delta(NamedTuple):
    """What one step added to one request. A tuple, because one is made per request and step."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token id, when asked for
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error" | a given abort reason
    stop_token_id: int | None = None  # the stop token that ended it (also last of token_ids)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None  # with finish_reason "error"
    scheduled_s: float | None = None  # time.monotonic() of first scheduling, set on the first Delta
