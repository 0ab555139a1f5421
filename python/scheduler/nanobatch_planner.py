"""Cuts the scheduler's steps into nano-batches: what the search found for steps of this kind, fitted to this one.

    requests ──> kind of step (log2 of decodes, their KV, chunk tokens, their context) ──> found structure, or a search
                                                                                           that goes on bit by bit
             ──> token counts in proportion, at whole tiles ──> ranges (kept per structure) ──> NanoPlan

A kind that was not met before is searched a few hundred microseconds per call of plan(), until it is known; meanwhile its
steps stay whole, or are cut in equal parts where nano-batches were asked for. That takes nothing from the clock: the same
calls give the same plans, in real and in simulated time. prepare() does it at once, at start.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import pairwise
from math import log2
from typing import NamedTuple

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
from scheduler.nanobatch_cost import nano_makespan_s  # noqa: F401 (the simulator asks for it here)
from scheduler.nanobatch_orders import lock_step
from scheduler.nanobatch_search import SMALL_STEP_TOKENS, TILE_TOKENS, NanoStructure, search
from scheduler.nanobatch_tables import ModelTable, NanoCosts, TypicalStep, lanes_along
from scheduler.nanobatch_timeline import ranges_of
from scheduler.nanobatch_trial import NanoTrial
from scheduler.step import LanePlan, ScheduledRequest
from scheduler.step_shape import StepShape, shape_of

# Layers are alike: what a few of them say about cuts and shares holds for all.
SEARCHED_LAYERS = 4
# Predicted part of a step's time below which cutting is not worth trying.
LEAST_PREDICTED_GAIN = 0.03
_MAX_KEPT_RANGES = 512


class _Question(NamedTuple):
    """What is searched for."""

    kind: TypicalStep
    num_nano: int  # 0: the best


class _Answer(NamedTuple):
    structure: NanoStructure | None  # None: too few tokens


class NanoPlanner:
    """One per scheduler."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None, spec: ModelSpec | None = None) -> None:
        """cost_model: None where the machine was never calibrated; then steps are cut only if asked for, in equal parts,
        and only if spec says what the program's nodes are. Raises ValueError if the model's nodes are not the program's."""
        self._spec = cost_model.spec if cost_model is not None else spec
        self._costs = NanoCosts(cost_model) if cost_model is not None else None
        self._nodes = self._spec.nodes() if self._spec is not None else ()
        if config.num_nodes and self._nodes and config.num_nodes != len(self._nodes):
            raise ValueError(
                f"NanoPlanner: the program has {config.num_nodes} nodes, {self._spec.name} by its spec {len(self._nodes)}"
            )
        self._window = self._spec.sliding_window if self._spec is not None else 0
        self._is_attention = tuple(node.kind == "attention" for node in self._nodes)
        self._answers: dict[_Question, _Answer] = {}
        self._searches: dict[_Question, Generator[None, None, NanoStructure | None]] = {}
        self._ranges: dict[tuple, tuple[NanoRange, ...]] = {}
        self._known_lanes: dict[tuple[TypicalStep, bool], tuple[int, ...]] = {}
        self.trial = NanoTrial()
        self.reason = ""  # of the latest answer

    def plan(self, requests: Sequence[ScheduledRequest], num_nano: int = 0) -> NanoPlan | None:
        """How a step of these requests is cut; None: it is not, and `reason` says why.

        num_nano: 2 to 4 as asked for, whether it pays or not (fewer if there are fewer tokens); 0 as many as pay by the
        cost model and, after the first steps of a kind, by measurement (trial); 1 none. Raises ValueError for others.
        """
        if not 0 <= num_nano <= MAX_NANO_BATCHES:
            raise ValueError(f"NanoPlanner.plan: got num_nano {num_nano}, wanted 0 (best) to {MAX_NANO_BATCHES}")
        num_tokens = sum([scheduled[3] for scheduled in requests])
        if num_nano == 1 or num_tokens < 2 or not self._nodes:
            return self._decline("one batch was asked for" if num_nano == 1 else "nothing to cut, or nodes not known")
        if self._costs is None:
            return self._equal_parts(requests, num_nano, num_tokens) if num_nano else self._decline("no cost model")
        shape = shape_of(requests, self._window)
        kind = kind_of(shape)
        answer = self._search_on(_Question(kind, num_nano))
        structure = answer.structure if answer is not None else None
        if num_nano:
            plan = self._fitted(requests, shape, kind, structure) if structure is not None else None
            return plan if plan is not None else self._equal_parts(requests, num_nano, num_tokens)
        if answer is None:
            return self._decline("this kind of step is being searched")
        if structure is None or structure.gain < LEAST_PREDICTED_GAIN:
            return self._decline("one batch is as good by the cost model")
        if not self.trial.chooses_nano(kind):
            return self._decline(
                "one batch, to compare with" if self.trial.verdict(kind) is None else "measured: no gain"
            )
        return self._fitted(requests, shape, kind, structure)

    def predicted_gain(self, shape: StepShape) -> float:
        """Part of a step's time that plan() would save as far as is known now, for who weighs arrangements; 0 where it
        would leave the step whole. Searches nothing."""
        kind = kind_of(shape)
        answer = self._answers.get(_Question(kind, 0))
        if answer is None or answer.structure is None or self.trial.verdict(kind) is False:
            return 0.0
        gain = answer.structure.gain
        return gain if gain >= LEAST_PREDICTED_GAIN else 0.0

    def observe(self, plan: LanePlan, seconds: float) -> None:
        """A whole step took so long, cut or not: what the trial decides by."""
        if self._costs is not None and plan.node_range is None:
            kind = kind_of(shape_of(plan.requests, self._window))
            self.trial.observe(kind, plan.nano is not None, plan.num_tokens, seconds)

    def prepare(self, steps: Iterable[TypicalStep], num_nano: int = 0) -> None:
        """Searches for steps like these at once (some 50 ms each)."""
        for step in steps:
            question = _Question(kind_of(step.shape(0, step.num_tokens, self._window)), num_nano)
            while self._costs is not None and self._search_on(question) is None:
                pass

    def describe(self) -> list[str]:
        """For people: what was found for each kind of step, and what measurements said."""
        lines = []
        for (kind, _), (structure,) in self._answers.items():
            words = (
                "too few tokens"
                if structure is None
                else (f"{structure.token_counts} tokens at shares {structure.shares}: {structure.gain:+.1%}")
            )
            lines.append(f"{_kind_words(kind)}: by the model {words}")
        return lines + [f"trial, {line}" for line in self.trial.describe(_kind_words)]

    # Searching

    def _search_on(self, question: _Question) -> _Answer | None:
        """The answer, or one more piece of work on it."""
        answer = self._answers.get(question)
        if answer is not None:
            return answer
        steps = self._searches.get(question)
        if steps is None:
            steps = self._searches[question] = self._search(*question)
        try:
            next(steps)
        except StopIteration as end:
            del self._searches[question]
            answer = self._answers[question] = _Answer(end.value)
        return answer

    def _search(self, kind: TypicalStep, num_nano: int) -> Generator[None, None, NanoStructure | None]:
        few_layers, whole = ModelTable(self._costs, kind, SEARCHED_LAYERS), ModelTable(self._costs, kind)
        if num_nano:
            return (yield from search(few_layers, num_nano, whole))
        best: NanoStructure | None = None
        for count in range(2, MAX_NANO_BATCHES + 1):
            structure = yield from search(few_layers, count, whole)
            if structure is None or (best is not None and structure.makespan_s >= best.makespan_s):
                break  # more pieces read the weights more often; where one more does not help, two do not
            best = structure
        return best

    # From a structure to a plan

    def _fitted(
        self, requests: Sequence[ScheduledRequest], shape: StepShape, step: TypicalStep, structure: NanoStructure
    ) -> NanoPlan | None:
        token_counts = fit_counts(structure.token_counts, step, shape.num_decodes, shape.num_tokens)
        if token_counts is None:
            return self._decline("too few tokens for the structure that was found")
        words = f"{len(token_counts)} nano-batches: {structure.gain:+.1%} by the cost model"
        return self._plan(requests, token_counts, structure.shares, structure.order, words)

    def _equal_parts(self, requests: Sequence[ScheduledRequest], num_nano: int, num_tokens: int) -> NanoPlan | None:
        num_nano = min(num_nano, num_tokens)
        token_counts = equal_counts(num_tokens, num_nano)
        shares = (0.5, 0.5)
        if self._costs is not None and self._costs.share_pairs:
            shares = min(self._costs.share_pairs, key=lambda pair: (abs(pair[0] - 0.5), pair))
        order = lock_step(len(self._nodes), num_nano)
        return self._plan(
            requests, token_counts, shares, order, f"{num_nano} nano-batches in equal parts, as asked for"
        )

    def _plan(
        self, requests: Sequence[ScheduledRequest], token_counts: tuple[int, ...], shares: tuple[float, float],
        order: tuple[int, ...], reason: str,
    ) -> NanoPlan | None:  # fmt: skip
        is_cut = cut_chunks(requests, token_counts)
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


