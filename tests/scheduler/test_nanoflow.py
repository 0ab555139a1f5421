"""Policy `nanoflow` in the simulator, against itself without its mechanisms (NanoFlow, arXiv 2408.12757)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch_check import check_nano_plan
from scheduler.simulator import ModelCosts, Simulation
from scheduler.simulator.costs import ScaledCost
from scheduler.simulator.lanes import FinishedStep
from scheduler.simulator.setup import load_model, scheduler_config
from scheduler.simulator.simulation import SimulationResult
from scheduler.simulator.traces import TraceRequest

SPEC = ModelSpec("8 of 32 layers", 4096, 8, 32, 8, 128, 14336, 32000, device="gpu", inner_bytes=2)
# Half of it draws the whole bandwidth and computes at nine tenths of the rate.
OVERLAPPING = Machine(
    "overlap", "made up for a test", 2.5e12, {"default": ClassRates(((1, 1e13), (128, 5e14)), 2.5e12, 2e-6)},
    saturation=Saturation(compute_share=0.5, decay=0.2, memory_share=0.5), rungs=(0.25, 0.5, 0.75, 1.0),
)  # fmt: skip
# Shares are worth what they are: nothing is gained by running side by side.
PROPORTIONAL = replace(OVERLAPPING, saturation=Saturation())
# A backlog of long prompts: steps are full, three prompt tokens to a decode
BACKLOG = [TraceRequest(0.0, 900 + 97 * i % 700, 250 + 61 * i % 150) for i in range(260)]


def config(**fields) -> SchedulerConfig:
    values = {
        "num_pages": 6000, "max_num_seqs": 192, "max_num_batched_tokens": 768, "max_model_len": 4096,
        "num_nodes": len(SPEC.nodes()), "policy": "nanoflow",
    }  # fmt: skip
    return SchedulerConfig(**{**values, **fields})


class CutIsSlower(ModelCosts):
    """Steps in nano-batches take so many times what the model says."""

    def __init__(self, model: CostModel, factor: float) -> None:
        super().__init__(model)
        self._factor = factor

    def step_cost(self, plan):
        cost = super().step_cost(plan)
        return cost if plan.nano is None else ScaledCost(cost, self._factor)


def run(machine: Machine, *, cut_factor: float = 1.0, requests=BACKLOG, **fields) -> tuple[SimulationResult, list]:
    """The result and its steps. The scheduler hears what steps took, as it does from the engine."""
    model, steps = CostModel(SPEC, machine), []
    costs = CutIsSlower(model, cut_factor)
    simulation = Simulation(config(**fields), costs, requests, cost_model=model, observe=steps.append)
    return simulation.run(), steps


def num_cut(steps: list[FinishedStep]) -> int:
    return sum(step.plan.nano is not None for step in steps)


def test_overlap_shortens_the_run_and_the_ablation_does_not():
    whole, whole_steps = run(OVERLAPPING, nano_batches="off")
    assert num_cut(whole_steps) == 0
    cut, cut_steps = run(OVERLAPPING)
    assert cut.duration_s < 0.93 * whole.duration_s
    assert num_cut(cut_steps) > 0.3 * len(cut_steps)
    # The same steps, made of the same tokens: only how they run differs.
    assert cut.num_step_tokens == whole.num_step_tokens
    assert {name: record.num_tokens for name, record in cut.records.items()} == {
        name: record.num_tokens for name, record in whole.records.items()
    }
    # Compute that has to be done is a bound that no overlap goes below.
    assert cut.duration_s > cut.compute_s
    checked = [step.plan for step in cut_steps if step.plan.nano is not None][::20]
    for plan in checked:
        check_nano_plan(plan, SPEC)


def test_where_shares_are_worth_what_they_are_no_step_is_cut():
    result, steps = run(PROPORTIONAL)
    assert num_cut(steps) == 0
    assert result.duration_s == run(PROPORTIONAL, nano_batches="off")[0].duration_s


def test_the_engine_measures_and_stops_using_what_does_not_pay():
    """The model says that it pays; measured, cut steps take twice as long."""
    believed_steps = run(OVERLAPPING)[1]
    assert num_cut(believed_steps) > 0.3 * len(believed_steps)
    declined_steps = run(OVERLAPPING, cut_factor=2.0)[1]
    assert 0 < num_cut(declined_steps) < 0.1 * len(declined_steps)  # those of the trials


def test_a_number_that_is_asked_for_is_used_though_it_loses():
    requests = BACKLOG[:40]
    whole, _ = run(PROPORTIONAL, requests=requests, nano_batches="off")
    for num_nano in ("2", "4"):
        cut, steps = run(PROPORTIONAL, requests=requests, nano_batches=num_nano)
        assert num_cut(steps) > 0.9 * len(steps)
        assert max(step.plan.nano.num_nano for step in steps if step.plan.nano is not None) == int(num_nano)
        assert cut.duration_s > whole.duration_s


def test_admission_by_predicted_peak_never_gives_way_where_admission_by_free_pages_does():
    """KV for a quarter of what is asked for; answers much longer than prompts."""
    requests = [TraceRequest(0.0, 100, 600) for _ in range(60)]
    fields = {"num_pages": 160, "max_model_len": 1024}
    by_peak, _ = run(OVERLAPPING, requests=requests, nano_batches="off", **fields)
    by_pages, _ = run(OVERLAPPING, requests=requests, policy="default", **fields)
    assert by_pages.stats.num_preemptions > 20
    assert by_peak.stats.num_preemptions < by_pages.stats.num_preemptions / 4
    # Tokens are not computed twice, and the KV is nearly as full.
    assert by_peak.num_step_tokens < by_pages.num_step_tokens
    assert by_peak.kv_usage_peak > 0.7


@pytest.mark.parametrize("machine_name", ["h100-sxm"])
def test_by_the_numbers_of_a_public_data_sheet_it_pays_on_full_steps(machine_name):
    """A simulation of a machine that nobody measured: no more than what the cost model believes of it."""
    machine = Machine.load(machine_name)
    spec = load_model("llama-3-8b", machine)
    model, durations = CostModel(spec, machine), {}
    for nano_batches in ("off", "auto"):
        limits = scheduler_config(
            spec, machine, longest=4096, max_num_batched_tokens=1024, policy="nanoflow", nano_batches=nano_batches
        )
        requests = [TraceRequest(0.0, 600 + 971 * i % 2600, 150 + 613 * i % 600) for i in range(500)]
        durations[nano_batches] = Simulation(limits, ModelCosts(model), requests, cost_model=model).run().duration_s
    assert durations["auto"] < 0.97 * durations["off"]
