"""What the next plan of a lane holds: a pass over running and waiting requests that decides and changes nothing.

The order is Dynamic SplitFuse's: requests with one pending token (decodes) first, then running prefills, then
admissions, until the token budget is spent. A policy that does not mix has prompts first, and decodes alone. A pass works
on a Composition, its own count of tokens, pages and rows handed out; Scheduler commits it. Two things leave the pass at
once, both harmless if the plan stays empty: an admitted request leaves the waiting queue (the composition is always
committed), and a preemption, which is a decision of its own. Whose pages there are says composed_pages.py.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.arrangement import PREFILL_LANE
from scheduler.composed_pages import ComposedPages
from scheduler.config import SchedulerConfig
from scheduler.outlook import Outlook
from scheduler.peak_admission import HeldTokens, PeakAdmission
from scheduler.policy import Policy
from scheduler.prefix_cache import PrefixMatch
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request, RequestStatus
from scheduler.request_pages import RequestPages

RUNNING = RequestStatus.RUNNING


class Composition:
    """One plan in the making."""

    __slots__ = ("lane", "shares", "admissions", "budget", "num_reserved_pages", "has_stalled", "has_preempted", "held")

    def __init__(self, lane: int, budget: int) -> None:
        self.lane = lane
        self.shares: list[tuple[Request, int]] = []  # (request, scheduled tokens), in plan order
        self.admissions: list[tuple[Request, PrefixMatch | None]] = []  # also in shares
        self.budget = budget  # tokens left
        self.num_reserved_pages = 0  # that the commit will take
        self.has_stalled = False  # a running request got no page
        self.has_preempted = False
        self.held: list[HeldTokens] | None = None  # by who runs and who was admitted; None: nobody has asked yet

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.shares)


class Composer:
    """Reads the queues and the pages. `preempt(request)` and `num_draining()` are the scheduler's."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        running: RunningList,
        waiting: WaitingQueue,
        pages: RequestPages,
        preempt: Callable[[Request], None],
        num_draining: Callable[[], int],
        outlook: Outlook,
        peak: PeakAdmission | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._running = running
        self._waiting = waiting
        self._pages = pages
        self._supply = ComposedPages(config, policy, running, pages, preempt, num_draining, peak)
        self._outlook = outlook
        self._has_lanes = config.num_lanes > 1

    def compose(self, lane: int, num_free_rows: int, is_idle: bool, token_budget: int = 0) -> Composition:
        """Decodes and prompts. is_idle: no plan is in flight on any lane, no run rests. token_budget: 0 for the policy's."""
        # A step has room for the limit at most, whatever a policy says, and for one token at least.
        budget = token_budget or self._policy.token_budget(self._outlook, lane)
        composition = Composition(lane, min(max(budget, 1), self._config.max_num_batched_tokens))
        if not self._policy.mixes:
            self._compose_prompts_first(composition, num_free_rows, is_idle)
            return composition
        prefills = self._compose_decodes(composition, is_idle)
        if self._policy.order is not None:
            self._compose_by_rank(prefills, composition, num_free_rows, is_idle)
            return composition
        self._compose_chunks(prefills, composition, is_idle)
        # Who runs comes before who waits: nobody is admitted while a running request lacks a page.
        if not (composition.has_stalled or composition.has_preempted):
            self._compose_waiting(composition, num_free_rows, is_idle)
        return composition

    def compose_decodes(self, lane: int, is_idle: bool) -> Composition:
        """Requests with one pending token, and no prompt."""
        composition = Composition(lane, self._config.max_num_batched_tokens)
        self._compose_decodes(composition, is_idle)
        return composition

    def compose_prompts(
        self, lane: int, num_free_rows: int, is_idle: bool, token_budget: int = 0, can_admit: bool = True
    ) -> Composition:
        """Prompt chunks, and no decode. token_budget: 0 for as many as a step holds. can_admit: of those that wait."""
        most = self._config.max_num_batched_tokens
        composition = Composition(lane, min(token_budget or most, most))
        self._compose_chunks(self._pending_prefills(lane), composition, is_idle)
        if can_admit and not (composition.has_stalled or composition.has_preempted):
            self._compose_waiting(composition, num_free_rows, is_idle)
        return composition

    def compose_run(self, lane: int, num_free_rows: int, is_idle: bool, can_admit: bool = True) -> Composition:
        """Prompts that go through the program together, in parts: the first in rank order leads, cut only to what a frame
        holds; others join it in order, as far as the policy's budget for its run has room for all that is pending of them.
        """
        composition = Composition(lane, self._config.max_num_batched_tokens)
        prefills = self._pending_prefills(lane)
        lead = self._run_lead(prefills) if can_admit else next(iter(prefills), None)
        if lead is None:
            return composition
        budget = min(max(self._policy.run_budget(self._outlook, lead), 1), self._config.max_num_batched_tokens)
        next_prefill = 0
        while True:
            waiting = self._waiting.peek() if can_admit and len(composition.admissions) < num_free_rows else None
            prefill = prefills[next_prefill] if next_prefill < len(prefills) else None
            takes_waiting = prefill is None or (waiting is not None and waiting.rank < prefill.rank)
            request = waiting if takes_waiting else prefill
            if request is None or composition.has_stalled or composition.has_preempted:
                return composition
            if composition.shares:  # the lead has its tokens: what is left of the budget is for whole prompts
                num_left = budget - composition.num_tokens
                if request.num_expected_tokens - request.next_start > num_left:
                    return composition
            if takes_waiting:
                if self._supply.admit(request, composition, is_idle):
                    self._waiting.pop()
                else:
                    can_admit = False  # it is not overtaken by others that wait; who runs goes on
            else:
                next_prefill += 1
                if request.status is RUNNING:
                    self._compose_chunk(request, composition, is_idle)

    def run_lead(self, lane: int) -> Request | None:
        """Who would lead the lane's next run."""
        return self._run_lead(self._pending_prefills(lane))

    def could_begin(self, request: Request) -> bool:
        """Whether compose_run would give tokens to this request as the lead, asked while other runs have begun. Exact: a run
        that stopped for somebody who then cannot begin would go on, be stopped again, and never end."""
        return self._supply.could_begin(request, Composition(PREFILL_LANE, self._config.max_num_batched_tokens))

    def _run_lead(self, prefills: list[Request]) -> Request | None:
        waiting = self._waiting.peek()
        if not prefills or (waiting is not None and waiting.rank < prefills[0].rank):
            return waiting
        return prefills[0]

    def _pending_prefills(self, lane: int) -> list[Request]:
        """Running requests whose prompts this lane may go on with, in rank order."""
        return [
            request
            for request in self._running
            if request.run is None
            and request.num_expected_tokens < request.max_num_tokens
            and request.num_expected_tokens - request.next_start > 1
            and not (self._has_lanes and request.num_plans_in_flight and request.lane != lane)
        ]

    def _compose_decodes(self, composition: Composition, is_idle: bool) -> list[Request]:
        """Adds every request with one pending token; returns those with more."""
        lane, shares, has_lanes = composition.lane, composition.shares, self._has_lanes
        prefills: list[Request] = []
        for request in self._running.snapshot():
            if request.run is not None:
                continue
            num_expected = request.num_expected_tokens
            if num_expected >= request.max_num_tokens:
                continue  # its last token is in flight
            start = request.next_start
            if has_lanes and request.num_plans_in_flight and request.lane != lane:
                continue
            if num_expected - start > 1:
                prefills.append(request)
                continue
            if composition.budget == 0 or request.status is not RUNNING:
                continue
            if start >= request.page_capacity and not self._supply.reserve(request, start + 1, composition, is_idle):
                continue
            shares.append((request, 1))
            composition.budget -= 1
        return prefills

    def _compose_chunks(self, prefills: list[Request], composition: Composition, is_idle: bool) -> None:
        for request in prefills:
            if composition.budget == 0:
                break
            if request.status is RUNNING:
                self._compose_chunk(request, composition, is_idle)

    def _compose_prompts_first(self, composition: Composition, num_free_rows: int, is_idle: bool) -> None:
        """Chunks and admissions while there are any; a step of decodes only when there are none.

        Pages that decodes need next are kept for them meanwhile: else a prompt that was preempted for such a page would be
        admitted with it again before the decode's turn comes, for ever.
        """
        lane, decodes, prefills, num_kept = composition.lane, [], [], 0
        for request in self._running.snapshot():
            num_expected = request.num_expected_tokens
            if num_expected >= request.max_num_tokens or request.run is not None:
                continue
            if self._has_lanes and request.num_plans_in_flight and request.lane != lane:
                continue
            if num_expected - request.next_start > 1:
                prefills.append(request)
                continue
            decodes.append(request)
            if request.next_start >= request.page_capacity:
                num_kept += self._pages.num_kv_groups
        composition.num_reserved_pages = num_kept
        for request in prefills:
            if composition.budget and request.status is RUNNING:
                self._compose_chunk(request, composition, is_idle)
        if not (composition.has_stalled or composition.has_preempted):
            self._compose_waiting(composition, num_free_rows, is_idle)
        if composition.shares:
            return
        composition.num_reserved_pages -= num_kept
        for request in decodes:
            if composition.budget and request.status is RUNNING:
                self._compose_chunk(request, composition, is_idle)

    def _compose_by_rank(
        self, prefills: list[Request], composition: Composition, num_free_rows: int, is_idle: bool
    ) -> None:
        """Where ranks change with time a prompt that waits may come before one that has begun."""
        next_prefill, can_admit = 0, True
        while composition.budget > 0:
            # Who runs comes before who waits, as above; but who runs goes on, or nobody might.
            can_admit = can_admit and not (composition.has_stalled or composition.has_preempted)
            waiting = self._waiting.peek() if can_admit and len(composition.admissions) < num_free_rows else None
            prefill = prefills[next_prefill] if next_prefill < len(prefills) else None
            if waiting is not None and (prefill is None or waiting.rank < prefill.rank):
                if self._supply.admit(waiting, composition, is_idle):
                    self._waiting.pop()
                else:
                    can_admit = False
            elif prefill is not None:
                next_prefill += 1
                if prefill.status is RUNNING:
                    self._compose_chunk(prefill, composition, is_idle)
            else:
                return

    def _compose_chunk(self, request: Request, composition: Composition, is_idle: bool) -> None:
        start = request.next_start
        num_tokens = self._policy.chunk(request.num_expected_tokens - start, composition.budget, self._config)
        # A chunk need not end with a page, nor with what was asked for: it shrinks to the pages there are.
        num_available = self._supply.num_available(composition) // self._pages.num_kv_groups
        reach = request.page_capacity + num_available * self._pages.page_size
        stop = min(start + num_tokens, max(reach, start + 1))
        if stop > request.page_capacity and not self._supply.reserve(request, stop, composition, is_idle):
            return
        composition.shares.append((request, stop - start))
        composition.budget -= stop - start

    def _compose_waiting(self, composition: Composition, num_free_rows: int, is_idle: bool) -> None:
        while composition.budget > 0 and len(composition.admissions) < num_free_rows:
            request = self._waiting.peek()
            if request is None or not self._supply.admit(request, composition, is_idle):
                return  # the head of the queue is not overtaken
            self._waiting.pop()
