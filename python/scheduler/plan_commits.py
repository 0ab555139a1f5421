"""The only place where a plan changes requests, pages and rows: a composition, or a run's next part, becomes a LanePlan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scheduler.composer import Composition
from scheduler.config import SchedulerConfig
from scheduler.nanobatch import NanoPlan
from scheduler.prefill_run import PrefillRun
from scheduler.prefix_cache import PrefixNode
from scheduler.queues import RunningList
from scheduler.request import Request, RequestStatus
from scheduler.request_pages import RequestPages
from scheduler.run_lives import RunLives
from scheduler.step import Admission, LanePlan, PageCopy, PageTableReset, ScheduledRequest
from scheduler.step_shape import shape_of

# Builds a named tuple from its fields in order, at half its constructor's price; one is made per request and step.
make_tuple = tuple.__new__


class Flight(NamedTuple):
    """A plan between commit and result."""

    plan: LanePlan
    requests: list[Request]  # plan.requests, as objects
    copy_sources: list[PrefixNode]  # held until the plan has copied them; those of a run are the run's
    run: PrefillRun | None = None  # of which the plan is a part


class PlanCommits:
    """Owns the plans in flight and their numbers."""

    def __init__(
        self, config: SchedulerConfig, pages: RequestPages, running: RunningList, run_lives: RunLives, free_rows: list[int],
        window: int,
    ) -> None:  # fmt: skip
        self._config = config
        self._pages = pages
        self._running = running
        self._run_lives = run_lives
        self._window = window  # tokens that a query of a windowed layer sees; 0: no such layers
        self._free_rows = free_rows
        self.lanes: list[deque[Flight]] = [deque() for _ in range(config.num_lanes)]
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._num_plans = 0

    def step(
        self, composition: Composition, now: float, share: float, run_bounds: tuple[int, ...] | None = None, last: int = 0,
        cut: Callable[[Sequence[ScheduledRequest]], NanoPlan | None] | None = None,
    ) -> LanePlan:  # fmt: skip
        """run_bounds: where the parts of a prefill end that goes in parts; the first ends before node `last`. cut: says how
        the step goes in nano-batches."""
        lane, pages = composition.lane, self._pages
        for request, match in composition.admissions:
            pages.take_match(request, match)
        admissions, resets, copies, copy_sources = self._admit(composition, now)

        scheduled: list[ScheduledRequest] = []
        requests: list[Request] = []
        no_pages = pages.no_pages
        for request, num_tokens in composition.shares:
            start = request.next_start
            stop = start + num_tokens
            new_pages = pages.extend(request, stop) if stop > request.page_capacity else no_pages
            samples = stop == request.num_expected_tokens
            request.next_start = stop
            if samples:
                request.num_expected_tokens = stop + 1
            request.num_plans_in_flight += 1
            request.lane = lane
            part = (request.request_id, request.row, start, num_tokens, new_pages, samples)
            scheduled.append(make_tuple(ScheduledRequest, part))
            requests.append(request)

        self._num_plans += 1
        plan = LanePlan(
            plan_id=self._num_plans,
            lane=lane,
            share=share,
            program="step",
            node_range=(0, last) if run_bounds is not None and last < self._config.num_nodes else None,
            requests=tuple(scheduled),
            admissions=tuple(admissions),
            resets=tuple(resets),
            copies=tuple(copies),
            # Copies are the first nano-batch's; an order may begin with another, which would not wait for them.
            nano=cut(scheduled) if cut is not None and not copies else None,
        )
        if run_bounds is None:
            self.lanes[lane].append(Flight(plan, requests, copy_sources))
            return plan
        without_pages = tuple([part._replace(new_pages=no_pages) for part in scheduled])
        shape = shape_of(without_pages, self._window)
        run = PrefillRun(plan.plan_id, requests, without_pages, shape, copy_sources, now, run_bounds)
        self._run_lives.begin(run)
        self._run_lives.begin_part(run, plan, now)
        self.lanes[lane].append(Flight(plan, requests, [], run))
        return plan

    def part(self, lane: int, run: PrefillRun, last: int, now: float, share: float) -> LanePlan:
        """The next part of a run, up to node `last`: requests, pages and copies were its first part's."""
        self._num_plans += 1
        node_range = (run.cursor, last)
        plan = LanePlan(self._num_plans, lane, share, "step", node_range, run.scheduled, continues=run.run_id)
        self._run_lives.begin_part(run, plan, now)
        self.lanes[lane].append(Flight(plan, run.requests, [], run))
        return plan

    def _admit(
        self, composition: Composition, now: float
    ) -> tuple[list[Admission], list[PageTableReset], list[PageCopy], list[PrefixNode]]:
        admissions: list[Admission] = []
        resets: list[PageTableReset] = []
        copies: list[PageCopy] = []
        copy_sources: list[PrefixNode] = []
        for request, match in composition.admissions:
            if match is not None and match.copy_node is not None:
                copies.extend(self._pages.copy_matched_part(request, match.copy_node))
                copy_sources.append(match.copy_node)
            request.row = row = self._free_rows.pop()
            request.status = RequestStatus.RUNNING
            self._running.add(request)
            if request.first_scheduled_s is None:
                # A resume finds its own pages; counting them would flatter the hit rate.
                request.first_scheduled_s = now
                request.num_cached_tokens = request.num_computed_tokens
                self.num_prefix_query_tokens += request.num_prompt_tokens
                self.num_prefix_hit_tokens += request.num_computed_tokens
            known, num_computed = request.known_token_ids(), request.num_computed_tokens
            admissions.append(Admission(request.request_id, row, known, request.num_prompt_tokens, num_computed))
            resets.append(PageTableReset(row, tuple(tuple(table) for table in request.pages)))
        return admissions, resets, copies, copy_sources
