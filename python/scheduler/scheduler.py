"""The scheduler: events in, plans out.

The rule underneath everything: computed tokens catch up with known tokens. There is no prefill world and no decode
world; every request has computed tokens and known tokens, a plan hands out tokens so that the first catch up with
the second, and whoever catches up samples one more. Chunked prefill, prefix hits, resume after preemption and
pipelining are this one rule.

    event ──> land / queue / retire ──> for each lane with room: compose (decide) ──> commit (change) ──> LanePlan

Pipelining: a lane holds up to max_plans_in_flight plans. Plan i+1 is made while plan i runs; a decode row of plan
i+1 names the position whose token plan i is sampling, which is known to exist (num_expected_tokens) though its
value is not. When plan i's result ends the request, what plan i+1 yields for it is dropped. Ends by length are
foreseen, so never overrun.

A request that ends or is preempted keeps its row and its pages until no plan in flight names it ("draining").
Single-threaded: the engine's thread calls everything here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from scheduler.composer import Composer, Composition
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.goodput import GoodputCounter, GoodputStats, outcome_of
from scheduler.lane_planner import LanePlanner, NextWork, controller_for
from scheduler.outlook import Outlook
from scheduler.policy import policy_named, with_preset
from scheduler.prefill_run import PrefillRun, RunTable
from scheduler.prefix_cache import PrefixNode
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request, RequestStatus
from scheduler.request_pages import RequestPages
from scheduler.step import (
    AbortRequest,
    Admission,
    Arrival,
    CopyDone,
    DropRun,
    Event,
    LaneFinished,
    LanePlan,
    LaneResult,
    Order,
    PageCopy,
    PageTableReset,
    PausePlan,
    ScheduledRequest,
    Timer,
    TokenOutput,
)
from scheduler.step_shape import shape_of

RUNNING, PREEMPTED, FINISHED = RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.FINISHED
MISSING = -2  # no token where one was due; -1 is the contract's "the logits were not finite"
# Builds a named tuple from its fields in order, at half its constructor's price; for the two per request and step.
make_tuple = tuple.__new__


class SchedulerStats(NamedTuple):
    """A snapshot for metrics. Counters count from the scheduler's start."""

    num_running: int  # requests that hold a row and may be scheduled
    num_waiting: int
    num_draining: int  # ended or preempted, still named by a plan in flight
    num_free_pages: int
    num_cached_pages: int  # in the prefix cache and evictable
    num_live_pages: int  # held by requests
    kv_usage: float  # live / total, 0..1
    num_preemptions: int
    num_prefix_query_tokens: int  # prompt tokens of admitted requests
    num_prefix_hit_tokens: int  # of those, found in the prefix cache
    goodput: GoodputStats = GoodputStats()  # service levels kept and missed
    num_pauses: int = 0  # prefills that stopped for one that ranks before them
    num_moves: int = 0  # of the border between prefill and decode
    arrangements: Mapping[str, int] = MappingProxyType({})  # what the controller decided -> times


class Flight(NamedTuple):
    """A plan between commit and result."""

    plan: LanePlan
    requests: list[Request]  # plan.requests, as objects
    copy_sources: list[PrefixNode]  # held until the plan has copied them
    run: PrefillRun | None = None  # of which the plan is a part


