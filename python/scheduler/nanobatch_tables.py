"""How long the operators of a nano-batch take at a share of the chip: the table that the search looks things up in.

The search asks for the work of a step that is cut at certain rows, with certain shares for the two lanes. What an operator
takes alone on the whole chip is the calibrated cost model's word. What it takes on a share, and beside the other lane, was
measured where the machine file has lane_speeds (NanoFlow's table R -> P, arXiv 2408.12757, section 4.2); where it has none,
the cost model's law of shares and its contention for memory stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scheduler.cost_model import CostModel
from scheduler.lane_speeds import LaneSpeeds
from scheduler.model_spec import NodeSpec
from scheduler.nanobatch import COMPUTE_LANE, MEMORY_LANE
from scheduler.nanobatch_contention import BandwidthContention, Contention, MeasuredContention, Operator
from scheduler.nanobatch_timeline import NanoWork
from scheduler.step_shape import StepShape

SOLO = (1.0, 1.0)


class NanoTable(Protocol):
    num_tokens: int
    share_pairs: Sequence[tuple[float, float]]  # (compute lane, memory lane), by rising compute share

    def sequential_s(self) -> float:
        """The step as one batch on the whole chip."""
        ...

    def work(self, token_counts: Sequence[int], shares: tuple[float, float]) -> NanoWork: ...


class NanoCosts:
    """A model's operators, by nano-batch. Layers are alike, so each distinct node is priced once."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        machine = model.machine
        self.nodes = model.spec.nodes()
        self.is_attention = tuple(node.kind == "attention" for node in self.nodes)
        # Waiting for the other lane is taken to cost as much as launching a node; nobody has measured it yet.
        self.handoff_s = machine.rates("linear").overhead_s
        alike: dict[NodeSpec, int] = {}
        self._same_as = [alike.setdefault(node._replace(name="", layer=0), i) for i, node in enumerate(self.nodes)]
        self._distinct = sorted(set(self._same_as))
        rungs = [rung for rung in machine.rungs if rung < 1.0]
        self._by_model = BandwidthContention(machine.shared_bytes_per_s, machine.contention)
        self._measured = {
            speeds.shares: (speeds, MeasuredContention(speeds, machine.contention)) for speeds in machine.lane_speeds
        }
        # Where the lanes were measured, only cuts that were: a guess beside them would win by being wrong.
        self.share_pairs = tuple(
            sorted(self._measured or {(1.0 - rung, rung) for rung in rungs} | {(rung, 1.0 - rung) for rung in rungs})
        )

    @property
    def is_measured(self) -> bool:
        """What operators take on their shares and beside each other is from measurements, not from the cost model."""
        return bool(self._measured)

    @property
    def source(self) -> str:
        """For people."""
        return "the measured table" if self._measured else "the cost model"

    def contention_at(self, shares: tuple[float, float]) -> Contention:
        return self._measured[self._nearest(shares)][1] if self._measured else self._by_model

    def _speeds_at(self, shares: tuple[float, float]) -> LaneSpeeds | None:
        """None: the cost model's."""
        return self._measured[self._nearest(shares)][0] if self._measured and shares != SOLO else None

    def _nearest(self, shares: tuple[float, float]) -> tuple[float, float]:
        """Plans in equal parts may name shares that no table has."""
        if shares in self._measured:
            return shares
        return min(self._measured, key=lambda each: (abs(each[0] - shares[0]) + abs(each[1] - shares[1]), each))

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
        model, same_as, speeds = self.model, self._same_as, self._speeds_at(shares)
        priced: dict[tuple[int, int], Operator] = {}
        chain = []
        for index, lane in enumerate(lanes):
            key = (same_as[index], lane)
            operator = priced.get(key)
            if operator is None:
                share = shares[lane] if speeds is None else 1.0
                segments = model.step_cost(shape, share, (key[0], key[0] + 1)).segments
                busy_s = sum(max(segment.compute_s, segment.memory_s) for segment in segments)
                alone_s = busy_s + sum(segment.overhead_s for segment in segments)
                memory_s = sum(segment.memory_s for segment in segments)
                is_attention = self.is_attention[index]
                if speeds is not None:  # of the whole node, launch and all, as it was measured
                    slower = 1.0 / speeds.alone_speed(lane, is_attention)
                    alone_s, busy_s, memory_s = alone_s * slower, busy_s * slower, memory_s * slower
                operator = priced[key] = Operator(
                    lane, alone_s, busy_s, memory_s, sum(segment.num_bytes for segment in segments),
                    alone_s if is_attention else 0.0,
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


class StepTable:
    """A typical step. max_layers: a search that compares cuts needs no more than a few of the model's
    layers, which are alike, and nothing else: beside so few layers the logits would weigh too much. None: all nodes."""

    def __init__(self, costs: NanoCosts, step: TypicalStep, max_layers: int | None = None) -> None:
        self._costs = costs
        self._step = step
        self.num_tokens = step.num_tokens
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
        contention = self._costs.contention_at(shares)
        return NanoWork(with_handoffs, tuple(is_cut[:-1]), self._is_attention, contention)

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
