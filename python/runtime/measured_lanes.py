"""What two lanes do to each other, class of operators by class: the `lane_speeds` of a machine file.

    lane of the first cores     prompts, step after step      linear, attention over a chunk
    lane of the other cores     decodes, step after step      linear of few rows, attention over long contexts

A frame runs its nodes in order, so a lane cannot be given one operator again and again; nor should it be, as its weights
would then lie in the cache. Whole steps run in a row on both lanes, in mixtures of more linear and of more attention, and
the spans of their nodes say what was beside what for how long. How much of a node's work is done in a second beside each
class is then a small least-squares fit. NanoFlow's table R -> P (arXiv 2408.12757, section 4.2) by other means.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from runtime.fit_rates import nonnegative_fit
from runtime.measured_steps import StepBench, StepKind
from scheduler.lane_speeds import COMPUTE_CLASSES, LANE_CLASSES, LANE_NAMES, MEMORY_CLASSES, LaneSpeeds, PairSpeed
from scheduler.model_spec import ModelSpec, NodeSpec

ROUNDS = 3
# A class that was hardly ever alone beside the watched one is drawn to what was seen beside both: by one made-up
# observation for each so many real ones.
_OBSERVATIONS_PER_PRIOR = 200
_STALLED = 1 / 3  # of the median speed: such a node had its core taken away
_SLOWEST = 0.1  # of the speed beside both classes; a fit says 0 where one of them was not seen apart


class Watched(NamedTuple):
    """One node of one lane while the other was there."""

    beside_s: tuple[float, float]  # by class of the other lane: linear (and all that is not attention), attention
    lone_s: float  # nothing ran beside it
    work_s: float  # what it takes alone on the whole machine


def lane_kinds(bench: StepBench) -> tuple[list[StepKind], list[StepKind]]:
    """(prompts, decodes): of each one step with more linear and one with more attention, as large as pages allow for the two
    lanes at once."""
    starts = (1400, 900, 400, 100, 0)
    decodes = [StepKind(num, context) for num, context in ((16, 800), (16, 400), (8, 400), (8, 100), (4, 50), (1, 20))]
    prompts = [StepKind(0, 0, 1, num_tokens, 0) for num_tokens in (128, 64, 16)]
    long_prompts = [StepKind(0, 0, 1, 64, start) for start in starts] + [StepKind(0, 0, 1, 16, 0)]

    def largest(kinds: Sequence[StepKind]) -> StepKind:
        """Half of the pages and rows is for each lane."""
        fitting = [kind for kind in kinds if bench.fits(kind) and bench.fits_twice(kind)]
        return fitting[0] if fitting else kinds[-1]

    return [largest(prompts), largest(long_prompts)], [
        StepKind(min(4, largest(decodes).num_decodes), 20),
        largest(decodes),
    ]


class CutRuns:
    """Completions on the two lanes of one cut."""

    def __init__(self) -> None:
        self.alone: dict[tuple[int, StepKind], list[dict]] = defaultdict(list)  # (lane, what it ran) ->
        # (what lane 0 ran, what lane 1 ran) -> completions of each
        self.beside: dict[tuple[StepKind, StepKind], tuple[list[dict], list[dict]]] = defaultdict(lambda: ([], []))


def measure_lane_speeds(
    bench: StepBench, splits: Mapping[tuple[float, float], StepBench], spec: ModelSpec, seconds: float
) -> tuple[LaneSpeeds, ...]:
    """bench: one lane of the whole machine. splits: shares of the two lanes -> a bench of them. seconds: for all of it,
    more where a run of each step in each round takes longer. In rounds, so that a busy second spoils a part of every
    figure, of which medians are taken, and not all of one. Raises RuntimeError when a step fails."""
    kinds = lane_kinds(bench)
    slot_s = seconds / (ROUNDS * (4 + 12 * len(splits)))
    whole: dict[StepKind, list[dict]] = defaultdict(list)
    cuts = {shares: CutRuns() for shares in sorted(splits)}
    for _ in range(ROUNDS):
        for kind in (*kinds[0], *kinds[1]):
            whole[kind] += bench.runs(kind, 1, seconds=slot_s)
        for shares, runs in cuts.items():
            split = splits[shares]
            for lane, of in enumerate(kinds):
                for kind in of:
                    runs.alone[lane, kind] += split.runs(kind, 1, lane, slot_s)
            for pair in product(*kinds):
                for before, ran in zip(runs.beside[pair], split.beside(*pair, 1, 2 * slot_s), strict=True):
                    before.extend(ran)
    nodes = spec.nodes()
    whole_s = {kind: median_node_s(runs, len(nodes)) for kind, runs in whole.items()}
    return tuple(speeds_at(shares, runs, whole_s, nodes) for shares, runs in cuts.items())


def speeds_at(
    shares: tuple[float, float], runs: CutRuns, whole_s: Mapping[StepKind, Sequence[float]], nodes: Sequence[NodeSpec]
) -> LaneSpeeds:
    """whole_s: of each step, per node, on the whole machine."""
    lane_s = {key: median_node_s(ran, len(nodes)) for key, ran in runs.alone.items()}
    alone = {
        name: {
            class_name: _ratio(
                [(whole_s[kind], seconds) for (of, kind), seconds in lane_s.items() if of == lane],
                class_nodes(nodes, group),
            )
            for group, class_name in enumerate(LANE_CLASSES[lane])
        }
        for lane, name in enumerate(LANE_NAMES)
    }
    watched: dict[tuple[int, int], list[Watched]] = defaultdict(list)  # (lane, class) ->
    for pair, ran in runs.beside.items():
        spans = [[span for completion in each for span in completion["spans"]] for each in ran]
        for lane, kind in enumerate(pair):
            for group in (0, 1):
                chosen = set(class_nodes(nodes, group))
                own = [span for span in spans[lane] if span[0] in chosen]
                watched[lane, group] += watch(own, spans[1 - lane], nodes, whole_s[kind])
    beside = {
        (lane, group): fit_beside(seen, alone[LANE_NAMES[lane]][LANE_CLASSES[lane][group]])
        for (lane, group), seen in watched.items()
    }
    pairs = tuple(
        PairSpeed(one, other, beside[0, own_group][other_group], beside[1, other_group][own_group])
        for own_group, one in enumerate(COMPUTE_CLASSES)
        for other_group, other in enumerate(MEMORY_CLASSES)
    )
    return LaneSpeeds(shares, alone, pairs)


def class_nodes(nodes: Sequence[NodeSpec], is_attention: int) -> list[int]:
    """Those that a class is measured by: attention, or the layers' linears. The logits' has rows of its own number."""
    return [
        index
        for index, node in enumerate(nodes)
        if (node.kind == "attention" if is_attention else node.kind == "linear" and node.rows == "token")
    ]


def median_node_s(runs: Sequence[dict], num_nodes: int) -> list[float]:
    """Per node, over completions; 0 for a node that never ran."""
    times: list[list[int]] = [[] for _ in range(num_nodes)]
    for completion in runs:
        for node, start_ns, end_ns in completion["spans"]:
            times[node].append(end_ns - start_ns)
    return [statistics.median(each) / 1e9 if each else 0.0 for each in times]


def _ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], chosen: Sequence[int]) -> float:
    """Seconds on the whole machine over seconds on the lane; a part that is quicker than the whole was disturbed less."""
    whole_s = sum(whole[node] for whole, _ in pairs for node in chosen)
    lane_s = sum(lane[node] for _, lane in pairs for node in chosen)
    if whole_s <= 0.0 or lane_s <= 0.0:
        raise RuntimeError("calibration: no node of a class ran, so what lanes achieve was not measured")
    return min(1.0, whole_s / lane_s)


def watch(
    own: Sequence[tuple[int, int, int]], others: Sequence[tuple[int, int, int]], nodes: Sequence[NodeSpec],
    whole_s: Sequence[float],
) -> list[Watched]:  # fmt: skip
    """Spans (node, start_ns, end_ns) of two lanes, each by rising start and without overlap among themselves."""
    found, first = [], 0
    for node, start_ns, end_ns in own:
        beside_ns = [0, 0]
        while first < len(others) and others[first][2] <= start_ns:
            first += 1
        index = first
        while index < len(others) and others[index][1] < end_ns:
            other, other_start_ns, other_end_ns = others[index]
            beside_ns[nodes[other].kind == "attention"] += min(end_ns, other_end_ns) - max(start_ns, other_start_ns)
            index += 1
        lone_ns = end_ns - start_ns - sum(beside_ns)
        found.append(Watched((beside_ns[0] / 1e9, beside_ns[1] / 1e9), lone_ns / 1e9, whole_s[node]))
    return found


def fit_beside(watched: Sequence[Watched], alone: float) -> tuple[float, float]:
    """The speed beside a linear and beside attention, of what the whole machine does alone; at most `alone`, which is the
    speed on the lane with nothing beside. Of nodes that were mostly accompanied."""
    useful = []
    for beside_s, lone_s, work_s in watched:
        work_beside_s = work_s - alone * lone_s
        if sum(beside_s) > lone_s and work_beside_s > 0.0:
            useful.append((beside_s, work_beside_s, work_beside_s / sum(beside_s)))
    if not useful:
        return alone, alone
    slowest = _STALLED * statistics.median(speed for *_, speed in useful)
    useful = [each for each in useful if each[2] >= slowest]
    both = sum(work_s for _, work_s, _ in useful) / sum(sum(beside_s) for beside_s, *_ in useful)
    rows = [beside_s for beside_s, *_ in useful]
    work = [work_s for _, work_s, _ in useful]
    for _ in range(-(-len(useful) // _OBSERVATIONS_PER_PRIOR)):
        rows += [(1.0, 0.0), (0.0, 1.0)]
        work += [both, both]
    linear, attention = nonnegative_fit(rows, work)
    return min(max(linear, _SLOWEST * both), alone), min(max(attention, _SLOWEST * both), alone)