class Scheduler:
    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None = None) -> None:
        """cost_model: of this machine, for policies that predict; None: they go by their fixed limits."""
        config = with_preset(config)
        self.config = config
        self.cost_model = cost_model
        self._policy = policy_named(config.policy)
        self._pages = RequestPages(config)
        self._requests: dict[str, Request] = {}  # every request that has no finish reason yet
        self._waiting = WaitingQueue()
        self._running = RunningList()
        self._draining: set[Request] = set()
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._lanes: list[deque[Flight]] = [deque() for _ in range(config.num_lanes)]
        self._runs = RunTable()
        self._outlook = Outlook(config, cost_model, self._running, self._waiting, self._runs, self._pages)
        self._composer = Composer(
            config, self._policy, self._running, self._waiting, self._pages, self._preempt, lambda: bool(self._draining),
            self._outlook,
        )  # fmt: skip
        self._controller = controller_for(config, self._policy, cost_model)
        self._planner: LanePlanner | None = None  # None: plans are the composer's, whole and of one lane's kind
        if self._controller is not None:
            self._planner = LanePlanner(
                config, self._policy, self._controller, self._composer, self._outlook, self._runs
            )
        self._order = self._policy.order(config, cost_model) if self._policy.order is not None else None
        self._orders: list[Order] = []
        self._num_pauses = 0
        self._outputs: list[TokenOutput] = []
        self._num_plans = 0
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_prefix_query_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._goodput = GoodputCounter()

    def on_event(self, event: Event, now: float) -> list[LanePlan]:
        """Takes one event and returns the plans it made possible, in the order in which each lane must run them.

        now is the driver's clock in seconds, real or virtual. Raises ValueError for a result of a plan that is not the
        oldest in flight on its lane, and for a request id that is still in use; nothing has changed then.
        """
        self._take(event, now)
        return self._plan_lanes(now)

    def on_events(self, events: Iterable[Event], now: float) -> list[LanePlan]:
        """Several events that are due at once, then one round of planning: requests arriving together start together.

        If an event is refused (see on_event), those before it have been taken, it and those after it have not.
        """
        for event in events:
            self._take(event, now)
        return self._plan_lanes(now)

    def take_outputs(self) -> list[TokenOutput]:
        """What happened since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_orders(self) -> list[Order]:
        """What to do with plans in flight and runs at rest, since the last call, after the plans were launched."""
        orders, self._orders = self._orders, []
        return orders

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_plans_in_flight(self) -> int:
        return sum(len(flights) for flights in self._lanes)

    @property
    def is_idle(self) -> bool:
        """Nothing to do and nothing in flight: every page is free or cached."""
        return not self._requests and not any(self._lanes) and not self._runs

    @property
    def kv_usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1."""
        return 1.0 - self._pages.num_available_pages / self._pages.num_pages

    def stats(self) -> SchedulerStats:
        pages = self._pages
        num_live = pages.num_pages - pages.num_available_pages
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_draining=len(self._draining),
            num_free_pages=pages.num_free_pages,
            num_cached_pages=pages.num_evictable_pages,
            num_live_pages=num_live,
            kv_usage=num_live / pages.num_pages,
            num_preemptions=self._num_preemptions,
            num_prefix_query_tokens=self._num_prefix_query_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            goodput=self._goodput.stats(),
            num_pauses=self._num_pauses,
            num_moves=self._planner.num_moves if self._planner is not None else 0,
            arrangements=dict(self._planner.counts) if self._planner is not None else {},
        )

    def reset_prefix_cache(self) -> None:
        """No later request reads KV computed before this call (the weights changed). Requests that run go on."""
        self._pages.clear_cache()

    def check_integrity(self) -> None:
        """free + cached + live == total, every page and row has the owners it should. Raises AssertionError.

        Walks all pages: cheap enough for whenever the engine is idle, and for every step of a test.
        """
        holders = [*self._running, *self._draining]
        self._pages.check_integrity(holders)
        rows = [request.row for request in holders] + self._free_rows
        if sorted(rows) != list(range(self.config.max_num_seqs)):
            raise AssertionError(
                f"rows held and free {sorted(rows)} are not 0..{self.config.max_num_seqs - 1} once each"
            )
        in_flight: dict[Request, int] = dict.fromkeys(holders, 0)
        for flights in self._lanes:
            for flight in flights:
                for request in flight.requests if flight.run is None else ():
                    in_flight[request] = in_flight.get(request, 0) + 1
        for run in self._runs:
            for request in run.requests:
                in_flight[request] = in_flight.get(request, 0) + 1
                if request.run is not run:
                    raise AssertionError(f"{request!r}: {run!r} holds it, it knows of {request.run!r}")
        for request, count in in_flight.items():
            if request.num_plans_in_flight != count:
                raise AssertionError(f"{request!r}: {count} plans in flight name it")

    # Events

    def _take(self, event: Event, now: float) -> None:
        if isinstance(event, LaneFinished):
            self._land(event.result, now)
        elif isinstance(event, Arrival):
            self._arrive(event.request, now)
        elif isinstance(event, AbortRequest):
            request = self._requests.get(event.request_id)
            if request is not None:  # else it ended while the abort was on its way
                self._finish(request, event.reason, now)
        elif not isinstance(event, (CopyDone, Timer)):  # those change nothing by themselves: they wake the planner
            raise TypeError(f"Scheduler: got event {type(event).__name__}, wanted one of scheduler.step.Event")

    def _arrive(self, request: Request, now: float) -> None:
        if request.request_id in self._requests:
            raise ValueError(f"Arrival: request id {request.request_id!r} is in use by an unfinished request")
        why = self._refusal(request)
        if why is not None:
            request.status = FINISHED
            request.finish_reason = "error"
            self._outputs.append(TokenOutput(request.request_id, (), "error", None, 0, why))
            return
        self._num_arrivals += 1
        if self._order is not None:
            request.rank = self._order.rank(request, self._num_arrivals, now)
        else:
            request.rank = self._policy.rank(request, self._num_arrivals)
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def _refusal(self, request: Request) -> str | None:
        """Why the request could never end even if it ran alone, or None."""
        asked = f"{request.num_prompt_tokens} prompt tokens + up to {request.max_tokens} generated"
        if request.max_num_tokens > self.config.max_model_len:
            return f"{asked} = {request.max_num_tokens} tokens; the context holds {self.config.max_model_len}"
        num_needed = self._pages.pages_alone(request.max_num_tokens - 1)  # the last token never needs KV
        num_pages = self._pages.num_pages
        if num_needed > num_pages:
            num_per_group = num_pages // self._pages.num_kv_groups
            return (
                f"{asked} need KV for {request.max_num_tokens - 1} tokens ({num_needed} pages); "
                f"{num_per_group * self._pages.page_size} tokens are available ({num_pages} pages)"
            )
        return None

    def _land(self, result: LaneResult, now: float) -> None:
        """A plan's result: its tokens are computed, its samples known."""
        flights = self._lanes[result.lane] if 0 <= result.lane < len(self._lanes) else ()
        if not flights or flights[0].plan.plan_id != result.plan_id:
            wanted = flights[0].plan.plan_id if flights else "none, nothing is in flight there"
            raise ValueError(f"LaneFinished: got plan {result.plan_id} of lane {result.lane}, wanted {wanted}")
        flight = flights.popleft()
        for node in flight.copy_sources:
            self._pages.release_source(node)
        if flight.run is not None and not self._land_part(flight.run, flight.plan, result, now):
            return  # the run goes on: nothing is computed yet

        token_of = dict(result.sampled)
        why_failed = dict(result.failed)
        pages, outputs, frees_windows = self._pages, self._outputs, self._pages.frees_windows
        for request, (request_id, _, _, num_tokens, _, samples) in zip(
            flight.requests, flight.plan.requests, strict=True
        ):
            request.num_plans_in_flight -= 1
            if request.status is FINISHED:
                if request.num_plans_in_flight == 0:
                    self._drained(request)
                continue
            token_id = token_of.get(request_id, MISSING) if samples else 0
            if token_id < 0 or (why_failed and request_id in why_failed):
                # Its KV is not to be trusted: nothing of this chunk is counted or published.
                missing = (
                    "the lane's result names no token for it" if token_id == MISSING else "the logits were not finite"
                )
                self._finish(request, "error", now, why_failed.get(request_id, missing))
                continue

            num_computed = request.num_computed_tokens = request.num_computed_tokens + num_tokens
            if num_computed >= request.publish_at:
                pages.publish(request)
            if frees_windows:
                pages.release_outside_windows(request)

            if samples:
                output_token_ids = request.output_token_ids
                output_token_ids.append(token_id)
                num_outputs = len(output_token_ids)
                finish_reason = stop_token_id = None
                if token_id in request.stop_token_ids and num_outputs > request.min_tokens:
                    finish_reason, stop_token_id = "stop", token_id
                elif num_outputs == request.max_tokens:
                    finish_reason = "length"
                first_s = None
                if num_outputs == 1:
                    first_s, request.first_token_s = request.first_scheduled_s, now
                    if self._controller is not None:
                        self._controller.hear_first_token(request, now)
                num_cached = request.num_cached_tokens
                output = (request_id, (token_id,), finish_reason, stop_token_id, num_cached, None, first_s)
                outputs.append(make_tuple(TokenOutput, output))
                if finish_reason is not None:
                    self._retire(request, finish_reason, now)
            if request.status is PREEMPTED and request.num_plans_in_flight == 0:
                self._drained(request)

    def _land_part(self, run: PrefillRun, plan: LanePlan, result: LaneResult, now: float) -> bool:
        """A part is back. True: with it the run has ended, or failed, and its result is the requests'."""
        run.plan, run.is_pausing = None, False
        num_nodes = self.config.num_nodes
        ended_at = result.cursor if result.cursor is not None else (plan.node_range or (0, num_nodes))[1]
        if ended_at < num_nodes and not result.failed:
            run.cursor = ended_at
            self._num_pauses += result.cursor is not None
            if self._order is not None:
                run.executed_s += now - run.part_started_s
                self._order.paused(run.lead, run.executed_s, now)
            if run.is_doomed or all(request.status is not RUNNING for request in run.requests):
                self._drop_run(run)
            return False
        self._runs.remove(run)
        for node in run.copy_sources:
            self._pages.release_source(node)
        for request in run.requests:
            request.run = None
            if self._order is not None:
                self._order.ended(request)
        return True

    def _drop_run(self, run: PrefillRun) -> None:
        """A run at rest will not go on: what it computed is forgotten, and who is alive is scheduled anew."""
        self._runs.remove(run)
        self._orders.append(DropRun(run.run_id))
        for node in run.copy_sources:
            self._pages.release_source(node)
        for request, (_, _, start, _, _, samples) in zip(run.requests, run.scheduled, strict=True):
            request.run = None
            request.num_plans_in_flight -= 1
            if request.status is RUNNING:
                request.next_start = start
                request.num_expected_tokens -= samples
                if run.copy_sources:  # whether its copied part of a page was filled is not known
                    self._preempt(request)
            elif request.num_plans_in_flight == 0:
                self._drained(request)

    def _leave_run(self, request: Request) -> None:
        """A request of a run was preempted: its pages are needed now, so the run ends as soon as it rests."""
        run = request.run
        if run.is_resting:
            self._drop_run(run)
        else:
            run.is_doomed = True
            self._pause(run)

    def _pause(self, run: PrefillRun) -> None:
        if not run.is_pausing:
            run.is_pausing = True
            self._orders.append(PausePlan(run.plan.plan_id, run.plan.lane))

    # Lives and ends

    def _finish(self, request: Request, reason: str, now: float, error: str | None = None) -> None:
        """Ends a request for a reason that is no token."""
        first_scheduled = None if request.output_token_ids else request.first_scheduled_s
        self._outputs.append(
            TokenOutput(request.request_id, (), reason, None, request.num_cached_tokens, error, first_scheduled)
        )
        self._retire(request, reason, now)

    def _retire(self, request: Request, reason: str, now: float) -> None:
        was_running = request.status is RUNNING
        is_holding = was_running or request in self._draining
        request.status = FINISHED
        request.finish_reason = reason
        del self._requests[request.request_id]
        if reason in ("stop", "length", "error"):  # an abort says nothing of how well it was served
            self._count_goodput(request, reason, now)
            if self._controller is not None:
                self._controller.hear_finished(request, now)
        if self._order is not None:
            self._order.ended(request)
        if was_running:
            self._running.remove(request)
        if is_holding:
            self._drain(request)
        else:
            self._waiting.remove(request)
        run = request.run
        if run is not None and run.is_resting and all(other.status is not RUNNING for other in run.requests):
            self._drop_run(run)

    def _preempt(self, request: Request) -> None:
        """Preemption by recompute: known tokens are computed again, as far as the prefix cache forgot them."""
        request.status = PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._running.remove(request)
        self._drain(request)
        if request.run is not None:
            self._leave_run(request)

    def _count_goodput(self, request: Request, reason: str, now: float) -> None:
        arrival_s, first_token_s = request.arrival_s, request.first_token_s
        outcome = outcome_of(
            request.ttft_s, request.tpot_s, request.deadline_s,
            first_token_s=None if first_token_s is None else first_token_s - arrival_s, end_s=now - arrival_s,
            num_tokens=request.num_output_tokens,
        )  # fmt: skip
        self._goodput.add(outcome, request.num_output_tokens, has_failed=reason == "error")

    def _drain(self, request: Request) -> None:
        """Row and pages go back now, or with the last result that names the request."""
        self._draining.add(request)
        if request.num_plans_in_flight == 0:
            self._drained(request)

    def _drained(self, request: Request) -> None:
        self._draining.discard(request)
        self._pages.release(request)
        self._free_rows.append(request.row)
        request.row = None
        if request.status is PREEMPTED:
            request.num_computed_tokens = request.next_start = 0
            request.num_expected_tokens = request.num_known_tokens
            request.admission_threshold = 0
            self._waiting.push(request)

    # Plans

    def _plan_lanes(self, now: float) -> list[LanePlan]:
        self._outlook.now = now
        if self._order is not None:
            self._rerank(now)
        if self._planner is not None:
            return self._plan_roles(now)
        plans: list[LanePlan] = []
        for lane, flights in enumerate(self._lanes):
            while len(flights) < self.config.max_plans_in_flight and (self._running or self._waiting):
                composition = self._composer.compose(lane, len(self._free_rows), self.num_plans_in_flight == 0)
                if composition.shares:
                    plans.append(self._commit(composition, now))
                elif not composition.has_preempted:
                    break  # else a preemption made room for those who wait
        return plans

    def _rerank(self, now: float) -> None:
        """Who has lost its chance to be in time makes way for who has not."""
        for request, rank in self._order.due(now):
            if request in self._waiting:
                self._waiting.rerank(request, rank)
            elif request.status is RUNNING:
                self._running.rerank(request, rank)

    def _plan_roles(self, now: float) -> list[LanePlan]:
        """As the controller arranges it."""
        plans: list[LanePlan] = []
        planner, has_arranged = self._planner, False
        for lane, flights in enumerate(self._lanes):
            while len(flights) < self.config.max_plans_in_flight and (self._running or self._waiting or self._runs):
                if not has_arranged:
                    planner.arrange()
                    has_arranged = True
                is_idle = self.num_plans_in_flight == 0 and not self._runs
                work = planner.next_work(lane, len(flights), len(self._free_rows), is_idle)
                if work is None:
                    break
                if work.run is not None:
                    plans.append(self._commit_part(lane, work, now))
                elif work.composition.shares:
                    plans.append(self._commit(work.composition, now, work))
                elif not work.composition.has_preempted:
                    break
        run = planner.run_to_pause()
        if run is not None:
            self._pause(run)
        return plans

    def _commit_part(self, lane: int, work: NextWork, now: float) -> LanePlan:
        """The next part of a run: its requests, pages and copies are the run's."""
        run = work.run
        self._num_plans += 1
        plan = run.plan = LanePlan(
            self._num_plans, lane, work.share, "step", (run.cursor, work.last), run.scheduled, continues=run.run_id
        )
        self._begin_part(run, now)
        self._lanes[lane].append(Flight(plan, run.requests, [], run))
        return plan

    def _begin_part(self, run: PrefillRun, now: float) -> None:
        run.part_started_s = now
        for request in run.requests:
            request.lane = run.plan.lane
        if self._order is not None:
            self._order.started(run.lead, now)

    def _commit(self, composition: Composition, now: float, work: NextWork | None = None) -> LanePlan:
        """The only place where a plan changes requests, pages and rows."""
        lane, pages = composition.lane, self._pages
        for request, match in composition.admissions:
            pages.take_match(request, match)
        admissions, resets, copies, copy_sources = self._commit_admissions(composition, now)

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
            share = (request.request_id, request.row, start, num_tokens, new_pages, samples)
            scheduled.append(make_tuple(ScheduledRequest, share))
            requests.append(request)

        self._num_plans += 1
        is_part = work is not None and work.begins_run
        plan = LanePlan(
            plan_id=self._num_plans,
            lane=lane,
            share=self.config.lane_shares[lane] if work is None else work.share,
            program="step",
            node_range=(0, work.last) if is_part and work.last < self.config.num_nodes else None,
            requests=tuple(scheduled),
            admissions=tuple(admissions),
            resets=tuple(resets),
            copies=tuple(copies),
        )
        if is_part:
            self._lanes[lane].append(Flight(plan, requests, [], self._begin_run(plan, requests, copy_sources, now)))
        else:
            self._lanes[lane].append(Flight(plan, requests, copy_sources))
        return plan

    def _begin_run(
        self, plan: LanePlan, requests: list[Request], copy_sources: list[PrefixNode], now: float
    ) -> PrefillRun:
        no_pages = self._pages.no_pages
        scheduled = tuple(share._replace(new_pages=no_pages) for share in plan.requests)
        window = self.cost_model.window if self.cost_model is not None else 0
        shape = shape_of(scheduled, window)
        bounds = self._planner.bounds_of(shape.num_tokens)
        run = PrefillRun(plan.plan_id, requests, scheduled, shape, copy_sources, now, bounds)
        run.plan = plan
        for request in requests:
            request.run = run
        self._runs.add(run)
        self._begin_part(run, now)
        return run

    def _commit_admissions(
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
            request.status = RUNNING
            self._running.add(request)
            if request.first_scheduled_s is None:
                # A resume finds its own pages; counting them would flatter the hit rate.
                request.first_scheduled_s = now
                request.num_cached_tokens = request.num_computed_tokens
                self._num_prefix_query_tokens += request.num_prompt_tokens
                self._num_prefix_hit_tokens += request.num_computed_tokens
            admissions.append(
                Admission(
                    request.request_id,
                    row,
                    request.known_token_ids(),
                    request.num_prompt_tokens,
                    request.num_computed_tokens,
                )
            )
            resets.append(PageTableReset(row, tuple(tuple(table) for table in request.pages)))
        return admissions, resets, copies, copy_sources
