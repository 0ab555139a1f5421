"""The search for nano-batches against brute force, on tables that are made up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch_contention import BandwidthContention, Load, MeasuredContention, Operator
from scheduler.nanobatch_orders import RULES, best_order, list_order, lock_step
from scheduler.nanobatch_search import cuts, makespan_s, search
from scheduler.nanobatch_tables import NanoCosts, StepTable, TypicalStep
from scheduler.nanobatch_timeline import NanoWork, finish, ranges_makespan_s, ranges_of
from tests.kit.lane_speeds import lane_speeds
from tests.scheduler.made_up_table import MadeUpTable

# NanoFlow's pairs for GEMM and GEMV, from the reference (systems.md 2.3): share -> part of the solo speed.
ACHIEVED = {
    "compute": ((0.1, 0.1), (0.6, 0.6), (0.9, 0.9)),
    "memory": ((0.1, 0.2), (0.2, 0.3), (0.4, 0.8), (0.8, 0.85), (0.9, 0.95)),
}
PAIRS = ((0.2, 0.8), (0.4, 0.6), (0.6, 0.4), (0.8, 0.2))


def every_order(num_nodes: int, num_nano: int):
    """All that keep the order of the program within each nano-batch, and in which they begin in plan order."""

    def extend(order: tuple[int, ...], position: list[int]):
        if len(order) == num_nodes * num_nano:
            yield order
            return
        for nano in range(num_nano):
            if position[nano] < num_nodes and (nano == 0 or position[nano - 1] > 0):
                position[nano] += 1
                yield from extend((*order, nano), position)
                position[nano] -= 1

    return extend((), [0] * num_nano)


def order_seconds(work: NanoWork, order: tuple[int, ...]) -> float | None:
    """By the definition: an operator starts when its lane, its nano-batch and what it reads are done. None: the order has
    attention over a cut chunk before the one that appends what it reads."""
    end: dict[tuple[int, int], float] = {}
    lane_end, position = [0.0, 0.0], [0] * len(work.chains)
    for nano in order:
        node = position[nano]
        position[nano] += 1
        operator = work.chains[nano][node]
        start = max(lane_end[operator.lane], end.get((nano, node - 1), 0.0))
        if nano and work.is_attention[node] and work.is_cut[nano - 1]:
            if (nano - 1, node) not in end:
                return None
            start = max(start, end[nano - 1, node])
        end[nano, node] = lane_end[operator.lane] = start + operator.alone_s
    return max(end.values())


def brute_force(table: MadeUpTable, num_nano: int) -> float:
    """Every cut, every pair of shares, every order."""
    best = None
    for shares in table.share_pairs:
        for counts in cuts(table.num_tokens, num_nano):
            work = table.work(counts, shares)
            for order in every_order(len(work.is_attention), num_nano):
                seconds = order_seconds(work, order)
                if seconds is not None and (best is None or seconds < best):
                    best = seconds
    return best


@pytest.mark.parametrize("beside", [(0.55, 0.75), (0.35, 0.45)])
def test_the_search_over_a_machines_measured_table_equals_brute_force(beside):
    """The planner's own table: one layer, two cuts of the machine, pairs with speeds of their own, all orders."""
    spec = ModelSpec("one layer", 4096, 1, 32, 8, 128, 14336, 32000, device="gpu", inner_bytes=2)
    machine = Machine(
        "measured", "made up", 2.5e12, {"default": ClassRates(((1, 1e13), (128, 5e14)), 2.5e12, 2e-6)},
        rungs=(0.25, 0.75, 1.0),
        lane_speeds=(
            lane_speeds((0.25, 0.75), (0.3, 0.95), (0.28, 0.9), linear__attention_decode=(0.25, 0.7)),
            lane_speeds((0.75, 0.25), (0.8, 0.6), beside, attention_chunk__linear=(0.3, 0.3)),
        ),
    )  # fmt: skip
    table = StepTable(NanoCosts(CostModel(spec, machine)), TypicalStep(96, 2048, 160, 0), max_layers=1)
    found = finish(search(table, 2))
    best = None
    for shares in table.share_pairs:
        for counts in cuts(table.num_tokens, 2):
            work = table.work(counts, shares)
            assert work.contention is not None
            for order in every_order(len(work.is_attention), 2):
                if order_seconds(work, order) is not None:
                    seconds = makespan_s(work, order)
                    best = seconds if best is None else min(best, seconds)
    assert found.makespan_s == pytest.approx(best)
    assert makespan_s(table.work(found.token_counts, found.shares), found.order) == pytest.approx(best)


