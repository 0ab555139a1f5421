"""The contract between the scheduler and whatever runs its plans (the engine or the simulator).

A plan names rows and token ranges, never the value of a token that is still in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a plan: tokens [start, start + num_tokens) of its row are computed."""

    request_id: str
    row: int  # permanent index in native state
    start: int  # absolute position of the first scheduled token; all before it are computed or in flight
    num_tokens: int
    new_pages: tuple[tuple[int, ...], ...]  # per KV group: page ids to append to the row's page table
    samples: bool  # the last scheduled token is the last known one: sample the next token


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy-on-write: the runner copies the page's bytes before the plan's first node."""

    source_page: int
    target_page: int


@dataclass(frozen=True, slots=True)
class PageTableReset:
    """The row's page table starts anew with these pages (admission with a prefix hit, or resume after preemption)."""

    row: int
    pages: tuple[tuple[int, ...], ...]  # per KV group


@dataclass(frozen=True, slots=True)
class LanePlan:
    """Work for one idle lane. Immutable; executed once."""

    plan_id: int
    lane: int
    share: float  # of the chip, 0..1
    program: str  # "step"
    node_range: tuple[int, int] | None  # None: the whole program
    requests: tuple[ScheduledRequest, ...]
    resets: tuple[PageTableReset, ...] = ()
    copies: tuple[PageCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.requests)


@dataclass(frozen=True, slots=True)
class LaneResult:
    """What a plan yielded: one token per sampling request, in plan order."""

    plan_id: int
    lane: int
    sampled: tuple[tuple[str, int], ...] = ()  # (request_id, token id); -1: the logits were not finite
    failed: tuple[tuple[str, str], ...] = ()  # (request_id, why)


# Events that drive Scheduler.on_event(event, now) -> list[LanePlan].


@dataclass(frozen=True, slots=True)
class Arrival:
    request: object  # scheduler.request.Request


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str
    reason: str = "abort"


@dataclass(frozen=True, slots=True)
class LaneFinished:
    result: LaneResult


@dataclass(frozen=True, slots=True)
class CopyDone:
    copy_id: int


@dataclass(frozen=True, slots=True)
class Timer:
    name: str = ""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """Scheduler -> engine, after update(): what happened to a request that the user must hear of."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    first_scheduled: float | None = field(default=None)
