"""Step i + 1 is formed while step i runs (NanoFlow, arXiv 2408.12757, section 4.3): no gap between steps, and one token
computed in vain when an end was not foreseen."""

from __future__ import annotations

from itertools import pairwise

import pytest

from scheduler.config import SchedulerConfig
from scheduler.simulator import Simulation
from scheduler.simulator.costs import Costs, FixedCost
from scheduler.simulator.lanes import FinishedStep
from scheduler.simulator.traces import TraceRequest

STEP_S, DELAY_NS = 0.010, 4_000_000


class EvenSteps(Costs):
    """Every step takes 10 ms; its result is known 4 ms later."""

    def step_cost(self, plan):
        return FixedCost(STEP_S)

    def result_delay_ns(self, plan):
        return DELAY_NS


def run(max_plans_in_flight: int, *, ends_by_stop: bool) -> tuple[list[FinishedStep], dict[str, int]]:
    """(steps, tokens that each request was given)."""
    steps: list[FinishedStep] = []
    requests = [TraceRequest(0.0, 20, 5 + 3 * i) for i in range(6)]
    config = SchedulerConfig(
        num_pages=200, page_size=16, max_num_batched_tokens=128, max_model_len=256,
        max_plans_in_flight=max_plans_in_flight,
    )  # fmt: skip
    simulation = Simulation(config, EvenSteps(), requests, ends_by_stop=ends_by_stop, observe=steps.append)
    result = simulation.run()
    return steps, {name: record.num_tokens for name, record in result.records.items()}


@pytest.mark.parametrize("ends_by_stop", [False, True])
def test_two_plans_in_flight_close_the_gap_that_one_leaves(ends_by_stop):
    steps, tokens = run(2, ends_by_stop=ends_by_stop)
    assert [after.start_ns - before.end_ns for before, after in pairwise(steps)] == [0] * (len(steps) - 1)
    ablated, ablated_tokens = run(1, ends_by_stop=ends_by_stop)
    assert {after.start_ns - before.end_ns for before, after in pairwise(ablated)} == {DELAY_NS}
    assert tokens == ablated_tokens


def test_an_end_that_is_not_foreseen_costs_one_token_and_one_that_is_costs_none():
    def rows(steps: list[FinishedStep]) -> dict[str, int]:
        """Sampling rows that each request had in plans."""
        counts: dict[str, int] = {}
        for step in steps:
            for scheduled in step.plan.requests:
                counts[scheduled.request_id] = counts.get(scheduled.request_id, 0) + scheduled.samples
        return counts

    for max_plans_in_flight, ends_by_stop, wasted in ((2, True, 1), (2, False, 0), (1, True, 0)):
        steps, tokens = run(max_plans_in_flight, ends_by_stop=ends_by_stop)
        sampled = rows(steps)
        assert {name: sampled[name] - tokens[name] for name in tokens} == dict.fromkeys(tokens, wasted)
