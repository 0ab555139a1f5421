"""What a policy may look at when it decides: the state of a lane's next plan, computed only when asked for.

Policies stay functions of this and of a request; they never touch the scheduler. One Outlook serves a scheduler for life.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request
from scheduler.step_shape import StepShape


class Decodes(NamedTuple):
    """The requests that take one token each in the lane's next plan."""

    shape: StepShape
    tightest_tpot_s: float | None  # of those that carry a target


class Outlook:
    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None, running: RunningList, waiting: WaitingQueue
    ) -> None:
        self.config = config
        self.cost_model = cost_model  # None: this machine was never calibrated
        self._running = running
        self._waiting = waiting

    def decodes(self, lane: int) -> Decodes:
        window = self.cost_model.window if self.cost_model is not None else 0
        num, kv_tokens, seen_tokens, tightest = 0, 0, 0, None
        has_lanes = self.config.num_lanes > 1
        for request in self._running:
            start = request.next_start
            if request.num_expected_tokens - start != 1 or request.num_expected_tokens >= request.max_num_tokens:
                continue
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
            if request.num_expected_tokens - request.next_start > 1 and not (
                has_lanes and request.num_plans_in_flight and request.lane != lane
            ):
                return request
        has_rows = len(self._running) < self.config.max_num_seqs
        return self._waiting.peek() if has_rows else None
