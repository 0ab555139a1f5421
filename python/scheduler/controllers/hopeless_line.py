"""Turns for those that cannot be in time any more, so that nobody waits for the overload to end.

They rank behind all that can be in time. Under endless overload that is for ever, so the one that is due longest comes
before everybody for once; then as long a pause as keeps such turns at SHARE of the time. A request is due LATENESS times its
target after its arrival, or when it becomes hopeless if that is later.

The bound. Let d(i) be the time from the first work on i's prompt in its turn to its first token, w(i) what it waits before
for a row, pages, and the step that runs. A request that is due at t has its first token by

    t + sum over those that were due before it, and itself, of w(i) + d(i) / SHARE

and nobody who comes later lengthens that. It holds among requests of one priority: a lower one waits for the higher ones.
No bound in seconds exists beyond capacity, where lines grow: this one says that a line is served, and in which order.

In time and not in predicted work: where prompts take longer than predicted all are given up half-way and none ends, so
nothing that counts ended work would ever give a turn; and without a cost model there are no predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf

from scheduler.request import Request, RequestStatus

SHARE = (
    0.005  # of the time. 0.01 cost S-EDF 3.3 % of its goodput in simulated overload, this 1.6 % (docs/scheduling.md)
)
LATENESS = 5.0  # times the target: what a burst leaves over is mostly served sooner without a turn


def front_rank(request: Request) -> tuple:
    """Before all of its priority."""
    return (request.priority, 0, -inf, request.rank[-1])


class HopelessLine:
    """Of one priority. O(log n) a request, O(1) a call otherwise."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Request]] = []
        self._members: set[Request] = set()  # of `_due`, as far as they have not left
        self._at_front: Request | None = None  # whose turn it is
        self._turn_began_s = 0.0
        self._next_turn_s = -inf

    def __len__(self) -> int:
        return len(self._members) + (self._at_front is not None)

    def add(self, request: Request, sequence: int, target_s: float) -> None:
        self._members.add(request)
        heappush(self._due, (request.arrival_s + LATENESS * target_s, sequence, request))

    def discard(self, request: Request) -> None:
        """It has left, if it was here."""
        self._members.discard(request)
        if len(self._due) > 2 * len(self._members) + 64:
            self._due = [item for item in self._due if item[2] in self._members]
            heapify(self._due)

    def is_over(self, now: float) -> bool:
        """Nothing would be lost with it."""
        return not len(self) and now >= self._next_turn_s

    def turns(self, now: float) -> Iterator[tuple[Request, tuple]]:
        """Whose place changes now, with the new ranks."""
        request = self._at_front
        if request is not None:
            if not _has_its_tokens(request):
                yield from self._bring_to_front(request)
                return
            self._end_turn(request, now)
        due = self._due
        while due and (due[0][2] not in self._members or (due[0][0] <= now and now >= self._next_turn_s)):
            _, _, request = heappop(due)
            if request not in self._members:
                continue
            self._members.remove(request)
            yield from self._bring_to_front(request)
            # One that was served while nobody else was there takes no turn: it is only not to be preempted for ever.
            if not _has_its_tokens(request):
                self._at_front, self._turn_began_s = request, now
                return

    @staticmethod
    def _bring_to_front(request: Request) -> Iterator[tuple[Request, tuple]]:
        """Asked for again until it is done: one that drains after a preemption has no place to change yet. A run goes with
        its lead, who may have to be brought along."""
        lead = request.run.lead if request.run is not None else request
        for one in (request,) if lead is request else (lead, request):
            if one.rank[2] != -inf:
                yield one, front_rank(one)

    def _end_turn(self, request: Request, now: float) -> None:
        began_s = self._turn_began_s
        if request.first_scheduled_s is not None:
            began_s = max(began_s, request.first_scheduled_s)
        self._next_turn_s = now + (now - began_s) * (1.0 / SHARE - 1.0)
        self._at_front = None


def _has_its_tokens(request: Request) -> bool:
    """Its first token is there and no prompt of it is pending, as after a preemption; or it has left."""
    if request.finish_reason is not None:
        return True
    is_decoding = request.status is RequestStatus.RUNNING and request.num_expected_tokens - request.next_start <= 1
    return request.first_token_s is not None and is_decoding
