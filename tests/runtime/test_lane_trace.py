"""TRACE: what the step trace of a real engine with real weights shows of lanes, a moving border, parts and pauses."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from runtime.model_runner import ModelRunner
from runtime.step_trace import StepTrace
from scheduler import policy as policies
from scheduler.arrangement import DECODE_LANE, PREFILL_LANE, Arrangement
from scheduler.controllers import layered
from scheduler.step import LanePlan, PausePlan
from tests.kit.engines import load, running_engine

LIMITS = {"max_model_len": 512, "page_size": 16, "max_num_seqs": 6, "max_num_batched_tokens": 512}
# Threads that take turns on the cores there are, so that the border has somewhere to move to.
NUM_THREADS = 4


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2", threads=NUM_THREADS, **LIMITS)


@pytest.fixture(scope="module")
def prompts(loaded):
    rng = random.Random(8)
    return [[rng.randrange(3, loaded.config.vocab_size) for _ in range(length)] for length in (20, 9, 300)]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    with running_engine("smollm2", loaded=loaded, threads=NUM_THREADS, **LIMITS) as engine:
        return engine.run(prompts, max_tokens=40)


class Steps:
    """A trace's steps of each lane in order of time, each with its nodes."""

    def __init__(self, trace: StepTrace):
        self.nodes: dict[int, list[dict]] = {}
        by_lane: dict[int, list[dict]] = {}
        for event in trace.events():
            event["end"] = event["ts"] + event["dur"]
            if event["cat"] == "node":
                self.nodes.setdefault(event["args"]["plan"], []).append(event)
            else:
                by_lane.setdefault(event["tid"], []).append(event)
        self.decodes = sorted(by_lane.get(DECODE_LANE, ()), key=lambda step: step["ts"])
        self.prefills = sorted(by_lane.get(PREFILL_LANE, ()), key=lambda step: step["ts"])

    def nodes_of(self, step: dict) -> list[dict]:
        return self.nodes.get(step["args"]["plan"], [])


def run_beside_decodes(loaded, prompts, expected, **args) -> tuple[Steps, dict, object]:
    """Two requests decode, then a long prompt comes. (steps, stats, lane bank)."""
    trace = StepTrace(loaded.program.node_names)
    options = {**LIMITS, "threads": NUM_THREADS, **args}
    with running_engine("smollm2", loaded=loaded, trace=trace, **options) as engine:
        runner, launch, ids = engine.engine._runner, engine.engine._runner.launch, []

        def launch_and_submit(plan):
            launch(plan)
            if len(ids) == 2 and all(engine.answers[id].num_deltas > 1 for id in ids):
                # From the step loop: this test's own thread may come when the decodes are over.
                ids.append(engine.submit(prompts[2], max_tokens=40))

        runner.launch = launch_and_submit
        first, second = [engine.submit(prompt, max_tokens=40) for prompt in prompts[:2]]
        ids += [first, second]
        engine.wait_until(lambda: len(ids) == 3)
        assert [engine.wait(id).token_ids for id in ids] == expected
        return Steps(trace), engine.engine.stats(), engine.engine._runner.bank


def overlap(first: dict, second: dict) -> float:
    """Microseconds in which both run."""
    return min(first["end"], second["end"]) - max(first["ts"], second["ts"])


def test_a_prompt_and_decodes_run_at_the_same_time_on_cores_of_their_own(loaded, prompts, expected, plans):
    steps, _, bank = run_beside_decodes(loaded, prompts, expected, lanes="50:50")
    prefill = max(steps.prefills, key=lambda step: step["dur"])
    assert sum(tokens for _, _, tokens in prefill["args"]["requests"]) == len(prompts[2])
    beside = [step for step in steps.decodes if prefill["ts"] < step["ts"] and step["end"] < prefill["end"]]
    assert len(beside) >= 3, "decodes did not go on while the prompt was computed"
    assert prefill["args"]["share"] == 0.5
    # The first of them may have been queued before the prompt came, with the whole chip.
    assert {step["args"]["share"] for step in beside[2:]} == {0.5}
    for step in beside:
        assert any(overlap(node, other) > 0 for node in steps.nodes_of(step) for other in steps.nodes_of(prefill))
    workers = [bank.lane(PREFILL_LANE, 0.5).cores, bank.lane(DECODE_LANE, 0.5).cores]
    assert workers[0] + workers[1] == loaded.device.engine_cores()

    # From prefill to decode nothing is copied, admitted or set anew: decodes read the pages where the prompt wrote them.
    own = [plan for plan in plans if any(scheduled.request_id == "r2" for scheduled in plan.requests)]
    first, *handed_over = own
    assert first.lane == PREFILL_LANE
    assert handed_over and all(plan.lane == DECODE_LANE for plan in handed_over)
    for plan in handed_over:
        assert not plan.copies and not plan.admissions and not plan.resets
        assert {s.row for s in plan.requests if s.request_id == "r2"} == {first.requests[0].row}


