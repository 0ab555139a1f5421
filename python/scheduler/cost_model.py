"""What a step will take: the one model that the simulator, the controllers and the searches ask.

Per node: overhead + rows * row time + max(operations / compute rate, bytes / memory rate). The compute rate depends on
the rows and on the share of the machine, the memory rate on the share and on what other lanes draw meanwhile. A step is
the sum of its nodes.

    model = CostModel(spec, Machine.load("h100-sxm"))
    model.step_s(shape)                            # alone on the whole machine
    cost = model.step_cost(shape, share=0.5)
    cost.duration_s(other_demand)                  # beside lanes that draw so many bytes/s
    model.observe(shape, measured_s)               # refine

Layers are alike, so the nodes of a model fall into a few groups that are computed once and counted: some 10 microseconds
a step.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from scheduler.machine import Machine
from scheduler.model_spec import ModelSpec, NodeSpec
from scheduler.step_shape import StepShape

# Online corrections stay within these, so that one stalled step cannot make the model useless.
MIN_CORRECTION, MAX_CORRECTION = 0.25, 4.0
LEARNING_RATE = 0.05  # weight of the newest step in a correction
SATURATED = 0.9  # of the best throughput
_MAX_KNOWN_RATES = 1 << 15
GUARD_QUANTILE, GUARD_RATE = 0.95, 0.02  # of actual / predicted, for promises; tracked in steps of this rate
MAX_GUARD_RATIO = 2.0

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


class _Group(NamedTuple):
    node: NodeSpec
    count: int


class CostModel:
    """A model on a machine. Raises ValueError when a node's class has no rates."""

    def __init__(self, spec: ModelSpec, machine: Machine) -> None:
        self.spec = spec
        self.machine = machine
        self._nodes = spec.nodes()
        self._groups = _grouped(self._nodes)
        self._corrections: dict[str, float] = {}
        self._guard_ratio = 1.0
        # A run asks for the same few (class, rows, rows, share) again and again.
        self._known_rates: dict[tuple[str, float, int, float], tuple[float, float, float]] = {}
        self._saturating: dict[tuple[int, float], int] = {}
        self.window = spec.sliding_window

    # Predictions

    def step_s(self, shape: StepShape, share: float = 1.0) -> float:
        return self.step_cost(shape, share).alone_s

    def guarded_step_s(self, shape: StepShape, share: float = 1.0) -> float:
        """Longer than 95 of 100 steps turned out to be, for those who promise."""
        return self.step_s(shape, share) * max(1.0, self._guard_ratio)

    def step_cost(self, shape: StepShape, share: float = 1.0, node_range: tuple[int, int] | None = None) -> StepCost:
        """node_range: of the Program, None for all of it."""
        groups = self._groups if node_range is None else _grouped(self._nodes[node_range[0] : node_range[1]])
        segments: list[Segment] = []
        token_rows, logit_rows = shape.num_tokens, shape.num_logit_rows
        for node, count in groups:
            kind = node.kind
            if kind == "attention":
                self._add_attention(segments, node, count, shape, share)
                continue
            num_rows = token_rows if node.rows == "token" else logit_rows
            if num_rows == 0 or kind == "copy_pages":
                continue
            compute_rate, memory_rate, beside_s = self._rates(kind, num_rows, num_rows, share)
            num_bytes = count * (node.fixed_bytes + node.bytes_per_row * num_rows)
            compute_s = count * node.operations_per_row * num_rows / compute_rate
            fields = (kind, compute_s, num_bytes / memory_rate, count * beside_s, num_bytes)
            segments.append(make_tuple(Segment, fields))
        return StepCost(segments, self.machine.step_overhead_s, self.machine)

    def last_node_within(self, shape: StepShape, first: int, limit_s: float, share: float = 1.0) -> int:
        """The end of the longest range of nodes from `first` on that takes at most limit_s; at least one node."""
        low, high = first + 1, len(self._nodes)
        while low < high:
            middle = (low + high + 1) // 2
            if self.step_cost(shape, share, (first, middle)).alone_s <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low

    def saturating_tokens(self, most: int, share: float = 1.0) -> int:
        """The fewest tokens (16 times a power of two) of a prompt whose throughput is near the best that up to `most`
        tokens reach. As first asked for: corrections do not move it."""
        found = self._saturating.get((most, share))
        if found is None:
            sizes = [16]
            while sizes[-1] * 2 <= most:
                sizes.append(sizes[-1] * 2)
            nothing = StepShape(0, 0, 0)
            rates = [size / self.step_s(nothing.plus_chunk(0, size, self.window), share) for size in sizes]
            near = SATURATED * max(rates)
            found = next(size for size, rate in zip(sizes, rates, strict=True) if rate >= near)
            self._saturating[most, share] = found
        return found

    def node_durations_s(self, shape: StepShape, share: float = 1.0) -> list[tuple[str, float]]:
        """(name, seconds) of every node, for a trace."""
        durations: dict[NodeSpec, float] = {}
        named = []
        for index, node in enumerate(self._nodes):
            key = node._replace(name="", layer=0)
            if key not in durations:
                cost = self.step_cost(shape, share, (index, index + 1))
                durations[key] = cost.alone_s - self.machine.step_overhead_s
            named.append((node.name, durations[key]))
        return named

    def _rates(self, node_class: str, filling_rows: float, num_rows: int, share: float) -> tuple[float, float, float]:
        """(operations/s, bytes/s, seconds beside both) of one node of a class, corrected. `filling_rows`: what the compute
        rate depends on."""
        key = (node_class, filling_rows, num_rows, share)
        found = self._known_rates.get(key)
        if found is not None:
            return found
        rates = self.machine.rates(node_class)
        saturation = rates.saturation or self.machine.saturation
        correction = self._corrections.get(node_class, 1.0)
        gain = saturation.compute(share) / correction
        memory_rate = rates.bytes_per_s * saturation.memory(share) / correction
        beside_s = rates.overhead_s * correction + rates.row_s * num_rows / gain
        if len(self._known_rates) >= _MAX_KNOWN_RATES:
            self._known_rates.clear()
        found = self._known_rates[key] = (rates.rate_at(filling_rows) * gain, memory_rate, beside_s)
        return found

    def _add_attention(
        self, segments: list[Segment], node: NodeSpec, count: int, shape: StepShape, share: float
    ) -> None:
        if node.is_windowed:
            decode_kv, pairs = shape.window_decode_kv_tokens, shape.window_chunk_score_pairs
            chunk_kv = shape.window_chunk_kv_tokens
        else:
            decode_kv, pairs, chunk_kv = shape.decode_kv_tokens, shape.chunk_score_pairs, shape.chunk_kv_tokens
        num_decodes, num_chunks = shape.num_decodes, shape.num_requests - shape.num_decodes
        if num_decodes:
            compute_rate, memory_rate, beside_s = self._rates("attention_decode", num_decodes, num_decodes, share)
            num_bytes = count * (node.bytes_per_kv_token * decode_kv + node.bytes_per_row * num_decodes)
            compute_s = count * node.operations_per_pair * decode_kv / compute_rate
            segments.append(
                Segment("attention_decode", compute_s, num_bytes / memory_rate, count * beside_s, num_bytes)
            )
        if num_chunks:
            num_rows = shape.num_chunk_tokens
            compute_rate, memory_rate, beside_s = self._rates("attention_chunk", num_rows / num_chunks, num_rows, share)
            if num_decodes:  # one node, whatever it holds: one overhead
                beside_s -= self.machine.rates("attention_chunk").overhead_s * self._corrections.get(
                    "attention_chunk", 1.0
                )
            num_bytes = count * (node.bytes_per_kv_token * chunk_kv + node.bytes_per_row * num_rows)
            compute_s = count * node.operations_per_pair * pairs / compute_rate
            segments.append(Segment("attention_chunk", compute_s, num_bytes / memory_rate, count * beside_s, num_bytes))

    # Refinement

    @property
    def corrections(self) -> dict[str, float]:
        """Per node class: measured / fitted time, as learned so far."""
        return dict(self._corrections)

    @property
    def guard_ratio(self) -> float:
        return self._guard_ratio

    def observe(self, shape: StepShape, measured_s: float, share: float = 1.0) -> None:
        """A step took measured_s. Each class is corrected by its part of the step: a class that is half of it takes half
        of the blame. Exponential, bounded."""
        cost = self.step_cost(shape, share)
        if cost.alone_s <= 0.0 or measured_s <= 0.0:
            return
        ratio = measured_s / cost.alone_s
        parts: dict[str, float] = {}
        for segment in cost.segments:
            parts[segment.node_class] = parts.get(segment.node_class, 0.0) + segment.duration_s
        for node_class, part_s in parts.items():
            self._correct(node_class, ratio, LEARNING_RATE * part_s / cost.alone_s)
        is_above = ratio > self._guard_ratio
        guard_ratio = self._guard_ratio + GUARD_RATE * (GUARD_QUANTILE if is_above else GUARD_QUANTILE - 1.0)
        self._guard_ratio = min(guard_ratio, MAX_GUARD_RATIO)

    def observe_class(self, node_class: str, predicted_s: float, measured_s: float) -> None:
        """Nodes of one class took measured_s where the model said predicted_s (node spans of a step trace)."""
        if predicted_s > 0.0 and measured_s > 0.0:
            self._correct(node_class, measured_s / predicted_s, LEARNING_RATE)

    def _correct(self, node_class: str, ratio: float, weight: float) -> None:
        bounded = min(max(ratio, MIN_CORRECTION), MAX_CORRECTION)
        correction = self._corrections.get(node_class, 1.0) * bounded**weight
        self._known_rates.clear()
        self._corrections[node_class] = min(max(correction, MIN_CORRECTION), MAX_CORRECTION)


def _grouped(nodes: tuple[NodeSpec, ...]) -> list[_Group]:
    """Equal nodes (of different layers) together, in order of first appearance."""
    counts = Counter(node._replace(name="", layer=0) for node in nodes)
    return [_Group(node, count) for node, count in counts.items()]
