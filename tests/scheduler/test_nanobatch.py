"""Steps in nano-batches: how requests are cut, what plans must keep, when cutting is declined."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch import NanoPlan, cut_chunks, split_requests
from scheduler.nanobatch_check import check_nano_plan
from scheduler.nanobatch_cost import nano_makespan_s
from scheduler.nanobatch_kinds import fit_counts, kind_of
from scheduler.nanobatch_planner import NanoPlanner, class_lanes, equal_counts
from scheduler.nanobatch_tables import NanoCosts, TypicalStep
from scheduler.step import LanePlan, ScheduledRequest
from scheduler.step_shape import shape_of
from tests.kit.lane_speeds import lane_speeds

SMALL = ModelSpec("small", 256, 4, 4, 2, 64, 512, 1000)
# Norms of their own, windows in two layers of three, a soft cap: more kinds of nodes
GEMMA_LIKE = ModelSpec(
    "windows", 256, 6, 4, 2, 64, 512, 1000, has_post_norms=True, has_soft_cap=True, sliding_window=32,
    windowed_layers=frozenset([0, 1, 3, 4]),
)  # fmt: skip
LLAMA_8B = ModelSpec("8b", 4096, 32, 32, 8, 128, 14336, 128256, device="gpu", inner_bytes=2)


def overlap_machine(**fields) -> Machine:
    """Half of it draws the whole bandwidth, and keeps nine tenths of the compute rate: overlap pays."""
    values = {
        "saturation": Saturation(compute_share=0.5, decay=0.2, memory_share=0.5), "rungs": (0.25, 0.5, 0.75, 1.0),
        "classes": {"default": ClassRates(((1, 1e13), (128, 5e14)), 2.5e12, 2e-6)},
    }  # fmt: skip
    return Machine("overlap", "made up for a test", 2.5e12, **{**values, **fields})


def model(spec: ModelSpec = LLAMA_8B) -> CostModel:
    return CostModel(spec, overlap_machine())


def planner(spec: ModelSpec = LLAMA_8B, **machine_fields) -> NanoPlanner:
    return NanoPlanner(SchedulerConfig(num_pages=100), CostModel(spec, overlap_machine(**machine_fields)))


def step(*shares: tuple[int, int] | tuple[int, int, bool]) -> tuple[ScheduledRequest, ...]:
    """(start, tokens) per request, all of which sample unless said otherwise."""
    return tuple(
        ScheduledRequest(f"r{row}", row, share[0], share[1], ((row,), ()), share[2] if len(share) > 2 else True)
        for row, share in enumerate(shares)
    )


def plan_of(requests: tuple[ScheduledRequest, ...], nano: NanoPlan | None) -> LanePlan:
    return LanePlan(7, 0, 1.0, "step", None, requests, nano=nano)


def mixed_step(
    num_decodes: int = 192, decode_kv: int = 2048, num_chunk_tokens: int = 832
) -> tuple[ScheduledRequest, ...]:
    return step(*[(decode_kv - 1, 1)] * num_decodes, (0, num_chunk_tokens, False))


@st.composite
def any_step(draw) -> tuple[ScheduledRequest, ...]:
    decodes = draw(st.lists(st.integers(0, 300), max_size=12))
    chunks = draw(st.lists(st.tuples(st.integers(0, 100), st.integers(2, 200), st.booleans()), max_size=4))
    shares = [(start, 1) for start in decodes] + chunks
    if draw(st.booleans()):
        shares = draw(st.permutations(shares))
    return step(*shares)


@st.composite
def cut_step(draw) -> tuple[tuple[ScheduledRequest, ...], tuple[int, ...]]:
    requests = draw(any_step().filter(lambda requests: sum(s.num_tokens for s in requests) >= 4))
    total = sum(s.num_tokens for s in requests)
    num_nano = draw(st.integers(1, 4))
    bounds = sorted(draw(st.sets(st.integers(1, total - 1), min_size=num_nano - 1, max_size=num_nano - 1)))
    return requests, tuple(b - a for a, b in zip([0, *bounds], [*bounds, total], strict=True))


@given(cut_step())
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_step_token_by_token(case):
    requests, counts = case
    pieces = split_requests(requests, counts)

    def tokens(scheduled: ScheduledRequest) -> list[tuple[str, int]]:
        return [(scheduled.request_id, scheduled.start + i) for i in range(scheduled.num_tokens)]

    assert [token for piece in pieces for s in piece for token in tokens(s)] == [t for s in requests for t in tokens(s)]
    assert [sum(s.num_tokens for s in piece) for piece in pieces] == list(counts)
    flat = [s for piece in pieces for s in piece]
    assert [s.request_id for s in flat if s.samples] == [s.request_id for s in requests if s.samples]
    for original in requests:
        mine = [s for s in flat if s.request_id == original.request_id]
        assert mine[0].new_pages == original.new_pages
        assert all(s.new_pages == ((), ()) and s.row == original.row for s in mine[1:])
    ends = set(accumulate(s.num_tokens for s in requests))
    assert cut_chunks(requests, counts) == tuple(bound not in ends for bound in list(accumulate(counts))[:-1])


def test_counts_that_do_not_add_up_are_refused():
    for counts in ((), (3, 0), (3, 3)):
        with pytest.raises(ValueError, match="wanted positive ones of sum 5"):
            split_requests(step((0, 5)), counts)


@pytest.mark.parametrize("spec", [SMALL, GEMMA_LIKE], ids=lambda spec: spec.name)
@pytest.mark.parametrize("has_model", [True, False])
@given(requests=any_step(), num_nano=st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_whatever_is_asked_for_gives_a_plan_that_holds(spec, has_model, requests, num_nano):
    """With and without a cost model; before and after the search."""
    machine_model = model(spec) if has_model else None
    cutter = NanoPlanner(SchedulerConfig(num_pages=100), machine_model, spec)
    total = sum(s.num_tokens for s in requests)
    for is_prepared in (False, True):
        nano = cutter.plan(requests, num_nano)
        if total < 2:
            assert nano is None
            return
        assert 2 <= nano.num_nano <= num_nano and nano.reason == cutter.reason
        plan = plan_of(requests, nano)
        check_nano_plan(plan, spec)
        if has_model and not is_prepared:
            assert nano_makespan_s(plan, NanoCosts(machine_model)) > 0
            cutter.prepare([kind_of(shape_of(requests, spec.sliding_window))], num_nano)


def test_the_planner_cuts_where_it_pays_and_not_where_it_does_not():
    cutter = planner()
    cutter.prepare([kind_of(shape_of(mixed_step()))])
    # Nobody measures here: after a while the model's word stands.
    plans = [cutter.plan(mixed_step()) for _ in range(40)]
    nano = plans[-1]
    assert plans[0] is None and nano is not None
    assert "by the cost model" in cutter.reason
    plan = plan_of(mixed_step(), nano)
    check_nano_plan(plan, LLAMA_8B)
    costs = cutter._costs
    whole_s, cut_s = costs.model.step_s(shape_of(mixed_step())), nano_makespan_s(plan, costs)
    assert cut_s < 0.95 * whole_s
    assert cutter.predicted_gain(shape_of(mixed_step())) > 0.05
    # Decodes alone are nothing but memory; a prompt alone nothing but compute.
    for requests in (step(*[(2047, 1)] * 64), step((0, 2048))):
        cutter.prepare([kind_of(shape_of(requests))])
        assert cutter.plan(requests) is None
        assert cutter.reason == "one batch is as good by the cost model"
        assert cutter.predicted_gain(shape_of(requests)) == 0.0
    assert cutter.plan(mixed_step(), 1) is None
    assert any("tokens at shares" in line for line in cutter.describe())


@pytest.mark.parametrize("nano_batches", ["auto", "2"])
def test_a_machine_that_cannot_be_cut_gets_equal_parts_where_they_are_asked_for(nano_batches):
    """One core: its machine file knows no share but the whole."""
    config = SchedulerConfig(num_pages=100, nano_batches=nano_batches)
    cutter = NanoPlanner(config, CostModel(LLAMA_8B, overlap_machine(rungs=(1.0,))))
    cutter.prepare([kind_of(shape_of(mixed_step()))])
    assert cutter.plan(mixed_step()) is None and "cannot be cut" in cutter.reason
    nano = cutter.plan(mixed_step(), 2)
    check_nano_plan(plan_of(mixed_step(), nano), LLAMA_8B)
    assert max(nano.token_counts) - min(nano.token_counts) <= 1


def test_a_machine_that_halves_with_its_share_gains_nothing():
    """The ablation of the table: rates in proportion to the share leave nothing to win."""
    proportional = planner(saturation=Saturation())
    proportional.prepare([kind_of(shape_of(mixed_step()))])
    assert proportional.plan(mixed_step()) is None and "as good" in proportional.reason


def test_a_kind_that_was_not_met_is_searched_bit_by_bit_and_the_same_way_each_time():
    one, other = planner(), planner()
    answers = []
    for cutter in (one, other):
        mine = []
        for _ in range(3000):
            nano = cutter.plan(mixed_step())
            mine.append((nano, cutter.reason))
            if nano is not None:
                break
        answers.append(mine)
    assert answers[0] == answers[1]
    assert answers[0][0] == (None, "this kind of step is being searched")
    assert len(answers[0]) > 50 and answers[0][-1][0] is not None


def test_typical_steps_price_as_the_requests_they_stand_for():
    typical = TypicalStep(8, 512, 96, 64)
    requests = step(*[(511, 1)] * 8, (64, 96))
    for counts in ((104,), (4, 100), (8, 96), (24, 40, 40)):
        first = 0
        for count, piece in zip(counts, split_requests(requests, counts), strict=True):
            assert typical.shape(first, first + count) == shape_of(piece)
            assert typical.shape(first, first + count, 100) == shape_of(piece, 100)
            first += count
    assert kind_of(shape_of(requests)) == TypicalStep(8, 512, 91, 64)


@given(st.integers(0, 300), st.integers(0, 2000), st.integers(0, 255), st.integers(2, 4))
@settings(max_examples=300, deadline=None)
def test_fitted_counts_add_up_and_keep_cuts_among_decodes_and_chunks(num_decodes, num_chunk_tokens, seed, num_nano):
    if num_decodes + num_chunk_tokens < num_nano:
        return
    typical = TypicalStep(128, 1024, 512, 0)
    bounds = sorted({1 + (seed * (i + 3) * 97) % 639 for i in range(num_nano - 1)})
    counts = tuple(b - a for a, b in zip([0, *bounds], [*bounds, 640], strict=True))
    fitted = fit_counts(counts, typical, num_decodes, num_decodes + num_chunk_tokens)
    if fitted is None:
        return
    assert min(fitted) > 0 and sum(fitted) == num_decodes + num_chunk_tokens and len(fitted) == len(counts)
    for bound, fitted_bound in zip(bounds, list(accumulate(fitted))[:-1], strict=True):
        assert fitted_bound <= num_decodes if bound <= 128 else fitted_bound >= num_decodes
    equal = equal_counts(num_decodes + num_chunk_tokens, num_nano)
    assert sum(equal) == num_decodes + num_chunk_tokens and min(equal) > 0 and max(equal) - min(equal) <= 32


def measured_answer(beside: tuple[float, float]) -> tuple[NanoPlan | None, NanoPlanner]:
    """Of the same mixed step, model and machine; only what lanes achieve beside each other differs."""
    cutter = planner(lane_speeds=(lane_speeds((0.5, 0.5), (0.9, 0.9), beside),))
    cutter.prepare([kind_of(shape_of(mixed_step()))])
    for _ in range(40):  # nobody measures here: after a while the table's word stands
        nano = cutter.plan(mixed_step())
    return nano, cutter


def test_the_planner_believes_the_measured_table_where_there_is_one():
    """By the cost model overlap pays on this machine. Measured, it is another matter, either way."""
    nano, cutter = measured_answer((0.85, 0.85))  # nearly free
    assert nano is not None and nano.shares == (0.5, 0.5) and "by the measured table" in nano.reason
    plan = plan_of(mixed_step(), nano)
    check_nano_plan(plan, LLAMA_8B)
    assert "table: measured, lanes of 50% beside 50%" in cutter.describe()[0]
    assert any("by the measured table" in line for line in cutter.describe())
    nano, cutter = measured_answer((0.4, 0.4))  # costs more than it gives
    assert nano is None and cutter.reason == "one batch is as good by the measured table"
    by_model = planner()
    assert "no lane_speeds" in by_model.describe()[0]
    assert "never calibrated" in NanoPlanner(SchedulerConfig(num_pages=100), None, LLAMA_8B).describe()[0]


def test_steps_are_priced_by_what_was_measured_of_each_pair():
    """A step that is cut takes longer where the pair that it is made of does; contention scales what is felt."""
    speeds = lane_speeds((0.5, 0.5), (0.9, 0.9), (0.85, 0.85))
    nano, _ = measured_answer((0.85, 0.85))
    plan = plan_of(mixed_step(), nano)

    def makespan_s(of, **fields) -> float:
        machine = overlap_machine(lane_speeds=(of,), **fields)
        return nano_makespan_s(plan, NanoCosts(CostModel(LLAMA_8B, machine)))

    slowed = lane_speeds((0.5, 0.5), (0.9, 0.9), (0.85, 0.85), linear__attention_decode=(0.4, 0.4))
    assert makespan_s(slowed) > 1.2 * makespan_s(speeds)
    assert makespan_s(slowed, contention=0.0) == makespan_s(speeds, contention=0.0) < makespan_s(speeds)
    elsewhere = lane_speeds((0.75, 0.25), (0.9, 0.9), (0.85, 0.85))
    assert makespan_s(elsewhere) == makespan_s(speeds)  # shares that were not measured go by the nearest that were


def test_classes_are_lanes():
    """Decode attention is memory's; linears of many rows compute's, of few rows memory's; what has no rows goes along."""
    costs = NanoCosts(model())
    names = [node.name for node in costs.nodes]
    chunk, decodes = shape_of(step((0, 1024, False))), shape_of(step(*[(999, 1)] * 8))
    lanes = dict(zip(names, costs.lanes(chunk), strict=True))
    assert [lanes[f"layers.0.{name}"] for name in ("qkv", "attention", "o", "gate_up", "down")] == [0] * 5
    assert lanes["embedding"] == lanes["copy_pages"] == 1
    assert lanes["logits"] == lanes["sampling"] == 0  # no row samples: they follow the last layer
    assert set(costs.lanes(decodes)) == {1}
    assert class_lanes(LLAMA_8B, decodes) == costs.lanes(decodes)


