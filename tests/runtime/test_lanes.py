"""Hand-made plans through the ModelRunner: roles on moving parts of the chip, runs in parts, pauses, drops, nano-batches.

No scheduler decides here: a driver makes random plans that the contract allows, and the tokens must be those of one plan
after the other on one lane.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import replace

import pytest

from runtime import _native
from runtime.lane_bank import LaneBank
from runtime.model_runner import ModelRunner
from runtime.step_trace import StepTrace
from scheduler.controllers import layered
from scheduler.nanobatch import NanoPlan, NanoRange, cut_chunks
from scheduler.step import DropRun, LanePlan, PageCopy, PausePlan, ScheduledRequest
from tests.kit.engines import load, running_engine
from tests.kit.gpu_engines import FEW, random_tokens, write_llama

DEVICES = ["cpu", "simt", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_ROWS, MAX_LEN, MAX_TOKENS = 4, 128, 96
PAGES = 4  # of a row, and of any row of the pool: row r has pages [4 r, 4 r + 4)
PROMPTS, NUM_NEW = (40, 25, 60, 7), 6


@pytest.fixture(scope="module", params=DEVICES)
def loaded(request, tmp_path_factory):
    options = {**FEW, "max_num_batched_tokens": MAX_TOKENS}
    path = write_llama(tmp_path_factory.mktemp("llama"))
    return load(path, device=request.param, max_model_len=MAX_LEN, page_size=32, kv_memory=1 << 24, **options)


@pytest.fixture(scope="module")
def prompts(loaded):
    return [random_tokens(loaded, length) for length in PROMPTS]


def make_runner(loaded, lanes: str, **options) -> ModelRunner:
    completions = _native.CompletionQueue()
    bank = LaneBank(
        loaded.device, completions, lanes, NUM_ROWS, has_nano_batches=options.pop("has_nano_batches", False)
    )
    plan = replace(loaded.kv_plan, num_pages=NUM_ROWS * PAGES + PAGES)
    return ModelRunner(
        loaded.program, plan, loaded.device, vocab_size=loaded.config.vocab_size, max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=MAX_TOKENS, bank=bank, completions=completions, **options,
    )  # fmt: skip


def admit(runner: ModelRunner, prompts) -> None:
    """Every row anew, with all its pages: the first KV group is the only one."""
    sampling = _native.SamplingParams()
    sampling.temperature = 0.0
    for row, tokens in enumerate(prompts):
        runner.admit(row, tokens, len(tokens), sampling)
        runner.rows.set_pages(row, 0, 0, list(range(row * PAGES, (row + 1) * PAGES)), runner.kv_plan.num_pages)


def scheduled(row: int, start: int, num_tokens: int, samples: bool = True) -> ScheduledRequest:
    return ScheduledRequest(f"r{row}", row, start, num_tokens, ((),), samples)


def results_of(runner: ModelRunner) -> list:
    """LaneResults of whatever has ended by now; waits for the first."""
    found = []
    while not found:
        for completion in filter(None, map(runner.gather, runner.completions.wait_any(60.0))):
            found.append(runner.finish(completion, lambda _request_id: False)[0])
    return found


@pytest.fixture(scope="module")
def expected(loaded, prompts) -> list[list[int]]:
    """Each request alone, step after step on one lane."""
    runner = make_runner(loaded, "off")
    admit(runner, prompts)
    tokens, plan_id = [], 0
    for row, prompt in enumerate(prompts):
        own = []
        for step in range(NUM_NEW):
            plan_id += 1
            request = scheduled(row, 0, len(prompt)) if step == 0 else scheduled(row, len(prompt) + step - 1, 1)
            runner.launch(LanePlan(plan_id, 0, 1.0, "step", None, (request,)))
            (result,) = results_of(runner)
            own.append(result.sampled[0][1])
        tokens.append(own)
    return tokens


class Driver:
    """Random plans: prompts on lane 1, in parts and with pauses; decodes of any requests together on lane 0, up to two
    plans ahead; a share at random for each."""

    def __init__(self, runner: ModelRunner, prompts, seed: int, *, pauses: bool, drops: bool):
        self.runner, self.prompts, self.rng = runner, prompts, random.Random(seed)
        self.pauses, self.drops = pauses, drops
        self.num_nodes = runner.program.num_nodes
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.num_planned = [0] * len(prompts)  # tokens that plans have asked for
        self.waiting = deque(self.rng.sample(range(len(prompts)), len(prompts)))
        self.resting: list[tuple[int, int, int]] = []  # (row, run_id, cursor)
        self.parts: deque[tuple[LanePlan, int]] = deque()
        self.decodes: deque[LanePlan] = deque()
        self.plan_id = 0
        self.num_pauses = self.num_drops = self.num_overlaps = 0

    def share(self, lane: int) -> float:
        shares = [share for role, share in self.runner.bank._lanes if role == lane]
        return self.rng.choice(shares)

    def launch(self, lane: int, node_range, requests, continues=0) -> LanePlan:
        self.plan_id += 1
        plan = LanePlan(self.plan_id, lane, self.share(lane), "step", node_range, requests, continues=continues)
        self.runner.launch(plan)
        return plan

    def plan_prompt(self) -> None:
        if (self.resting and self.rng.random() < 0.7) or not self.waiting:
            row, run_id, cursor = self.resting.pop(self.rng.randrange(len(self.resting)))
            if self.drops and self.rng.random() < 0.3:
                self.runner.carry_out([DropRun(run_id)])
                self.num_drops += 1
                self.waiting.append(row)
                return
        else:
            row, run_id, cursor = self.waiting.popleft(), 0, 0
        last = self.rng.choice((self.num_nodes, self.rng.randint(cursor + 1, self.num_nodes)))
        plan = self.launch(1, (cursor, last), (scheduled(row, 0, len(self.prompts[row])),), run_id)
        self.parts.append((plan, row))
        if self.pauses and self.rng.random() < 0.5:
            if self.rng.random() < 0.5:
                time.sleep(self.rng.uniform(0.0, 5e-4))
            self.runner.carry_out([PausePlan(plan.plan_id, 1)])

    def plan_decodes(self) -> None:
        ready = [row for row, tokens in enumerate(self.tokens) if tokens and self.num_planned[row] < NUM_NEW]
        if not ready:
            return
        rows = sorted(self.rng.sample(ready, self.rng.randint(1, len(ready))))
        requests = tuple(scheduled(row, len(self.prompts[row]) + self.num_planned[row] - 1, 1) for row in rows)
        for row in rows:
            self.num_planned[row] += 1
        self.decodes.append(self.launch(0, None, requests))

    def land(self, result) -> None:
        if result.lane == 0:
            plan = self.decodes.popleft()
            assert result.plan_id == plan.plan_id and not result.failed
            for request_id, token in result.sampled:
                self.tokens[int(request_id[1:])].append(token)
            return
        plan, row = self.parts.popleft()
        assert result.plan_id == plan.plan_id and not result.failed
        cursor = plan.node_range[1] if result.cursor is None else result.cursor
        self.num_pauses += result.cursor is not None
        if cursor < self.num_nodes:
            assert not result.sampled
            self.resting.append((row, plan.run_id, cursor))
        else:
            ((request_id, token),) = result.sampled
            self.tokens[row].append(token)
            self.num_planned[row] = 1

    def run(self) -> list[list[int]]:
        while any(len(tokens) < NUM_NEW for tokens in self.tokens):
            while not self.parts and (self.waiting or self.resting):
                self.plan_prompt()
            while len(self.decodes) < 2:
                before = len(self.decodes)
                self.plan_decodes()
                if len(self.decodes) == before:
                    break
            self.num_overlaps += bool(self.parts and self.decodes)
            for result in results_of(self.runner):
                self.land(result)
        assert self.runner.num_in_flight == 0
        return self.tokens


MOST_ROUNDS = 200


def num_rounds(loaded) -> int:
    return 12 if loaded.device.gpu is None else 2


@pytest.mark.parametrize("lanes", ["auto", "50:50", "100:100"])
def test_prompts_in_parts_beside_decodes_on_moving_parts_of_the_chip(loaded, prompts, expected, lanes):
    runner = make_runner(loaded, lanes, max_resting_runs=NUM_ROWS)
    num_pauses = num_drops = num_overlaps = seed = 0
    can_pause = loaded.device.gpu is None
    # A pause that comes late finds its run over; on a busy machine many do, so rounds go on until one came in time.
    while seed < num_rounds(loaded) or (can_pause and not num_pauses and seed < MOST_ROUNDS):
        admit(runner, prompts)
        driver = Driver(runner, prompts, seed, pauses=True, drops=True)
        assert driver.run() == expected, seed
        num_pauses += driver.num_pauses
        num_drops += driver.num_drops
        num_overlaps += driver.num_overlaps
        seed += 1
        assert runner._frames.num_resting == 0
    assert num_overlaps > 0 and num_drops > 0
    assert num_pauses > 0 or not can_pause


def test_plans_of_a_role_follow_each_other_across_the_border(loaded, prompts, expected):
    """Each decode needs the token of the one before, which runs on another native lane and is still queued."""
    runner = make_runner(loaded, "auto")
    admit(runner, prompts)
    shares = sorted({share for role, share in runner.bank._lanes if role == 0})
    runner.launch(LanePlan(1, 0, 1.0, "step", None, (scheduled(0, 0, PROMPTS[0]),)))
    for step in range(1, 3):  # three frames: all of the plans are on their way at the same time
        share = shares[step % len(shares)]
        runner.launch(LanePlan(step + 1, 0, share, "step", None, (scheduled(0, PROMPTS[0] + step - 1, 1),)))
    results = []
    while len(results) < 3:
        results += results_of(runner)
    assert [result.plan_id for result in results] == [1, 2, 3]
    assert [result.sampled[0][1] for result in results] == expected[0][:3]


def test_a_plan_that_waits_for_the_border_can_be_paused_before_it_begins(loaded, prompts, expected):
    runner = make_runner(loaded, "auto", max_resting_runs=2)
    admit(runner, prompts)
    shares = sorted({share for role, share in runner.bank._lanes if role == 1})
    num_nodes = loaded.program.num_nodes
    runner.launch(LanePlan(1, 1, shares[0], "step", (0, num_nodes), (scheduled(2, 0, PROMPTS[2]),)))
    runner.launch(LanePlan(2, 1, shares[-1], "step", (0, num_nodes), (scheduled(0, 0, PROMPTS[0]),)))
    runner.carry_out([PausePlan(2, 1)])
    results = []
    while len(results) < 2:
        results += results_of(runner)
    assert results[0].sampled[0][1] == expected[2][0]
    cursor = results[1].cursor
    if cursor is None:  # it was over before the stop came
        assert results[1].sampled[0][1] == expected[0][0]
    else:
        assert results[1].sampled == ()
        part = LanePlan(3, 1, shares[0], "step", (cursor, num_nodes), (scheduled(0, 0, PROMPTS[0]),), continues=2)
        runner.launch(part)
        (result,) = results_of(runner)
        assert result.sampled[0][1] == expected[0][0]


def test_frames_of_dropped_runs_come_back(loaded, prompts):
    runner = make_runner(loaded, "off", max_resting_runs=1)
    admit(runner, prompts)
    for plan_id in range(1, 12):
        runner.launch(LanePlan(plan_id, 0, 1.0, "step", (0, 3), (scheduled(0, 0, PROMPTS[0]),)))
        (result,) = results_of(runner)
        assert result.cursor is None and result.sampled == ()
        runner.carry_out([DropRun(plan_id)])
    with pytest.raises(ValueError, match="run 11, which does not rest"):
        runner.launch(LanePlan(20, 0, 1.0, "step", (3, 5), (scheduled(0, 0, PROMPTS[0]),), continues=11))


def test_a_malformed_part_is_refused_and_its_frame_comes_back(loaded, prompts):
    """A part that names another node than the one where its run rests."""
    runner = make_runner(loaded, "off", max_resting_runs=1)
    admit(runner, prompts)
    for plan_id in range(1, 8):
        runner.launch(LanePlan(2 * plan_id, 0, 1.0, "step", (0, 3), (scheduled(0, 0, PROMPTS[0]),)))
        results_of(runner)
        with pytest.raises(ValueError, match="cursor"):
            runner.launch(LanePlan(2 * plan_id + 1, 0, 1.0, "step", (4, 6), (scheduled(0, 0, PROMPTS[0]),), (), (), (),
                                   2 * plan_id))  # fmt: skip
    assert runner.num_in_flight == 0


def failed_result(runner: ModelRunner):
    """The next plan's result, as if its last range had failed on the device."""
    while True:
        for completion in runner.completions.wait_any(60.0):
            gathered = runner.gather({**completion, "error": "the device says no"})
            if gathered is not None:
                return runner.finish(gathered, lambda _request_id: False)[0]


