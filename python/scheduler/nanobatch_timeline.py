"""Operators of nano-batches on two lanes: from an order to ranges, and from ranges to the time they take.

An *order* is a sequence of nano-batch numbers; each stands for the next node of that nano-batch. It is one of the ways to
run the nodes so that everything comes after what it needs, and each lane runs its own in this order: whatever the order
of the whole list, no two lanes can wait for each other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from scheduler.nanobatch import NanoRange
from scheduler.nanobatch_contention import Contention, Operator, joined


class NanoWork(NamedTuple):
    """A step that is cut."""

    chains: tuple[tuple[Operator, ...], ...]  # [nano-batch][node]; all of the same length
    is_cut: tuple[bool, ...]  # per boundary: it lies inside a request's tokens
    is_attention: tuple[bool, ...]  # per node
    contention: Contention | None = None  # between the lanes, at their shares; None: they do not touch each other

    def lanes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple([operator.lane for operator in chain]) for chain in self.chains)

    def lane_seconds(self) -> tuple[float, float]:
        """What each lane has to do: no order is done sooner than the larger of the two."""
        seconds = [0.0, 0.0]
        for chain in self.chains:
            for operator in chain:
                seconds[operator.lane] += operator.alone_s
        return seconds[0], seconds[1]


def ranges_of(
    order: Sequence[int], lanes: Sequence[Sequence[int]], is_cut: Sequence[bool], is_attention: Sequence[bool]
) -> tuple[NanoRange, ...]:
    """An order as ranges with the fewest entries that wait for nothing needlessly. lanes: [nano-batch][node].

    A range ends where its nano-batch changes the lane, where another nano-batch has its turn on the lane, and around an
    attention that waits for, or is waited for from, the other lane. Raises ValueError if attention over a cut chunk comes
    before the attention that appends what it reads.
    """
    num_nano = len(lanes)
    next_node = [0] * num_nano
    found: list[list] = []  # nano, first, last, lane, after
    last_on_lane = [-1, -1]  # range
    last_of_nano = [-1] * num_nano  # range
    is_closed: set[int] = set()
    attention_range: list[dict[int, int]] = [{} for _ in range(num_nano)]  # node -> range
    for nano in order:
        node = next_node[nano]
        next_node[nano] = node + 1
        lane = lanes[nano][node]
        current = last_of_nano[nano]
        awaited = -1  # range on the other lane whose keys this attention reads
        if nano and is_attention[node] and is_cut[nano - 1]:
            appended = attention_range[nano - 1].get(node)
            if appended is None:
                raise ValueError(f"ranges_of: attention {node} of nano-batch {nano} comes before that of {nano - 1}")
            if lanes[nano - 1][node] != lane:
                awaited = appended
        if (
            current >= 0 and found[current][3] == lane and last_on_lane[lane] == current
            and current not in is_closed and awaited < 0
        ):  # fmt: skip
            found[current][2] = node + 1
        else:
            after = {awaited} if awaited >= 0 else set()
            if current >= 0 and found[current][3] != lane:
                after.add(current)
            current = len(found)
            found.append([nano, node, node + 1, lane, tuple(sorted(after))])
            last_of_nano[nano] = last_on_lane[lane] = current
        if is_attention[node]:
            attention_range[nano][node] = current
            if nano + 1 < num_nano and is_cut[nano] and lanes[nano + 1][node] != lane:
                is_closed.add(current)
    return tuple(NanoRange(*fields) for fields in found)


EVENTS_PER_PAUSE = 100  # of makespan_steps: some hundred microseconds


def ranges_makespan_s(
    ranges: Sequence[NanoRange], chains: Sequence[Sequence[Operator]], contention: Contention | None = None
) -> float:
    """Until the last range ends, in a fluid model: each lane runs its ranges in order; while both are busy, each takes
    longer as far as the contention says. None: they do not touch each other."""
    return finish(makespan_steps(ranges, chains, contention))


def finish(steps: Generator[None, None, Any]) -> Any:
    """What a generator that is worked off bit by bit returns, in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def makespan_steps(
    ranges: Sequence[NanoRange], chains: Sequence[Sequence[Operator]], contention: Contention | None = None
) -> Generator[None, None, float]:
    """ranges_makespan_s, bit by bit."""
    loads = [joined(chains[entry.nano], entry.first, entry.last) for entry in ranges]
    queues: tuple[list[int], list[int]] = ([], [])
    for index, entry in enumerate(ranges):
        queues[entry.lane].append(index)
    has_ended = [False] * len(ranges)
    heads, running, left_s = [0, 0], [-1, -1], [0.0, 0.0]
    now, num_events = 0.0, 0
    while True:
        num_events += 1
        if num_events % EVENTS_PER_PAUSE == 0:
            yield
        for lane in (0, 1):
            if running[lane] < 0 and heads[lane] < len(queues[lane]):
                index = queues[lane][heads[lane]]
                if all(has_ended[needed] for needed in ranges[index].after):
                    running[lane], left_s[lane] = index, loads[index][0]
                    heads[lane] += 1
        first, second = running
        if first < 0 and second < 0:
            if heads[0] < len(queues[0]) or heads[1] < len(queues[1]):
                raise ValueError("ranges_makespan_s: the ranges wait for each other in a circle")
            return now
        if first >= 0 and second >= 0:
            paces = contention.stretches(loads[first], loads[second]) if contention is not None else (1.0, 1.0)
            step_s = min(left_s[0] * paces[0], left_s[1] * paces[1])
        else:
            paces = (1.0, 1.0)
            step_s = left_s[0] if first >= 0 else left_s[1]
        now += step_s
        for lane in (0, 1):
            index = running[lane]
            if index >= 0:
                left_s[lane] -= step_s / paces[lane]
                if left_s[lane] <= 1e-15 + 1e-12 * loads[index][0]:
                    has_ended[index] = True
                    running[lane] = -1