class MovingBorder:
    """The next rung at every boundary."""

    def __init__(self, config, cost_model):
        self._rungs, self._count = config.rungs, 0

    def arrange(self, outlook) -> Arrangement:
        self._count += 1
        share = self._rungs[self._count // 2 % len(self._rungs)]
        return Arrangement(share, 1.0 - share, token_budget=16)

    def hear_first_token(self, request, now) -> None:
        pass

    def hear_finished(self, request, now) -> None:
        pass


def test_the_border_moves_and_neither_lane_waits_for_the_other(loaded, prompts, expected, plans, monkeypatch):
    preset = policies.Policy("moving-border", lanes="auto", controller=MovingBorder)
    monkeypatch.setitem(policies._presets, "moving-border", preset)
    happened: list[tuple[str, LanePlan]] = []  # in the step loop, in its order
    launch, finish = ModelRunner.launch, ModelRunner.finish

    def recorded_launch(runner, plan):
        happened.append(("launched", plan))
        launch(runner, plan)

    def recorded_finish(runner, completion, wants_logprobs):
        found = finish(runner, completion, wants_logprobs)
        happened.append(("ended", found[2]))
        return found

    monkeypatch.setattr(ModelRunner, "launch", recorded_launch)
    monkeypatch.setattr(ModelRunner, "finish", recorded_finish)
    steps, stats, bank = run_beside_decodes(loaded, prompts, expected, policy="moving-border")
    assert bank.rungs == (0.25, 0.5, 0.75)
    assert stats["num_moves"] > 10
    assert all(plan.copies == () for plan in plans)
    # Steps of one lane follow each other, on whatever part of the chip.
    for lane in (steps.decodes, steps.prefills):
        assert all(step["end"] <= after["ts"] for step, after in pairwise(lane))
    chunks = [step for step in steps.prefills if step["args"]["requests"][0][0] == "r2"]
    first, last = chunks[0]["ts"], chunks[-1]["end"]
    both = [step for step in steps.decodes if first < step["ts"] and step["end"] < last]
    for lane in (chunks, both):
        assert {step["args"]["share"] for step in lane} >= {0.25, 0.5, 0.75}
    # A decode that has another share than the one before it has begun beside a chunk that went on meanwhile.
    changes = [(step, after) for step, after in pairwise(both)
               if step["args"]["share"] != after["args"]["share"]]  # fmt: skip
    assert any(chunk["ts"] < step["end"] and after["ts"] < chunk["end"] for step, after in changes for chunk in chunks)
    # Neither lane was ever drained for the other's move: whenever the step loop had nothing more to launch, both had work.
    own = {plan.plan_id for _, plan in happened if plan.lane == PREFILL_LANE and plan.requests[0].request_id == "r2"}
    decodes = [plan.plan_id for _, plan in happened if plan.lane == DECODE_LANE and plan.requests[0].request_id == "r0"]
    in_flight: dict[int, set[int]] = {DECODE_LANE: set(), PREFILL_LANE: set()}
    num_looked_at = 0
    for (what, plan), (next_what, _) in pairwise(happened):
        lane = in_flight[plan.lane]
        lane.add(plan.plan_id) if what == "launched" else lane.remove(plan.plan_id)
        has_both = min(own) <= plan.plan_id < max(own) and plan.plan_id < max(decodes)
        if what == "launched" and next_what == "ended" and has_both:
            num_looked_at += 1
            assert in_flight[DECODE_LANE] and in_flight[PREFILL_LANE]
    assert num_looked_at > 10


def test_a_group_of_layers_goes_beside_each_step_of_decodes(loaded, prompts, expected, monkeypatch):
    """Layered Prefill: the prompt crosses every node once, in groups of layers, one between two steps of decodes."""
    monkeypatch.setattr(layered, "_TOKENS_OF_GROUPS", ((64, 1), (512, 6)))
    steps, _, _ = run_beside_decodes(loaded, prompts, expected, prefill="layer")
    parts = [step for step in steps.decodes if [request[0] for request in step["args"]["requests"]] == ["r2"]]
    parts = [part for part in parts if part["args"]["requests"][0][2] > 1]
    assert len(parts) == 6 and len({part["args"]["run"] for part in parts}) == 1
    bounds = [part["args"]["nodes"] for part in parts]
    assert bounds[0][0] == 0 and bounds[-1][1] == loaded.program.num_nodes
    names = loaded.program.node_names
    for (_, end), (begin, _) in pairwise(bounds):
        assert begin == end
        assert names[begin].split(".")[1] != names[begin - 1].split(".")[1], "a group ends within a layer"
    seen = [node["name"] for part in parts for node in steps.nodes_of(part)]
    assert len(seen) == len(set(seen)), "the prompt crossed a node twice"
    for part, after in pairwise(parts):
        between = [step for step in steps.decodes if part["end"] <= step["ts"] and step["end"] <= after["ts"]]
        assert len(between) == 1
        assert [request[2] for request in between[0]["args"]["requests"]] == [1, 1], "both requests have a token"


@pytest.mark.parametrize("lanes", ["off", "50:50"])
def test_a_pause_takes_effect_before_the_next_operator(loaded, lanes, monkeypatch):
    """FlowPrefill: after the stop no operator begins; the one that had begun is all that whoever comes first waits for."""
    stops: dict[int, float] = {}  # plan -> when the stop had been asked for, us
    carry_out = ModelRunner.carry_out

    def recording(runner, orders):
        carry_out(runner, orders)
        stops.update({order.plan_id: time.monotonic_ns() / 1e3 for order in orders if isinstance(order, PausePlan)})

    monkeypatch.setattr(ModelRunner, "carry_out", recording)
    rng = random.Random(4)
    long, urgent = ([rng.randrange(3, loaded.config.vocab_size) for _ in range(length)] for length in (480, 12))
    trace = StepTrace(loaded.program.node_names)
    options = {**LIMITS, "threads": NUM_THREADS, "enable_prefix_caching": False, "lanes": lanes, "prefill": "operator"}
    with running_engine("smollm2", loaded=loaded, trace=trace, **options) as engine:
        deadline_s = time.monotonic() + 60.0
        answers = set()
        for _ in range(100):
            slow = engine.submit(long, max_tokens=2, priority=1)
            time.sleep(rng.uniform(0.02, 0.15))  # into the long prompt's run
            quick = engine.submit(urgent, max_tokens=2, priority=0)
            answers.add((*engine.wait(quick).token_ids, *engine.wait(slow).token_ids))
            if len(stops) >= 5 or time.monotonic() > deadline_s:
                break
        assert len(answers) == 1, "pauses changed an answer"
        num_pauses = engine.engine.stats()["num_pauses"]
    steps = Steps(trace)
    stopped = [step for step in steps.decodes + steps.prefills if step["args"]["stopped"]]
    assert len(stops) >= 5 and num_pauses >= len(stopped) > 0
    for step in stopped:
        asked_us = stops[step["args"]["plan"]]
        nodes = steps.nodes_of(step)
        assert not [node["name"] for node in nodes if node["ts"] > asked_us]
        if nodes:
            assert nodes[-1]["end"] - asked_us <= nodes[-1]["dur"]
        # It goes on from the operator at which it stopped, when whoever came first has its first token.
        run, cursor = step["args"]["run"], step["args"]["nodes"][1]
        (after,) = [
            each
            for each in steps.decodes + steps.prefills
            if each["args"]["run"] == run and each["args"]["nodes"][0] == cursor and each is not step
        ]
        assert after["ts"] >= step["end"]