def kind_of(shape: StepShape) -> TypicalStep:
    """The typical step that stands for all whose sizes are within a factor of about 1.2 (context before the chunks: 1.4).
    Whole powers of two were tried: a cut that was found 15 % better lost 2 % on a step at the far end of its kind."""
    num_chunks = shape.num_requests - shape.num_decodes
    num_chunk_tokens = shape.num_chunk_tokens
    decode_kv = shape.decode_kv_tokens / shape.num_decodes if shape.num_decodes else 0
    chunk_start = (shape.chunk_kv_tokens - num_chunk_tokens) / num_chunks if num_chunks else 0
    return TypicalStep(
        _rounded(shape.num_decodes, 2), _rounded(decode_kv, 2), _rounded(num_chunk_tokens, 2), _rounded(chunk_start, 1)
    )


def _rounded(value: float, steps_per_octave: int) -> int:
    """To a power of two, or one between; 0 stays 0."""
    return round(2.0 ** (round(log2(value) * steps_per_octave) / steps_per_octave)) if value >= 1 else 0


def _kind_words(kind: TypicalStep) -> str:
    return (
        f"about {kind.num_decodes} decodes of {kind.decode_kv} tokens, {kind.num_chunk_tokens} prompt tokens after "
        f"{kind.chunk_start}"
    )