def test_a_failure_is_every_request_s_and_the_frames_come_back(loaded, prompts, expected):
    runner = make_runner(loaded, "off", max_resting_runs=1, has_nano_batches=True, num_nano_frames=2)
    num_nodes = loaded.program.num_nodes
    both = (scheduled(0, 0, PROMPTS[0]), scheduled(1, 0, PROMPTS[1]))
    ranges = (NanoRange(0, 0, num_nodes, 0), NanoRange(1, 0, num_nodes, 1))
    nano = NanoPlan((PROMPTS[0], PROMPTS[1]), (0.5, 0.5), ranges)
    admit(runner, prompts)
    for plan_id in range(1, 30, 3):
        runner.launch(LanePlan(plan_id, 0, 1.0, "step", (0, 3), both))
        assert [name for name, _ in failed_result(runner).failed] == ["r0", "r1"]
        runner.launch(LanePlan(plan_id + 1, 0, 1.0, "step", None, both, nano=nano))
        result = failed_result(runner)
        assert [name for name, _ in result.failed] == ["r0", "r1"] and not result.sampled
        assert runner.num_in_flight == 0 and runner._frames.num_resting == 0
    runner.launch(LanePlan(50, 0, 1.0, "step", None, both, nano=nano))
    (result,) = results_of(runner)
    assert dict(result.sampled) == {"r0": expected[0][0], "r1": expected[1][0]}


