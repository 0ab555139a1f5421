"""Where the durations of plans come from: the cost model, possibly disturbed, or a run that happened."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import exp
from typing import NamedTuple, Protocol

from scheduler.cost_model import CostModel
from scheduler.nanobatch_cost import nano_step_cost
from scheduler.nanobatch_tables import NanoCosts
from scheduler.step import LanePlan
from scheduler.step_shape import shape_of

NANOSECONDS = 1_000_000_000


class Cost(Protocol):
    """What a plan wants; cost_model.StepCost is one."""

    alone_s: float
    num_bytes: float
    compute_s: float

    @property
    def demand_bytes_per_s(self) -> float: ...

    def duration_s(self, other_demand: float = 0.0) -> float: ...


class Costs:
    """One subclass per source of durations."""

    def step_cost(self, plan: LanePlan) -> Cost:
        """Of the plan's nodes on its share of the machine."""
        raise TypeError(f"{type(self).__name__} must say what a plan costs")

    def result_delay_ns(self, plan: LanePlan) -> int:
        """From the end of a plan to its result at the scheduler."""
        return 0

    def result_rank(self, plan: LanePlan) -> int:
        """Results that come to the scheduler at the same nanosecond are told in this order."""
        return plan.plan_id

    def stop_at(self, plan: LanePlan, done: float) -> tuple[int | None, float]:
        """A plan of which the fraction `done` is over is asked to stop: where it rests and the fraction that is over then;
        None: it ends first. Here nothing can be stopped."""
        return None, 1.0

    def slow_down_of_overlap(self, total_share: float, total_demand: float) -> float:
        """How many times longer everybody takes while lanes run whose shares add up to more than the machine."""
        return total_share


class ModelCosts(Costs):
    """The cost model's durations, disturbed by a log-normal error if asked."""

    def __init__(self, model: CostModel, *, error: float = 0.0, seed: int = 0) -> None:
        """error: standard deviation of log(actual / predicted). It is drawn once per run, for all of its parts and whenever
        it is asked: a model is wrong about a shape, and a prompt that is cut in parts must not average it away."""
        self.model = model
        self._error = error
        self._seed = seed
        self._nano_costs: NanoCosts | None = None  # made for the first plan that asks
        self._delay_ns = round(model.machine.result_delay_s * NANOSECONDS)

    def step_cost(self, plan: LanePlan) -> Cost:
        model = self.model
        shape = shape_of(plan.requests, model.window)
        factor = 1.0
        if plan.nano is None:
            cost: Cost = model.step_cost(shape, plan.share, plan.node_range)
        else:
            if self._nano_costs is None:
                self._nano_costs = NanoCosts(model)
            cost = nano_step_cost(plan, self._nano_costs)
            # Its makespan is of its nodes and the gap before them; the host takes its part all the same.
            factor += (model.overhead_s(shape) - model.machine.step_overhead_s) / cost.alone_s
        if self._error:
            factor *= exp(random.Random(self._seed * 1_000_003 + plan.run_id).gauss(0.0, self._error))
        return ScaledCost(cost, factor) if factor != 1.0 else cost

    def result_delay_ns(self, plan: LanePlan) -> int:
        return self._delay_ns

    def stop_at(self, plan: LanePlan, done: float) -> tuple[int | None, float]:
        model = self.model
        last = plan.node_range[1] if plan.node_range is not None else model.num_nodes
        shape = shape_of(plan.requests, model.window)
        node, stopped = model.stop_node(shape, plan.node_range, done, plan.share)
        return (node, stopped) if node < last else (None, 1.0)

    def slow_down_of_overlap(self, total_share: float, total_demand: float) -> float:
        return self.model.slow_down_of_overlap(total_share, total_demand)


class ScaledCost:
    """Everything takes `factor` times as long."""

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


class RecordedCosts(Costs):
    """Of a run that happened, by plan id. Raises KeyError for a plan that did not. What lanes did to each other, and where a
    pause came, is in the recorded durations and cursors."""

    def __init__(
        self, durations_ns: Mapping[int, int], delays_ns: Mapping[int, int], ranks: Mapping[int, int],
        cursors: Mapping[int, int],
    ) -> None:  # fmt: skip
        """ranks: plan id -> place of its result among all. cursors: of the plans that were paused."""
        self._durations_ns, self._delays_ns = durations_ns, delays_ns
        self._ranks, self._cursors = ranks, cursors

    def step_cost(self, plan: LanePlan) -> Cost:
        return FixedCost(self._durations_ns[plan.plan_id] / NANOSECONDS)

    def result_delay_ns(self, plan: LanePlan) -> int:
        return self._delays_ns[plan.plan_id]

    def result_rank(self, plan: LanePlan) -> int:
        return self._ranks[plan.plan_id]

    def stop_at(self, plan: LanePlan, done: float) -> tuple[int | None, float]:
        return self._cursors.get(plan.plan_id), 1.0

    def slow_down_of_overlap(self, total_share: float, total_demand: float) -> float:
        return 1.0