def broken(plan: LanePlan, **fields) -> LanePlan:
    return replace(plan, nano=replace(plan.nano, **fields))


def test_the_check_finds_every_rule_that_is_broken():
    """A prompt cut in the middle, attention on different lanes: lock step on a chunk whose second piece is one token."""
    requests = step((0, 33))
    cutter = NanoPlanner(SchedulerConfig(num_pages=100), None, SMALL)
    nano = cutter.plan(requests, 2)
    counts = (32, 1)
    pieces = split_requests(requests, counts)
    assert [s.num_tokens for piece in pieces for s in piece] == [32, 1]
    nano = cutter._plan(requests, counts, (0.5, 0.5), (0, 1) * len(SMALL.nodes()), "test")
    plan = plan_of(requests, nano)
    check_nano_plan(plan, SMALL)
    ranges = nano.ranges
    attention = next(i for i, node in enumerate(SMALL.nodes()) if node.kind == "attention")
    waiting = next(i for i, entry in enumerate(ranges) if entry.nano == 1 and entry.first == attention)
    assert len(ranges[waiting].after) >= 1  # nano-batch 1 reads what 0 appends, on the other lane

    def without_waits(index: int) -> tuple:
        return (*ranges[:index], ranges[index]._replace(after=()), *ranges[index + 1 :])

    cases = {
        "has no nano-batches": replace(plan, nano=None),
        "counts:": broken(plan, token_counts=(32, 2)),
        "wanted 2 to 4": broken(plan, token_counts=(33,)),
        "shares:": broken(plan, shares=(0.75, 0.5)),
        "waits: .* may start before": broken(plan, ranges=without_waits(waiting)),
        "waits: range 0 waits for": broken(plan, ranges=(ranges[0]._replace(after=(1,)), *ranges[1:])),
        "nano-batches end at nodes": broken(plan, ranges=ranges[:-1]),
        "order: range": broken(plan, ranges=(ranges[0], *ranges)),
        "which copies pages": broken(plan, ranges=(ranges[1], ranges[0], *ranges[2:])),
        "no such nano-batch or lane": broken(plan, ranges=(*ranges[:-1], ranges[-1]._replace(lane=2))),
    }
    for message, bad in cases.items():
        with pytest.raises(AssertionError, match=message):
            check_nano_plan(bad, SMALL)


