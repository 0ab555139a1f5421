"""What two lanes of nano-batches do to each other while both are busy: by their traffic, or as it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple, Protocol

from scheduler.lane_speeds import LaneSpeeds


class Operator(NamedTuple):
    """One node of one nano-batch, on its lane's share of the chip with nothing beside it."""

    lane: int
    alone_s: float
    busy_s: float = 0.0  # of alone_s, without what launching takes
    memory_s: float = 0.0  # of busy_s, how long the bytes take when nobody else draws
    num_bytes: float = 0.0
    attention_s: float = 0.0  # of alone_s


class Load(NamedTuple):
    """Operators that run one after the other, taken together."""

    alone_s: float
    busy_s: float
    memory_s: float
    num_bytes: float
    attention_s: float


class Contention(Protocol):
    def stretches(self, compute: Load, memory: Load) -> tuple[float, float]:
        """How many times longer than alone each takes while the other is there, at least 1."""
        ...


class BandwidthContention(NamedTuple):
    """Both draw from the same memory (as step_cost.StepCost has it)."""

    shared_bytes_per_s: float = inf
    strength: float = 1.0

    def stretches(self, compute: Load, memory: Load) -> tuple[float, float]:
        demands = [load.num_bytes / load.alone_s if load.alone_s > 0.0 else 0.0 for load in (compute, memory)]
        excess = (demands[0] + demands[1]) / self.shared_bytes_per_s - 1.0
        if excess <= 0.0 or demands[0] <= 0.0 or demands[1] <= 0.0:
            return 1.0, 1.0
        slowed = [load.memory_s * (1.0 + self.strength * excess) - load.busy_s for load in (compute, memory)]
        return 1.0 + max(0.0, slowed[0]) / compute.alone_s, 1.0 + max(0.0, slowed[1]) / memory.alone_s


class MeasuredContention:
    """Pairs of classes at one cut of the machine. Of a range that holds operators of both classes, each part is beside
    each part of the other's in proportion to their times."""

    def __init__(self, speeds: LaneSpeeds, strength: float = 1.0) -> None:
        """strength: of what was measured, how much is felt (Machine.contention)."""
        pairs = [speeds.pair_stretches(own, other) for own in (False, True) for other in (False, True)]
        self._excess = tuple(tuple(strength * (stretch - 1.0) for stretch in pair) for pair in pairs)

    def stretches(self, compute: Load, memory: Load) -> tuple[float, float]:
        if compute.alone_s <= 0.0 or memory.alone_s <= 0.0:
            return 1.0, 1.0
        own, other = compute.attention_s / compute.alone_s, memory.attention_s / memory.alone_s
        weights = ((1.0 - own) * (1.0 - other), (1.0 - own) * other, own * (1.0 - other), own * other)
        first = second = 1.0
        for weight, (first_excess, second_excess) in zip(weights, self._excess, strict=True):
            first += weight * first_excess
            second += weight * second_excess
        return first, second


def joined(chain: Sequence[Operator], first: int, last: int) -> Load:
    """Nodes [first, last) of a nano-batch."""
    alone_s = busy_s = memory_s = num_bytes = attention_s = 0.0
    for node in range(first, last):
        _, node_alone_s, node_busy_s, node_memory_s, node_bytes, node_attention_s = chain[node]
        alone_s += node_alone_s
        busy_s += node_busy_s
        memory_s += node_memory_s
        num_bytes += node_bytes
        attention_s += node_attention_s
    return Load(alone_s, busy_s, memory_s, num_bytes, attention_s)
