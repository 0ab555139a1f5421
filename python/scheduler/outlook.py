"""What a policy may look at when it decides: the state of a lane's next plan, computed only when asked for.

Policies stay functions of this and of a request; they never touch the scheduler. One Outlook serves a scheduler for life.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.prefill_run import RunTable
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request
from scheduler.request_pages import RequestPages
from scheduler.step_shape import StepShape


class Decodes(NamedTuple):
    """The requests that take one token each in the lane's next plan."""

    shape: StepShape
    tightest_tpot_s: float | None  # of those that carry a target


class Outlook:
    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None, running: RunningList, waiting: WaitingQueue,
        runs: RunTable, pages: RequestPages,
    ) -> None:  # fmt: skip
        self.config = config
        self.cost_model = cost_model  # None: this machine was never calibrated
        self.runs = runs  # prefills that have begun in parts: resting or with a part in flight
        self.now = 0.0  # the driver's clock at this round of planning, seconds
        self._running = running
        self._waiting = waiting
        self._pages = pages

    @property
    def kv_usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1."""
        return 1.0 - self._pages.num_available_pages / self._pages.num_pages

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> Iterable[Request]:
        """Requests that hold a row, in rank order."""
        return self._running

    @property
    def pending_prefill_tokens(self) -> int:
        """Of prompts: known tokens that no plan has computed or holds, of running and waiting requests."""
        num_tokens = self._waiting.num_tokens
        for request in self._running:
            num_pending = request.num_expected_tokens - request.next_start
            if num_pending > 1:
                num_tokens += num_pending
        return num_tokens

    def has_prefill(self) -> bool:
        """Prompts are pending, or on their way through the program in parts."""
        if self.runs or (self._waiting and len(self._running) < self.config.max_num_seqs):
            return True
        return any(request.num_expected_tokens - request.next_start > 1 for request in self._running)

    def is_prefilling(self) -> bool:
        """Prompts are pending, or on their way: the last chunk of one may be in flight."""
        return self.has_prefill() or any(
            request.num_known_tokens - request.num_computed_tokens > 1 for request in self._running
        )

    def has_decode(self) -> bool:
        """Some request has its prompt behind it and more to say."""
        for request in self._running:
            if (
                request.run is None
                and request.num_expected_tokens - request.next_start <= 1
                and request.num_expected_tokens < request.max_num_tokens
            ):
                return True
        return False

    def prefills(self, limit: int) -> list[Request]:
        """Requests whose prompts are pending, at most `limit`: those that run in rank order, then those that wait."""
        found: list[Request] = []
        for request in self._running:
            if len(found) == limit:
                return found
            if request.run is None and request.num_expected_tokens - request.next_start > 1:
                found.append(request)
        return found + self._waiting.first(limit - len(found))

    def decodes(self, lane: int) -> Decodes:
        window = self.cost_model.window if self.cost_model is not None else 0
        num, kv_tokens, seen_tokens, tightest = 0, 0, 0, None
        has_lanes = self.config.num_lanes > 1
        for request in self._running:
            start = request.next_start
            if request.num_expected_tokens - start != 1 or request.num_expected_tokens >= request.max_num_tokens:
                continue
            if request.run is not None:
                continue  # its token is sampled by a run that has not ended
            if has_lanes and request.num_plans_in_flight and request.lane != lane:
                continue
            num += 1
            kv_tokens += start + 1
            seen_tokens += min(start + 1, window) if window else start + 1
            if request.tpot_s is not None and (tightest is None or request.tpot_s < tightest):
                tightest = request.tpot_s
        return Decodes(StepShape(num, num, num, num, kv_tokens, window_decode_kv_tokens=seen_tokens), tightest)

    def first_prefill(self, lane: int) -> Request | None:
        """Whose prompt the lane's next plan would go on with, or begin; None: all have caught up."""
        has_lanes = self.config.num_lanes > 1
        for request in self._running:
            if (
                request.run is None
                and request.num_expected_tokens - request.next_start > 1
                and not (has_lanes and request.num_plans_in_flight and request.lane != lane)
            ):
                return request
        has_rows = len(self._running) < self.config.max_num_seqs
        return self._waiting.peek() if has_rows else None
