"""EQ: whatever decides and however the chip is shared, the tokens are those of the plain path. Real weights.

The plain path is one lane, the default policy, a page for every token. Everything else here has too few pages, so that
requests are preempted and computed again in the middle of whatever else goes on.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from runtime import _native, engine_loader
from runtime.describe_model import spec_of
from runtime.model_runner import ModelRunner
from scheduler import policy as policies
from scheduler.arrangement import Arrangement
from scheduler.controllers import layered
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from tests.kit.engines import EngineUnderTest, engine_args, load, running_engine

LIMITS = {"max_model_len": 512, "page_size": 16, "max_num_seqs": 6, "max_num_batched_tokens": 128}
FEW_PAGES = 13  # 208 tokens, where six requests run that may grow to some 500
MAX_TOKENS = 20


# Tests register others, in whatever order they are collected.
SHIPPED = sorted(name for name in policies._presets if not name.startswith("chosen"))


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2", **LIMITS)


@pytest.fixture(scope="module")
def prompts(loaded):
    """Twelve of 3 to 120 tokens, of which some begin alike."""
    rng = random.Random(5)
    shared = [rng.randrange(3, loaded.config.vocab_size) for _ in range(40)]
    lengths = (3, 120, 17, 90, 33, 64, 8, 45, 100, 16, 70, 25)
    made = []
    for index, length in enumerate(lengths):
        own = [rng.randrange(3, loaded.config.vocab_size) for _ in range(length)]
        made.append((shared + own)[:length] if index % 3 == 1 else own)
    return made


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    with running_engine("smollm2", loaded=loaded, **LIMITS) as engine:
        tokens = engine.run(prompts, max_tokens=MAX_TOKENS)
        assert engine.engine.stats()["num_preemptions"] == 0, "the plain path had too few pages"
    return tokens


@pytest.fixture(autouse=True)
def many_layer_groups(monkeypatch):
    """Prompts here are short: by the authors' rule, which begins to cut at 512 tokens, none would go in parts."""
    monkeypatch.setattr(layered, "_TOKENS_OF_GROUPS", ((8, 1), (16, 2), (64, 4), (96, 8)))


@pytest.fixture(autouse=True)
def calibrated(loaded, monkeypatch):
    """Controllers that decide by predicted times get a machine to predict with, calibrated here or not."""
    model = CostModel(spec_of(loaded, ("bf16", "bf16")), Machine.load("cpu-2-cores"))
    monkeypatch.setattr(engine_loader, "calibrated_model", lambda _loaded, _args: model)


def check_equal(loaded, prompts, expected, **args) -> EngineUnderTest:
    few = replace(loaded, kv_plan=replace(loaded.kv_plan, num_pages=FEW_PAGES))
    with running_engine("smollm2", loaded=few, **{**LIMITS, **args}) as engine:
        ids = []
        for index, prompt in enumerate(prompts):
            ids.append(
                engine.submit(
                    prompt, max_tokens=MAX_TOKENS, ttft_ms=100.0 * (index % 4 + 1), tpot_ms=20.0 * (index % 3 + 1)
                )
            )
        for id, tokens in zip(ids, expected, strict=True):
            answer = engine.wait(id)
            assert answer.error is None
            assert answer.token_ids == tokens, id
    return engine


@pytest.mark.parametrize("name", SHIPPED)
def test_every_policy(loaded, prompts, expected, plans, name):
    engine = check_equal(loaded, prompts, expected, policy=name)
    lanes = policies.policy_named(name).lanes
    if name != "arbitrate":  # it may find that one lane is best throughout
        assert {plan.lane for plan in plans} == ({0} if lanes == "off" else {0, 1})
    if name in ("layered", "flowprefill"):
        assert any(plan.continues for plan in plans), "no prompt went in parts"
    if name != "nanoflow":  # which lets nobody in who would have to give way later
        assert engine.engine.stats()["num_preemptions"] > 0, "there were enough pages after all"


@pytest.mark.parametrize("lanes", ["off", "50:50", "100:100"])
@pytest.mark.parametrize("prefill", ["token", "layer", "operator"])
def test_lanes_and_granularities(loaded, prompts, expected, plans, lanes, prefill):
    check_equal(loaded, prompts, expected, lanes=lanes, prefill=prefill)
    assert {plan.lane for plan in plans} == ({0} if lanes == "off" else {0, 1})
    if lanes == "50:50" and len(_native.usable_core_ids()) > 1:
        assert {plan.share for plan in plans} >= {0.5, 1.0}, "the border never moved"
    if lanes == "off":
        assert any(plan.continues for plan in plans) == (prefill != "token")


@pytest.mark.parametrize("nano_batches", ["2", "3", "4"])
def test_nano_batches(loaded, prompts, expected, plans, nano_batches):
    check_equal(loaded, prompts, expected, nano_batches=nano_batches)
    cut = [plan for plan in plans if plan.nano is not None]
    assert cut and max(plan.nano.num_nano for plan in cut) == int(nano_batches)
    assert any(entry.lane == 1 for plan in cut for entry in plan.nano.ranges)