def equal_counts(num_tokens: int, num_nano: int) -> tuple[int, ...]:
    """Parts that differ by a tile at most, or by a token where there are few."""
    tile = TILE_TOKENS if num_tokens >= SMALL_STEP_TOKENS else 1
    bounds = [i * num_tokens // num_nano // tile * tile for i in range(num_nano)]
    return tuple(last - first for first, last in zip(bounds, (*bounds[1:], num_tokens), strict=True))


def fit_counts(
    token_counts: Sequence[int], step: TypicalStep, num_decodes: int, num_tokens: int
) -> tuple[int, ...] | None:
    """The cuts of a typical step, at the same places among the decodes and among the prompt tokens of this one; None if
    some part would be empty."""
    tile = TILE_TOKENS if num_tokens >= SMALL_STEP_TOKENS else 1
    num_chunk_tokens = num_tokens - num_decodes
    bounds, reached = [0], 0
    for count in token_counts[:-1]:
        reached += count
        if reached <= step.num_decodes:
            bound = num_decodes * reached // step.num_decodes
            # The nearest whole tile, but not beyond the decodes: what lies there was found without a wait.
            nearest = (bound + tile // 2) // tile * tile
            bound = nearest if reached < step.num_decodes and nearest <= num_decodes else bound
        else:
            bound = num_decodes + num_chunk_tokens * (reached - step.num_decodes) // step.num_chunk_tokens
            nearest = (bound + tile // 2) // tile * tile
            bound = nearest if num_decodes < nearest < num_tokens else bound
        bounds.append(bound)
    bounds.append(num_tokens)
    counts = tuple(last - first for first, last in pairwise(bounds))
    return counts if min(counts) > 0 else None
