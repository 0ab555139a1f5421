"""Calibration: the fit finds a machine it is shown, and the command saves a file that predicts this one."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from runtime import calibrate, measured_engine
from runtime.fit_rates import fit_classes, fit_saturation, nonnegative_fit
from runtime.measured_engine import line_above_zero
from runtime.measured_lanes import CutRuns, fit_beside, speeds_at, watch
from runtime.measured_steps import MeasuredStep, StepKind
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch_tables import NanoCosts
from scheduler.step import ScheduledRequest
from tests.kit.tiny_models import write_tiny_model

SPEC = ModelSpec("shown", 576, 6, 9, 3, 64, 1536, 49152, weight_format="Q4_1", output_format="Q8_0")
SHOWN = Machine(
    "shown", "test", 5e10,
    {
        "linear": ClassRates(((1, 1.2e11), (8, 5e11), (64, 8e11), (512, 7e11)), 3e10, 3e-6),
        "attention_decode": ClassRates(((1, 6e10),), 3e10, 4e-6, 2e-6),
        "attention_chunk": ClassRates(((16, 8e10), (256, 2.5e11)), 3e10, 9e-6, 1e-6),
        "sampling": ClassRates(((1, 8e9),), 4e10, 1e-5),
        "default": ClassRates(((1, 1e15),), 1e10, 1e-6),
    },
)  # fmt: skip


def shown_steps(kinds, noise: float = 0.0) -> list[MeasuredStep]:
    model, rng, steps = CostModel(SPEC, SHOWN), random.Random(3), []
    for kind in kinds:
        shape = kind.shape(0)
        node_s = tuple(s * (1 + noise * rng.random()) for _, s in model.node_durations_s(shape))
        steps.append(MeasuredStep(kind, shape, sum(node_s), node_s))
    return steps


@pytest.mark.parametrize(("noise", "bar"), [(0.0, 0.06), (0.2, 0.20)])
def test_the_fit_predicts_held_out_steps_of_a_machine_it_is_shown(noise, bar):
    machine = Machine("fitted", "test", 5e10, fit_classes(shown_steps(calibrate.fit_grid(512), noise), SPEC))
    truth, fitted = CostModel(SPEC, SHOWN), CostModel(SPEC, machine)
    for kind in calibrate.held_out_grid(512):
        shape = kind.shape(0)
        assert fitted.step_s(shape) == pytest.approx(truth.step_s(shape), rel=bar), kind


def test_saturation_reproduces_the_times_it_was_fitted_to():
    saturation = fit_saturation({0.5: 1.6, 1.0: 1.0}, {0.5: 1.25, 1.0: 1.0})
    assert saturation.compute(1.0) / saturation.compute(0.5) == pytest.approx(1.6)
    assert saturation.memory(1.0) / saturation.memory(0.5) == pytest.approx(1.25)
    linear = fit_saturation({0.5: 2.1, 1.0: 1.0}, {0.5: 2.2, 1.0: 1.0})
    assert linear.compute(0.5) == pytest.approx(0.5) and linear.memory(0.5) == 0.5


def test_nonnegative_fit_leaves_out_what_would_be_negative():
    rows = [(1.0, x, 3.0 * x * x) for x in (1.0, 2.0, 3.0, 5.0)]
    assert nonnegative_fit(rows, [2 + 4 * r[1] for r in rows]) == pytest.approx([2.0, 4.0, 0.0], abs=1e-9)
    assert min(nonnegative_fit([(1.0, x) for x in (1.0, 2.0, 3.0)], [3.0, 2.0, 1.0])) >= 0


def test_a_line_that_stays_above_zero():
    assert line_above_zero([1, 4, 16], [3.0, 6.0, 18.0]) == pytest.approx((2.0, 1.0))
    assert line_above_zero([1, 4, 16], [1.0, 8.0, 40.0])[0] == 0.0  # through the origin, not below it
    assert line_above_zero([1, 4, 16], [5.0, 4.0, 3.0]) == pytest.approx((4.0, 0.0))
    assert line_above_zero([1, 4, 16], [-5.0, -4.0, -3.0]) == (0.0, 0.0)
    assert line_above_zero([4], [2.0]) == (2.0, 0.0)


class Plan(NamedTuple):
    plan_id: int
    requests: tuple


def test_a_phase_of_the_engine_is_its_full_steps_and_the_gaps_between_neighbours():
    def step(plan_id: int, start_us: int, num: int = 4, tokens: int = 1):
        requests = tuple(ScheduledRequest(f"r{row}", row, 40, tokens, (), True) for row in range(num))
        return Plan(plan_id, requests), start_us * 1000, (start_us + 900) * 1000, (start_us + 950) * 1000

    started = [step(i, 1000 * i) for i in range(8)]
    steps = [*started, step(8, 8000), step(9, 9000, tokens=2), step(10, 10000, num=3), step(11, 11000), step(12, 12050)]
    phase = measured_engine._phase_of(steps, 4)
    assert phase.steps_s == [pytest.approx(9e-4)] * 3
    assert phase.gaps_s == [pytest.approx(1.5e-4)]  # steps 8 and 11 are no neighbours
    assert phase.delays_s == [pytest.approx(5e-5)] * 3


# Of the whole machine's speed: (lane, attention?) alone, and (lane, attention?, beside attention?).
ALONE = {(0, 0): 0.6, (0, 1): 0.5, (1, 0): 0.8, (1, 1): 0.7}
BESIDE = {
    (0, 0, 0): 0.35, (0, 0, 1): 0.55, (0, 1, 0): 0.45, (0, 1, 1): 0.25,
    (1, 0, 0): 0.40, (1, 0, 1): 0.75, (1, 1, 0): 0.60, (1, 1, 1): 0.30,
}  # fmt: skip


def lanes_shown(nodes, programs: tuple[list[float], list[float]], until_s: float) -> tuple[list[dict], list[dict]]:
    """Two lanes that run their programs again and again, each node at the speed that BESIDE says of it and the other's
    node: a fluid simulation, as spans. programs: seconds of every node on the whole machine."""
    ran: tuple[list[dict], list[dict]] = ([{"spans": []}], [{"spans": []}])
    node, left_s, began_s, now_s = [0, 0], [programs[0][0], programs[1][0]], [0.0, 0.0], 0.0
    while now_s < until_s:
        is_attention = [nodes[node[lane]].kind == "attention" for lane in (0, 1)]
        speeds = [BESIDE[lane, is_attention[lane], is_attention[1 - lane]] for lane in (0, 1)]
        step_s = min(left_s[lane] / speeds[lane] for lane in (0, 1))
        now_s += step_s
        for lane in (0, 1):
            left_s[lane] -= step_s * speeds[lane]
            if left_s[lane] <= 1e-12:
                ran[lane][0]["spans"].append((node[lane], round(began_s[lane] * 1e9), round(now_s * 1e9)))
                node[lane] = (node[lane] + 1) % len(nodes)
                left_s[lane], began_s[lane] = programs[lane][node[lane]], now_s
    return ran


def test_speeds_of_two_lanes_are_those_of_a_machine_it_is_shown():
    """Each pair of classes has speeds of its own, and no node of the spans lies beside one class alone."""
    spec = ModelSpec("shown", 256, 3, 4, 2, 64, 512, 1000)
    nodes = spec.nodes()
    kinds = ([StepKind(0, 0, 1, 128), StepKind(0, 0, 1, 64, 900)], [StepKind(4, 20), StepKind(8, 400)])
    seconds = {}  # of the whole machine: (linear, attention) node
    for (one, other), ((a, b), (c, d)) in zip(kinds, (((5, 1), (2, 4)), ((0.9, 0.2), (0.3, 1.1))), strict=True):
        seconds[one], seconds[other] = (a * 1e-3, b * 1e-3), (c * 1e-3, d * 1e-3)
    whole_s = {kind: [of[node.kind == "attention"] for node in nodes] for kind, of in seconds.items()}
    runs = CutRuns()
    for lane, of in enumerate(kinds):
        for kind in of:
            spans, now_s = [], 0.0
            for index, node in enumerate(nodes):
                end_s = now_s + whole_s[kind][index] / ALONE[lane, node.kind == "attention"]
                spans.append((index, round(now_s * 1e9), round(end_s * 1e9)))
                now_s = end_s
            runs.alone[lane, kind].append({"spans": spans})
    for prompt in kinds[0]:
        for decode in kinds[1]:
            runs.beside[prompt, decode] = lanes_shown(nodes, (whole_s[prompt], whole_s[decode]), 2.0)
    found = speeds_at((0.5, 0.5), runs, whole_s, nodes)
    for lane in (0, 1):
        for group in (False, True):
            assert found.alone_speed(lane, group) == pytest.approx(ALONE[lane, group], rel=1e-3)
    for own in (False, True):
        for other in (False, True):
            stretches = found.pair_stretches(own, other)
            assert stretches[0] == pytest.approx(ALONE[0, own] / BESIDE[0, own, other], rel=0.12)
            assert stretches[1] == pytest.approx(ALONE[1, other] / BESIDE[1, other, own], rel=0.12)


def test_what_a_node_was_beside_is_found_span_by_span():
    nodes = ModelSpec("shown", 256, 1, 4, 2, 64, 512, 1000).nodes()
    attention = next(index for index, node in enumerate(nodes) if node.kind == "attention")
    linear = attention - 1
    others = [(linear, 0, 400), (attention, 500, 700), (linear, 900, 2000)]
    (seen,) = watch([(linear, 300, 1000)], others, nodes, [1.0] * len(nodes))
    assert seen.beside_s == pytest.approx((2e-7, 2e-7)) and seen.lone_s == pytest.approx(3e-7)


def test_lanes_that_never_met_keep_their_speed_and_a_stalled_node_does_not_count():
    nodes = ModelSpec("shown", 256, 1, 4, 2, 64, 512, 1000).nodes()
    assert fit_beside(watch([(3, 0, 100)], [], nodes, [1.0] * len(nodes)), 0.6) == (0.6, 0.6)
    met = watch([(2, 100 * i, 100 * i + 100) for i in range(40)], [(2, 0, 10_000)], nodes, [40e-9] * len(nodes))
    stalled = watch([(2, 0, 90_000)], [(2, 0, 90_000)], nodes, [40e-9] * len(nodes))
    assert fit_beside(met + stalled, 0.6)[0] == pytest.approx(0.4, rel=0.01)


def test_the_command_saves_a_file_that_predicts_this_machine(tmp_path, capsys):
    path, _ = write_tiny_model("llama", tmp_path, max_position_embeddings=2048)
    output = tmp_path / "machine.json"
    arguments = [str(path), "--output", str(output), "--runs", "3", "--seconds", "10", "--kv-dtype", "int8"]
    assert calibrate.main(arguments) == 0
    machine = Machine.load(output)
    assert machine.model == str(path) and machine.source.startswith("measured by partita calibrate")
    # A loaded machine measures badly; that it is of the right size at all is what can be asked in a test.
    assert 0 < machine.held_out_error < 1.0
    assert 0 < machine.step_overhead_s < 0.05 and 0 < machine.result_delay_s < 0.05
    assert 0 <= machine.host_s_per_step < 0.05 and 0 <= machine.host_s_per_request < 0.01
    assert 0 <= machine.overlap_gain <= 1
    # A cut in two where there are two cores, and of that each speed of each pair (LaneSpeeds refuses less).
    is_steady = machine.held_out_error <= calibrate.HELD_OUT_BAR
    assert bool(machine.lane_speeds) == (len(machine.rungs) > 1 and is_steady)
    for speeds in machine.lane_speeds:
        assert set(speeds.shares) <= set(machine.rungs) and sum(speeds.shares) == pytest.approx(1.0)
        for own in (False, True):
            for other in (False, True):
                assert all(1.0 <= stretch < 1000.0 for stretch in speeds.pair_stretches(own, other))
    assert NanoCosts(CostModel(SPEC, machine)).is_measured == bool(machine.lane_speeds)
    out = capsys.readouterr().out
    assert "held-out steps: median error" in out and str(output) in out
    assert StepKind(3, 150).num_pages(64) == 9
