"""FastGen's acceptance: equal answers are tested on the engine (tests/runtime/test_fastgen_engine.py); here the trace, the
simulated comparison and the budget that follows the tightest target. Each claim fails with its mechanism switched off.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from scheduler import SchedulerConfig
from scheduler.composed_pages import ComposedPages
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator import ModelCosts, Report, Simulation
from scheduler.simulator.arrivals import renewal
from scheduler.simulator.report import percentile
from scheduler.simulator.setup import load_model, scheduler_config
from scheduler.simulator.simulation import ServiceTargets
from scheduler.simulator.traces import TraceRequest
from scheduler.splitfuse import most_tiles
from scheduler.step_shape import shape_of

H100 = Machine.load("h100-sxm")
LLAMA = load_model("llama-3-8b")
MODEL = CostModel(LLAMA, H100)
LONG_PROMPTS = [(6000, 60), (3000, 120), (200, 200), (400, 150)]


def config(**fields) -> SchedulerConfig:
    return scheduler_config(LLAMA, H100, longest=8192, enable_prefix_caching=False, **fields)


def backlog(policy: str, budget: int, **fields):
    """Plans of a run in which prompts wait from the first step to nearly the last."""
    requests = [TraceRequest(0.0, 37 + 131 * i % 900, 3 + i % 11) for i in range(60)]
    run_config = config(policy=policy, max_num_batched_tokens=budget, max_plans_in_flight=1, **fields)
    return Simulation(run_config, ModelCosts(MODEL), requests, keep_plans=True).run().plans


def tokens_before_the_last_admission(budget: int) -> set[int]:
    plans = backlog("fastgen", budget)
    last = max(index for index, plan in enumerate(plans) if plan.admissions)
    return {plan.num_tokens for plan in plans[:last]}


@pytest.mark.parametrize("budget", [64, 256, 1000])
def test_while_prompts_wait_every_step_has_exactly_the_budget(budget, monkeypatch):
    assert tokens_before_the_last_admission(budget) == {budget}
    # Switched off: a prompt that does not fit what is left waits for a step of its own instead of being cut.
    admit = ComposedPages.admit

    def admit_whole(self, request, composition, is_idle):
        fits = request.num_known_tokens <= composition.budget or not composition.shares
        return fits and admit(self, request, composition, is_idle)

    monkeypatch.setattr(ComposedPages, "admit", admit_whole)
    assert len(tokens_before_the_last_admission(budget)) > 1


def test_what_binds_beside_the_budget_is_the_number_of_requests():
    plans = backlog("fastgen", 256, max_num_seqs=4)
    last = max(index for index, plan in enumerate(plans) if plan.admissions)
    for plan in plans[:last]:
        assert plan.num_tokens == 256 or len(plan.requests) == 4


@pytest.mark.parametrize("cv", [1.0, 3.0])  # Poisson, and bursts
def test_steps_even_out_and_the_tail_between_tokens_falls_at_equal_throughput(cv):
    requests = renewal(9.0, 400, cv=cv, lengths=LONG_PROMPTS, seed=11)

    def run(policy: str):
        # The baseline takes whole prompts: its limit holds the longest; FastGen's is where the machine saturates.
        budget = 8192 if policy == "prefill-first" else 512
        run_config = config(policy=policy, max_num_batched_tokens=budget)
        return Report(Simulation(run_config, ModelCosts(MODEL), requests).run())

    fastgen, whole = run("fastgen"), run("prefill-first")
    ours, theirs = fastgen.to_json(), whole.to_json()
    assert ours["output_throughput"] == pytest.approx(theirs["output_throughput"], rel=0.05)
    assert ours["itl_s_p99"] <= 0.5 * theirs["itl_s_p99"]
    assert statistics.pvariance(fastgen.result.step_s) <= 0.5 * statistics.pvariance(whole.result.step_s)


def decode_steps_beside_chunks(plans):
    """(predicted seconds, prompt tokens) of the steps that hold both."""
    steps = []
    for plan in plans:
        shape = shape_of(plan.requests)
        if 0 < shape.num_decodes < shape.num_requests:
            steps.append((MODEL.step_s(shape), shape.num_chunk_tokens))
    return steps


def test_the_budget_keeps_the_tightest_target_and_shrinks_as_histories_grow():
    requests = [TraceRequest(0.0, 300, 400) for _ in range(30)]
    requests += [TraceRequest(0.2 + 0.4 * i, 7000, 5) for i in range(12)]
    targets = ServiceTargets(tpot_s=0.030)

    def run(model: CostModel | None):
        result = Simulation(
            config(policy="fastgen", max_num_batched_tokens=4096), ModelCosts(MODEL), requests, targets=targets,
            cost_model=model, keep_plans=True,
        ).run()  # fmt: skip
        return result.plans, Report(result)

    kept_plans, report = run(MODEL)
    kept = decode_steps_beside_chunks(kept_plans)
    assert len(kept) > 20 and max(seconds for seconds, _ in kept) <= 0.030
    assert percentile(report.series["itl"], 99) <= 0.030
    # It uses what the target leaves: full chunks come within a tile of it.
    assert statistics.median(seconds for seconds, _ in kept) > 0.8 * 0.030
    tokens_at: dict[int, list[int]] = {}
    for plan in kept_plans:
        chunk = max(plan.requests, key=lambda scheduled: scheduled.num_tokens)
        if chunk.num_tokens > 16 and len(plan.requests) > 1:
            tokens_at.setdefault(chunk.start // 2000, []).append(chunk.num_tokens)
    assert statistics.fmean(tokens_at[2]) < statistics.fmean(tokens_at[0])
    # Switched off, no model to ask: the fixed limit breaks the target.
    broken_plans, broken = run(None)
    assert max(seconds for seconds, _ in decode_steps_beside_chunks(broken_plans)) > 2 * 0.030
    assert percentile(broken.series["itl"], 99) > 2 * 0.030


def test_without_targets_or_prompts_nothing_is_held_back():
    requests = [TraceRequest(0.0, 3000, 20), TraceRequest(0.0, 3000, 20)]
    result = Simulation(
        config(policy="fastgen", max_num_batched_tokens=2048), ModelCosts(MODEL), requests, cost_model=MODEL,
        keep_plans=True,
    ).run()  # fmt: skip
    assert result.plans[0].num_tokens == 2048


def test_a_hopeless_target_still_lets_prompts_go_on():
    requests = [TraceRequest(0.0, 300, 50) for _ in range(20)] + [TraceRequest(0.05, 5000, 2)]
    result = Simulation(
        config(policy="fastgen", max_num_batched_tokens=2048), ModelCosts(MODEL), requests,
        targets=ServiceTargets(tpot_s=0.001), cost_model=MODEL, keep_plans=True,
    ).run()  # fmt: skip
    chunks = [tokens for _, tokens in decode_steps_beside_chunks(result.plans)]
    assert min(chunks[:-1]) >= MODEL.saturating_tokens(2048) // 2
    assert all(record.finish_reason == "length" for record in result.records.values())


def test_saturation_is_where_throughput_levels_off():
    knee = MODEL.saturating_tokens(4096)
    slow = CostModel(LLAMA, replace(H100, step_overhead_s=0.05))
    assert 64 <= knee <= 1024 < slow.saturating_tokens(4096)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.6, 3.0])
def test_the_search_for_a_budget_equals_trying_all(power):
    for most in (0, 1, 2, 7, 128, 500):
        for limit_s in (0.5, 1.0, 3.0, 40.0, 777.0, 1e9):
            asked = []

            def step_s(tiles, asked=asked):
                asked.append(tiles)
                return 1.0 + tiles**power

            wanted = max([tiles for tiles in range(1, most + 1) if 1.0 + tiles**power <= limit_s], default=0)
            assert most_tiles(step_s, most, limit_s) == wanted
            assert len(asked) <= 15
            if power == 1.0:
                assert len(asked) <= 5
