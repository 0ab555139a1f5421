"""Prompts in parts: Layered Prefill and FlowPrefill, each against itself with its mechanism switched off (simulated)."""

import itertools
import random
from functools import cache

import pytest

from scheduler.scheduler import Scheduler
from scheduler.step import PausePlan
from scheduler.step_shape import shape_of
from tests.scheduler.policy_runs import MACHINE, MODEL, arrivals, simulation, with_own_targets

NUM_NODES = MODEL.num_nodes

# Layered Prefill


def long_prompt_beside_decodes(policy: str, **fields):
    """Steps, in order, of 24 decodes and one prompt of 4096 tokens that arrives when they run."""
    steps = []
    chat = [(0.0, 60, 400, None)] * 24
    one = with_own_targets(
        policy, [*chat, (0.5, 4096, 2, None)], observe=lambda step: steps.append(step), **fields
    )  # fmt: skip
    one.run()
    return steps


def prefill_of(steps, request_id: str):
    return [
        step
        for step in steps
        if any(part.request_id == request_id and part.num_tokens > 1 for part in step.plan.requests)
    ]


def layers_in(first: int, last: int) -> set[int]:
    nodes = MODEL.spec.nodes()[first:last]
    return {node.layer for node in nodes if node.layer >= 0}


def test_layered_one_group_of_layers_a_step_and_decodes_in_all():
    steps = long_prompt_beside_decodes("layered")
    parts = prefill_of(steps, "r24")
    assert len(parts) == 8  # 4096 tokens: 8 groups
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])] and parts[-1].last == NUM_NODES
    groups = [layers_in(part.first, part.last) for part in parts]
    assert sorted(layer for group in groups for layer in group) == list(range(MODEL.spec.num_layers))  # once each
    places = [steps.index(part) for part in parts]
    for before, after in itertools.pairwise(places):
        between = steps[before + 1 : after]
        assert len(between) == 1 and len(between[0].plan.requests) == 24  # one step of all decodes
        assert (between[0].first, between[0].last) == (0, NUM_NODES)


def weight_touches(steps, request_id: str) -> int:
    """Layers whose weights the request's prefill went through, once per step."""
    return sum(len(layers_in(step.first, step.last)) for step in prefill_of(steps, request_id))


def test_layered_touches_weights_at_most_a_quarter_as_often_as_chunks_of_512():
    layered = weight_touches(long_prompt_beside_decodes("layered"), "r24")
    chunked = weight_touches(long_prompt_beside_decodes("default", max_num_batched_tokens=512 + 24), "r24")
    assert layered == MODEL.spec.num_layers  # one pass
    assert chunked >= 8 * MODEL.spec.num_layers  # switched off: 8 chunks, 8 passes
    assert layered <= chunked / 4


def test_layered_keeps_its_runs_hidden_states_no_longer_than_the_run():
    one = simulation("layered", arrivals(6, 10, lambda rng: (rng.randint(600, 6000), 60), seed=1))
    one.run()
    assert one.scheduler.is_idle and len(one.scheduler._runs) == 0 and not one._lanes._resting


# FlowPrefill

TIGHT, LOOSE = (300, 0.25), (8000, 6.0)  # prompt tokens, TTFT target
RATES = (3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24)


def mix(rate: float, part_of_long: float, seconds: float = 20.0):
    rng, now, drawn = random.Random(3), 0.0, []
    while now < seconds:
        now += rng.expovariate(rate)
        num_tokens, target_s = LOOSE if rng.random() < part_of_long else TIGHT
        drawn.append((now, num_tokens, 1, target_s))
    return drawn


@cache
def goodput_at_90_percent(policy: str, part_of_long: float, budget: int = 8192, prefill: str | None = None) -> float:
    """The highest of RATES at which 90 % of the requests have their first token in time."""
    best = 0.0
    for rate in RATES:
        one = with_own_targets(
            policy, mix(rate, part_of_long), max_num_batched_tokens=budget, prefill=prefill
        )  # fmt: skip
        goodput = one.run().stats.goodput
        if goodput.num_ttft_kept < 0.9 * goodput.num_ttft_targets:
            break
        best = rate
    return best


MIXES = (0.1, 0.3, 0.5)


@pytest.mark.parametrize("part_of_long", MIXES)
def test_flowprefill_carries_at_least_what_the_best_chunk_size_does(part_of_long):
    ours = goodput_at_90_percent("flowprefill", part_of_long)
    assert ours >= max(goodput_at_90_percent("default", part_of_long, budget) for budget in (512, 2048, 8192))


def test_flowprefill_carries_half_as_much_again_as_first_come_first_served_at_every_mix():
    for part_of_long in MIXES:
        fcfs = goodput_at_90_percent("default", part_of_long)
        assert goodput_at_90_percent("flowprefill", part_of_long) >= 1.5 * fcfs
        # Switched off: prompts in parts, but in order of arrival; nobody ranks before who runs.
        assert goodput_at_90_percent("default", part_of_long, prefill="operator") < 1.5 * fcfs


def test_without_pauses_s_edf_alone_makes_tight_prompts_wait(monkeypatch):
    def tight_in_time() -> float:
        result = with_own_targets("flowprefill", mix(10, 0.3), max_num_batched_tokens=8192).run()
        tight = [one for one in result.records.values() if one.num_prompt_tokens == TIGHT[0]]
        return sum(one.first_token_ns - one.arrival_ns <= 0.1e9 for one in tight) / len(tight)

    with_pauses = tight_in_time()
    monkeypatch.setattr("scheduler.lane_planner.LanePlanner.run_to_pause", lambda self: None)
    assert with_pauses > 0.95 and tight_in_time() < with_pauses - 0.2


def test_a_pause_takes_no_longer_than_the_nodes_that_are_launched():
    asked_s, waited = {}, []

    def observe(step) -> None:
        if step.is_stopped:
            shape = shape_of(step.plan.requests)
            most_s = MACHINE.launch_ahead_nodes * MODEL.longest_node_s(shape)
            waited.append((step.end_ns / 1e9 - asked_s[step.plan.plan_id], most_s))

    one = with_own_targets("flowprefill", mix(10, 0.3), observe=observe, max_num_batched_tokens=8192)
    take_orders = one.scheduler.take_orders

    def watched():
        orders = take_orders()
        for order in orders:
            if isinstance(order, PausePlan):
                asked_s[order.plan_id] = one.scheduler._outlook.now
        return orders

    one.scheduler.take_orders = watched
    one.run()
    assert len(waited) > 20
    assert all(seconds <= most_s + 1e-6 for seconds, most_s in waited)


def test_the_scheduler_is_called_at_arrivals_ends_and_pauses_only(monkeypatch):
    """Every event it takes is an arrival, the end of a prompt, or the acknowledgement of a pause."""
    taken = []
    take = Scheduler._take
    monkeypatch.setattr(Scheduler, "_take", lambda self, event, now: (taken.append(event), take(self, event, now)))

    def num_events(policy: str, budget: int) -> tuple[int, int]:
        taken.clear()
        result = with_own_targets(policy, mix(8, 0.3), max_num_batched_tokens=budget).run()
        num_requests = len(result.records)
        assert all(record.finish_reason == "length" for record in result.records.values())
        return len(taken), 2 * num_requests + result.stats.num_pauses

    num, most = num_events("flowprefill", 8192)
    assert num <= most
    num, most = num_events("default", 512)  # switched off: every chunk calls it
    assert num > most
