"""In which order the operators of nano-batches go to their lanes: rules for whole programs, and the best for small ones.

A rule is list scheduling: again and again, of the nano-batches' next operators, the one that can start soonest goes next,
and the rule says who is preferred among those that could start together. The best order is found by walking through all
states (how far each nano-batch is) and keeping, of the ways to get there, those that no other beats in every time that
the rest depends on: the same answer as trying every order, in far fewer steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import product
from math import factorial

from scheduler.nanobatch_timeline import NanoWork

# States that best_order may walk through, and orders that may be timed one by one; above them only rules are tried.
EXACT_STATES = 1200
EXACT_ORDERS = 300
OPERATORS_PER_PAUSE = 96  # a rule over a long program yields after so many, so that no step of a search is long

RULES = ("in_turn", "front_first", "feed_memory", "longest_left")


def lock_step(num_nodes: int, num_nano: int) -> tuple[int, ...]:
    """Each node for all nano-batches in plan order: valid for whatever they hold, and known without a search."""
    return tuple(range(num_nano)) * num_nodes


def num_orders(num_nodes: int, num_nano: int) -> int:
    """At most, that keep the order of the program within each nano-batch."""
    return factorial(num_nodes * num_nano) // factorial(num_nodes) ** num_nano


def every_order(work: NanoWork) -> Iterator[tuple[int, ...]]:
    """All that keep the order of the program within each nano-batch, begin in plan order, and have attention over a cut
    chunk after the attention that appends what it reads."""
    num_nano, num_nodes = len(work.chains), len(work.is_attention)

    def extend(order: tuple[int, ...], position: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(order) == num_nano * num_nodes:
            yield order
        for nano, node in enumerate(position):
            if node == num_nodes or (nano and not position[nano - 1]):
                continue
            if nano and work.is_attention[node] and work.is_cut[nano - 1] and position[nano - 1] <= node:
                continue
            yield from extend((*order, nano), (*position[:nano], node + 1, *position[nano + 1 :]))

    return extend((), (0,) * num_nano)


def list_order(work: NanoWork, rule: str) -> Generator[None, None, tuple[tuple[int, ...], float]]:
    """(order, its makespan in seconds). Preferred among operators that could start at once: in_turn: of the nano-batch
    that is least far; front_first: of the earlier nano-batch; feed_memory: the one behind which an operator of the memory
    lane comes soonest, so that this lane does not run dry (NanoFlow puts the next layer's QKV before its neighbour's
    output projection for that); longest_left: of the nano-batch with most left to do."""
    chains, is_cut, is_attention, _ = work
    num_nano, num_nodes = len(chains), len(is_attention)
    preference = _preference(work, rule)
    position, ready_s, free_s = [0] * num_nano, [0.0] * num_nano, [0.0, 0.0]
    attention_end_s: list[dict[int, float]] = [{} for _ in range(num_nano)]
    order: list[int] = []
    for count in range(num_nano * num_nodes):
        best: tuple | None = None
        for nano in range(num_nano):
            node = position[nano]
            if node == num_nodes or (nano and not position[nano - 1]):
                continue
            operator = chains[nano][node]
            start_s = max(free_s[operator.lane], ready_s[nano])
            if nano and is_attention[node] and is_cut[nano - 1]:
                appended_s = attention_end_s[nano - 1].get(node)
                if appended_s is None:
                    continue
                start_s = max(start_s, appended_s)
            key = (start_s, preference[nano][node], nano)
            if best is None or key < best:
                best = key
        start_s, _, nano = best
        node = position[nano]
        operator = chains[nano][node]
        end_s = start_s + operator.alone_s
        free_s[operator.lane] = ready_s[nano] = end_s
        if is_attention[node]:
            attention_end_s[nano][node] = end_s
        position[nano] = node + 1
        order.append(nano)
        if count % OPERATORS_PER_PAUSE == OPERATORS_PER_PAUSE - 1:
            yield
    return tuple(order), max(ready_s)


def _preference(work: NanoWork, rule: str) -> Sequence[Sequence[float]]:
    """[nano-batch][node], smaller first."""
    if rule == "front_first":
        return [[float(nano)] * len(chain) for nano, chain in enumerate(work.chains)]
    if rule == "in_turn":
        return [[float(node) for node in range(len(chain))] for chain in work.chains]
    if rule not in RULES:
        raise ValueError(f"list_order: got rule {rule!r}, wanted one of {', '.join(RULES)}")
    preference = []
    for chain in work.chains:
        values, total_s = [], 0.0
        for operator in reversed(chain):
            if rule == "feed_memory":
                total_s = 0.0 if operator.lane else total_s + operator.alone_s
                values.append(total_s)
            else:
                total_s += operator.alone_s
                values.append(-total_s)
        preference.append(values[::-1])
    return preference


def best_order(work: NanoWork) -> tuple[tuple[int, ...], float]:
    """(an order of the least makespan, that makespan in seconds); operators do not slow each other. For small work
    (nodes + 1) ** nano-batches up to EXACT_STATES or so."""
    chains, is_cut, is_attention, _ = work
    num_nano, num_nodes = len(chains), len(is_attention)
    # A way to a state: times of the two lanes and of the nano-batches, then the ends of attentions that the next
    # nano-batch has still to wait for; and the order that led there, as a linked list.
    origin = ((0.0,) * (2 + num_nano), ((),) * (num_nano - 1), None)
    ways: dict[tuple[int, ...], list[tuple]] = {(0,) * num_nano: [origin]}
    for state in sorted(product(range(num_nodes + 1), repeat=num_nano), key=sum):
        for times, pending, path in ways.pop(state, ()) if sum(state) < num_nano * num_nodes else ():
            for nano in range(num_nano):
                node = state[nano]
                if node == num_nodes or (nano and not state[nano - 1]):
                    continue
                operator = chains[nano][node]
                start_s = max(times[operator.lane], times[2 + nano])
                next_pending = list(pending)
                if is_attention[node]:
                    if nano and is_cut[nano - 1]:
                        if not pending[nano - 1]:
                            continue  # the attention that appends what this one reads has not been placed
                        start_s = max(start_s, pending[nano - 1][0])
                        next_pending[nano - 1] = pending[nano - 1][1:]
                    if nano + 1 < num_nano and is_cut[nano]:
                        next_pending[nano] = (*pending[nano], start_s + operator.alone_s)
                next_times = list(times)
                next_times[operator.lane] = next_times[2 + nano] = start_s + operator.alone_s
                reached = (*state[:nano], node + 1, *state[nano + 1 :])
                way = (tuple(next_times), tuple(next_pending), (nano, path))
                _keep_undominated(ways.setdefault(reached, []), way)
    times, _, path = min(ways[(num_nodes,) * num_nano], key=lambda way: max(way[0]))
    order = []
    while path is not None:
        nano, path = path
        order.append(nano)
    return tuple(reversed(order)), max(times)


def _keep_undominated(ways: list[tuple], way: tuple) -> None:
    for other in ways:
        if _is_no_later(other, way):
            return
    ways[:] = [other for other in ways if not _is_no_later(way, other)]
    ways.append(way)


def _is_no_later(one: tuple, other: tuple) -> bool:
    return all(a <= b for a, b in zip(one[0], other[0])) and all(
        a <= b for ones, others in zip(one[1], other[1]) for a, b in zip(ones, others)
    )
