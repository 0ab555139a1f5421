"""The cost model's rules: roofline per node, shares, contention, refinement, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from scheduler.cost_model import MAX_CORRECTION, MAX_GUARD_RATIO, CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.model_spec import ModelSpec
from scheduler.step import ScheduledRequest
from scheduler.step_shape import shape_of
from tests.kit.lane_speeds import lane_speeds

SPEC = ModelSpec("small", 256, 4, 4, 2, 64, 512, 1000)


def machine(**fields) -> Machine:
    rates = ClassRates(((1, 1e11), (64, 1e12)), 5e10, 1e-6)
    values = {"name": "m", "source": "test", "shared_bytes_per_s": 5e10, "classes": {"default": rates}}
    return Machine(**{**values, **fields})


def shape(*parts: tuple[int, int]):
    return shape_of([ScheduledRequest("", row, start, n, (), True) for row, (start, n) in enumerate(parts)])


DECODES = shape(*[(200, 1)] * 8)
PROMPT = shape((0, 512))
MIXED = shape((64, 90), *[(100, 1)] * 5)


def test_a_step_is_the_sum_of_its_nodes_each_bound_by_compute_or_memory():
    model = CostModel(SPEC, machine())
    for one in (DECODES, PROMPT):
        expected_s = 0.0
        for node in SPEC.nodes():
            rows = node.num_rows(one)
            if node.kind == "copy_pages" or rows == 0:
                continue
            rates = model.machine.rates(node.kind)
            expected_s += 1e-6 + max(node.operations(one) / rates.rate_at(rows), node.bytes(one) / 5e10)
        assert model.step_s(one) == pytest.approx(expected_s, rel=1e-9)
    by_node = model.node_durations_s(PROMPT)
    assert [name for name, _ in by_node] == [node.name for node in SPEC.nodes()]
    assert sum(seconds for _, seconds in by_node) == pytest.approx(model.step_s(PROMPT))


def test_ranges_of_nodes_add_up_to_the_whole():
    model = CostModel(SPEC, machine())
    num_nodes = len(SPEC.nodes())
    for cut in (1, 5, num_nodes - 2):
        parts = [model.step_cost(PROMPT, 1.0, bounds) for bounds in ((0, cut), (cut, num_nodes))]
        assert sum(part.alone_s for part in parts) == pytest.approx(model.step_s(PROMPT))


def test_the_ends_of_nodes_are_what_ranges_of_them_take():
    model = CostModel(SPEC, machine(step_overhead_s=3e-5))
    num_nodes = len(SPEC.nodes())
    for one in (DECODES, PROMPT, MIXED):
        ends = model.node_ends_s(one, 0.5)
        assert len(ends) == num_nodes + 1 and ends[0] == 0.0 and ends == sorted(ends)
        assert ends[-1] + 3e-5 == pytest.approx(model.step_s(one, 0.5), rel=1e-12)
        for first, last in ((0, 1), (0, 7), (3, 11), (num_nodes - 2, num_nodes)):
            assert model.range_s(one, first, last, 0.5) == pytest.approx(
                model.step_cost(one, 0.5, (first, last)).alone_s, rel=1e-9
            )
        assert model.longest_node_s(one, 0.5) == pytest.approx(max(b - a for a, b in pairwise(ends)))
    beside_s = model.range_s(DECODES, 2, 9, other_demand=4e10)
    assert beside_s == model.step_cost(DECODES, 1.0, (2, 9)).duration_s(4e10) > model.range_s(DECODES, 2, 9)
    before = model.node_ends_s(PROMPT)[-1]
    for _ in range(50):
        model.observe(PROMPT, 2 * before, node_range=(1, 9))
    assert model.node_ends_s(PROMPT)[-1] > 1.05 * before  # what was learned is not hidden by what was kept


def test_how_far_a_time_goes():
    model = CostModel(SPEC, machine(step_overhead_s=3e-5))
    num_nodes, layers = len(SPEC.nodes()), [2, 7, 12, 17, 22]
    for first in (0, 4, num_nodes - 1):
        for limit_s in (0.0, 4e-5, 1e-4, 2e-4, 1.0):
            fitting = [
                last for last in range(first + 1, num_nodes + 1) if model.range_s(PROMPT, first, last) <= limit_s
            ]
            assert model.last_node_within(PROMPT, first, limit_s) == max(fitting, default=first + 1)
            ends = [*layers, num_nodes]
            behind = [last for last in ends if last > first]
            wanted = max((last for last in behind if last in fitting), default=behind[0])
            assert model.last_node_within(PROMPT, first, limit_s, candidates=ends) == wanted
    with pytest.raises(ValueError, match="candidates"):
        model.last_node_within(PROMPT, 22, 1.0, candidates=layers)


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_a_stop_comes_at_the_next_boundary_behind_what_was_launched(num_ahead):
    model = CostModel(SPEC, machine(step_overhead_s=3e-5, launch_ahead_nodes=num_ahead))
    first, last = 2, 20
    ends, total_s = model.node_ends_s(PROMPT), model.range_s(PROMPT, first, last)

    def stop(elapsed_s: float) -> tuple[int, float]:
        node, done = model.stop_node(PROMPT, (first, last), elapsed_s / total_s)
        return node, done * total_s

    assert stop(1e-5) == (first, pytest.approx(1e-5))  # before its first node it stops at once
    for node in range(first, last):
        middle_s = 3e-5 + (ends[node] + ends[node + 1]) / 2 - ends[first]
        stopped_at, stopped_s = stop(middle_s)
        if node + num_ahead >= last:
            assert (stopped_at, stopped_s) == (last, pytest.approx(total_s))
        else:
            assert stopped_at == node + num_ahead
            assert stopped_s == pytest.approx(3e-5 + ends[stopped_at] - ends[first])
            assert stopped_s - middle_s <= num_ahead * model.longest_node_s(PROMPT)


def test_a_smaller_share_never_helps_and_memory_saturates_before_compute():
    model = CostModel(SPEC, machine(saturation=Saturation(0.5, 0.5, 0.4)))
    shares = [0.1, 0.25, 0.5, 0.75, 1.0]
    for one in (DECODES, PROMPT):
        times = [model.step_s(one, share) for share in shares]
        assert times == sorted(times, reverse=True)
    # A decode step at half the machine has all the bandwidth; a prompt there has 0.5 / 0.625 of the compute.
    assert model.step_s(DECODES, 0.5) / model.step_s(DECODES) < 1.1
    assert model.step_s(PROMPT, 0.5) / model.step_s(PROMPT) > 1.15


def test_lanes_share_bandwidth_in_proportion_and_compute_does_not_suffer():
    model = CostModel(SPEC, machine(classes={"default": ClassRates(((1, 1e12),), 5e10)}))
    decode, prompt = model.step_cost(DECODES), model.step_cost(PROMPT)
    assert decode.duration_s(0.0) == decode.alone_s
    # Both want all of the memory: each gets half.
    beside_equal = decode.duration_s(5e10)
    memory_s = sum(s.memory_s for s in decode.segments if s.memory_s >= s.compute_s)
    assert beside_equal - decode.alone_s == pytest.approx(memory_s, rel=0.05)
    assert prompt.duration_s(2.5e10) / prompt.alone_s < decode.duration_s(2.5e10) / decode.alone_s
    doubled = CostModel(SPEC, replace(model.machine, contention=2.0)).step_cost(DECODES)
    assert doubled.duration_s(5e10) > beside_equal
    roomy = CostModel(SPEC, replace(model.machine, shared_bytes_per_s=1e11)).step_cost(DECODES)
    assert roomy.duration_s(5e10) == roomy.alone_s


def test_refinement_finds_a_machine_that_is_slower_than_its_file_and_stays_bounded():
    truth = CostModel(SPEC, machine(classes={"default": ClassRates(((1, 0.5e11), (64, 0.5e12)), 3e10, 1e-6)}))
    model = CostModel(SPEC, machine())
    steps = [DECODES, PROMPT, shape((0, 40), *[(300, 1)] * 20)]
    before = max(abs(model.step_s(one) / truth.step_s(one) - 1) for one in steps)
    for _ in range(300):
        for one in steps:
            model.observe(one, truth.step_s(one))
    after = max(abs(model.step_s(one) / truth.step_s(one) - 1) for one in steps)
    assert before > 0.35 and after < 0.15
    assert 0.9 < model.guard_ratio < 1.3
    for _ in range(5000):
        model.observe(DECODES, 100.0)
    assert max(model.corrections.values()) <= MAX_CORRECTION and model.guard_ratio <= MAX_GUARD_RATIO
    assert model.guarded_step_s(DECODES) >= model.step_s(DECODES)


def test_the_hosts_part_of_a_step_counts_everywhere_but_in_its_nodes():
    plain = CostModel(SPEC, machine(step_overhead_s=3e-5))
    host = CostModel(SPEC, machine(step_overhead_s=3e-5, host_s_per_step=1e-4, host_s_per_request=1e-5))
    more_s = 1e-4 + 8e-5  # of eight requests
    assert host.overhead_s(DECODES) == pytest.approx(3e-5 + more_s)
    assert host.step_s(DECODES) - plain.step_s(DECODES) == pytest.approx(more_s)
    assert host.within_step_s(DECODES) == pytest.approx(host.step_s(DECODES) - 3e-5)  # the gap lies before the step
    assert host.range_s(DECODES, 3, 9) - plain.range_s(DECODES, 3, 9) == pytest.approx(more_s)
    assert host.node_ends_s(DECODES) == plain.node_ends_s(DECODES)
    room_s = plain.range_s(DECODES, 0, 12)
    assert host.last_node_within(DECODES, 0, room_s + more_s + 1e-9) == 12 > host.last_node_within(DECODES, 0, room_s)
    node, done = host.stop_node(DECODES, None, 1.2e-4 / host.step_s(DECODES))
    assert (node, done * host.step_s(DECODES)) == (0, pytest.approx(1.2e-4))  # still the host's part: no node has begun
    for _ in range(100):  # a step as a lane tells it has no gap: what is right already stays as it is
        host.observe(DECODES, host.within_step_s(DECODES))
    assert all(correction == pytest.approx(1.0) for correction in host.corrections.values())


def test_a_machine_file_says_the_same_after_a_round_trip(tmp_path):
    speeds = lane_speeds((0.5, 0.5), (0.6, 0.8), (0.5, 0.4), linear__attention_decode=(0.55, 0.7))
    original = machine(saturation=Saturation(0.6, 1.0, 0.5), rungs=(0.5, 1.0), held_out_error=0.04, model="small")
    original = replace(original, host_s_per_step=1e-4, host_s_per_request=1e-5, overlap_gain=0.1, launch_ahead_nodes=8)
    original = replace(original, lane_speeds=(speeds, replace(speeds, shares=(0.25, 0.75))))
    original.save(tmp_path / "m.json")
    assert Machine.load(tmp_path / "m.json") == original
    assert Machine.load(tmp_path / "m.json").lane_speeds[0].pair_stretches(False, True) == (0.6 / 0.55, 0.8 / 0.7)
    older = original.to_json()
    del older["lane_speeds"]
    assert Machine.from_json(older).lane_speeds == ()
    assert "lane_speeds" not in Machine.from_json(older).to_json()  # its absence says that nobody measured
    for name in ("host_s_per_step", "host_s_per_request", "overlap_gain", "launch_ahead_nodes"):
        del older[name]
    read = Machine.from_json(older)  # files from before these fields were there
    assert (read.host_s_per_step, read.host_s_per_request, read.overlap_gain, read.launch_ahead_nodes) == (
        0.0,
        0.0,
        0.0,
        1,
    )


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm-80gb", "cpu-2-cores"])
def test_machines_that_ship_load_and_say_where_their_numbers_come_from(name):
    loaded = Machine.load(name)
    assert loaded.source.startswith(("public numbers", "measured by partita calibrate"))
    if loaded.source.startswith("public numbers"):
        assert loaded.lane_speeds == ()
    assert CostModel(SPEC, loaded).step_s(PROMPT) > CostModel(SPEC, loaded).step_s(DECODES) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": {"linear": {"operations_per_s": [[1, 1.0]], "bytes_per_s": 1.0}}}, "no default"),
        ({"classes": {"default": {"operations_per_s": [[2, 1.0], [1, 1.0]], "bytes_per_s": 1.0}}}, "rising rows"),
        ({"shared_bytes_per_s": 0}, "bytes/s"),
        ({"host_s_per_step": -1.0}, "below 0"),
        ({"launch_ahead_nodes": 0}, "launch_ahead_nodes"),
        ({"colour": "red"}, "colour"),
        ({"lane_speeds": [{"shares": [0.5, 0.5], "alone": {}, "beside": []}]}, "LaneSpeeds.alone: compute"),
        ({"lane_speeds": [{"shares": [0.5, 0.6], "alone": {}, "beside": []}]}, "LaneSpeeds.shares"),
        ({"lane_speeds": 2 * [asdict(lane_speeds((0.5, 0.5), (0.6, 0.6), (0.5, 0.5)))]}, "each pair once"),
    ],
)
def test_a_broken_machine_file_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**machine().to_json(), **change}))
    with pytest.raises(ValueError, match=message):
        Machine.load(path)
    with pytest.raises(ValueError, match="h100-sxm"):
        Machine.load("abacus")


def test_lane_speeds_name_what_is_wrong():
    with pytest.raises(ValueError, match="beside: got a speed that is not above 0"):
        lane_speeds((0.5, 0.5), (0.6, 0.6), (0.5, 0.0))
    good = lane_speeds((0.5, 0.5), (0.6, 0.6), (0.5, 0.5))
    with pytest.raises(ValueError, match="wanted every compute class with every memory class"):
        replace(good, beside=good.beside[1:])
