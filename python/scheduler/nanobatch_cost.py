"""What a step in nano-batches takes by the cost model, for the simulator."""

from __future__ import annotations

from scheduler.nanobatch import split_requests
from scheduler.nanobatch_tables import NanoCosts
from scheduler.nanobatch_timeline import Operator, ranges_makespan_s
from scheduler.step import LanePlan
from scheduler.step_shape import shape_of


def nano_makespan_s(plan: LanePlan, costs: NanoCosts) -> float:
    """Each lane at its share, in the order of the ranges, drawing from the same memory; the step has the whole chip. Raises
    ValueError if the plan has no nano-batches."""
    nano = plan.nano
    if nano is None:
        raise ValueError(f"nano_makespan_s: plan {plan.plan_id} has no nano-batches")
    model = costs.model
    lanes = [[0] * len(costs.nodes) for _ in range(nano.num_nano)]
    for entry in nano.ranges:
        lanes[entry.nano][entry.first : entry.last] = [entry.lane] * (entry.last - entry.first)
    chains: list[list[Operator]] = []
    for index, piece in enumerate(split_requests(plan.requests, nano.token_counts)):
        chains.append(list(costs.chain(shape_of(piece, model.window), lanes[index], nano.shares)))
    for entry in nano.ranges:
        if entry.after:
            first = chains[entry.nano][entry.first]
            chains[entry.nano][entry.first] = first._replace(alone_s=first.alone_s + costs.handoff_s)
    return model.machine.step_overhead_s + ranges_makespan_s(nano.ranges, chains, costs.contention)
