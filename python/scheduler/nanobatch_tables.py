"""How long the operators of a nano-batch take at a share of the chip: from the cost model, or from measured tables.

The search asks a table for the work of a step that is cut at certain rows, with certain shares for the two lanes. Solo
work (shares 1 and 1) is what its first stage sees, where operators do not disturb each other; at real shares operators
are slower, each by what its class loses (NanoFlow's table R -> P, arXiv 2408.12757 section 4.2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from scheduler.cost_model import CostModel
from scheduler.model_spec import NodeSpec
from scheduler.nanobatch import COMPUTE_LANE, MEMORY_LANE
from scheduler.nanobatch_timeline import Contention, NanoWork, Operator
from scheduler.step_shape import StepShape

SOLO = (1.0, 1.0)


class NanoTable(Protocol):
    num_tokens: int
    contention: Contention | None
    share_pairs: Sequence[tuple[float, float]]  # (compute lane, memory lane), by rising compute share

    def sequential_s(self) -> float:
        """The step as one batch on the whole chip."""
        ...

    def work(self, token_counts: Sequence[int], shares: tuple[float, float]) -> NanoWork: ...


class MeasuredTable:
    """Durations that were measured, or made up by a test.

    classes     [node] "compute" or "memory"; attention is where `is_attention` says
    durations   (node, rows) -> seconds on the whole chip, a function or anything callable
    achieved    per class: (share, fraction of the solo speed) by rising share, straight between; NanoFlow's R -> P
    """

    contention = None  # P(R) was measured beside the other class and holds it

    def __init__(
        self, num_tokens: int, classes: Sequence[str], durations, achieved: Mapping[str, Sequence[tuple[float, float]]],
        share_pairs: Sequence[tuple[float, float]], is_attention: Sequence[bool] = (), *, has_chunk: bool = True,
    ) -> None:  # fmt: skip
        """has_chunk: all rows are one request's, so that every boundary cuts it."""
        self.num_tokens = num_tokens
        self.share_pairs = share_pairs
        self._lanes = [COMPUTE_LANE if name == "compute" else MEMORY_LANE for name in classes]
        self._durations = durations
        self._achieved = achieved
        self._is_attention = tuple(is_attention) or (False,) * len(classes)
        self._has_chunk = has_chunk

    def sequential_s(self) -> float:
        return sum(self._durations(node, self.num_tokens) for node in range(len(self._lanes)))

    def work(self, token_counts: Sequence[int], shares: tuple[float, float]) -> NanoWork:
        speeds = (self._speed("compute", shares[0]), self._speed("memory", shares[1]))
        chains = tuple(
            tuple(
                Operator(lane, self._durations(node, num_rows) / speeds[lane])
                for node, lane in enumerate(self._lanes)
            )
            for num_rows in token_counts
        )  # fmt: skip
        return NanoWork(chains, (self._has_chunk,) * (len(token_counts) - 1), self._is_attention)

    def _speed(self, name: str, share: float) -> float:
        if share == 1.0:
            return 1.0
        knots = ((0.0, 0.0), *self._achieved.get(name, ()), (1.0, 1.0))
        i = max(1, bisect_left(knots, (share, 0.0)))
        (low, low_speed), (high, high_speed) = knots[i - 1], knots[i]
        return low_speed + (high_speed - low_speed) * (share - low) / (high - low) if high > low else high_speed


class NanoCosts:
    """The cost model's operators, by nano-batch. Layers are alike, so each distinct node is priced once."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        machine = model.machine
        self.contention = Contention(machine.shared_bytes_per_s, machine.contention)
        self.nodes = model.spec.nodes()
        self.is_attention = tuple(node.kind == "attention" for node in self.nodes)
        # Waiting for the other lane is taken to cost as much as launching a node; nobody has measured it yet.
        self.handoff_s = machine.rates("linear").overhead_s
        alike: dict[NodeSpec, int] = {}
        self._same_as = [alike.setdefault(node._replace(name="", layer=0), i) for i, node in enumerate(self.nodes)]
        self._distinct = sorted(set(self._same_as))
        rungs = [rung for rung in machine.rungs if rung < 1.0]
        self.share_pairs = tuple(
            sorted({(1.0 - rung, rung) for rung in rungs} | {(rung, 1.0 - rung) for rung in rungs})
        )

    def lanes(self, shape: StepShape) -> tuple[int, ...]:
        """Per node, for a nano-batch of this shape: the lane of its resource class."""
        classes = {index: self._lane(index, shape) for index in self._distinct}
        return lanes_along([classes[index] for index in self._same_as])

    def _lane(self, index: int, shape: StepShape) -> int | None:
        node = self.nodes[index]
        if node.num_rows(shape) == 0 or node.kind == "copy_pages":
            return None  # nothing to do: wherever the nano-batch is
        if node.kind == "attention" and node.resource_class(shape) == "memory":
            return (
                MEMORY_LANE  # of decodes: reads all of their KV, whatever part of the time that takes on this machine
            )
        cost = self.model.step_cost(shape, 1.0, (index, index + 1))
        memory_s = sum(segment.memory_s for segment in cost.segments)
        return MEMORY_LANE if memory_s >= cost.compute_s else COMPUTE_LANE

    def chain(self, shape: StepShape, lanes: Sequence[int], shares: tuple[float, float]) -> tuple[Operator, ...]:
        """The operators of one nano-batch, without hand-offs."""
        model, same_as = self.model, self._same_as
        priced: dict[tuple[int, int], Operator] = {}
        chain = []
        for index, lane in enumerate(lanes):
            key = (same_as[index], lane)
            operator = priced.get(key)
            if operator is None:
                segments = model.step_cost(shape, shares[lane], (key[0], key[0] + 1)).segments
                busy_s = sum(max(segment.compute_s, segment.memory_s) for segment in segments)
                operator = priced[key] = Operator(
                    lane, busy_s + sum(segment.overhead_s for segment in segments), busy_s,
                    sum(segment.memory_s for segment in segments), sum(segment.num_bytes for segment in segments),
                )  # fmt: skip
            chain.append(operator)
        return tuple(chain)


def lanes_along(classes: Sequence[int | None]) -> tuple[int, ...]:
    """A node without work goes with the one before it; the first ones are the memory lane's, as embedding is."""
    lanes, lane = [], MEMORY_LANE
    for known in classes:
        lane = lane if known is None else known
        lanes.append(lane)
    return tuple(lanes)


