"""What a step costs on its lane: alone, and beside lanes that draw from the same memory.

Apart from the cost model, which makes these of a shape and a machine, because what lanes do to each other is one concept
and does not ask what a step is made of.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.machine import Machine

# Builds a named tuple from its fields in order, at half its constructor's price.
make_tuple = tuple.__new__


class Segment(NamedTuple):
    """Nodes of one class and size, all of them together, alone on a lane's share."""

    node_class: str
    compute_s: float
    memory_s: float
    overhead_s: float
    num_bytes: float

    @property
    def duration_s(self) -> float:
        """Alone."""
        return self.overhead_s + (self.compute_s if self.compute_s > self.memory_s else self.memory_s)


class StepCost:
    """A step on one lane."""

    __slots__ = ("segments", "alone_s", "num_bytes", "compute_s", "_shared_bytes_per_s", "_contention")

    def __init__(self, segments: list[Segment], step_overhead_s: float, machine: Machine) -> None:
        self.segments = segments
        alone_s = step_overhead_s
        num_bytes = compute_s = 0.0
        for _, segment_compute_s, memory_s, overhead_s, segment_bytes in segments:
            alone_s += overhead_s + (segment_compute_s if segment_compute_s > memory_s else memory_s)
            compute_s += segment_compute_s
            num_bytes += segment_bytes
        self.alone_s = alone_s
        self.num_bytes = num_bytes
        self.compute_s = compute_s
        self._shared_bytes_per_s = machine.shared_bytes_per_s
        self._contention = machine.contention

    @property
    def demand_bytes_per_s(self) -> float:
        """What the step draws from memory when nothing slows it, on average."""
        return self.num_bytes / self.alone_s

    def duration_s(self, other_demand: float = 0.0) -> float:
        """Beside lanes that draw `other_demand` bytes/s. A segment and they get bandwidth in proportion to what they
        want (Nexus's m_d / (m_d + m_p)); where it suffices for both nobody is slowed. The others are taken at their
        undisturbed demand, which breaks the circle."""
        if other_demand <= 0.0:
            return self.alone_s
        shared, slowed_s = self._shared_bytes_per_s, 0.0
        for _, compute_s, memory_s, _, num_bytes in self.segments:
            alone_s = compute_s if compute_s > memory_s else memory_s
            if num_bytes <= 0.0 or alone_s <= 0.0:
                continue
            excess = (num_bytes / alone_s + other_demand) / shared - 1.0
            if excess > 0.0:
                # What the segment waits for memory stretches; what it computes does not.
                contended_s = memory_s * (1.0 + self._contention * excess)
                if contended_s > alone_s:
                    slowed_s += contended_s - alone_s
        return self.alone_s + slowed_s
