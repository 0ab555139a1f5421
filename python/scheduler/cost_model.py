"""What a step will take: the one model that the simulator, the controllers and the searches ask.

Per node: overhead + rows * row time + max(operations / compute rate, bytes / memory rate). The compute rate depends on
the rows and on the share of the machine, the memory rate on the share and on what other lanes draw meanwhile. A step is
the sum of its nodes, the gap before it, and what the host's own thread takes from it (step_cost.py).

    model = CostModel(spec, Machine.load("h100-sxm"))
    model.step_s(shape)                            # alone on the whole machine
    cost = model.step_cost(shape, share=0.5)
    cost.duration_s(other_demand)                  # beside lanes that draw so many bytes/s
    model.range_s(shape, first, last)              # nodes [first, last) alone
    model.last_node_within(shape, first, limit_s)  # how far so much time goes
    model.observe(shape, measured_s)               # refine

Layers are alike, so the nodes of a model fall into a few groups that are computed once and counted: some 10 microseconds
a step, or a range of nodes. What is asked node by node (node_ends_s) is kept for the shapes asked for last.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from scheduler.machine import Machine
from scheduler.model_spec import ModelSpec, NodeSpec
from scheduler.step_cost import Segment, StepCost, make_tuple
from scheduler.step_shape import StepShape

# Online corrections stay within these, so that one stalled step cannot make the model useless.
MIN_CORRECTION, MAX_CORRECTION = 0.25, 4.0
LEARNING_RATE = 0.05  # weight of the newest step in a correction
SATURATED = 0.9  # of the best throughput
_MAX_KNOWN_RATES = 1 << 15
_MAX_KNOWN_ENDS = 256  # shapes of which the nodes' ends are kept
GUARD_QUANTILE, GUARD_RATE = 0.95, 0.02  # of actual / predicted, for promises; tracked in steps of this rate
MAX_GUARD_RATIO = 2.0


class _Group(NamedTuple):
    node: NodeSpec
    count: int


class CostModel:
    """A model on a machine. Raises ValueError when a node's class has no rates."""

    def __init__(self, spec: ModelSpec, machine: Machine) -> None:
        self.spec = spec
        self.machine = machine
        self._nodes = spec.nodes()
        self._groups, self._group_of, self._counts_before = _grouped(self._nodes)
        self._corrections: dict[str, float] = {}
        self._guard_ratio = 1.0
        # A run asks for the same few (class, rows, rows, share) again and again.
        self._known_rates: dict[tuple[str, float, int, float], tuple[float, float, float]] = {}
        self._known_ends: dict[tuple[StepShape, float], list[float]] = {}
        self._saturating: dict[tuple[int, float], int] = {}
        self.num_nodes = len(self._nodes)
        self.window = spec.sliding_window

    # Predictions

    def overhead_s(self, shape: StepShape) -> float:
        """Of a plan beside its nodes: the gap before it and the host's part of it."""
        machine = self.machine
        return machine.step_overhead_s + machine.host_s_per_step + machine.host_s_per_request * shape.num_requests

    def within_step_s(self, shape: StepShape, share: float = 1.0) -> float:
        """From the start of a step's first node to the end of its last, as a lane or a step trace tells it."""
        return self.step_cost(shape, share).alone_s - self.machine.step_overhead_s

    def step_s(self, shape: StepShape, share: float = 1.0) -> float:
        return self.step_cost(shape, share).alone_s

    def guarded_step_s(self, shape: StepShape, share: float = 1.0) -> float:
        """Longer than 95 of 100 steps turned out to be, for those who promise."""
        return self.step_s(shape, share) * max(1.0, self._guard_ratio)

    def step_cost(self, shape: StepShape, share: float = 1.0, node_range: tuple[int, int] | None = None) -> StepCost:
        """node_range: of the Program, None for all of it."""
        groups = self._groups if node_range is None else self._groups_in(*node_range)
        return StepCost(self._segments(groups, shape, share), self.overhead_s(shape), self.machine)

    def _segments(self, groups: Sequence[tuple[NodeSpec, int]], shape: StepShape, share: float) -> list[Segment]:
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
        return segments

    def range_s(self, shape: StepShape, first: int, last: int, share: float = 1.0, other_demand: float = 0.0) -> float:
        """Nodes [first, last) as one part of a run, what comes between two plans included; beside lanes that draw
        other_demand bytes/s."""
        if other_demand > 0.0:
            return self.step_cost(shape, share, (first, last)).duration_s(other_demand)
        ends = self.node_ends_s(shape, share)
        return self.overhead_s(shape) + ends[last] - ends[first]

    def node_ends_s(self, shape: StepShape, share: float = 1.0) -> list[float]:
        """Seconds from the start of a step's first node to the boundary before each node, alone: num_nodes + 1 ascending
        numbers, the first 0, the last the step without its overhead. Not to be written to."""
        key = (shape, share)
        ends = self._known_ends.get(key)
        if ends is None:
            seconds = [self._group_s(group.node, shape, share) for group in self._groups]
            if len(self._known_ends) >= _MAX_KNOWN_ENDS:
                self._known_ends.clear()
            each = [seconds[group] for group in self._group_of]
            ends = self._known_ends[key] = list(accumulate(each, initial=0.0))
        return ends

    def last_node_within(
        self, shape: StepShape, first: int, limit_s: float, share: float = 1.0, candidates: Sequence[int] | None = None
    ) -> int:
        """The end of the longest range of nodes from `first` on that takes at most limit_s as range_s counts it; at least
        one node. candidates: where it may end, ascending (the ends of layers); then at least up to the first of them
        behind `first`. Raises ValueError when none lies behind it."""
        ends = self.node_ends_s(shape, share)
        limit_s += ends[first] - self.overhead_s(shape)
        if candidates is None:
            return max(bisect_right(ends, limit_s) - 1, first + 1)
        lowest = bisect_right(candidates, first)
        if lowest == len(candidates):
            raise ValueError(f"last_node_within: got candidates {list(candidates)}, wanted one behind node {first}")
        place = bisect_right(candidates, limit_s, lowest, key=ends.__getitem__) - 1
        return candidates[max(place, lowest)]

    def longest_node_s(self, shape: StepShape, share: float = 1.0) -> float:
        """What a pause waits for at most: a node that has begun ends."""
        return max(self._group_s(group.node, shape, share) for group in self._groups)

    def stop_node(
        self, shape: StepShape, node_range: tuple[int, int] | None, done: float, share: float = 1.0
    ) -> tuple[int, float]:
        """A plan of which the fraction `done` is over is asked to stop: the node before which it rests, and the fraction
        that is over then (1: it ends first). The nodes that the lane has launched ahead still run."""
        first, last = node_range or (0, self.num_nodes)
        ends, overhead_s = self.node_ends_s(shape, share), self.overhead_s(shape)
        total_s = overhead_s + ends[last] - ends[first]
        now_s = done * total_s - overhead_s + ends[first]  # on the scale of `ends`
        if now_s <= ends[first]:
            return first, done  # not a node has begun
        # The first boundary at or behind now; what a comparison of sums may miss is no node.
        node = bisect_left(ends, now_s - 1e-12, first, last) + self.machine.launch_ahead_nodes - 1
        if node >= last:
            return last, 1.0
        return node, max(done, (overhead_s + ends[node] - ends[first]) / total_s)

    def slow_down_of_overlap(self, total_share: float, total_demand: float) -> float:
        """How many times longer than alone everybody takes on lanes that run at once and whose shares add up to more than
        the machine: it takes turns, which yields overlap_gain more than one after the other, within its bandwidth."""
        machine = self.machine
        in_turns = total_share / (1.0 + machine.overlap_gain)
        return max(1.0, in_turns, total_demand / machine.shared_bytes_per_s)

    def _group_s(self, node: NodeSpec, shape: StepShape, share: float) -> float:
        return StepCost(self._segments(((node, 1),), shape, share), 0.0, self.machine).alone_s

    def _groups_in(self, first: int, last: int) -> list[tuple[NodeSpec, int]]:
        before, after = self._counts_before[first], self._counts_before[last]
        return [
            (group.node, high - low) for group, low, high in zip(self._groups, before, after, strict=True) if high > low
        ]

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
        seconds = [self._group_s(group.node, shape, share) for group in self._groups]
        return [(node.name, seconds[group]) for node, group in zip(self._nodes, self._group_of, strict=True)]

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

    def observe(
        self, shape: StepShape, measured_s: float, share: float = 1.0, node_range: tuple[int, int] | None = None,
        other_demand: float = 0.0,
    ) -> None:  # fmt: skip
        """A step, or these nodes of it, took measured_s from its first node to its last, beside lanes that drew
        other_demand bytes/s. Each class is corrected by its part of the step: one that is half of it takes half of the
        blame. Exponential, bounded."""
        cost = self.step_cost(shape, share, node_range)
        predicted_s = cost.duration_s(other_demand) - self.machine.step_overhead_s
        if predicted_s <= 0.0 or measured_s <= 0.0:
            return
        ratio = measured_s / predicted_s
        parts: dict[str, float] = {}
        for segment in cost.segments:
            parts[segment.node_class] = parts.get(segment.node_class, 0.0) + segment.duration_s
        for node_class, part_s in parts.items():
            self._correct(node_class, ratio, LEARNING_RATE * part_s / cost.alone_s)
        is_above = ratio > self._guard_ratio
        guard_ratio = self._guard_ratio + GUARD_RATE * (GUARD_QUANTILE if is_above else GUARD_QUANTILE - 1.0)
        self._guard_ratio = min(guard_ratio, MAX_GUARD_RATIO)

    def _correct(self, node_class: str, ratio: float, weight: float) -> None:
        bounded = min(max(ratio, MIN_CORRECTION), MAX_CORRECTION)
        correction = self._corrections.get(node_class, 1.0) * bounded**weight
        self._known_rates.clear()
        self._known_ends.clear()
        self._corrections[node_class] = min(max(correction, MIN_CORRECTION), MAX_CORRECTION)


def _grouped(nodes: tuple[NodeSpec, ...]) -> tuple[list[_Group], list[int], list[tuple[int, ...]]]:
    """Equal nodes (of different layers) together, in order of first appearance; the group of every node; and how many
    nodes of each group lie before each boundary."""
    place_of: dict[NodeSpec, int] = {}
    group_of = [place_of.setdefault(node._replace(name="", layer=0), len(place_of)) for node in nodes]
    counts = [0] * len(place_of)
    counts_before = [tuple(counts)]
    for group in group_of:
        counts[group] += 1
        counts_before.append(tuple(counts))
    groups = [_Group(node, count) for node, count in zip(place_of, counts, strict=True)]
    return groups, group_of, counts_before
