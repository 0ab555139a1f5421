"""Nexus's greedy search against an exhaustive one, its limits, its hysteresis, its order of prompts."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.controllers.nexus import ALPHA, BETA, Nexus, adjust, shortest_then_aged
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.request import Request
from scheduler.simulator.setup import load_model
from scheduler.step_shape import StepShape

MACHINE = Machine.load("h100-sxm")
MODEL = CostModel(load_model("llama-3-8b", MACHINE), MACHINE)
RUNGS = tuple(rung / 16 for rung in range(1, 16))
NOTHING = StepShape(0, 0, 0)


def decodes(num: int, context: int) -> StepShape:
    return StepShape(num, num, num, num, num * context, window_decode_kv_tokens=num * context)


@given(st.integers(1, 40), st.data())
def test_greedy_is_exhaustive_and_asks_for_what_lies_between(num_places, data):
    start = data.draw(st.integers(0, num_places - 1))
    limit = data.draw(st.integers(-1, num_places - 1))  # the last place that keeps the slack; -1: none
    asked = []

    def keeps(place: int) -> bool:
        asked.append(place)
        return place <= limit

    found = adjust(num_places, start, keeps)
    exhaustive = max((place for place in range(num_places) if place <= limit), default=0)
    assert found == exhaustive
    assert len(asked) == len(set(asked)) <= abs(found - start) + 2


@pytest.mark.parametrize("seed", range(40))
def test_on_random_convex_models_it_finds_the_optimum_of_its_objective(seed):
    rng = random.Random(seed)
    a, b, c, d = (rng.uniform(0.1, 2.0) for _ in range(4))

    def decode_s(share: float) -> float:  # falls and flattens with its share
        return a / share + b

    def prefill_s(share: float) -> float:
        return c / share + d

    limit_s = BETA * decode_s(1.0) * rng.uniform(1.0, 4.0)
    place = adjust(len(RUNGS), rng.randrange(len(RUNGS)), lambda at: decode_s(1.0 - RUNGS[at]) <= limit_s)
    feasible = [share for share in RUNGS if decode_s(1.0 - share) <= limit_s] or [RUNGS[0]]
    assert RUNGS[place] == min(feasible, key=prefill_s)


def nexus(**fields) -> Nexus:
    return Nexus(SchedulerConfig(num_pages=64, rungs=RUNGS, lanes="auto", **fields), MODEL)


@pytest.mark.parametrize(("num", "context", "prompt"), [(8, 500, 512), (64, 1500, 2048), (200, 1500, 1024)])
def test_each_objective_keeps_the_other_sides_slack_on_the_cost_model(num, context, prompt):
    shape, prompts, controller = decodes(num, context), NOTHING.plus_chunk(0, prompt), nexus()
    place = controller.best_cut(shape, prompts, is_full=False)

    def slow_down(share: float) -> float:
        other = MODEL.step_cost(prompts, share).demand_bytes_per_s
        return MODEL.step_cost(shape, 1.0 - share).duration_s(other) / MODEL.step_s(shape)

    kept = [at for at, share in enumerate(RUNGS) if slow_down(share) <= BETA]
    most = max(kept)
    assert place == most
    place = controller.best_cut(shape, prompts, is_full=True)
    kept = [at for at, share in enumerate(RUNGS) if MODEL.step_s(prompts, share) <= ALPHA * MODEL.step_s(prompts)]
    assert place == min(min(kept), most)  # decodes never get less for being preferred


def test_a_search_from_where_the_border_is_asks_for_few_shares():
    controller, rng = nexus(), random.Random(3)
    num, context, prompt = 64, 1000, 1024
    for _ in range(300):  # a workload that drifts
        num = min(max(num + rng.randint(-2, 2), 1), 200)
        context = min(max(context + rng.randint(-10, 14), 100), 4000)
        prompt = min(max(prompt + rng.randint(-64, 64), 64), 2048)
        controller._place = controller.best_cut(decodes(num, context), NOTHING.plus_chunk(0, prompt), is_full=False)
    assert controller.num_evaluations / controller.num_searches <= 4


@given(
    st.lists(st.tuples(st.integers(1, 9000), st.floats(0, 1000)), min_size=2, max_size=20), st.floats(0, 1000),
    st.floats(1, 100),
)  # fmt: skip
def test_the_static_rank_orders_as_the_score_with_ages_at_any_time(drawn, arrived_s, later_s):
    requests = [Request(f"r{i}", range(length), 1, arrival_s=at) for i, (length, at) in enumerate(drawn)]
    now = 1000.0 + arrived_s + later_s

    def score(one: Request) -> float:  # the paper's: remaining - gamma x age
        return one.num_prompt_tokens - 15.0 * (now - one.arrival_s)

    ranked = sorted(range(len(requests)), key=lambda i: shortest_then_aged(requests[i], i))
    for first, second in pairwise(ranked):
        assert score(requests[first]) <= score(requests[second]) + 1e-6
