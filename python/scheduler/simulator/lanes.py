"""Lanes in virtual time: plans queue on a lane and run one after the other; lanes that run at once share bandwidth.

Time is in whole nanoseconds, so that a recorded run adds up exactly. A running step is a fraction left to do and the
duration that all of it would take as things stand; when another lane starts or ends a step, what was done is subtracted
and the rest goes on at the new pace (a fluid model). Shares of running lanes that add up to more than 1 are time-shared
in proportion.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from math import exp
from typing import NamedTuple, Protocol

from scheduler.cost_model import CostModel
from scheduler.step import LanePlan
from scheduler.step_shape import shape_of

NANOSECONDS = 1_000_000_000


class Cost(Protocol):
    """What a step wants; cost_model.StepCost is one."""

    alone_s: float
    num_bytes: float
    compute_s: float

    @property
    def demand_bytes_per_s(self) -> float: ...

    def duration_s(self, other_demand: float = 0.0) -> float: ...


class Costs(Protocol):
    """Where the durations of plans come from."""

    def step_cost(self, plan: LanePlan, share: float) -> Cost: ...

    def result_delay_ns(self, plan: LanePlan) -> int: ...


class ModelCosts:
    """The cost model's durations, disturbed by a log-normal error if asked (the same for a plan whenever it is asked)."""

    def __init__(self, model: CostModel, *, error: float = 0.0, seed: int = 0) -> None:
        """error: standard deviation of log(actual / predicted)."""
        self.model = model
        self._error = error
        self._seed = seed
        self._delay_ns = round(model.machine.result_delay_s * NANOSECONDS)

    def step_cost(self, plan: LanePlan, share: float) -> Cost:
        model = self.model
        cost = model.step_cost(shape_of(plan.requests, model.window), share, plan.node_range)
        if self._error:
            factor = exp(random.Random(self._seed * 1_000_003 + plan.plan_id).gauss(0.0, self._error))
            return _ScaledCost(cost, factor)
        return cost

    def result_delay_ns(self, plan: LanePlan) -> int:
        return self._delay_ns


class _ScaledCost:
    __slots__ = ("_cost", "_factor")

    def __init__(self, cost: Cost, factor: float) -> None:
        self._cost, self._factor = cost, factor

    @property
    def alone_s(self) -> float:
        return self._cost.alone_s * self._factor

    @property
    def num_bytes(self) -> float:
        return self._cost.num_bytes

    @property
    def compute_s(self) -> float:
        return self._cost.compute_s

    @property
    def demand_bytes_per_s(self) -> float:
        return self._cost.demand_bytes_per_s / self._factor

    def duration_s(self, other_demand: float = 0.0) -> float:
        return self._cost.duration_s(other_demand) * self._factor


class FixedCost(NamedTuple):
    """A duration that nothing changes."""

    alone_s: float
    num_bytes: float = 0.0
    compute_s: float = 0.0

    @property
    def demand_bytes_per_s(self) -> float:
        return 0.0

    def duration_s(self, other_demand: float = 0.0) -> float:
        return self.alone_s


class RecordedCosts:
    """Durations and delays of a run that happened, by plan id. Raises KeyError for a plan that did not."""

    def __init__(self, durations_ns: Mapping[int, int], delays_ns: Mapping[int, int]) -> None:
        self._durations_ns, self._delays_ns = durations_ns, delays_ns

    def step_cost(self, plan: LanePlan, share: float) -> Cost:
        return FixedCost(self._durations_ns[plan.plan_id] / NANOSECONDS)

    def result_delay_ns(self, plan: LanePlan) -> int:
        return self._delays_ns[plan.plan_id]


class FinishedStep(NamedTuple):
    plan: LanePlan
    start_ns: int
    end_ns: int
    cost: Cost


class _Lane:
    __slots__ = ("cost", "demand", "duration_s", "end_ns", "left", "plan", "queue", "share", "start_ns", "updated_ns")

    def __init__(self) -> None:
        self.queue: deque[LanePlan] = deque()
        self.plan: LanePlan | None = None
        self.cost: Cost | None = None
        self.share = 0.0  # effective
        self.demand = 0.0  # bytes/s, undisturbed
        self.start_ns = 0
        self.updated_ns = 0
        self.end_ns = 0
        self.left = 0.0  # fraction of the step that is to be done after updated_ns
        self.duration_s = 0.0  # that all of it would take as things stand


class VirtualLanes:
    def __init__(self, num_lanes: int, costs: Costs) -> None:
        self._lanes = [_Lane() for _ in range(num_lanes)]
        self._costs = costs
        self._is_single = num_lanes == 1
        self.busy_ns = [0] * num_lanes
        self.num_steps = [0] * num_lanes

    def submit(self, plan: LanePlan, now_ns: int) -> None:
        lane = self._lanes[plan.lane]
        lane.queue.append(plan)
        if lane.plan is None:
            self._start_next(lane, now_ns)
            self._repace(now_ns)

    def next_end_ns(self) -> int | None:
        """When the next step ends, as things stand."""
        if self._is_single:
            lane = self._lanes[0]
            return lane.end_ns if lane.plan is not None else None
        ends = [lane.end_ns for lane in self._lanes if lane.plan is not None]
        return min(ends) if ends else None

    def finish(self, now_ns: int) -> list[FinishedStep]:
        """Steps that end now; what was queued behind them begins."""
        finished = []
        for index, lane in enumerate(self._lanes):
            if lane.plan is not None and lane.end_ns <= now_ns:
                finished.append(FinishedStep(lane.plan, lane.start_ns, now_ns, lane.cost))
                self.busy_ns[index] += now_ns - lane.start_ns
                self.num_steps[index] += 1
                lane.plan = None
                if lane.queue:
                    self._start_next(lane, now_ns)
        if finished:
            self._repace(now_ns)
        return finished

    def _start_next(self, lane: _Lane, now_ns: int) -> None:
        plan = lane.plan = lane.queue.popleft()
        lane.share = plan.share
        cost = lane.cost = self._costs.step_cost(plan, plan.share)
        lane.start_ns = lane.updated_ns = now_ns
        lane.left = 1.0
        lane.duration_s = cost.alone_s
        lane.end_ns = now_ns + max(1, round(cost.alone_s * NANOSECONDS))
        if not self._is_single:
            lane.demand = cost.demand_bytes_per_s

    def _repace(self, now_ns: int) -> None:
        """Every running step goes on at the pace that its present neighbours leave it."""
        if self._is_single:
            return
        running = [lane for lane in self._lanes if lane.plan is not None]
        total_share = sum(lane.plan.share for lane in running)
        for lane in running:
            share = lane.plan.share / total_share if total_share > 1.0 + 1e-9 else lane.plan.share
            if share != lane.share:
                lane.share = share
                lane.cost = self._costs.step_cost(lane.plan, share)
                lane.demand = lane.cost.demand_bytes_per_s
        total_demand = sum(lane.demand for lane in running)
        for lane in running:
            duration_s = lane.cost.duration_s(total_demand - lane.demand if len(running) > 1 else 0.0)
            if duration_s != lane.duration_s:
                done = (now_ns - lane.updated_ns) / NANOSECONDS / lane.duration_s
                lane.left = max(0.0, lane.left - done)
                lane.updated_ns, lane.duration_s = now_ns, duration_s
                lane.end_ns = now_ns + max(1, round(lane.left * duration_s * NANOSECONDS))