def test_measured_pairs_stretch_each_part_by_what_it_is_beside():
    speeds = lane_speeds((0.5, 0.5), (0.8, 0.8), (0.8, 0.8), linear__attention_decode=(0.4, 0.2))
    contention = MeasuredContention(speeds)
    linear, attention = Load(1.0, 1.0, 0.0, 0.0, 0.0), Load(1.0, 1.0, 1.0, 0.0, 1.0)
    half = Load(1.0, 1.0, 0.5, 0.0, 0.5)
    assert contention.stretches(linear, attention) == pytest.approx((2.0, 4.0))
    assert contention.stretches(linear, linear) == contention.stretches(attention, attention) == (1.0, 1.0)
    assert contention.stretches(linear, half) == pytest.approx((1.5, 2.5))
    assert MeasuredContention(speeds, 0.5).stretches(linear, attention) == pytest.approx((1.5, 2.5))


# Whole milliseconds, so that sums are exact enough to be compared; 0: a node that has nothing to do
SECONDS = st.integers(0, 9).map(lambda ms: ms * 1e-3)


@st.composite
def works(draw, max_nano: int = 3) -> NanoWork:
    num_nano = draw(st.integers(2, max_nano))
    num_nodes = draw(st.integers(1, 5 if num_nano == 2 else 3))
    lanes = st.integers(0, 1)
    chains = tuple(tuple(Operator(draw(lanes), draw(SECONDS)) for _ in range(num_nodes)) for _ in range(num_nano))
    is_cut = tuple(draw(st.booleans()) for _ in range(num_nano - 1))
    return NanoWork(chains, is_cut, tuple(draw(st.booleans()) for _ in range(num_nodes)))


@given(works())
@settings(max_examples=150, deadline=None)
def test_the_best_order_is_that_of_brute_force(work):
    orders = every_order(len(work.is_attention), len(work.chains))
    best = min(seconds for order in orders if (seconds := order_seconds(work, order)) is not None)
    order, seconds = best_order(work)
    assert seconds == pytest.approx(best)
    assert order_seconds(work, order) == pytest.approx(best)


@given(works(max_nano=4))
@settings(max_examples=150, deadline=None)
def test_ranges_take_what_their_order_takes_and_rules_never_beat_the_best(work):
    """Nodes that are joined to ranges, and waits that are declared only across lanes, change no time."""
    num_nodes, num_nano = len(work.is_attention), len(work.chains)
    lanes = [[operator.lane for operator in chain] for chain in work.chains]
    best = best_order(work)[1] if num_nano < 4 else max(work.lane_seconds())
    listed = [finish(list_order(work, rule)) for rule in RULES]
    locked = lock_step(num_nodes, num_nano)
    for order, seconds in [*listed, (locked, order_seconds(work, locked))]:
        assert seconds == pytest.approx(order_seconds(work, order))
        ranges = ranges_of(order, lanes, work.is_cut, work.is_attention)
        assert ranges_makespan_s(ranges, work.chains) == pytest.approx(seconds)
        assert seconds >= best - 1e-12
        assert seconds >= max(work.lane_seconds()) - 1e-12


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_search_finds_the_optimum_of_brute_force(data):
    num_nodes = data.draw(st.integers(2, 4))
    classes = data.draw(st.lists(st.sampled_from(["compute", "memory"]), min_size=num_nodes, max_size=num_nodes))
    fixed_ms = data.draw(st.lists(st.integers(0, 3), min_size=num_nodes, max_size=num_nodes))
    row_ms = data.draw(st.lists(st.integers(1, 5), min_size=num_nodes, max_size=num_nodes))
    is_attention = [name == "memory" and data.draw(st.booleans()) for name in classes]
    table = MadeUpTable(
        8, classes, lambda node, rows: (fixed_ms[node] + rows * row_ms[node]) * 1e-3, ACHIEVED, PAIRS, is_attention,
        has_chunk=data.draw(st.booleans()),
    )  # fmt: skip
    found = finish(search(table, 2))
    assert found.makespan_s == pytest.approx(brute_force(table, 2))
    work = table.work(found.token_counts, found.shares)
    assert makespan_s(work, found.order) == pytest.approx(found.makespan_s)
    assert sum(found.token_counts) == 8


def test_three_nano_batches_are_searched_exactly_too():
    table = MadeUpTable(
        6, ["compute", "memory", "compute"], lambda node, rows: rows * (1 + node) * 1e-3, ACHIEVED, PAIRS
    )
    assert finish(search(table, 3)).makespan_s == pytest.approx(brute_force(table, 3))


