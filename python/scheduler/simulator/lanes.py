"""Lanes in virtual time: plans queue on a lane and run one after the other; lanes that run at once share bandwidth.

Time is in whole nanoseconds, so that a recorded run adds up exactly. A running plan is a fraction left to do and the
duration that all of it would take as things stand; when another lane starts or ends a plan, what was done is subtracted
and the rest goes on at the new pace (a fluid model). Each plan brings its own share, so the border between lanes moves from
one plan to the next without anybody waiting. While shares of running lanes add up to more than 1 the machine takes turns.

A run in parts rests between them: every part must start where its run rests, and no run may be left resting. A plan that is
asked to stop runs on to the boundary that Costs.stop_at names; one that still waits in its lane's queue stops when its turn
comes, before its first node.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from scheduler.simulator.costs import NANOSECONDS, Cost, Costs
from scheduler.step import DropRun, LanePlan, Order


class FinishedStep(NamedTuple):
    """A plan that ran: nodes [first, last) of the program."""

    plan: LanePlan
    start_ns: int
    end_ns: int
    cost: Cost  # of the nodes that ran
    first: int = 0
    last: int = 0
    is_stopped: bool = False  # it was asked to, and rests before node `last`
    ends_run: bool = True  # with it the program has ended: its tokens are sampled

    @property
    def cursor(self) -> int | None:
        """As LaneResult.cursor."""
        return self.last if self.is_stopped else None


class _Lane:
    __slots__ = (
        "cost", "cursor", "demand", "duration_s", "end_ns", "left", "plan", "queue", "start_ns", "undone", "updated_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.queue: deque[LanePlan] = deque()
        self.plan: LanePlan | None = None
        self.cost: Cost | None = None
        self.demand = 0.0  # bytes/s, undisturbed
        self.start_ns = 0
        self.updated_ns = 0
        self.end_ns = 0
        self.left = 0.0  # fraction of the plan that is not over at updated_ns
        self.undone = 0.0  # fraction that will not be done, because it was asked to stop
        self.cursor: int | None = None  # where it will rest, if it was asked to stop
        self.duration_s = 0.0  # that all of it would take as things stand


class VirtualLanes:
    def __init__(self, num_lanes: int, costs: Costs, num_nodes: int = 0) -> None:
        """num_nodes: of the program; 0 where plans are whole."""
        self._lanes = [_Lane() for _ in range(num_lanes)]
        self._costs = costs
        self._is_single = num_lanes == 1
        self._num_nodes = num_nodes
        self._to_stop: set[int] = set()  # ids of queued plans
        self._resting: dict[int, int] = {}  # run id -> the node before which it rests
        self.busy_ns = [0] * num_lanes
        self.num_steps = [0] * num_lanes

    @property
    def num_resting(self) -> int:
        return len(self._resting)

    def submit(self, plan: LanePlan, now_ns: int) -> None:
        """Raises RuntimeError for a part that does not start where its run rests."""
        if plan.continues or plan.node_range is not None:
            first = plan.node_range[0] if plan.node_range is not None else 0
            rests_at = self._resting.pop(plan.run_id, None if plan.continues else 0)
            if first != rests_at:
                raise RuntimeError(
                    f"plan {plan.plan_id} starts at node {first}, its run {plan.run_id} rests at {rests_at}"
                )
        lane = self._lanes[plan.lane]
        lane.queue.append(plan)
        if lane.plan is None:
            self._start_next(lane, now_ns)
            self._repace(now_ns)

    def carry_out(self, order: Order, now_ns: int) -> None:
        """Raises RuntimeError for the drop of a run that does not rest."""
        if isinstance(order, DropRun):
            if self._resting.pop(order.run_id, None) is None:
                raise RuntimeError(f"run {order.run_id} is dropped but does not rest")
            return
        lane = self._lanes[order.lane]
        if lane.plan is not None and lane.plan.plan_id == order.plan_id:
            self._stop(lane, now_ns)
        elif any(plan.plan_id == order.plan_id for plan in lane.queue):
            self._to_stop.add(order.plan_id)
        # Else it has ended, and its result is on the way.

    def next_end_ns(self) -> int | None:
        """When the next plan ends, as things stand."""
        if self._is_single:
            lane = self._lanes[0]
            return lane.end_ns if lane.plan is not None else None
        ends = [lane.end_ns for lane in self._lanes if lane.plan is not None]
        return min(ends) if ends else None

    def finish(self, now_ns: int) -> list[FinishedStep]:
        """Plans that end now; what was queued behind them begins."""
        finished = []
        for index, lane in enumerate(self._lanes):
            if lane.plan is not None and lane.end_ns <= now_ns:
                finished.append(self._finished(lane, now_ns))
                self.busy_ns[index] += now_ns - lane.start_ns
                self.num_steps[index] += 1
                lane.plan = None
                if lane.queue:
                    self._start_next(lane, now_ns)
        if finished:
            self._repace(now_ns)
        return finished

    def _finished(self, lane: _Lane, now_ns: int) -> FinishedStep:
        plan, num_nodes, cursor = lane.plan, self._num_nodes, lane.cursor
        if plan.node_range is None and cursor is None:
            return FinishedStep(plan, lane.start_ns, now_ns, lane.cost, 0, num_nodes)
        first, last = plan.node_range or (0, num_nodes)
        cost = lane.cost
        if cursor is not None:
            last = cursor
            cost = self._costs.step_cost(replace(plan, node_range=(first, cursor)))
        if last < num_nodes:
            self._resting[plan.run_id] = last
        return FinishedStep(plan, lane.start_ns, now_ns, cost, first, last, cursor is not None, last == num_nodes)

    def _start_next(self, lane: _Lane, now_ns: int) -> None:
        plan = lane.plan = lane.queue.popleft()
        cost = lane.cost = self._costs.step_cost(plan)
        lane.start_ns = lane.updated_ns = now_ns
        lane.left, lane.undone, lane.cursor = 1.0, 0.0, None
        lane.duration_s = cost.alone_s
        lane.end_ns = now_ns + max(1, round(cost.alone_s * NANOSECONDS))
        if not self._is_single:
            lane.demand = cost.demand_bytes_per_s
        if plan.plan_id in self._to_stop:
            self._to_stop.discard(plan.plan_id)
            self._stop(lane, now_ns)

    def _stop(self, lane: _Lane, now_ns: int) -> None:
        self._catch_up(lane, now_ns)
        lane.cursor, done = self._costs.stop_at(lane.plan, 1.0 - lane.left)
        lane.undone = 1.0 - done
        self._set_end(lane)

    def _catch_up(self, lane: _Lane, now_ns: int) -> None:
        elapsed_s = (now_ns - lane.updated_ns) / NANOSECONDS
        lane.left = max(0.0, lane.left - elapsed_s / lane.duration_s) if lane.duration_s > 0.0 else 0.0
        lane.updated_ns = now_ns

    def _set_end(self, lane: _Lane) -> None:
        left = max(0.0, lane.left - lane.undone)
        lane.end_ns = lane.updated_ns + max(1, round(left * lane.duration_s * NANOSECONDS))

    def _repace(self, now_ns: int) -> None:
        """Every running plan goes on at the pace that its present neighbours leave it."""
        if self._is_single:
            return
        running = [lane for lane in self._lanes if lane.plan is not None]
        total_share = sum(lane.plan.share for lane in running)
        total_demand = sum(lane.demand for lane in running)
        takes_turns = len(running) > 1 and total_share > 1.0 + 1e-9
        slow_down = self._costs.slow_down_of_overlap(total_share, total_demand) if takes_turns else 1.0
        for lane in running:
            if len(running) == 1:
                duration_s = lane.cost.alone_s
            elif takes_turns:
                duration_s = lane.cost.alone_s * slow_down
            else:
                duration_s = lane.cost.duration_s(total_demand - lane.demand)
            if duration_s != lane.duration_s:
                self._catch_up(lane, now_ns)
                lane.duration_s = duration_s
                self._set_end(lane)
