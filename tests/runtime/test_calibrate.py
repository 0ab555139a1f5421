"""Calibration: the fit finds a machine it is shown, and the command saves a file that predicts this one."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from runtime import calibrate, measured_engine
from runtime.fit_rates import fit_classes, fit_saturation, nonnegative_fit
from runtime.measured_engine import line_above_zero
from runtime.measured_steps import MeasuredStep, StepKind
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
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
    out = capsys.readouterr().out
    assert "held-out steps: median error" in out and str(output) in out
    assert StepKind(3, 150).num_pages(64) == 9
