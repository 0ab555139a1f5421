"""A prefill on its way through the program in parts: by groups of layers, or until it is paused at an operator.

A run holds some requests' tokens from its first part to its last. Between two parts it rests: the runner keeps its frame,
the requests keep their pages, and nothing of theirs may be scheduled. Only its end counts anything as computed, so the
prefix cache hears of a run when it is over (Layered Prefill, arXiv 2510.08055; FlowPrefill, arXiv 2602.16603).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from scheduler.step_shape import StepShape

if TYPE_CHECKING:
    from scheduler.prefix_cache import PrefixNode
    from scheduler.request import Request
    from scheduler.step import LanePlan, ScheduledRequest


class PrefillRun:
    """Written by scheduler.py alone."""

    __slots__ = (
        "_lead", "bounds", "copy_sources", "cursor", "executed_s", "is_doomed", "is_pausing", "num_tokens", "part_started_s",
        "plan", "requests", "run_id", "scheduled", "shape", "started_s",
    )  # fmt: skip

    def __init__(
        self, run_id: int, requests: list[Request], scheduled: tuple[ScheduledRequest, ...], shape: StepShape,
        copy_sources: list[PrefixNode], started_s: float, bounds: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.run_id = run_id
        self.requests = requests
        self._lead = min(requests, key=lambda request: request.rank)
        self.scheduled = scheduled  # without new pages, as later parts repeat it
        self.shape = shape
        self.num_tokens = shape.num_tokens
        self.cursor = 0  # the node before which it rests, or before which its part in flight began
        self.plan: LanePlan | None = None  # its part in flight; None: it rests
        self.bounds = bounds  # nodes at which its parts end, the program's end last; that one alone: by time or a pause
        self.is_pausing = False  # the part in flight was asked to stop
        self.is_doomed = False  # to be dropped when its part in flight is back
        self.copy_sources = copy_sources  # held until the run has ended: who knows whether its copy was made
        self.started_s = started_s
        self.executed_s = 0.0  # that its parts took so far, from plan to result
        self.part_started_s = started_s

    @property
    def lead(self) -> Request:
        """Whose turn it is: the run has its rank. When it has left, the first of those that are still here: a rank that
        nobody changes any more would keep them back."""
        if self._lead.finish_reason is not None:
            left = [request for request in self.requests if request.finish_reason is None]
            if left:
                self._lead = min(left, key=lambda request: request.rank)
        return self._lead

    @property
    def is_resting(self) -> bool:
        return self.plan is None

    def next_bound(self) -> int:
        return next(bound for bound in self.bounds if bound > self.cursor)

    def __repr__(self) -> str:
        state = "resting" if self.is_resting else "in flight"
        size = f"{len(self.requests)} requests, {self.num_tokens} tokens"
        return f"PrefillRun({self.run_id}, {size}, node {self.cursor}, {state})"


class RunTable:
    """The runs that have begun and not ended, in the order in which they began."""

    def __init__(self) -> None:
        self._runs: dict[int, PrefillRun] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[PrefillRun]:
        return iter(self._runs.values())

    def add(self, run: PrefillRun) -> None:
        self._runs[run.run_id] = run

    def remove(self, run: PrefillRun) -> None:
        del self._runs[run.run_id]

    def first_resting(self) -> PrefillRun | None:
        """Of those that rest, the one whose lead ranks first."""
        best = None
        for run in self._runs.values():
            if run.plan is None and (best is None or run.lead.rank < best.lead.rank):
                best = run
        return best

    def num_resting(self) -> int:
        return sum(run.plan is None for run in self._runs.values())

    def in_flight(self) -> PrefillRun | None:
        """At most one run has a part in flight: prompts go one after the other."""
        for run in self._runs.values():
            if run.plan is not None:
                return run
        return None
