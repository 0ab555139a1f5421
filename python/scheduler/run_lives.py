"""How prefills that go in parts rest, end, are paused and dropped.

What a run holds is in prefill_run.py; when a part of it is due says lane_planner.py.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.policy import PrefillOrder
from scheduler.prefill_run import PrefillRun, RunTable
from scheduler.request import Request, RequestStatus
from scheduler.request_pages import RequestPages
from scheduler.step import DropRun, LanePlan, LaneResult, Order, PausePlan

RUNNING = RequestStatus.RUNNING


class RunLives:
    """preempt(request) and drained(request) are the scheduler's."""

    def __init__(
        self, num_nodes: int, runs: RunTable, pages: RequestPages, order: PrefillOrder | None, *,
        preempt: Callable[[Request], None], drained: Callable[[Request], None],
    ) -> None:  # fmt: skip
        self._num_nodes = num_nodes
        self._runs = runs
        self._pages = pages
        self._order = order
        self._preempt = preempt
        self._drained = drained
        self._orders: list[Order] = []
        self.num_pauses = 0

    def take_orders(self) -> list[Order]:
        orders, self._orders = self._orders, []
        return orders

    def begin(self, run: PrefillRun) -> None:
        for request in run.requests:
            request.run = run
        self._runs.add(run)

    def begin_part(self, run: PrefillRun, plan: LanePlan, now: float) -> None:
        run.plan, run.part_started_s = plan, now
        for request in run.requests:
            request.lane = plan.lane
        if self._order is not None and run.lead.status is RUNNING:  # it may have left, and others go on
            self._order.started(run.lead, now)

    def land_part(self, run: PrefillRun, plan: LanePlan, result: LaneResult, now: float) -> bool:
        """A part is back. True: with it the run has ended, or failed, and its result is the requests'."""
        run.plan, run.is_pausing = None, False
        ended_at = result.cursor if result.cursor is not None else (plan.node_range or (0, self._num_nodes))[1]
        if ended_at < self._num_nodes and not result.failed:
            run.cursor = ended_at
            run.executed_s += now - run.part_started_s
            # Between two turns of one lane it goes on executing, as far as its order is concerned: it shares the chip with
            # decodes.
            was_paused = result.cursor is not None
            self.num_pauses += was_paused and not run.is_doomed  # who gives its pages away makes way for nobody's turn
            if was_paused and self._order is not None and run.lead.status is RUNNING:
                self._order.paused(run.lead, run.executed_s, now)
            if run.is_doomed or all(request.status is not RUNNING for request in run.requests):
                self.drop(run)
            return False
        self._end(run)
        for request in run.requests:
            request.run = None
            if self._order is not None and request.num_expected_tokens - request.next_start <= 1:
                self._order.ended(request)  # else the run held a first part of its prompt only
        return True

    def drop(self, run: PrefillRun) -> None:
        """A run at rest will not go on: what it computed is forgotten, and who is alive is scheduled anew."""
        self._end(run)
        self._orders.append(DropRun(run.run_id))
        for request, (_, _, start, _, _, samples) in zip(run.requests, run.scheduled, strict=True):
            request.run = None
            request.num_plans_in_flight -= 1
            if request.status is RUNNING:
                request.next_start = start
                request.num_expected_tokens -= samples
                if run.copy_sources:  # whether its copied part of a page was filled is not known
                    self._preempt(request)
            elif request.num_plans_in_flight == 0:
                self._drained(request)

    def leave(self, request: Request) -> None:
        """A request of a run was preempted: its pages are needed now, so the run ends as soon as it rests."""
        run = request.run
        if run.is_resting:
            self.drop(run)
        else:
            run.is_doomed = True
            self.pause(run)

    def pause(self, run: PrefillRun) -> None:
        if not run.is_pausing:
            run.is_pausing = True
            self._orders.append(PausePlan(run.plan.plan_id, run.plan.lane))

    def _end(self, run: PrefillRun) -> None:
        self._runs.remove(run)
        for node in run.copy_sources:
            self._pages.release_source(node)
