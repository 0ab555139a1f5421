"""What a step in nano-batches takes by the cost model, for those who predict and for the simulator."""

from __future__ import annotations

from typing import NamedTuple

from scheduler.nanobatch import split_requests
from scheduler.nanobatch_contention import Operator
from scheduler.nanobatch_tables import NanoCosts
from scheduler.nanobatch_timeline import ranges_makespan_s
from scheduler.step import LanePlan
from scheduler.step_shape import shape_of


class NanoStepCost(NamedTuple):
    """As cost_model.StepCost, of a step that has the whole chip: its own two lanes are priced, others do not slow it."""

    alone_s: float
    num_bytes: float  # weights once per nano-batch
    compute_s: float  # that its operations keep the whole chip busy

    @property
    def demand_bytes_per_s(self) -> float:
        return self.num_bytes / self.alone_s

    def duration_s(self, other_demand: float = 0.0) -> float:
        return self.alone_s


def nano_makespan_s(plan: LanePlan, costs: NanoCosts) -> float:
    """Each lane at its share, in the order of the ranges, as far as they slow each other. Raises ValueError if the plan has
    no nano-batches."""
    return nano_step_cost(plan, costs).alone_s


def nano_step_cost(plan: LanePlan, costs: NanoCosts) -> NanoStepCost:
    """Raises ValueError if the plan has no nano-batches."""
    nano = plan.nano
    if nano is None:
        raise ValueError(f"nano_step_cost: plan {plan.plan_id} has no nano-batches")
    model = costs.model
    lanes = [[0] * len(costs.nodes) for _ in range(nano.num_nano)]
    for entry in nano.ranges:
        lanes[entry.nano][entry.first : entry.last] = [entry.lane] * (entry.last - entry.first)
    chains: list[list[Operator]] = []
    for index, piece in enumerate(split_requests(plan.requests, nano.token_counts)):
        chains.append(list(costs.chain(shape_of(piece, model.window), lanes[index], nano.shares)))
    num_bytes = sum([operator.num_bytes for chain in chains for operator in chain])
    for entry in nano.ranges:
        if entry.after:
            first = chains[entry.nano][entry.first]
            chains[entry.nano][entry.first] = first._replace(alone_s=first.alone_s + costs.handoff_s)
    makespan_s = model.machine.step_overhead_s + ranges_makespan_s(
        nano.ranges, chains, costs.contention_at(nano.shares)
    )
    return NanoStepCost(makespan_s, num_bytes, model.step_cost(shape_of(plan.requests, model.window)).compute_s)