class TypicalStep(NamedTuple):
    """A step that stands for those like it: decodes first, then one chunk."""

    num_decodes: int
    decode_kv: int  # tokens that each decode sees
    num_chunk_tokens: int
    chunk_start: int

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens

    def shape(self, first: int, last: int, window: int = 0) -> StepShape:
        """Of rows [first, last)."""
        num = max(0, min(last, self.num_decodes) - first)
        seen = min(self.decode_kv, window) if window else self.decode_kv
        shape = StepShape(num, num, num, num, num * self.decode_kv, window_decode_kv_tokens=num * seen)
        begin, end = max(first, self.num_decodes) - self.num_decodes, last - self.num_decodes
        if end <= begin:
            return shape
        shape = shape.plus_chunk(self.chunk_start + begin, end - begin, window)
        if last < self.num_tokens:
            shape = shape._replace(num_logit_rows=shape.num_logit_rows - 1)
        return shape


class ModelTable:
    """A typical step by the cost model. max_layers: a search that compares cuts needs no more than a few of the model's
    layers, which are alike, and nothing else: beside so few layers the logits would weigh too much. None: all nodes."""

    def __init__(self, costs: NanoCosts, step: TypicalStep, max_layers: int | None = None) -> None:
        self._costs = costs
        self._step = step
        self.num_tokens = step.num_tokens
        self.contention = costs.contention
        self.share_pairs = costs.share_pairs
        self._kept = [
            index for index, node in enumerate(costs.nodes) if max_layers is None or 0 <= node.layer < max_layers
        ]  # fmt: skip
        self._is_attention = tuple(costs.is_attention[index] for index in self._kept)
        self._chains: dict[tuple[int, int, tuple[float, float]], tuple[Operator, ...]] = {}
        self._lanes: dict[tuple[int, int], tuple[int, ...]] = {}

    def sequential_s(self) -> float:
        chain = self._chain(0, self.num_tokens, SOLO)
        return sum(operator.alone_s for operator in chain)

    def hideable(self) -> float:
        """Part of the step that could at best run beside the rest: no cut saves more."""
        seconds = [0.0, 0.0]
        for operator in self._chain(0, self.num_tokens, SOLO):
            seconds[operator.lane] += operator.alone_s
        return min(seconds) / sum(seconds)

    def work(self, token_counts: Sequence[int], shares: tuple[float, float]) -> NanoWork:
        chains, is_cut, first = [], [], 0
        for count in token_counts:
            chains.append(self._chain(first, first + count, shares))
            first += count
            # Where a chunk begins counts as inside of it: an order that waits there holds for every step like this one.
            is_cut.append(first >= self._step.num_decodes)
        with_handoffs = add_handoffs(chains, is_cut[:-1], self._is_attention, self._costs.handoff_s)
        return NanoWork(with_handoffs, tuple(is_cut[:-1]), self._is_attention)

    def _chain(self, first: int, last: int, shares: tuple[float, float]) -> tuple[Operator, ...]:
        """Kept: a search asks for the same piece beside many others."""
        chain = self._chains.get((first, last, shares))
        if chain is None:
            shape = self._step.shape(first, last, self._costs.model.window)
            lanes = self._lanes.get((first, last))
            if lanes is None:
                lanes = self._lanes[first, last] = self._costs.lanes(shape)
            whole = self._costs.chain(shape, lanes, shares)
            chain = self._chains[first, last, shares] = tuple([whole[index] for index in self._kept])
        return chain


def add_handoffs(
    chains: Sequence[Sequence[Operator]], is_cut: Sequence[bool], is_attention: Sequence[bool], handoff_s: float
) -> tuple[tuple[Operator, ...], ...]:
    """An operator that waits for the other lane begins that much later."""
    added = []
    for nano, chain in enumerate(chains):
        operators = list(chain)
        for node, operator in enumerate(chain):
            waits = node > 0 and chain[node - 1].lane != operator.lane
            if nano and is_attention[node] and is_cut[nano - 1]:
                waits = waits or chains[nano - 1][node].lane != operator.lane
            if waits:
                operators[node] = operator._replace(alone_s=operator.alone_s + handoff_s)
        added.append(tuple(operators))
    return tuple(added)
