"""The rule that chooses among ways to share the chip: never worse than one of them, and why (simulated)."""

from dataclasses import replace
from functools import cache

import pytest

from scheduler.controllers import arbitration, candidates, goodput_order
from scheduler.controllers.arbitration import Arbitration
from scheduler.controllers.candidates import Candidate, Prediction
from scheduler.cost_model import CostModel
from scheduler.simulator.costs import ModelCosts
from scheduler.simulator.setup import scheduler_config
from scheduler.simulator.simulation import ServiceTargets, Simulation
from tests.scheduler.policy_runs import MACHINE, SPEC, arrivals, record, run, simulation

TARGETS = ServiceTargets(ttft_s=1.0, tpot_s=0.025)
CORNERS = ("default", "fastgen", "layered", "flowprefill", "semi-pd", "nexus", "two-lanes", "nanoflow")


def requests_at(rate: float, seconds: float = 15.0, seed: int = 2):
    """Prompts of mixed length, answers of a few hundred tokens: about what a chat service sees."""

    def lengths(rng):
        prompt = min(int(rng.lognormvariate(6.6, 1.0)) + 10, 7000)
        return prompt, min(int(rng.lognormvariate(5.2, 0.7)) + 5, 900)

    return arrivals(rate, seconds, lengths, seed=seed)


@cache
def num_good(policy: str, rate: float, contention: float = 1.0) -> int:
    executing = replace(MACHINE, contention=MACHINE.contention * contention)
    config = scheduler_config(SPEC, MACHINE, policy=policy, enable_prefix_caching=False)
    costs = ModelCosts(CostModel(SPEC, executing), error=0.08, seed=1)
    one = Simulation(
        config, costs, requests_at(rate), targets=TARGETS, cost_model=CostModel(SPEC, MACHINE)
    )  # fmt: skip
    return one.run().stats.goodput.num_good_tokens


@pytest.mark.parametrize("contention", [0.75, 1.25])
@pytest.mark.parametrize("rate", [6, 20, 36])
def test_the_rule_is_within_five_percent_of_every_corner_with_a_wrong_model(rate, contention):
    rule = num_good("arbitrate", rate, contention)
    for corner in CORNERS:
        assert rule >= 0.95 * num_good(corner, rate, contention), corner


def restricted(kinds: tuple[str, ...], rate: float, **options):
    one = simulation("arbitrate", requests_at(rate), TARGETS)
    scheduler = one.scheduler
    recorder = record(one, Arbitration(scheduler.config, scheduler.cost_model, kinds=kinds, **options))
    return one.run(), recorder


def test_the_choice_is_what_does_it():
    """Switched off: one kind of candidate alone loses somewhere."""
    chosen = run("arbitrate", requests_at(30), TARGETS).stats.goodput.num_good_tokens
    mixed, recorder = restricted(("mix",), 30)
    assert not any(arrangement.is_spatial for _, _, arrangement in recorder.decisions)
    assert chosen > 1.05 * mixed.stats.goodput.num_good_tokens
    turns, _ = restricted(("turns",), 30)
    assert chosen > 1.05 * turns.stats.goodput.num_good_tokens
    overlap, _ = restricted(("overlap",), 30)
    assert chosen > 1.05 * overlap.stats.goodput.num_good_tokens


def test_both_one_lane_and_two_are_chosen_as_the_load_asks_for_it():
    low, high = (run("arbitrate", requests_at(rate), TARGETS).stats.arrangements for rate in (4, 30))

    def part_of_two_lanes(counts) -> float:
        return sum(number for name, number in counts.items() if ":" in name) / sum(counts.values())

    assert part_of_two_lanes(low) < 0.1 < 0.4 < part_of_two_lanes(high)


@pytest.mark.parametrize("hysteresis, moves", [(None, False), (0.0, True)])
def test_what_is_there_stays_unless_it_is_clearly_beaten(hysteresis, moves):
    options = {} if hysteresis is None else {"hysteresis": hysteresis}
    rule = Arbitration(scheduler_config(SPEC, MACHINE, policy="arbitrate"), CostModel(SPEC, MACHINE), **options)

    def chosen(mix_rate: float, split_rate: float) -> str:
        mix, split = Candidate("mix", 0.0, 1.0, mix_rate), Candidate("split", 0.5, 0.5, split_rate)
        return rule._choose(Prediction((mix, split), 0.1)).kind

    assert chosen(1000.0, 900.0) == "mix"
    assert chosen(1000.0, 1040.0) == ("split" if moves else "mix")
    assert chosen(1000.0, 1060.0) == "split"
    assert chosen(1040.0, 1000.0) == ("mix" if moves else "split")


def test_targets_are_planned_with_a_margin(monkeypatch):
    def tpot_kept() -> float:
        goodput = run("arbitrate", requests_at(60, 20.0), TARGETS).stats.goodput
        return goodput.num_tpot_kept / goodput.num_tpot_targets

    kept = tpot_kept()
    for module in (arbitration, candidates):
        monkeypatch.setattr(module, "MARGIN", 1.0)
    assert kept > 0.95 and tpot_kept() < kept - 0.1


def test_when_prompts_are_too_many_long_ones_stand_back(monkeypatch):
    def lengths(rng):
        return min(int(rng.lognormvariate(6.6, 1.0)) + 10, 7000), 8

    requests = arrivals(120, 12, lengths, seed=4)

    def good() -> int:
        return run("arbitrate", requests, ServiceTargets(ttft_s=1.0)).stats.goodput.num_good

    weighed = good()
    monkeypatch.setattr(goodput_order, "WORK_WEIGHT", 0.0)
    assert weighed > 1.2 * good()


def test_nobody_to_share_with_means_the_whole_chip():
    result, recorder = restricted(arbitration.KINDS, 1.0)
    reasons = {arrangement.reason for _, _, arrangement in recorder.decisions}
    assert any("no prompt" in reason for reason in reasons) and any("no decode" in reason for reason in reasons)
    assert all(not arrangement.is_spatial for _, _, arrangement in recorder.decisions if "no " in arrangement.reason)
    assert result.stats.goodput.num_good == len(result.records)


def test_without_a_calibrated_machine_there_is_one_lane_and_the_policys_budget():
    config = scheduler_config(SPEC, MACHINE, policy="arbitrate", enable_prefix_caching=False)
    one = Simulation(config, ModelCosts(CostModel(SPEC, MACHINE)), requests_at(5, 5), targets=TARGETS)
    recorder = record(one)
    one.run()
    decided = {(arrangement.is_spatial, arrangement.token_budget) for _, _, arrangement in recorder.decisions}
    assert decided == {(False, 0)}
    assert "no calibrated machine" in recorder.decisions[0][2].reason


def test_equal_runs_decide_equally():
    first, second = (restricted(arbitration.KINDS, 20)[1].decisions for _ in range(2))
    assert first == second
