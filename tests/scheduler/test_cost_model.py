"""The cost model's rules: roofline per node, shares, contention, refinement, and its file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scheduler.cost_model import MAX_CORRECTION, MAX_GUARD_RATIO, CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.model_spec import ModelSpec
from scheduler.step import ScheduledRequest
from scheduler.step_shape import shape_of

SPEC = ModelSpec("small", 256, 4, 4, 2, 64, 512, 1000)


def machine(**fields) -> Machine:
    rates = ClassRates(((1, 1e11), (64, 1e12)), 5e10, 1e-6)
    values = {"name": "m", "source": "test", "shared_bytes_per_s": 5e10, "classes": {"default": rates}}
    return Machine(**{**values, **fields})


def shape(*parts: tuple[int, int]):
    return shape_of([ScheduledRequest("", row, start, n, (), True) for row, (start, n) in enumerate(parts)])


DECODES = shape(*[(200, 1)] * 8)
PROMPT = shape((0, 512))


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


def test_a_class_is_corrected_alone():
    model = CostModel(SPEC, machine())
    before = model.step_cost(DECODES)
    for _ in range(200):
        model.observe_class("attention_decode", 1.0, 2.0)
    after = {s.node_class: s.duration_s for s in model.step_cost(DECODES).segments}
    for segment in before.segments:
        if segment.node_class == "attention_decode":
            assert after["attention_decode"] > 1.9 * segment.duration_s
    assert model.corrections.keys() == {"attention_decode"}


def test_a_machine_file_says_the_same_after_a_round_trip(tmp_path):
    original = machine(saturation=Saturation(0.6, 1.0, 0.5), rungs=(0.5, 1.0), held_out_error=0.04, model="small")
    original.save(tmp_path / "m.json")
    assert Machine.load(tmp_path / "m.json") == original


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm-80gb", "cpu-2-cores"])
def test_machines_that_ship_load_and_say_where_their_numbers_come_from(name):
    loaded = Machine.load(name)
    assert loaded.source.startswith(("public numbers", "measured by partita calibrate"))
    assert CostModel(SPEC, loaded).step_s(PROMPT) > CostModel(SPEC, loaded).step_s(DECODES) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": {"linear": {"operations_per_s": [[1, 1.0]], "bytes_per_s": 1.0}}}, "no default"),
        ({"classes": {"default": {"operations_per_s": [[2, 1.0], [1, 1.0]], "bytes_per_s": 1.0}}}, "rising rows"),
        ({"shared_bytes_per_s": 0}, "bytes/s"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_broken_machine_file_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**machine().to_json(), **change}))
    with pytest.raises(ValueError, match=message):
        Machine.load(path)
    with pytest.raises(ValueError, match="h100-sxm"):
        Machine.load("abacus")
