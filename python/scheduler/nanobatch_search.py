"""The search for nano-batches: how many, cut where, in which order, with which shares of the chip (NanoFlow's
auto-search, arXiv 2408.12757 section 4.2, without a solver).

    stage I    structure: every way to cut the rows at a handful of places, every order (small work) or a handful of them,
               operators at solo speed
    stage II   shares: for the best structures, from the balanced pair of shares uphill to the best; operators as slow as
               their lane's share makes them, and drawing from the same memory

Small work is searched in one go instead, every cut at every pair of shares with its best order: the optimum of what can be
said. A search is a generator that yields after a piece of work of some hundred microseconds, so that whoever has no
millisecond to spare can do it bit by bit; it depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import combinations
from typing import NamedTuple

from scheduler.nanobatch import MAX_NANO_BATCHES, NanoRange
from scheduler.nanobatch_orders import EXACT_STATES, RULES, best_order, list_order, num_states
from scheduler.nanobatch_tables import SOLO, NanoTable
from scheduler.nanobatch_timeline import NanoWork, ranges_makespan_s, ranges_of

TILE_TOKENS = 16  # matrix products round up to it, so cuts are at whole tiles
SMALL_STEP_TOKENS = 64  # where tiles would leave no choice: cuts anywhere
MAX_CUT_PLACES = 8  # a step is cut at multiples of one part in so many
STRUCTURES_KEPT = 2  # per number of nano-batches, for stage II


class NanoStructure(NamedTuple):
    """A found way to run a step."""

    token_counts: tuple[int, ...]
    shares: tuple[float, float]
    order: tuple[int, ...]
    makespan_s: float
    sequential_s: float

    @property
    def gain(self) -> float:
        """Part of the sequential time that is saved; negative where cutting loses."""
        return 1.0 - self.makespan_s / self.sequential_s


def cuts(num_tokens: int, num_nano: int) -> list[tuple[int, ...]]:
    """The ways to cut that are looked at: token counts per nano-batch. Empty if there are too few tokens."""
    if num_tokens < SMALL_STEP_TOKENS:
        step = max(1, -(-num_tokens // MAX_CUT_PLACES))
    else:
        step = TILE_TOKENS * -(-num_tokens // (TILE_TOKENS * MAX_CUT_PLACES))
    places = range(step, num_tokens, step)
    return [
        tuple(last - first for first, last in zip((0, *chosen), (*chosen, num_tokens), strict=True))
        for chosen in combinations(places, num_nano - 1)
    ]


def makespan_s(work: NanoWork, order: Sequence[int], table: NanoTable) -> float:
    """Of an order, as the ranges that it becomes."""
    return ranges_makespan_s(_ranges(work, order), work.chains, table.contention)


def _ranges(work: NanoWork, order: Sequence[int]) -> tuple[NanoRange, ...]:
    lanes = [[operator.lane for operator in chain] for chain in work.chains]
    return ranges_of(order, lanes, work.is_cut, work.is_attention)


def search(
    table: NanoTable, num_nano: int, whole: NanoTable | None = None
) -> Generator[None, None, NanoStructure | None]:
    """The best structure of num_nano nano-batches; None if there are too few tokens. whole: the table that the result is
    for, where `table` holds only some of its layers. It may lose against one batch: see NanoStructure.gain."""
    if not 2 <= num_nano <= MAX_NANO_BATCHES:
        raise ValueError(f"search: got num_nano {num_nano}, wanted 2 to {MAX_NANO_BATCHES}")
    ways = cuts(table.num_tokens, num_nano)
    if not ways:
        return None
    num_nodes = len(table.work(ways[0], SOLO).is_attention)
    if (num_nodes + 1) ** num_nano <= EXACT_STATES and table.contention is None:
        found = yield from _search_all(table, ways)
    else:
        found = yield from _search_in_stages(table, ways)
    if whole is None or whole is table:
        return found
    return (yield from _for_whole(whole, found))


def finish(steps: Generator) -> NanoStructure | None:
    """A search in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _search_all(table: NanoTable, ways: Sequence[tuple[int, ...]]) -> Generator[None, None, NanoStructure]:
    sequential_s = table.sequential_s()
    best: NanoStructure | None = None
    for shares in table.share_pairs:
        for counts in ways:
            work = table.work(counts, shares)
            if best is None or max(work.lane_seconds()) < best.makespan_s:
                order, order_s = best_order(work)
                if best is None or order_s < best.makespan_s:
                    best = NanoStructure(counts, shares, order, order_s, sequential_s)
            yield
    return best