def layers_table(num_layers: int, compute_ms: float, memory_ms: float, fixed_ms: float = 0.0) -> MadeUpTable:
    """[qkv, attention, o, gate_up, down] per layer, of 512 rows: compute_ms of linears, memory_ms of attention."""
    kinds = ["compute", "memory", "compute", "compute", "compute"]
    parts = [0.15 * compute_ms, memory_ms, 0.1 * compute_ms, 0.5 * compute_ms, 0.25 * compute_ms]

    def seconds(node: int, rows: int) -> float:
        return (parts[node % 5] * rows / 512 + fixed_ms) * 1e-3

    is_attention = [node % 5 == 1 for node in range(5 * num_layers)]
    return MadeUpTable(512, kinds * num_layers, seconds, ACHIEVED, PAIRS, is_attention, has_chunk=False)


def test_where_overlap_pays_the_makespan_is_between_bound_and_sequential():
    """A long program: the two stages, rules for orders. Shares of 0.6 and 0.4 leave compute 0.6 and
    memory 0.8 of its speed: 1 / 0.6 ms per layer at best, against 1.8 ms one after the other."""
    table = layers_table(8, compute_ms=1.0, memory_ms=0.8)
    for num_nano in (2, 3, 4):
        found = finish(search(table, num_nano))
        work = table.work(found.token_counts, found.shares)
        assert max(work.lane_seconds()) - 1e-12 <= found.makespan_s < 0.95 * found.sequential_s
        assert found.gain > 0.05
        solo = table.work(found.token_counts, (1.0, 1.0))
        assert found.makespan_s > max(solo.lane_seconds())  # interference costs something


def test_two_stages_come_near_the_optimum_of_a_program_small_enough_for_both():
    """Cuts of stage I are chosen without interference; here that costs nothing, and orders by rules little."""
    table = layers_table(2, compute_ms=1.0, memory_ms=0.8)
    table.contention = BandwidthContention()  # infinite bandwidth: same times, but not the exhaustive way
    staged = finish(search(table, 2))
    table.contention = None
    exhaustive = finish(search(table, 2))
    assert exhaustive.makespan_s <= staged.makespan_s + 1e-12
    assert staged.makespan_s <= 1.1 * exhaustive.makespan_s


def test_where_it_does_not_pay_the_gain_says_so():
    """No memory work to hide; or each operator costs so much however few its rows that two of them cost twice."""
    assert finish(search(layers_table(4, compute_ms=1.0, memory_ms=0.01), 2)).gain < 0
    assert finish(search(layers_table(4, compute_ms=1.0, memory_ms=0.8, fixed_ms=1.0), 2)).gain < 0


def test_contention_stretches_what_waits_for_memory():
    """Two operators of 1 s that both want 0.8 of the bandwidth: 1.6 of it together, so that both take 1.6 s."""
    work = NanoWork(((Operator(0, 1.0, 1.0, 1.0, 80.0),), (Operator(1, 1.0, 1.0, 1.0, 80.0),)), (False,), (False,))
    ranges = ranges_of((0, 1), [[0], [1]], work.is_cut, work.is_attention)
    assert ranges_makespan_s(ranges, work.chains) == pytest.approx(1.0)
    assert ranges_makespan_s(ranges, work.chains, BandwidthContention(100.0)) == pytest.approx(1.6)
    assert ranges_makespan_s(ranges, work.chains, BandwidthContention(100.0, 0.5)) == pytest.approx(1.3)


def test_cuts_are_whole_tiles_or_anywhere_in_small_steps():
    for counts in cuts(1000, 3):
        assert sum(counts) == 1000 and all(count % 16 == 0 for count in counts[:-1])
    assert set(cuts(4, 2)) == {(1, 3), (2, 2), (3, 1)}
    assert cuts(1, 2) == []
    assert all(len(counts) == 4 and min(counts) > 0 for counts in cuts(2048, 4))


def test_an_order_that_breaks_a_dependency_is_refused():
    lanes = [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="attention 1 of nano-batch 1 comes before"):
        ranges_of((0, 1, 1, 0), lanes, (True,), (False, True))
    waits = ranges_of((0, 1, 1, 0), lanes, (False,), (False, True))
    assert [entry.after for entry in waits] == [(), (), (1,), (0,)]


def test_a_search_is_cut_into_pieces_and_refuses_numbers_it_does_not_know():
    steps = search(layers_table(8, 1.0, 0.8), 2)
    assert sum(1 for _ in steps) > 50
    with pytest.raises(ValueError, match="num_nano 5, wanted 2 to 4"):
        next(search(layers_table(1, 1.0, 1.0), 5))