def random_nano_plan(requests, num_nano: int, num_nodes: int, rng: random.Random) -> NanoPlan:
    """Any cut of the rows, any cuts of the nodes, any lanes, any order that the rules allow."""
    total = sum(request.num_tokens for request in requests)
    edges = sorted(rng.sample(range(1, total), num_nano - 1))
    counts = tuple(high - low for low, high in zip([0, *edges], [*edges, total], strict=True))
    is_cut = cut_chunks(requests, counts)
    bounds = [0, *sorted(rng.sample(range(1, num_nodes), 5)), num_nodes]
    ranges: list[NanoRange] = []
    index_of: dict[tuple[int, int], int] = {}
    done = [0] * num_nano
    while min(done) < len(bounds) - 1:
        # Where a chunk is cut, a piece may only follow the one before it through the nodes.
        ready = [
            nano for nano in range(num_nano)
            if done[nano] < len(bounds) - 1 and (nano == 0 or not is_cut[nano - 1] or done[nano - 1] > done[nano])
        ]  # fmt: skip
        nano = rng.choice(ready)
        piece = done[nano]
        lane = rng.randrange(2)
        after = []
        if piece and ranges[index_of[nano, piece - 1]].lane != lane:
            after.append(index_of[nano, piece - 1])
        if nano and is_cut[nano - 1]:
            after.append(index_of[nano - 1, piece])
        index_of[nano, piece] = len(ranges)
        ranges.append(NanoRange(nano, bounds[piece], bounds[piece + 1], lane, tuple(sorted(set(after)))))
        done[nano] += 1
    return NanoPlan(counts, (0.5, 0.5), tuple(ranges))


