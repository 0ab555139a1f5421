"""Finished steps of a simulation, kept for a trace file or a chart: the same JSON as the engine's --trace-steps."""

from __future__ import annotations

from scheduler.cost_model import CostModel
from scheduler.simulator.costs import NANOSECONDS
from scheduler.simulator.lanes import FinishedStep
from scheduler.step_shape import shape_of
from scheduler.step_trace import StepTrace


class StepLog:
    """Give `add` to Simulation(observe=...). Keeps the steps that touch [from_s, to_s) of virtual time."""

    def __init__(self, model: CostModel, from_s: float = 0.0, to_s: float = float("inf")) -> None:
        self.model = model
        self.steps: list[FinishedStep] = []
        self._from_ns, self._to_ns = from_s * NANOSECONDS, to_s * NANOSECONDS

    def add(self, step: FinishedStep) -> None:
        if step.end_ns > self._from_ns and step.start_ns < self._to_ns:
            self.steps.append(step)

    def write(self, path: str) -> None:
        """Perfetto and chrome://tracing open it. A step's nodes are the model's, stretched to the step's duration."""
        trace = StepTrace([node.name for node in self.model.spec.nodes()])
        for step in self.steps:
            trace.add(self._completion(step), step.plan)
        trace.write(path)

    def _completion(self, step: FinishedStep) -> dict:
        """What a lane's completion queue would have said of the step."""
        plan, model = step.plan, self.model
        durations = model.node_durations_s(shape_of(plan.requests, model.window), plan.share)
        first, last = step.first, step.last or model.num_nodes  # a scheduler that was told no nodes runs whole steps
        total_s = sum(seconds for _, seconds in durations[first:last]) or 1.0
        stretch = (step.end_ns - step.start_ns) / total_s
        spans, at_ns = [], float(step.start_ns)
        for node in range(first, last):
            end_ns = at_ns + durations[node][1] * stretch
            if end_ns > at_ns:
                spans.append((node, at_ns, end_ns))
            at_ns = end_ns
        return {
            "lane": plan.lane, "start_ns": step.start_ns, "end_ns": step.end_ns, "first_node": first, "cursor": last,
            "was_stopped": step.is_stopped, "spans": spans,
        }  # fmt: skip
