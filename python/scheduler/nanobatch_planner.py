"""Cuts the scheduler's steps into nano-batches: what the search found for steps of this kind, fitted to this one.

    requests ──> kind of step (log2 of decodes, their KV, chunk tokens, their context) ──> found structure, or a search
                                                                                           that goes on bit by bit
             ──> token counts in proportion, at whole tiles ──> ranges (kept per structure) ──> NanoPlan

Kinds that were not met before are searched a few hundred microseconds per call of plan() (nanobatch_kinds.py). Until then
steps stay whole, or are cut in equal parts where nano-batches were asked for. No clock is asked: the same calls give the
same plans, in real and in simulated time. Kinds that a full step may be are searched at start, some 50 ms each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch import (
    MAX_NANO_BATCHES,
    MEMORY_LANE,
    NanoPlan,
    NanoRange,
    cut_chunks,
    split_requests,
)
from scheduler.nanobatch_kinds import LEAST_PREDICTED_GAIN, KindSearch, fit_counts, kind_of, kind_words
from scheduler.nanobatch_orders import lock_step
from scheduler.nanobatch_search import SMALL_STEP_TOKENS, TILE_TOKENS, NanoStructure
from scheduler.nanobatch_tables import NanoCosts, TypicalStep, lanes_along
from scheduler.nanobatch_timeline import ranges_of
from scheduler.nanobatch_trial import NanoTrial
from scheduler.step import LanePlan, ScheduledRequest
from scheduler.step_shape import StepShape, shape_of

_MAX_KEPT_RANGES = 512


class NanoPlanner:
    """One per scheduler."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None, spec: ModelSpec | None = None) -> None:
        """cost_model: None where the machine was never calibrated; then steps are cut only if asked for, in equal parts,
        and only if spec says what the program's nodes are. Raises ValueError if the model's nodes are not the program's."""
        self._spec = cost_model.spec if cost_model is not None else spec
        costs = NanoCosts(cost_model) if cost_model is not None else None
        # None also where the chip cannot be cut, one core for instance: whatever overlaps there takes turns.
        self._costs = costs if costs is not None and costs.share_pairs else None
        self._nodes = self._spec.nodes() if self._spec is not None else ()
        if config.num_nodes and self._nodes and config.num_nodes != len(self._nodes):
            raise ValueError(
                f"NanoPlanner: the program has {config.num_nodes} nodes, {self._spec.name} by its spec {len(self._nodes)}"
            )
        self._window = self._spec.sliding_window if self._spec is not None else 0
        self._is_attention = tuple(node.kind == "attention" for node in self._nodes)
        self._kinds = KindSearch(self._costs) if self._costs is not None else None
        self._ranges: dict[tuple, tuple[NanoRange, ...]] = {}
        self._known_lanes: dict[tuple[TypicalStep, bool], tuple[int, ...]] = {}
        self.trial = NanoTrial()
        self.reason = ""  # of the latest answer
        if config.nano_batches == "auto":
            self.prepare(dense_steps(config))

    def plan(self, requests: Sequence[ScheduledRequest], num_nano: int = 0) -> NanoPlan | None:
        """How a step of these requests is cut; None: it is not, and `reason` says why.

        num_nano: 2 to 4 as asked for, whether it pays or not (fewer if there are fewer tokens); 0 as many as pay by the
        table and, after the first steps of a kind, by measurement (trial); 1 none. Raises ValueError for others.
        """
        if not 0 <= num_nano <= MAX_NANO_BATCHES:
            raise ValueError(f"NanoPlanner.plan: got num_nano {num_nano}, wanted 0 (best) to {MAX_NANO_BATCHES}")
        num_tokens = sum([scheduled[3] for scheduled in requests])
        if num_nano == 1 or num_tokens < 2 or not self._nodes:
            return self._decline("one batch was asked for" if num_nano == 1 else "nothing to cut, or nodes not known")
        if self._costs is None:
            if num_nano:
                return self._equal_parts(requests, num_nano, num_tokens)
            return self._decline("no cost model, or a chip that cannot be cut")
        shape = shape_of(requests, self._window)
        kind = kind_of(shape)
        answer = self._kinds.ask(kind, num_nano)
        structure = answer.structure if answer is not None else None
        if num_nano:
            plan = self._fitted(requests, shape, kind, structure) if structure is not None else None
            return plan if plan is not None else self._equal_parts(requests, num_nano, num_tokens)
        if answer is None:
            return self._decline("this kind of step is being searched")
        if structure is None or structure.gain < LEAST_PREDICTED_GAIN:
            return self._decline(f"one batch is as good by {self._costs.source}")
        if not self.trial.chooses_nano(_trial_kind(kind)):
            is_open = self.trial.verdict(_trial_kind(kind)) is None
            return self._decline("one batch, to compare with" if is_open else "measured: no gain")
        return self._fitted(requests, shape, kind, structure)

    def predicted_gain(self, shape: StepShape) -> float:
        """Part of a step's time that plan() would save as far as is known now, for who weighs arrangements; 0 where it
        would leave the step whole. Searches nothing."""
        kind = kind_of(shape)
        answer = self._kinds.known(kind, 0) if self._kinds is not None else None
        if answer is None or answer.structure is None or self.trial.verdict(_trial_kind(kind)) is False:
            return 0.0
        gain = answer.structure.gain
        return gain if gain >= LEAST_PREDICTED_GAIN else 0.0

    def observe(self, plan: LanePlan, seconds: float) -> None:
        """A whole step took so long, cut or not: what the trial decides by."""
        if self._costs is not None and plan.node_range is None:
            kind = kind_of(shape_of(plan.requests, self._window))
            self.trial.observe(_trial_kind(kind), plan.nano is not None, plan.num_tokens, seconds)

    def prepare(self, steps: Iterable[TypicalStep], num_nano: int = 0) -> None:
        """Searches for steps like these at once (some 50 ms each)."""
        for step in steps if self._kinds is not None else ():
            self._kinds.search_now(kind_of(step.shape(0, step.num_tokens, self._window)), num_nano)

    def describe(self) -> list[str]:
        """For people: which table is searched, what was found for each kind of step, and what measurements said."""
        found = [self._describe_table(), *(self._kinds.describe() if self._kinds is not None else ())]
        return found + [f"trial, {line}" for line in self.trial.describe(kind_words)]

    def _describe_table(self) -> str:
        if self._costs is None:
            return "table: none, as the machine was never calibrated or cannot be cut"
        if not self._costs.is_measured:
            return "table: the cost model's; this machine file has no lane_speeds, which `partita calibrate` measures"
        cuts = ", ".join(f"{compute:.0%} beside {memory:.0%}" for compute, memory in self._costs.share_pairs)
        return f"table: measured, lanes of {cuts}"

    # From a structure to a plan

    def _fitted(
        self, requests: Sequence[ScheduledRequest], shape: StepShape, step: TypicalStep, structure: NanoStructure
    ) -> NanoPlan | None:
        token_counts = fit_counts(structure.token_counts, step, shape.num_decodes, shape.num_tokens)
        if token_counts is None:
            return self._decline("too few tokens for the structure that was found")
        words = f"{len(token_counts)} nano-batches: {structure.gain:+.1%} by {self._costs.source}"
        # The lanes go with the order: a node whose class is near the border would, on the other lane, stand in the way.
        return self._plan(requests, token_counts, structure.shares, structure.order, words, structure.lanes)

    def _equal_parts(self, requests: Sequence[ScheduledRequest], num_nano: int, num_tokens: int) -> NanoPlan | None:
        num_nano = min(num_nano, num_tokens)
        token_counts = equal_counts(num_tokens, num_nano)
        shares = (0.5, 0.5)
        if self._costs is not None:
            shares = min(self._costs.share_pairs, key=lambda pair: (abs(pair[0] - 0.5), pair))
        order = lock_step(len(self._nodes), num_nano)
        return self._plan(
            requests, token_counts, shares, order, f"{num_nano} nano-batches in equal parts, as asked for"
        )

    def _plan(
        self, requests: Sequence[ScheduledRequest], token_counts: tuple[int, ...], shares: tuple[float, float],
        order: tuple[int, ...], reason: str, lanes: tuple[tuple[int, ...], ...] | None = None,
    ) -> NanoPlan | None:  # fmt: skip
        """lanes: None for those of the nodes' classes."""
        is_cut = cut_chunks(requests, token_counts)
        if lanes is None:
            pieces = split_requests(requests, token_counts)
            lanes = tuple(self._lanes(shape_of(piece, self._window)) for piece in pieces)
        key = (order, lanes, is_cut)
        ranges = self._ranges.get(key)
        if ranges is None:
            try:
                ranges = ranges_of(order, lanes, is_cut, self._is_attention)
            except ValueError:  # found for steps whose decodes come first; this one is ordered otherwise
                return self._decline("the order that was found does not fit where chunks are cut here")
            if len(self._ranges) >= _MAX_KEPT_RANGES:
                self._ranges.clear()
            self._ranges[key] = ranges
        self.reason = reason
        return NanoPlan(token_counts, shares, ranges, reason)

    def _lanes(self, shape: StepShape) -> tuple[int, ...]:
        # By kind, not by shape: pricing every node of every piece anew would cost more than all else here.
        key = (kind_of(shape), shape.num_logit_rows > 0)
        lanes = self._known_lanes.get(key)
        if lanes is None:
            lanes = self._costs.lanes(shape) if self._costs is not None else class_lanes(self._spec, shape)
            if len(self._known_lanes) >= _MAX_KEPT_RANGES:
                self._known_lanes.clear()
            self._known_lanes[key] = lanes
        return lanes

    def _decline(self, reason: str) -> None:
        self.reason = reason


