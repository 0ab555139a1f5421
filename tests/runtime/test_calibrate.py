"""Calibration: the fit finds a machine it is shown, and the command saves a file that predicts this one."""

from __future__ import annotations

import random

import pytest

from runtime import calibrate
from runtime.fit_rates import fit_classes, fit_saturation, nonnegative_fit
from runtime.measured_steps import MeasuredStep, StepKind
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
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


def test_the_command_saves_a_file_that_predicts_this_machine(tmp_path, capsys):
    path, _ = write_tiny_model("llama", tmp_path, max_position_embeddings=2048)
    output = tmp_path / "machine.json"
    arguments = [str(path), "--output", str(output), "--runs", "3", "--seconds", "10", "--kv-dtype", "int8"]
    assert calibrate.main(arguments) == 0
    machine = Machine.load(output)
    assert machine.model == str(path) and machine.source.startswith("measured by partita calibrate")
    # A loaded machine measures badly; that it is of the right size at all is what can be asked in a test.
    assert 0 < machine.held_out_error < 1.0
    assert machine.step_overhead_s < 0.05 and machine.result_delay_s < 0.05
    out = capsys.readouterr().out
    assert "held-out steps: median error" in out and str(output) in out
    assert StepKind(3, 150).num_pages(64) == 9
