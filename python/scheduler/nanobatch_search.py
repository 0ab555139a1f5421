"""The search for nano-batches: how many, cut where, in which order, with which shares of the chip (NanoFlow's
auto-search, arXiv 2408.12757 section 4.2, without a solver).

    stage I    structure: every way to cut the rows at a handful of places, a handful of orders, at the pair of shares that
               balances the lanes (NanoFlow: at solo speed, as if there were no interference. Tried: many cuts are then
               equally good, and the one that was kept lost up to 9 % against another once shares were real)
    stage II   shares: for the best structures, from there uphill to the best pair, with the lanes drawing from the same
               memory

Small work is searched in one go instead, every cut at every pair of shares with its best order: the optimum of what can be
said. A search is a generator that yields after a piece of work of some hundred microseconds, so that whoever has no
millisecond to spare can do it bit by bit; it depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import combinations
from typing import NamedTuple

from scheduler.nanobatch import MAX_NANO_BATCHES
from scheduler.nanobatch_orders import (
    EXACT_ORDERS,
    EXACT_STATES,
    RULES,
    best_order,
    every_order,
    list_order,
    num_orders,
)
from scheduler.nanobatch_tables import NanoTable
from scheduler.nanobatch_timeline import NanoWork, makespan_steps, ranges_makespan_s, ranges_of

TILE_TOKENS = 16  # matrix products round up to it, so cuts are at whole tiles
SMALL_STEP_TOKENS = 64  # where tiles would leave no choice: cuts anywhere
MAX_CUT_PLACES = 8  # a step is cut at multiples of one part in so many
STRUCTURES_KEPT = 4  # per number of nano-batches, for stage II


class NanoStructure(NamedTuple):
    """A found way to run a step."""

    token_counts: tuple[int, ...]
    shares: tuple[float, float]
    order: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]  # [nano-batch][node]
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


def makespan_s(work: NanoWork, order: Sequence[int]) -> float:
    """Of an order, as the ranges that it becomes. Raises ValueError if attention over a cut chunk comes before the
    attention that appends what it reads."""
    ranges = ranges_of(order, work.lanes(), work.is_cut, work.is_attention)
    return ranges_makespan_s(ranges, work.chains, work.contention)


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
    if _is_small(table.work(ways[0], table.share_pairs[0])):
        found = yield from _search_all(table, ways)
    else:
        found = yield from _search_in_stages(table, ways)
    if whole is None or whole is table:
        return found
    return (yield from structure_at(whole, found.token_counts, found.shares))


def _is_small(work: NanoWork) -> bool:
    """Every order can be looked at: by states while lanes do not touch each other, else one by one."""
    num_nano, num_nodes = len(work.chains), len(work.is_attention)
    if work.contention is None:
        return (num_nodes + 1) ** num_nano <= EXACT_STATES
    return num_orders(num_nodes, num_nano) <= EXACT_ORDERS


def _best_of_all_orders(work: NanoWork) -> Generator[None, None, tuple[tuple[int, ...], float]]:
    best: tuple[float, tuple[int, ...]] | None = None
    for order in every_order(work):
        order_s = makespan_s(work, order)
        yield
        if best is None or order_s < best[0]:
            best = order_s, order
    return best[1], best[0]


def _search_all(table: NanoTable, ways: Sequence[tuple[int, ...]]) -> Generator[None, None, NanoStructure]:
    sequential_s = table.sequential_s()
    best: NanoStructure | None = None
    for shares in table.share_pairs:
        for counts in ways:
            work = table.work(counts, shares)
            if best is None or max(work.lane_seconds()) < best.makespan_s:
                order, order_s = best_order(work) if work.contention is None else (yield from _best_of_all_orders(work))
                if best is None or order_s < best.makespan_s:
                    best = NanoStructure(counts, shares, order, work.lanes(), order_s, sequential_s)
            yield
    return best


def _search_in_stages(table: NanoTable, ways: Sequence[tuple[int, ...]]) -> Generator[None, None, NanoStructure]:
    position = yield from _balanced_pair(table, ways)
    sequential_s = table.sequential_s()
    kept: list[tuple[float, tuple[int, ...]]] = []  # (makespan, counts)
    for counts in ways:
        work = table.work(counts, table.share_pairs[position])
        yield
        if len(kept) == STRUCTURES_KEPT and max(work.lane_seconds()) >= kept[-1][0]:
            continue  # even without any wait it would not be among the best
        found = yield from _best_order_of(work, counts, table.share_pairs[position], sequential_s)
        kept.append((found.makespan_s, counts))
        kept.sort()
        del kept[STRUCTURES_KEPT:]
    best: NanoStructure | None = None
    for _, counts in kept:
        found = yield from _climb(table, counts, position, sequential_s)
        if best is None or found.makespan_s < best.makespan_s:
            best = found
    return best


def _balanced_pair(table: NanoTable, ways: Sequence[tuple[int, ...]]) -> Generator[None, None, int]:
    """Index of the pair of shares at which the busier lane has least to do, by the way whose parts are most even and the
    one whose parts are least so."""
    by_evenness = sorted(ways, key=lambda counts: (max(counts) - min(counts), counts))
    bounds = []
    for index, shares in enumerate(table.share_pairs):
        for counts in (by_evenness[0], by_evenness[-1]):
            bounds.append((max(table.work(counts, shares).lane_seconds()), index))
            yield
    return min(bounds)[1]


def _climb(
    table: NanoTable, counts: tuple[int, ...], position: int, sequential_s: float
) -> Generator[None, None, NanoStructure]:
    """Uphill over the pairs of shares, from that at `position`."""
    pairs = table.share_pairs
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
    work = table.work(counts, shares)
    yield
    return (yield from _best_order_of(work, counts, shares, sequential_s))


def _best_order_of(
    work: NanoWork, counts: tuple[int, ...], shares: tuple[float, float], sequential_s: float
) -> Generator[None, None, NanoStructure]:
    """The order that is best at these shares before contention, with what contention makes of it."""
    best: tuple[float, tuple[int, ...]] | None = None
    for rule in RULES:
        order, order_s = yield from list_order(work, rule)
        yield
        if best is None or order_s < best[0]:
            best = order_s, order
    lanes = work.lanes()
    ranges = ranges_of(best[1], lanes, work.is_cut, work.is_attention)
    yield
    order_s = yield from makespan_steps(ranges, work.chains, work.contention)
    return NanoStructure(counts, shares, best[1], lanes, order_s, sequential_s)


def structure_at(
    table: NanoTable, token_counts: tuple[int, ...], shares: tuple[float, float]
) -> Generator[None, None, NanoStructure]:
    """A structure that was found for other work, on this table: its cut and shares, with the best order for them here."""
    return _best_at(table, token_counts, shares, table.sequential_s())
