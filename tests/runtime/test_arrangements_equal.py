"""EQ where controllers decide: real weights, targets that cannot all be kept, prompts of up to 400 tokens that come one
after the other, and more places for the border than this machine has cores. Each test says what the controller did, by the
engine's own counters.
"""

from __future__ import annotations

import random
import time

import pytest

from runtime import engine_loader
from runtime.describe_model import spec_of
from scheduler.controllers import semi_pd
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from tests.kit.engines import load, running_engine

LIMITS = {"max_model_len": 512, "page_size": 16, "max_num_seqs": 6, "threads": 4}
LENGTHS = (30, 1, 400, 12, 90, 250, 5, 60)
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2", **LIMITS)


@pytest.fixture(scope="module")
def prompts(loaded):
    rng = random.Random(12)
    shared = [rng.randrange(3, loaded.config.vocab_size) for _ in range(50)]
    made = [[rng.randrange(3, loaded.config.vocab_size) for _ in range(length)] for length in LENGTHS]
    return [(shared + own)[: len(own)] if index % 2 == 0 else own for index, own in enumerate(made)]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    """The plain path: one lane, the default policy, a page for every token, chunks of 64."""
    with running_engine("smollm2", loaded=loaded, max_num_batched_tokens=64, **LIMITS) as engine:
        tokens = engine.run(prompts, max_tokens=MAX_TOKENS)
        stats = engine.engine.stats()
        assert stats["num_preemptions"] == 0 and stats["arrangements"] == {} and stats["num_moves"] == 0
    return tokens


@pytest.fixture(autouse=True)
def calibrated(loaded, monkeypatch):
    """A machine that takes some 5 ms for a decode and 0.2 s for the longest prompt, whatever this one does."""
    machine = Machine(
        "made up", "test", 4e10, {"default": ClassRates(((1, 5e10), (64, 4e11)), 4e10)}, rungs=(0.25, 0.5, 0.75, 1.0)
    )
    monkeypatch.setattr(
        engine_loader, "calibrated_model", lambda _loaded, args: CostModel(spec_of(loaded, args.kv_codecs), machine)
    )


def check_equal(loaded, prompts, expected, *, num_rounds: int = 1, targets=None, **args) -> dict:
    """The engine's stats after the last request. ``targets``: of every request; None: of several kinds."""
    rng = random.Random(6)
    with running_engine("smollm2", loaded=loaded, **LIMITS, **args) as engine:
        for _ in range(num_rounds):
            ids = []
            for index, prompt in enumerate(prompts):
                mixed = {"ttft_ms": 60.0 * (1 + index % 3), "tpot_ms": 15.0 * (1 + index % 2), "priority": index % 2}
                ids.append(engine.submit(prompt, max_tokens=MAX_TOKENS, **(targets or mixed)))
                time.sleep(rng.uniform(0.0, 0.06))
            for index, id in enumerate(ids):
                answer = engine.wait(id)
                assert answer.error is None and answer.token_ids == expected[index], (index, answer.error)
        return engine.engine.stats()


@pytest.mark.parametrize("policy, targets", [
    # semi-PD moves when one side fails its targets and the other does not.
    ("semi-pd", {"ttft_ms": 1e5, "tpot_ms": 0.5}), ("semi-pd", {"ttft_ms": 1.0, "tpot_ms": 1e4}),
    ("nexus", None),
])  # fmt: skip
def test_a_controller_moves_the_border(loaded, prompts, expected, plans, policy, targets, monkeypatch):
    monkeypatch.setattr(semi_pd, "WINDOW", 40)  # decisions between two looks: these runs are short
    stats = check_equal(loaded, prompts, expected, policy=policy, targets=targets, num_rounds=3)
    assert stats["num_moves"] > 0 and len(stats["arrangements"]) > 1, stats["arrangements"]
    if policy == "semi-pd":
        shares = {(plan.lane, plan.share) for plan in plans if plan.share < 1.0}
        assert len(shares) > 2, "the lanes never had other parts of the chip than at first"
    assert {plan.lane for plan in plans} == {0, 1}


def test_arbitration_goes_between_one_lane_and_others(loaded, prompts, expected):
    stats = check_equal(loaded, prompts, expected, policy="arbitrate", num_rounds=2)
    assert len(stats["arrangements"]) > 1, stats["arrangements"]
    # The flag alone is the same rule.
    assert len(check_equal(loaded, prompts, expected, lanes="auto")["arrangements"]) > 1


@pytest.mark.parametrize("lanes", ["off", "50:50", "100:100"])
def test_flow_order_pauses_prompts_on_any_lanes(loaded, prompts, expected, lanes):
    stats, num_rounds = {"num_pauses": 0}, 0
    while not stats["num_pauses"] and num_rounds < 4:  # it takes an arrival in the middle of a long prompt
        stats = check_equal(loaded, prompts, expected, policy="flowprefill", lanes=lanes, num_rounds=2)
        num_rounds += 1
    assert stats["num_pauses"] > 0
