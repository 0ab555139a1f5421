"""Pages of a plan in the making: who may start, who may grow, and who gives way when there are too few.

Works on a Composition's own count (num_reserved_pages); nothing is taken before the plan is committed. A preemption leaves
at once: it is a decision of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from scheduler.config import SchedulerConfig
from scheduler.peak_admission import PeakAdmission
from scheduler.policy import Policy
from scheduler.prefix_cache import PrefixMatch
from scheduler.queues import RunningList
from scheduler.request import Request
from scheduler.request_pages import RequestPages

if TYPE_CHECKING:
    from scheduler.composer import Composition


class ComposedPages:
    """`preempt(request)` and `num_draining()` are the scheduler's; who drains holds a row and pages until what is in flight
    of it is over."""

    def __init__(
        self, config: SchedulerConfig, policy: Policy, running: RunningList, pages: RequestPages,
        preempt: Callable[[Request], None], num_draining: Callable[[], int], peak: PeakAdmission | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._policy = policy
        self._running = running
        self._pages = pages
        self._preempt = preempt
        self._num_draining = num_draining
        self._peak = peak

    def could_begin(self, request: Request, step: Composition) -> bool:
        """Whether the request would get tokens in this step, which is empty, as the first of all."""
        pages = self._pages
        if request.row is None:
            num_rows_held = len(self._running) + self._num_draining()
            return num_rows_held < self._config.max_num_seqs and self._fit(request, step, False) is not None
        return (
            request.next_start < request.page_capacity
            or pages.num_available_pages >= pages.num_kv_groups
            or (not self._num_draining() and self._policy.victim(self._running.ranked_below(request)) is not None)
        )

    def num_available(self, composition: Composition) -> int:
        return self._pages.num_available_pages - composition.num_reserved_pages

    def admit(self, request: Request, composition: Composition, is_idle: bool) -> bool:
        """Adds a waiting request with its first chunk, if its pages are there; False: it waits on."""
        is_alone = is_idle and len(self._running) == 0 and not composition.shares
        fit = self._fit(request, composition, is_alone)
        if fit is None:
            return False
        match, num_tokens, num_needed = fit
        composition.num_reserved_pages += num_needed
        composition.admissions.append((request, match))
        if composition.held is not None:
            composition.held += self._peak.held_by([request])
        composition.shares.append((request, num_tokens))
        composition.budget -= num_tokens
        return True

    def _fit(
        self, request: Request, composition: Composition, is_alone: bool
    ) -> tuple[PrefixMatch | None, int, int] | None:
        """(what the cache has of it, tokens of its first chunk, pages that must be available) of a waiting request; None: it
        may not start now."""
        config, pages, admits = self._config, self._pages, self._policy.admits
        num_available = self.num_available(composition)
        # A head that did not fit is not matched anew each step; only more pages, or being alone, can change the answer.
        if not is_alone and num_available < request.admission_threshold:
            return None
        if self._peak is not None and not is_alone:
            if composition.held is None:
                admitted = [other for other, _ in composition.admissions]
                composition.held = self._peak.held_by([*self._running, *admitted])
            if not self._peak.admits(request, composition.held):
                return None
        match = pages.match(request)
        start, num_tokens, num_needed = self._admission(request, match, composition.budget)
        if (
            not admits(num_needed, num_available, is_alone, config)
            and match is not None
            and match.copy_node is not None
        ):
            # The copy's source must stay while the copy is made: one page per group more than computing it anew.
            match = pages.without_copy(match)
            start, num_tokens, num_needed = self._admission(request, match, composition.budget)
        if not admits(num_needed, num_available, is_alone, config):
            if not is_alone:
                request.admission_threshold = num_needed
                return None
            num_tokens = min(num_tokens, self._fit_alone(match, start, num_available))
            if num_tokens < 1:
                return None
            num_needed = num_available
        return match, num_tokens, num_needed

    def _admission(self, request: Request, match: PrefixMatch | None, budget: int) -> tuple[int, int, int]:
        """(first token to compute, tokens of the first chunk, pages that must be available)."""
        pages = self._pages
        num_matched = match.num_pages if match is not None else 0
        start = num_matched * pages.page_size + (match.num_copied_tokens if match is not None else 0)
        num_tokens = self._policy.chunk(request.num_known_tokens - start, budget, self._config)
        # Who was preempted comes back when all of it fits: else the same shortage would drive it out again.
        reach = request.num_known_tokens if request.num_preemptions else start + num_tokens
        num_pages = (pages.pages_to_reach(reach) - num_matched) * pages.num_kv_groups
        return start, num_tokens, num_pages + (match.num_unlocked_pages if match is not None else 0)

    def _fit_alone(self, match: PrefixMatch | None, start: int, num_available: int) -> int:
        """The largest first chunk for a request that runs alone and must not wait (its window's pages come back)."""
        num_matched = match.num_pages if match is not None else 0
        num_unlocked = match.num_unlocked_pages if match is not None else 0
        num_per_group = (num_available - num_unlocked) // self._pages.num_kv_groups
        return (num_matched + num_per_group) * self._pages.page_size - start

    def reserve(self, request: Request, num_tokens: int, composition: Composition, is_idle: bool) -> bool:
        """Pages for a running request's table to hold num_tokens positions, from who ranks below it if need be."""
        pages = self._pages
        num_missing_tokens = num_tokens - request.page_capacity
        num_needed = pages.pages_to_reach(num_missing_tokens) * pages.num_kv_groups
        while self.num_available(composition) < num_needed:
            if not self._make_room(request, composition, is_idle):
                composition.has_stalled = True
                return False
        composition.num_reserved_pages += num_needed
        return True

    def _make_room(self, request: Request, composition: Composition, is_idle: bool) -> bool:
        """True when pages may have become available. The lowest-ranked request just waits; it keeps what it has."""
        if self._num_draining():
            return False  # pages are on their way back; preempting more now would take too much
        victim = self._policy.victim(self._running.ranked_below(request))
        if victim is None:
            # Alone and still short: its own pages have twins in the tree, locked because it stands on them (it computed
            # what another request published first). Recomputing finds them there. See pages.twins in docs/scheduler.md.
            if not (is_idle and len(self._running) == 1 and not composition.shares):
                return False
            victim = request
        for position, (scheduled, num_tokens) in enumerate(composition.shares):
            if scheduled is victim:  # it had its share of this plan already, as a decode does before a prefill
                del composition.shares[position]
                composition.budget += num_tokens
                num_reserved = self._pages.pages_to_reach(victim.next_start + num_tokens) - self._pages.pages_to_reach(
                    victim.page_capacity
                )
                composition.num_reserved_pages -= max(0, num_reserved) * self._pages.num_kv_groups
                break
        self._preempt(victim)
        composition.has_preempted = True
        composition.held = None
        return victim is not request