def test_steps_in_nano_batches_of_any_cut_and_order(loaded, prompts, expected):
    runner = make_runner(loaded, "off", has_nano_batches=True, num_nano_frames=8)
    num_nodes = loaded.program.num_nodes
    for seed in range(num_rounds(loaded)):
        rng = random.Random(seed)
        admit(runner, prompts)
        # Row 0 decodes beside the prompts of rows 1 and 3; then all of them decode, two steps on their way at once.
        first = LanePlan(1, 0, 1.0, "step", None, (scheduled(0, 0, PROMPTS[0]),))
        mixed = (scheduled(0, PROMPTS[0], 1), scheduled(1, 0, PROMPTS[1]), scheduled(3, 0, PROMPTS[3]))
        later = [
            tuple(scheduled(row, PROMPTS[row] + step + (row == 0), 1) for row in (0, 1, 3)) for step in range(2)
        ]  # fmt: skip
        plans = [first] + [
            LanePlan(index + 2, 0, 1.0, "step", None, requests,
                     nano=random_nano_plan(requests, rng.randint(2, min(4, 3)), num_nodes, rng))
            for index, requests in enumerate((mixed, *later))
        ]  # fmt: skip
        tokens: dict[str, list[int]] = {"r0": [], "r1": [], "r3": []}
        results, in_flight = [], 0
        for plan in plans:
            runner.launch(plan)
            in_flight += 1
            while in_flight == 2:
                landed = results_of(runner)
                results += landed
                in_flight -= len(landed)
        while in_flight:
            landed = results_of(runner)
            results += landed
            in_flight -= len(landed)
        assert [result.plan_id for result in results] == [1, 2, 3, 4]
        assert all(not result.failed for result in results), results
        for result in results:
            for request_id, token in result.sampled:
                tokens[request_id].append(token)
        assert tokens == {"r0": expected[0][:4], "r1": expected[1][:3], "r3": expected[3][:3]}, seed


