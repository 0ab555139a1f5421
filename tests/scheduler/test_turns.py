"""Prompts in parts beside decodes, where an operator takes milliseconds: two cores and SmolLM2, simulated."""

import random

import pytest

from scheduler.controllers import arbitration
from scheduler.cost_model import CostModel
from scheduler.lane_planner import MOST_TURNS_WAITED, LanePlanner
from scheduler.machine import Machine
from scheduler.outlook import Decodes
from scheduler.prefill_run import PrefillRun
from scheduler.request import Request
from scheduler.simulator.costs import ModelCosts
from scheduler.simulator.setup import default_model, load_model, scheduler_config
from scheduler.simulator.simulation import Simulation, SimulationResult
from scheduler.step_shape import StepShape
from tests.scheduler.policy_runs import ttft_s

MACHINE = Machine.load("cpu-2-cores")
SPEC = load_model(default_model(MACHINE), MACHINE)


def simulate(policy: str, requests: list[Request], **fields) -> tuple[Simulation, SimulationResult]:
    fields = {"max_num_batched_tokens": 3072, "enable_prefix_caching": False, "kv_bytes": 1 << 30, **fields}
    model = CostModel(SPEC, MACHINE)
    one = Simulation(
        scheduler_config(SPEC, MACHINE, policy=policy, **fields), ModelCosts(model), cost_model=model, keep_plans=True
    )
    for request in requests:
        one.add(round(request.arrival_s * 1e9), request)
    return one, one.run()


def mix(rate: float, long_share: float, num: int, seed: int, *, short, long) -> list[Request]:
    """short, long: (prompt tokens, generated tokens, TTFT target, TPOT target), the numbers of tokens as (least, most)."""
    rng, now, requests = random.Random(seed), 0.0, []
    for index in range(num):
        now += rng.expovariate(rate)
        prompt, generated, ttft_s, tpot_s = long if rng.random() < long_share else short
        requests.append(Request(
            f"r{index}", range(rng.randint(*prompt)), rng.randint(*generated), arrival_s=now, namespace=f"r{index}",
            ttft_s=ttft_s, tpot_s=tpot_s,
        ))  # fmt: skip
    return requests


def hurried(seed: int, rate: float = 6.0, long_share: float = 0.25, num: int = 60) -> list[Request]:
    """Short prompts in a hurry beside long ones; answers are over in no time, and nobody has a TPOT target."""
    return mix(rate, long_share, num, seed, short=((30, 150), (8, 8), 0.16, None),
               long=((2000, 3000), (8, 8), 20.0, None))  # fmt: skip


def chats(seed: int) -> list[Request]:
    return mix(2.0, 0.2, 120, seed, short=((30, 200), (30, 120), 0.4, 0.025),
               long=((1000, 3000), (10, 50), 20.0, 0.025))  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_a_prompt_in_a_hurry_begins_before_long_ones_that_have_begun(seed):
    """Decodes come and go: what a long prompt has begun must not have to end first."""

    def num_in_time(policy: str) -> int:
        return simulate(policy, hurried(seed))[1].stats.goodput.num_ttft_kept

    assert num_in_time("arbitrate") >= 0.95 * num_in_time("flowprefill") > 1.5 * num_in_time("prefill-first")


def test_an_operator_that_takes_longer_than_decodes_can_wait_is_put_off(monkeypatch):
    def num_tpot_missed() -> int:
        found = [simulate("arbitrate", chats(seed))[1].stats.goodput for seed in (0, 1)]
        return sum(each.num_tpot_targets - each.num_tpot_kept for each in found)

    assert num_tpot_missed() == 0
    monkeypatch.setattr(LanePlanner, "_has_to_wait", lambda *_: False)
    assert num_tpot_missed() > 0


def test_decodes_that_hardly_keep_their_target_do_not_keep_prompts_out_for_ever(monkeypatch):
    """There is never credit for what a prompt needs: an operator goes after so many turns, a chunk after so many steps."""
    scheduler = simulate("arbitrate", [])[0].scheduler
    planner, rule, config = scheduler._planner, scheduler._controller, scheduler.config
    monkeypatch.setattr(planner._outlook, "has_decode", lambda: True)
    run = PrefillRun(1, [Request("r", range(2000), 8)], (), StepShape(0, 0, 0).plus_chunk(0, 2000), [], 0.0,
                     (config.num_nodes,))  # fmt: skip
    run.cursor = 3
    assert not planner._has_to_wait(run, 1.0)
    waits = [planner._has_to_wait(run, 1e-6) for _ in range(MOST_TURNS_WAITED + 1)]
    assert waits == [True] * MOST_TURNS_WAITED + [False]

    decodes = Decodes(StepShape(8, 8, 8, 8, 800, window_decode_kv_tokens=800), 0.01)
    monkeypatch.setattr(planner._outlook, "first_prefill", lambda lane: Request("r", range(2000), 8))
    budgets = [rule._budget(planner._outlook, decodes, 1e-6, None) for _ in range(arbitration.MOST_STEPS_HELD + 2)]
    assert budgets[:-2] == [8] * arbitration.MOST_STEPS_HELD
    assert budgets[-2] > 8 and budgets[-1] == 8


def test_the_last_frame_is_kept_for_short_prompts(monkeypatch):
    """Long prompts that come later may rank before others at rest: where each takes a frame, none is left for the short."""

    def num_short_in_time() -> int:
        requests = [
            Request(f"long{n}", range(2400), 8, arrival_s=0.3 * n, namespace=f"long{n}", ttft_s=20.0 - 3.0 * n)
            for n in range(3)
        ]
        requests += [
            Request(f"r{n}", range(100), 8, arrival_s=0.7 + 0.1 * n, namespace=f"r{n}", ttft_s=0.2) for n in range(10)
        ]
        one, result = simulate("flowprefill", requests)
        assert one.scheduler.config.max_resting_runs == 3
        assert all(result.records[f"long{n}"].finish_reason == "length" for n in range(3))
        return sum(ttft_s(result.records[f"r{n}"]) <= 0.2 for n in range(10))

    assert num_short_in_time() == 10
    monkeypatch.setattr(
        LanePlanner, "_has_frame_for", lambda planner, _: len(planner._runs) < planner._config.max_resting_runs
    )
    assert num_short_in_time() < 5


def test_a_run_has_the_whole_chip_when_the_decodes_beside_it_are_over(monkeypatch):
    """An answer of 8 tokens ends early in the 2 s of a long prompt's run on half of the chip."""

    def run() -> tuple[float, list[float]]:
        requests = [
            Request("short", range(100), 8, namespace="short"),
            Request("long", range(2500), 8, arrival_s=0.01, namespace="long"),
        ]
        _, result = simulate("default", requests, lanes="50:50", prefill="operator")
        parts = [plan for plan in result.plans if plan.requests[0].request_id == "long" and plan.num_tokens > 1]
        return ttft_s(result.records["long"]), [plan.share for plan in parts]

    long_s, shares = run()
    assert shares[0] < 1.0 and shares[-1] == 1.0
    monkeypatch.setattr(LanePlanner, "_gains_by_whole_chip", lambda *_: False)
    without_s, shares = run()
    assert max(shares) < 1.0
    assert long_s < 0.7 * without_s
