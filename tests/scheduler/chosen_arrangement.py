"""A controller and an order of prompts that do what a test wants next, registered as policies of their own.

chosen-arrangement    whatever `scheduler._controller.arrangement` says, two lanes or one, from plan to plan
chosen-order          the same, and requests change their places now and then, as with an order in which time counts
"""

from __future__ import annotations

import random

from scheduler.arrangement import GRANULARITIES, Arrangement
from scheduler.outlook import Outlook
from scheduler.policy import Policy, register_policy
from scheduler.request import Request

SPLITS = ((0.0, 1.0), (0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (0.75, 0.25), (1.0, 1.0))
ARRANGEMENTS = tuple(
    Arrangement(prefill_share, decode_share, granularity, token_budget, segment_s)
    for prefill_share, decode_share in dict.fromkeys(SPLITS)
    for granularity in GRANULARITIES
    for token_budget, segment_s in ((0, 0.0), (3, 1e-9), (16, 4e-5))  # s of the tiny model: a node, half a step
)


def random_arrangement(rng: random.Random) -> Arrangement:
    prefill_share, decode_share = rng.choice(SPLITS)
    return Arrangement(
        prefill_share, decode_share, rng.choice(GRANULARITIES), rng.choice((0, 0, 1, 5)), rng.choice((0.0, 1e-9, 4e-5))
    )


class ChosenArrangement:
    """Also looks at all that a controller may look at, and compares it with a plain count."""

    def __init__(self) -> None:
        self.arrangement = Arrangement()
        self.num_first_tokens = 0
        self.num_finished = 0

    def arrange(self, outlook: Outlook) -> Arrangement:
        assert 0.0 <= outlook.kv_usage <= 1.0
        running = [r for r in outlook.running if r.num_expected_tokens - r.next_start > 1]
        pending = sum(r.num_expected_tokens - r.next_start for r in running)
        everybody = outlook.prefills(1 << 20)
        assert len(everybody) == sum(r.run is None for r in running) + outlook.num_waiting
        waiting = everybody[len(everybody) - outlook.num_waiting :]
        assert outlook.pending_prefill_tokens == pending + sum(r.num_known_tokens for r in waiting)
        assert [r.rank for r in waiting] == sorted(r.rank for r in waiting)
        assert outlook.prefills(2) == everybody[:2]
        return self.arrangement

    def hear_first_token(self, request: Request, now: float) -> None:
        self.num_first_tokens += 1

    def hear_finished(self, request: Request, now: float) -> None:
        self.num_finished += 1


class RestlessOrder:
    """First come, first served, but every request loses its place up to twice, at times that a seeded draw says."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._present: dict[str, Request] = {}
        self._num_left: dict[str, int] = {}
        self._num_ranks = 0

    def _draw(self, request: Request) -> tuple:
        self._num_ranks += 1
        return (self._rng.randrange(4), self._num_ranks)

    def rank(self, request: Request, sequence: int, now: float) -> tuple:
        self._present[request.request_id] = request
        self._num_left[request.request_id] = 2
        return self._draw(request)

    def due(self, now: float) -> list[tuple[Request, tuple]]:
        moved = [r for r in self._present.values() if self._num_left[r.request_id] and self._rng.random() < 0.05]
        for request in moved:
            self._num_left[request.request_id] -= 1
        return [(request, self._draw(request)) for request in moved]

    def started(self, request: Request, now: float) -> None:
        assert request.request_id in self._present or request.num_preemptions  # which computes its prompt anew

    def paused(self, request: Request, executed_s: float, now: float) -> None:
        assert executed_s > 0.0

    def ended(self, request: Request) -> None:
        self._present.pop(request.request_id, None)


def chosen(config, model) -> ChosenArrangement:
    return ChosenArrangement()


def restless(config, model) -> RestlessOrder:
    return RestlessOrder(config.num_pages)


register_policy(Policy("chosen-arrangement", lanes="auto", controller=chosen))
register_policy(Policy("chosen-order", lanes="auto", controller=chosen, order=restless))