def test_pages_are_copied_before_any_nano_batch_reads_them(loaded, prompts, expected):
    """Row 1 stands on a copy of the pages that row 2 filled, and its decode is in the second nano-batch."""
    runner = make_runner(loaded, "off", has_nano_batches=True, num_nano_frames=8)
    num_nodes = loaded.program.num_nodes
    for seed in range(num_rounds(loaded)):
        rng = random.Random(seed)
        admit(runner, [prompts[0], prompts[2], prompts[2]])
        runner.launch(LanePlan(1, 0, 1.0, "step", None, (scheduled(2, 0, PROMPTS[2]),)))
        results_of(runner)
        requests = (scheduled(0, 0, PROMPTS[0]), scheduled(1, PROMPTS[2] - 1, 1))
        copies = tuple(PageCopy(2 * PAGES + page, PAGES + page) for page in range(2))
        nano = random_nano_plan(requests, 2, num_nodes, rng)
        runner.launch(LanePlan(2, 0, 1.0, "step", None, requests, copies=copies, nano=nano))
        (result,) = results_of(runner)
        assert not result.failed
        assert dict(result.sampled) == {"r0": expected[0][0], "r1": expected[2][0]}, seed
        assert runner.arena.read_page(PAGES) == runner.arena.read_page(2 * PAGES)


OPTIONS = [
    {"lanes": "50:50"}, {"lanes": "50:50", "prefill": "operator"}, {"lanes": "100:100", "prefill": "operator"},
    {"policy": "semi-pd"}, {"prefill": "layer"}, {"nano_batches": "2"}, {"nano_batches": "4", "lanes": "auto"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(options.values()) for options in OPTIONS])
def test_an_engine_of_any_device_answers_the_same(loaded, prompts, expected, options, monkeypatch):
    monkeypatch.setattr(layered, "_TOKENS_OF_GROUPS", ((8, 1), (16, 2), (64, 4)))
    trace = StepTrace(loaded.program.node_names)
    device = "cpu" if loaded.device.gpu is None else loaded.device.gpu.world
    limits = {**FEW, "max_num_batched_tokens": MAX_TOKENS, "max_model_len": MAX_LEN, "page_size": 32}
    with running_engine("tiny", loaded=loaded, trace=trace, device=device, **limits, **options) as engine:
        assert engine.run(prompts, max_tokens=NUM_NEW) == expected
        (text,) = [line for line in engine.engine.describe() if line.startswith("lanes")]
    steps = [event for event in trace.events() if event["cat"] == "step"]
    if options.get("lanes", "auto") != "auto" or "policy" in options:
        assert {step["tid"] for step in steps} == {0, 1}, "each role is a track"
        assert "prefill" in text and "decode" in text
    if options == {"prefill": "layer"}:
        parts = [step["args"] for step in steps if step["args"]["plan"] != step["args"]["run"]]
        assert parts and all(part["nodes"][0] > 0 for part in parts)
    if "lanes" not in options and "nano_batches" in options:
        nano = [event for event in trace.events() if "nano_batch" in event["args"]]
        assert len({event["tid"] for event in nano}) == 2 and {event["args"]["nano_batch"] for event in nano} >= {0, 1}
    for step in steps:
        within = [
            event
            for event in trace.events()
            if event["cat"] == "node" and event["args"]["plan"] == step["args"]["plan"]
        ]
        assert within, step


def test_graphs_are_captured_at_start_on_every_lane_that_decodes(loaded, prompts, expected):
    if loaded.device.gpu is None:
        pytest.skip("a CPU has no graphs")
    limits = {**FEW, "max_num_batched_tokens": MAX_TOKENS, "max_model_len": MAX_LEN, "page_size": 32}
    options = {"lanes": "50:50", "capture_at_start": True, "device": loaded.device.gpu.world}
    with running_engine("tiny", loaded=loaded, **limits, **options) as engine:
        lanes = engine.engine._runner.bank.decode_lanes
        assert len(lanes) == 2 and all(lane.num_graphs > 0 for lane in lanes)
        assert engine.run(prompts, max_tokens=NUM_NEW) == expected
        assert sum(lane.num_graph_steps for lane in lanes) > 0
