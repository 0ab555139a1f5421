"""Lanes with roles, runs in parts, pauses and moving borders in virtual time: nothing is lost, nobody waits too long."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from scheduler import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch_cost import nano_makespan_s
from scheduler.nanobatch_planner import NanoPlanner
from scheduler.nanobatch_tables import NanoCosts
from scheduler.request import Request
from scheduler.simulator import ModelCosts, Simulation
from scheduler.simulator.costs import Costs, FixedCost
from scheduler.simulator.lanes import FinishedStep, VirtualLanes
from scheduler.simulator.recording import RecordingScheduler
from scheduler.step import DropRun, LanePlan, PausePlan, ScheduledRequest
from scheduler.step_shape import shape_of

SPEC = ModelSpec("small", 256, 4, 4, 2, 64, 512, 1000)
NODES = SPEC.nodes()
NUM_NODES = len(NODES)
LAYER_STARTS = tuple(i for i, node in enumerate(NODES) if node.layer >= 0 and NODES[i - 1].layer != node.layer)
OVERHEAD_S = 3e-5


def machine(**fields) -> Machine:
    rates = ClassRates(((1, 1e11), (64, 1e12)), 5e10, 1e-6)
    values = {"name": "m", "source": "test", "shared_bytes_per_s": 5e10, "classes": {"default": rates}}
    values |= {
        "rungs": (0.25, 0.5, 0.75, 1.0),
        "step_overhead_s": OVERHEAD_S,
        "result_delay_s": 2e-5,
        "saturation": Saturation(0.5, 0.5, 0.7),
    }
    return Machine(**{**values, **fields})


def costs(**fields) -> ModelCosts:
    return ModelCosts(CostModel(SPEC, machine(**fields)))


def prompt(plan_id: int, num_tokens: int = 300, lane: int = 1, share: float = 0.5, **fields) -> LanePlan:
    scheduled = ScheduledRequest(f"p{plan_id}", 0, 0, num_tokens, (), True)
    return LanePlan(plan_id, lane, share, "step", fields.pop("node_range", None), (scheduled,), **fields)


def decodes(plan_id: int, num: int = 8, share: float = 0.5) -> LanePlan:
    rows = tuple(ScheduledRequest(f"d{row}", row, 200, 1, (), True) for row in range(num))
    return LanePlan(plan_id, 0, share, "step", None, rows)


def drained(lanes: VirtualLanes) -> list[FinishedStep]:
    steps = []
    while (now := lanes.next_end_ns()) is not None:
        steps += lanes.finish(now)
    return steps


@pytest.mark.parametrize("num_ahead", [1, 4])
def test_a_pause_comes_within_the_nodes_launched_ahead_and_no_work_is_lost(num_ahead):
    source = costs(launch_ahead_nodes=num_ahead)
    model, rng = source.model, random.Random(5)
    whole_s = model.step_s(shape_of(prompt(1).requests), 0.5)
    longest_s = model.longest_node_s(shape_of(prompt(1).requests), 0.5)
    seen = set()
    for _ in range(200):
        lanes, now_ns = VirtualLanes(2, source, NUM_NODES), 0
        lanes.submit(prompt(1), 0)
        steps, plan_id = [], 1
        while not steps or not steps[-1].ends_run:
            if rng.random() < 0.7:
                asked_ns = now_ns + rng.randrange(1, max(2, lanes.next_end_ns() - now_ns))
                if asked_ns < lanes.next_end_ns():
                    lanes.carry_out(PausePlan(plan_id, 1), asked_ns)
                    stopped_in_s = (lanes.next_end_ns() - asked_ns) / 1e9
                    assert stopped_in_s <= num_ahead * longest_s + 2e-9
            now_ns = lanes.next_end_ns()
            (step,) = lanes.finish(now_ns)
            steps.append(step)
            assert step.cursor == (None if step.ends_run else step.last)
            assert lanes.num_resting == (not step.ends_run)
            if not step.ends_run:
                plan_id += 1
                lanes.submit(prompt(plan_id, node_range=(step.last, NUM_NODES), continues=1), now_ns)
        assert steps[0].first == 0 and all(a.last == b.first for a, b in pairwise(steps))
        busy_s = sum(step.end_ns - step.start_ns for step in steps) / 1e9
        began = sum(step.last > step.first for step in steps)
        # Each part pays for itself once; one that was stopped before its first node pays a part of that.
        assert whole_s + (began - 1) * OVERHEAD_S - 1e-7 <= busy_s <= whole_s + (len(steps) - 1) * OVERHEAD_S + 1e-7
        alone = model.step_cost(shape_of(prompt(1).requests), 0.5)
        assert sum(step.cost.num_bytes for step in steps) == pytest.approx(alone.num_bytes)
        assert sum(step.cost.compute_s for step in steps) == pytest.approx(alone.compute_s)
        seen.update(step.last for step in steps)
    assert len(seen) > NUM_NODES // 2  # pauses came all over the program


def test_a_pause_beside_another_lane_waits_for_the_slowed_node_and_gives_the_bandwidth_back():
    source = costs(shared_bytes_per_s=2e10)
    lanes = VirtualLanes(2, source, NUM_NODES)
    lanes.submit(decodes(1), 0)
    alone_ns = lanes.next_end_ns()
    lanes.submit(prompt(2, 40), 0)
    slowed_ns = lanes.next_end_ns()
    lanes.carry_out(PausePlan(2, 1), slowed_ns // 4)
    steps = {step.plan.plan_id: step for step in drained(lanes)}
    assert steps[2].is_stopped and 0 < steps[2].last < NUM_NODES and steps[2].end_ns < steps[1].end_ns
    assert alone_ns < steps[1].end_ns < slowed_ns


def test_a_plan_that_is_asked_to_stop_before_its_turn_rests_before_its_first_node():
    lanes = VirtualLanes(2, costs(), NUM_NODES)
    lanes.submit(prompt(1), 0)
    lanes.submit(prompt(2), 0)
    lanes.carry_out(PausePlan(2, 1), 1000)
    first, second = drained(lanes)
    assert first.ends_run and not first.is_stopped
    assert (second.cursor, second.first, second.ends_run) == (0, 0, False)
    assert second.end_ns - second.start_ns == 1 and second.cost.num_bytes == 0
    lanes.carry_out(PausePlan(2, 1), 10**9)  # it is not there any more
    lanes.carry_out(DropRun(2), 10**9)
    assert lanes.num_resting == 0
    with pytest.raises(RuntimeError, match="does not rest"):
        lanes.carry_out(DropRun(2), 10**9)


def test_a_part_must_start_where_its_run_rests():
    lanes = VirtualLanes(2, costs(), NUM_NODES)
    lanes.submit(prompt(1, node_range=(0, 7)), 0)
    (step,) = drained(lanes)
    assert (step.last, step.cursor, step.ends_run) == (7, None, False)
    with pytest.raises(RuntimeError, match="rests at 7"):
        lanes.submit(prompt(2, node_range=(8, NUM_NODES), continues=1), 10**9)
    with pytest.raises(RuntimeError, match="rests at None"):
        lanes.submit(prompt(3, node_range=(7, NUM_NODES), continues=9), 10**9)


class Table(Costs):
    """Seconds by plan id; gain of overlap."""

    def __init__(self, seconds: dict[int, float], gain: float = 0.0) -> None:
        self.seconds, self.gain = seconds, gain

    def step_cost(self, plan):
        return FixedCost(self.seconds[plan.plan_id] / plan.share)

    def slow_down_of_overlap(self, total_share, total_demand):
        return total_share / (1 + self.gain)


def test_the_border_moves_from_one_plan_to_the_next_without_a_wait():
    lanes = VirtualLanes(2, Table({1: 1.0, 2: 1.0, 3: 1.0}))
    lanes.submit(prompt(1, share=0.5), 0)
    lanes.submit(prompt(2, share=0.25), 0)
    lanes.submit(decodes(3, share=0.5), 1_000_000_000)
    steps = drained(lanes)
    spans = {step.plan.plan_id: (step.start_ns / 1e9, step.end_ns / 1e9) for step in steps}
    assert spans == {1: (0.0, 2.0), 2: (2.0, 6.0), 3: (1.0, 3.0)}


def test_lanes_that_both_have_everything_take_turns_and_gain_what_the_machine_says():
    for gain, both_end_s in ((0.0, 4.0), (0.25, 3.2)):
        lanes = VirtualLanes(2, Table({1: 2.0, 2: 2.0}, gain))
        lanes.submit(decodes(1, share=1.0), 0)
        lanes.submit(prompt(2, share=1.0), 0)
        assert [step.end_ns / 1e9 for step in drained(lanes)] == [pytest.approx(both_end_s)] * 2
    model = CostModel(SPEC, machine(overlap_gain=0.5))
    assert model.slow_down_of_overlap(1.8, 0.0) == pytest.approx(1.2)
    assert model.slow_down_of_overlap(1.2, 0.0) == 1.0
    assert model.slow_down_of_overlap(1.8, 1e11) == 2.0  # and not above the bandwidth


def test_an_error_is_a_runs_own_and_lanes_parts_and_pauses_have_it_alike():
    exact = costs()
    disturbed = ModelCosts(exact.model, error=0.3, seed=4)
    whole, part = prompt(7), prompt(9, node_range=(5, NUM_NODES), continues=7)
    factor = disturbed.step_cost(whole).alone_s / exact.step_cost(whole).alone_s
    assert factor != pytest.approx(1.0, abs=0.01)
    assert disturbed.step_cost(part).alone_s / exact.step_cost(part).alone_s == pytest.approx(factor)
    assert disturbed.step_cost(whole).duration_s(4e10) == pytest.approx(
        factor * exact.step_cost(whole).duration_s(4e10)
    )
    assert disturbed.stop_at(whole, 0.4) == exact.stop_at(whole, 0.4)
    other = disturbed.step_cost(prompt(8)).alone_s / exact.step_cost(prompt(8)).alone_s
    assert other != pytest.approx(factor, abs=0.01)


def test_nano_batches_take_their_makespan_with_the_contention_and_the_error_of_the_executor():
    source = costs(saturation=Saturation(0.5, 1.5, 0.4))
    planner = NanoPlanner(config(), source.model)
    rows = tuple(ScheduledRequest(f"d{row}", row, 3000, 1, (), True) for row in range(48))
    whole = LanePlan(1, 0, 1.0, "step", None, (*rows, ScheduledRequest("p", 48, 0, 512, (), True)))
    plan = replace(whole, nano=planner.plan(whole.requests, 2))
    assert plan.nano.num_nano == 2
    makespan_s = nano_makespan_s(plan, NanoCosts(source.model))
    cost, of_whole = source.step_cost(plan), source.step_cost(whole)
    assert cost.alone_s == pytest.approx(makespan_s) and cost.alone_s != pytest.approx(of_whole.alone_s, rel=1e-3)
    assert cost.num_bytes > of_whole.num_bytes and cost.compute_s == of_whole.compute_s  # weights are read twice
    felt = costs(
        saturation=Saturation(0.5, 1.5, 0.4), contention=4.0
    )  # mis-set: what is felt, not what was planned with
    assert felt.step_cost(plan).alone_s > cost.alone_s and felt.step_cost(whole).alone_s == of_whole.alone_s
    disturbed = ModelCosts(source.model, error=0.3, seed=4)
    factor = disturbed.step_cost(whole).alone_s / of_whole.alone_s
    assert disturbed.step_cost(plan).alone_s == pytest.approx(factor * cost.alone_s) and factor != 1.0
    host = costs(saturation=Saturation(0.5, 1.5, 0.4), host_s_per_step=1e-4, host_s_per_request=1e-6)
    assert host.step_cost(plan).alone_s - cost.alone_s == pytest.approx(1e-4 + 49e-6)


# The whole loop

ARRANGEMENTS = [
    {"lanes": "50:50", "prefill": "token"},
    {"lanes": "50:50", "prefill": "operator"},
    {"lanes": "25:75", "prefill": "layer"},
    {"lanes": "100:100", "prefill": "operator"},
    {"lanes": "off", "prefill": "layer"},
    {"lanes": "off", "prefill": "operator"},
    {"lanes": "off", "prefill": "token", "nano_batches": "3"},
    {"lanes": "off", "prefill": "layer", "nano_batches": "auto"},
]


def config(**fields) -> SchedulerConfig:
    values = {"num_pages": 400, "page_size": 16, "max_num_seqs": 12, "max_num_batched_tokens": 256}
    values |= {"max_model_len": 2048, "num_nodes": NUM_NODES, "layer_starts": LAYER_STARTS, "rungs": (0.25, 0.5, 0.75)}
    return SchedulerConfig(**{**values, **fields})


def requests_of(seed: int, num: int = 80) -> list[Request]:
    """Prompts of every length; an urgent one now and then, so that runs are paused."""
    rng, now_s, requests = random.Random(seed), 0.0, []
    for index in range(num):
        now_s += rng.expovariate(1500.0)
        length = round(4 * 150 ** rng.random())
        requests.append(
            Request(
                f"r{index}", range(length), rng.randint(1, 30), frozenset(), priority=rng.choice((0, 0, 0, -1)),
                arrival_s=now_s, namespace=f"r{index}", tpot_s=rng.choice((None, 0.002)),
            )
        )  # fmt: skip
    return requests


def simulation(fields: dict, seed: int = 1, **options) -> Simulation:
    source = costs()
    one = Simulation(config(**fields), source, cost_model=source.model, keep_plans=True, **options)
    for request in requests_of(seed):
        one.add(round(request.arrival_s * 1e9), request)
    return one


@pytest.mark.parametrize("fields", ARRANGEMENTS, ids=lambda fields: "-".join(fields.values()))
def test_every_arrangement_answers_everybody_and_runs_every_node_once(fields):
    steps: list[FinishedStep] = []
    one = simulation(fields, observe=steps.append)
    result = one.run()
    if fields.get("nano_batches") == "3":
        assert {step.plan.nano.num_nano for step in steps if step.plan.nano is not None} == {2, 3}
    one.scheduler.check_integrity()
    assert one.scheduler.is_idle and one._lanes.num_resting == 0
    assert all(record.finish_reason == "length" for record in result.records.values())
    covered: dict[int, list[FinishedStep]] = {}
    for step in steps:
        covered.setdefault(step.plan.run_id, []).append(step)
    parts = [run for run in covered.values() if len(run) > 1]
    for run in covered.values():
        assert run[0].first == 0 and all(a.last == b.first for a, b in pairwise(run))
        assert [step.ends_run for step in run] == [False] * (len(run) - 1) + [True]
    if fields["prefill"] != "token":
        assert parts
    if fields["lanes"] != "off":
        assert all(busy > 0 for busy in result.busy_ns)
        for step in steps:
            if step.plan.lane == 0:
                assert all(scheduled.num_tokens == 1 for scheduled in step.plan.requests)
        if fields["lanes"] == "50:50":
            assert {step.plan.share for step in steps} == {0.5, 1.0}  # a lane whose other half has nothing takes it all
        assert any(a.start_ns < b.end_ns and b.start_ns < a.end_ns for a, b in pairwise(steps)), (
            "no lane beside another"
        )
    if fields == {"lanes": "50:50", "prefill": "operator"}:
        assert result.stats.num_pauses > 0
    again = simulation(fields).run()
    assert again.plans == result.plans and again.end_ns == result.end_ns


@pytest.mark.parametrize("fields", ARRANGEMENTS, ids=lambda fields: "-".join(fields.values()))
def test_a_recorded_run_with_lanes_parts_and_pauses_replays_to_the_same_decisions(fields):
    spans = {}

    def note(step: FinishedStep) -> None:
        spans[step.plan.plan_id] = (step.start_ns, step.end_ns)
        if step.ends_run and not step.is_stopped and step.plan.plan_id % 3 == 0:  # what an engine would teach its model
            shape = shape_of(step.plan.requests)
            recorder.cost_model.observe(shape, 1.3 * (step.end_ns - step.start_ns) / 1e9, step.plan.share)

    one = simulation(fields, observe=note)
    recorder = one.scheduler = RecordingScheduler(one.config, CostModel(SPEC, machine()))
    one.run()
    recorded = recorder.recorded_run(spans)
    if fields == {"lanes": "50:50", "prefill": "operator"}:  # and the comparison sees where pauses came
        assert recorded.cursors
        assert replace(recorded, cursors={}).replay(CostModel(SPEC, machine())).plans != recorder.plans
    replayed = recorded.replay(CostModel(SPEC, machine()))
    assert replayed.plans == recorder.plans
    assert replayed.stats._replace(goodput=None) == recorder.stats()._replace(goodput=None)