class _Restless:
    """Another arrangement at every boundary."""

    def __init__(self, config, cost_model):
        self._rungs = config.rungs
        self._rng = random.Random(11)
        self.num_moves = 0

    def arrange(self, outlook) -> Arrangement:
        self.num_moves += 1
        granularity = self._rng.choice(("token", "layer", "operator"))
        share = self._rng.choice((0.0, *self._rungs, *self._rungs))
        segment_s = self._rng.choice((0.0, 0.002, 0.02))
        if share == 0.0:
            return Arrangement(
                granularity=granularity, segment_s=segment_s, num_nano_batches=self._rng.choice((1, 2, 3)),
                token_budget=self._rng.choice((0, 16, 48)),
            )  # fmt: skip
        decode_share = self._rng.choice((1.0 - share, 1.0))
        return Arrangement(share, decode_share, granularity, token_budget=self._rng.choice((0, 16, 48)))

    def hear_first_token(self, request, now) -> None:
        pass

    def hear_finished(self, request, now) -> None:
        pass


def test_a_border_and_a_granularity_that_change_at_every_boundary(loaded, prompts, expected, plans, monkeypatch):
    made = []

    def controller(config, cost_model):
        made.append(_Restless(config, cost_model))
        return made[-1]

    preset = policies.Policy("restless", lanes="auto", nano_batches="auto", controller=controller)
    monkeypatch.setitem(policies._presets, "restless", preset)
    for _ in range(2):
        engine = check_equal(loaded, prompts, expected, policy="restless")
        assert engine.engine.stats()["num_preemptions"] > 0
        assert made[-1].num_moves > 20
    assert {plan.lane for plan in plans} == {0, 1}
    assert any(plan.continues for plan in plans) and any(plan.nano is not None for plan in plans)


@pytest.mark.parametrize("lanes", ["off", "50:50", "100:100"])
def test_whoever_ranks_first_pauses_a_run_between_two_operators(loaded, lanes, monkeypatch):
    """A long prompt is under way; a more urgent one comes, has its first token, and the long one goes on from its node."""
    cursors, finish = [], ModelRunner.finish

    def recording(runner, completion, wants_logprobs):
        found = finish(runner, completion, wants_logprobs)
        cursors.append(found[0].cursor)
        return found

    monkeypatch.setattr(ModelRunner, "finish", recording)
    rng = random.Random(2)
    long, urgent = ([rng.randrange(3, loaded.config.vocab_size) for _ in range(length)] for length in (440, 20))
    options = {**LIMITS, "max_num_batched_tokens": 512, "enable_prefix_caching": False}
    with running_engine("smollm2", loaded=loaded, **options) as engine:
        plain = engine.run([long, urgent], max_tokens=4)
    cursors.clear()
    with running_engine("smollm2", loaded=loaded, **options, lanes=lanes, prefill="operator") as engine:
        deadline_s = time.monotonic() + 60.0
        while not any(cursors) and time.monotonic() < deadline_s:
            first = engine.submit(long, max_tokens=4, priority=1)
            time.sleep(rng.uniform(0.01, 0.1))  # into the long one's run
            second = engine.submit(urgent, max_tokens=4, priority=0)
            assert engine.wait(second).token_ids == plain[1]
            assert engine.wait(first).token_ids == plain[0]
    assert any(0 < cursor < loaded.program.num_nodes for cursor in cursors if cursor is not None)


def test_requests_that_are_aborted_at_random_leave_the_others_alone(loaded, prompts, expected):
    few = replace(loaded, kv_plan=replace(loaded.kv_plan, num_pages=FEW_PAGES))
    rng = random.Random(3)
    for options in ({"lanes": "50:50", "prefill": "operator"}, {"prefill": "layer"}):
        with running_engine("smollm2", loaded=few, **LIMITS, **options) as engine:
            ids = [engine.submit(prompt, max_tokens=MAX_TOKENS) for prompt in prompts]
            gone = set(rng.sample(ids, 4))
            for id in sorted(gone):
                engine.wait_until(lambda: any(answer.num_deltas for answer in engine.answers.values()))
                engine.engine.abort(id)
            for id, tokens in zip(ids, expected, strict=True):
                answer = engine.wait(id)
                if id in gone:
                    assert answer.token_ids == tokens[: len(answer.token_ids)]
                else:
                    assert answer.token_ids == tokens


def test_an_engine_ends_with_runs_at_rest(loaded, prompts):
    """Shut down in the middle: nothing hangs, everybody hears of it."""
    for options in ({"lanes": "50:50", "prefill": "operator"}, {"prefill": "layer"}, {"nano_batches": "3"}):
        engine = EngineUnderTest(loaded, engine_args("smollm2", **LIMITS, **options))
        ids = [engine.submit(prompt, max_tokens=MAX_TOKENS) for prompt in prompts]
        engine.wait_until(lambda: any(answer.num_deltas for answer in engine.answers.values()))  # noqa: B023
        engine.engine.shutdown()
        assert all(engine.answers[id].finish_reason is not None for id in ids)
        engine.engine.check_integrity()
