"""The contract between the scheduler and whatever runs its plans (the engine or the simulator).

A plan names rows and token ranges, never the value of a token that is still in flight: the runner keeps, per row, the
tokens it was given at admission followed by those it sampled, and reads its inputs there.

What a runner does with a LanePlan, in this order:

    1 admissions   write the row's known tokens and sampling state anew; the row may have belonged to another request
    2 resets       the row's page table becomes exactly these pages (one reset per admission, same row)
    3 new_pages    append each scheduled request's new pages to its row's page table
    4 copies       copy whole pages, source to target, before the plan's first node
    5 nodes        compute tokens [start, start + num_tokens) of each row; where `samples`, sample one token and append
                   it to the row, so that the next plan, which may already be queued, finds it
    6 result       LaneFinished(LaneResult) with one (request_id, token id) for every request that samples

Plans of one lane run in the order of their plan_id; results come back in that order. Lanes are independent. A lane is a
role, a share says how much of the chip its plan gets: successive plans of a lane may have different shares (the border
moved), and still run one after the other. A request is in flight on one lane at a time.

A *run* is one pass of some requests' tokens through the program. Most plans are a whole run. A plan with a node range is a
part of one: the first part brings admissions, pages and copies, those that follow name it in `continues`, repeat its
requests without new pages, and start where it rests. Between two parts the runner keeps the run's frame; a part is planned
when the result of the one before is here. Only the part that ends the program yields tokens. A plan in flight can be paused
(PausePlan): its result then carries the node where it rests.

The scheduler may have dropped a request (abort, stop id) whose plan is still queued: the runner runs it all the same; what
it yields is ignored. Entries of a windowed KV group's page table that lie wholly before the window may have been given to
others: an attention kernel never reads them.

ScheduledRequest and TokenOutput are named tuples, not dataclasses: one of each is made per request and step, and a
tuple is built several times faster than a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from scheduler.nanobatch import NanoPlan
    from scheduler.request import Request


class ScheduledRequest(NamedTuple):
    """One request's share of a plan: tokens [start, start + num_tokens) of its row are computed."""

    request_id: str
    row: int  # index in native state, the request's own from admission until nothing in flight names it
    start: int  # absolute position of the first scheduled token; all before it are computed or in flight
    num_tokens: int
    new_pages: tuple[tuple[int, ...], ...]  # per KV group: page ids to append to the row's page table
    samples: bool  # the last scheduled token is the last one known or in flight: sample the next token


@dataclass(frozen=True, slots=True)
class Admission:
    """The row begins (or resumes, after preemption) the life of this request. All of its tokens are known here."""

    request_id: str
    row: int
    token_ids: Sequence[int]  # prompt, then what was generated before a preemption
    num_prompt_tokens: int
    num_computed_tokens: int  # whose KV the row's pages hold already (prefix-cache hit and copied part of a page)


@dataclass(frozen=True, slots=True)
class PageTableReset:
    """The row's page table starts anew with these pages (admission with a prefix hit, or resume after preemption)."""

    row: int
    pages: tuple[tuple[int, ...], ...]  # per KV group


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy-on-write: the runner copies the page's bytes before the plan's first node."""

    source_page: int
    target_page: int


@dataclass(frozen=True, slots=True)
class LanePlan:
    """Work for one lane. Immutable; executed once."""

    plan_id: int
    lane: int
    share: float  # of the chip, 0..1
    program: str  # "step"
    node_range: tuple[int, int] | None  # None: the whole program
    requests: tuple[ScheduledRequest, ...]
    admissions: tuple[Admission, ...] = ()
    resets: tuple[PageTableReset, ...] = ()
    copies: tuple[PageCopy, ...] = ()
    continues: int = 0  # the plan that began this run and whose frame rests; 0: this one begins a run
    nano: NanoPlan | None = None  # how the step is cut into nano-batches; None: it is not

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.requests)

    @property
    def run_id(self) -> int:
        """The plan that began the run this one belongs to."""
        return self.continues or self.plan_id


@dataclass(frozen=True, slots=True)
class LaneResult:
    """What a plan yielded: one token per sampling request, in plan order."""

    plan_id: int
    lane: int
    sampled: tuple[tuple[str, int], ...] = ()  # (request_id, token id); -1: the logits were not finite
    failed: tuple[tuple[str, str], ...] = ()  # (request_id, why)
    cursor: int | None = None  # the node before which a paused plan rests; None: it ran to the end of its range


# Orders for plans in flight, from take_orders().


@dataclass(frozen=True, slots=True)
class PausePlan:
    """Stop before the next node. The plan's result says where it rests, or that it had ended."""

    plan_id: int
    lane: int


@dataclass(frozen=True, slots=True)
class DropRun:
    """A resting run will not go on: its frame is free."""

    run_id: int


Order = PausePlan | DropRun


# Events that drive Scheduler.on_event(event, now) -> list[LanePlan].


@dataclass(frozen=True, slots=True)
class Arrival:
    request: Request


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str
    reason: str = "abort"


@dataclass(frozen=True, slots=True)
class LaneFinished:
    result: LaneResult


@dataclass(frozen=True, slots=True)
class CopyDone:
    """A copy that no plan carries has ended. Plans carry all copies today, so this only wakes the planner."""

    copy_id: int


@dataclass(frozen=True, slots=True)
class Timer:
    name: str = ""


Event = Arrival | AbortRequest | LaneFinished | CopyDone | Timer


class TokenOutput(NamedTuple):
    """Scheduler -> engine, from take_outputs(): what happened to a request that the user must hear of."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # "stop" | "length" | "error" | the reason of an abort
    stop_token_id: int | None = None  # the stop token that ended it (also last of token_ids)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None  # with finish_reason "error": why
    first_scheduled: float | None = None  # the clock when it was first in a plan; on the request's first output
