"""What must hold of a step in nano-batches, before it runs and after it ran. For tests and for traces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from scheduler.model_spec import ModelSpec
from scheduler.nanobatch import COMPUTE_LANE, MAX_NANO_BATCHES, MEMORY_LANE, NanoPlan, cut_chunks
from scheduler.step import LanePlan

# Of the whole chip; what rounding may add.
_MOST_SHARE = 1.0 + 1e-9


def check_nano_plan(
    plan: LanePlan, spec: ModelSpec, spans: Iterable[tuple[int, int, int, int]] | None = None, slack: int = 0
) -> None:
    """Raises AssertionError naming the rule that plan.nano breaks.

    Without spans: counts add up, shares fit on the chip, every node of every nano-batch is run once and in order, every
    wait is for an earlier range, and whatever depends on the other lane waits for it, through the order of the lanes and
    the waits. spans: (nano, node, start, end) as they ran, in any one unit of time, possibly without nodes that had
    nothing to do: parents have ended before their children start where their rows meet, and operators of one resource
    class never overlap. slack: of the clock, in the same unit.
    """
    nano = plan.nano
    if nano is None:
        raise AssertionError(f"plan {plan.plan_id} has no nano-batches")
    num_nodes = len(spec.nodes())
    attention = [index for index, node in enumerate(spec.nodes()) if node.kind == "attention"]
    _check_counts(plan, nano)
    lane_of = _check_coverage(nano, num_nodes)
    is_cut = cut_chunks(plan.requests, nano.token_counts)
    edges = _edges(nano.num_nano, num_nodes, attention, is_cut)
    _check_waits(nano, edges)
    if spans is not None:
        _check_spans(list(spans), lane_of, nano.num_nano, num_nodes, attention, is_cut, slack)


def _check_counts(plan: LanePlan, nano: NanoPlan) -> None:
    counts = nano.token_counts
    if not 2 <= len(counts) <= MAX_NANO_BATCHES or min(counts) < 1:
        raise AssertionError(f"counts: {counts}, wanted 2 to {MAX_NANO_BATCHES} of at least 1 token")
    if sum(counts) != plan.num_tokens:
        raise AssertionError(f"counts: {counts} add up to {sum(counts)}, the plan has {plan.num_tokens} tokens")
    if min(nano.shares) <= 0.0 or sum(nano.shares) > _MOST_SHARE:
        raise AssertionError(f"shares: {nano.shares}, wanted above 0 and together at most the chip")


def _check_coverage(nano: NanoPlan, num_nodes: int) -> dict[tuple[int, int], int]:
    reached, lane_of = [0] * nano.num_nano, {}
    for index, entry in enumerate(nano.ranges):
        if not 0 <= entry.nano < nano.num_nano or entry.lane not in (COMPUTE_LANE, MEMORY_LANE):
            raise AssertionError(f"range {index}: {entry}: no such nano-batch or lane")
        if entry.first != reached[entry.nano] or entry.last <= entry.first:
            raise AssertionError(f"order: range {index} is {entry}, its nano-batch is at {reached[entry.nano]}")
        if entry.first == 0 and entry.nano and not reached[entry.nano - 1]:
            raise AssertionError(f"order: nano-batch {entry.nano} begins before {entry.nano - 1}, which copies pages")
        reached[entry.nano] = entry.last
        lane_of.update({(entry.nano, node): entry.lane for node in range(entry.first, entry.last)})
        if any(not 0 <= needed < index for needed in entry.after):
            raise AssertionError(f"waits: range {index} waits for {entry.after}, wanted earlier ones")
    if reached != [num_nodes] * nano.num_nano:
        raise AssertionError(f"order: nano-batches end at nodes {reached}, the program at {num_nodes}")
    return lane_of


def _edges(
    num_nano: int, num_nodes: int, attention: Sequence[int], is_cut: Sequence[bool]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(parent, child) as (nano, node): operators that depend on each other and whose rows meet."""
    edges = [((i, node - 1), (i, node)) for i in range(num_nano) for node in range(1, num_nodes)]
    for boundary, cut in enumerate(is_cut):
        if cut:
            edges += [((boundary, node), (boundary + 1, node)) for node in attention]
    return edges


def _check_waits(nano: NanoPlan, edges: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """Each range's ancestors by lane order and waits, as bits; every edge must be one of them."""
    range_of, ancestors = {}, []
    last_on_lane = [-1, -1]
    for index, entry in enumerate(nano.ranges):
        bits = 0
        for needed in (*entry.after, last_on_lane[entry.lane]):
            if needed >= 0:
                bits |= ancestors[needed] | 1 << needed
        ancestors.append(bits)
        last_on_lane[entry.lane] = index
        range_of.update({(entry.nano, node): index for node in range(entry.first, entry.last)})
    for parent, child in edges:
        before, index = range_of[parent], range_of[child]
        if before != index and not ancestors[index] >> before & 1:
            raise AssertionError(f"waits: (nano, node) {child} may start before {parent} has ended")


def _check_spans(
    spans: list[tuple[int, int, int, int]], lane_of: dict[tuple[int, int], int], num_nano: int, num_nodes: int,
    attention: Sequence[int], is_cut: Sequence[bool], slack: int,
) -> None:  # fmt: skip
    times: dict[tuple[int, int], tuple[int, int]] = {}
    for nano, node, start, end in spans:
        if (nano, node) in times:
            raise AssertionError(f"spans: node {node} of nano-batch {nano} ran twice")
        if (nano, node) not in lane_of or end < start:
            raise AssertionError(f"spans: {(nano, node, start, end)} is none of the plan's")
        times[nano, node] = (start, end)

    def check(parent: tuple[int, int], child: tuple[int, int]) -> None:
        if times[child][0] + slack < times[parent][1]:
            raise AssertionError(
                f"parents: (nano, node) {child} started at {times[child][0]}, before {parent} ended at "
                f"{times[parent][1]}"
            )

    for nano in range(num_nano):
        ran = [(nano, node) for node in range(num_nodes) if (nano, node) in times]
        if not ran:
            raise AssertionError(f"spans: nano-batch {nano} never ran")
        for parent, child in pairwise(ran):
            check(parent, child)
    for boundary, cut in enumerate(is_cut):
        for node in attention if cut else ():
            check((boundary, node), (boundary + 1, node))
    for lane in (COMPUTE_LANE, MEMORY_LANE):
        ordered = sorted((*times[key], key) for key in times if lane_of[key] == lane)
        for (_, end, one), (start, _, other) in pairwise(ordered):
            if start + slack < end:
                raise AssertionError(f"class: {one} and {other}, both of lane {lane}, overlap by {end - start}")