def _search_in_stages(table: NanoTable, ways: Sequence[tuple[int, ...]]) -> Generator[None, None, NanoStructure]:
    kept: list[tuple[float, tuple[int, ...], tuple[float, float]]] = []  # (solo makespan, counts, seconds of the lanes)
    for counts in ways:
        work = table.work(counts, SOLO)
        lane_s = work.lane_seconds()
        yield
        if len(kept) == STRUCTURES_KEPT and max(lane_s) >= kept[-1][0]:
            continue  # even without any wait it would not be among the best
        order_s = yield from _best_rule(work)
        kept.append((order_s, counts, lane_s))
        kept.sort()
        del kept[STRUCTURES_KEPT:]
    sequential_s = table.sequential_s()
    best: NanoStructure | None = None
    for _, counts, lane_s in kept:
        found = yield from _climb(table, counts, lane_s, sequential_s)
        if best is None or found.makespan_s < best.makespan_s:
            best = found
    return best


def _best_rule(work: NanoWork) -> Generator[None, None, float]:
    """Makespan at solo speed of the best order."""
    if num_states(work) <= EXACT_STATES // 4:
        order_s = best_order(work)[1]
        yield
        return order_s
    makespans = []
    for rule in RULES:
        _, order_s = yield from list_order(work, rule)
        makespans.append(order_s)
        yield
    return min(makespans)


def _climb(
    table: NanoTable, counts: tuple[int, ...], lane_s: tuple[float, float], sequential_s: float
) -> Generator[None, None, NanoStructure]:
    """Uphill over the pairs of shares, from the one that gives the lanes about what they have to do."""
    pairs = table.share_pairs
    wanted = lane_s[0] / max(lane_s[0] + lane_s[1], 1e-12)
    position = min(range(len(pairs)), key=lambda i: (abs(pairs[i][0] - wanted), i))
    known: dict[int, NanoStructure] = {}

    def at(index: int) -> Generator[None, None, NanoStructure]:
        if index not in known:
            known[index] = yield from _best_at(table, counts, pairs[index], sequential_s)
        return known[index]

    best = yield from at(position)
    while True:
        neighbours = []
        for index in (position - 1, position + 1):
            if 0 <= index < len(pairs):
                found = yield from at(index)
                neighbours.append((found.makespan_s, index))
        better = min(neighbours, default=(best.makespan_s, position))
        if better[0] >= best.makespan_s:
            return best
        position = better[1]
        best = known[position]


def _best_at(
    table: NanoTable, counts: tuple[int, ...], shares: tuple[float, float], sequential_s: float
) -> Generator[None, None, NanoStructure]:
    """The best order at these shares, with contention."""
    work = table.work(counts, shares)
    best: NanoStructure | None = None
    yield
    for rule in RULES:
        order, _ = yield from list_order(work, rule)
        yield
        ranges = _ranges(work, order)
        yield
        order_s = ranges_makespan_s(ranges, work.chains, table.contention)
        if best is None or order_s < best.makespan_s:
            best = NanoStructure(counts, shares, order, order_s, sequential_s)
        yield
    return best


def _for_whole(whole: NanoTable, found: NanoStructure) -> Generator[None, None, NanoStructure]:
    return (yield from _best_at(whole, found.token_counts, found.shares, whole.sequential_s()))