def spans_of(plan: LanePlan, seconds: int = 10) -> list[tuple[int, int, int, int]]:
    """As an ideal runner does it, every node in so many units of time."""
    ended: dict[int, int] = {}
    lane_end, spans = [0, 0], []
    for index, entry in enumerate(plan.nano.ranges):
        start = max([lane_end[entry.lane], *(ended[needed] for needed in entry.after)])
        for node in range(entry.first, entry.last):
            spans.append((entry.nano, node, start, start + seconds))
            start += seconds
        ended[index] = lane_end[entry.lane] = start
    return spans


@given(cut_step().filter(lambda case: len(case[1]) > 1))
@settings(max_examples=60, deadline=None)
def test_spans_of_a_plan_that_holds_hold(case):
    requests, counts = case
    cutter = NanoPlanner(SchedulerConfig(num_pages=100), None, SMALL)
    nano = cutter._plan(requests, counts, (0.5, 0.5), tuple(range(len(counts))) * len(SMALL.nodes()), "test")
    plan = plan_of(requests, nano)
    spans = spans_of(plan)
    check_nano_plan(plan, SMALL, spans)
    with pytest.raises(AssertionError, match="ran twice"):
        check_nano_plan(plan, SMALL, [*spans, spans[0]])
    last = spans[-1]
    with pytest.raises(AssertionError, match=r"parents|class"):
        check_nano_plan(plan, SMALL, [*spans[:-1], (*last[:2], last[2] - 11, last[3] - 11)])


def test_operators_of_one_class_that_overlap_are_found():
    requests = step((0, 64), (0, 64))
    cutter = NanoPlanner(SchedulerConfig(num_pages=100), None, SMALL)
    plan = plan_of(requests, cutter.plan(requests, 2))
    spans = spans_of(plan)
    check_nano_plan(plan, SMALL, spans)
    # The whole second nano-batch a little earlier: its own order holds, nothing is cut, but it meets the first one's.
    shifted = [(nano, node, start - 3 * nano, end - 3 * nano) for nano, node, start, end in spans]
    with pytest.raises(AssertionError, match="class: .* overlap by 3"):
        check_nano_plan(plan, SMALL, shifted)
    check_nano_plan(plan, SMALL, shifted, slack=3)