def class_lanes(spec: ModelSpec, shape: StepShape) -> tuple[int, ...]:
    """Per node, the lane of its resource class as the program has it, where no cost model knows better."""
    classes = []
    for node in spec.nodes():
        is_idle = node.num_rows(shape) == 0 or node.kind == "copy_pages"
        classes.append(None if is_idle else int(node.resource_class(shape) == "memory") * MEMORY_LANE)
    return lanes_along(classes)


def _trial_kind(kind: TypicalStep) -> TypicalStep:
    """What is measured together: the context before a chunk changes little of what cutting gains."""
    return kind._replace(chunk_start=0)


def dense_steps(config: SchedulerConfig) -> list[TypicalStep]:
    """Steps that are full, as they are under load: what is searched at start, for others to borrow from."""
    steps, most = [], config.max_num_batched_tokens
    for num_decodes in (config.max_num_seqs, config.max_num_seqs // 2, config.max_num_seqs // 4):
        for decode_kv in (512, 2048, 8192):
            if 0 < num_decodes < most and decode_kv <= config.max_model_len:
                steps.append(TypicalStep(num_decodes, decode_kv, most - num_decodes, 0))
    return steps


def equal_counts(num_tokens: int, num_nano: int) -> tuple[int, ...]:
    """Parts that differ by a tile at most, or by a token where there are few."""
    tile = TILE_TOKENS if num_tokens >= SMALL_STEP_TOKENS else 1
    bounds = [i * num_tokens // num_nano // tile * tile for i in range(num_nano)]
    return tuple(last - first for first, last in zip(bounds, (*bounds[1:], num_tokens), strict=True))
