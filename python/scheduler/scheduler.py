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

What becomes of requests is in request_lives.py, of prefills that go in parts in run_lives.py. Single-threaded: the engine's
thread calls everything here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.arrangement import PREFILL_LANE
from scheduler.composer import Composer
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.lane_planner import LanePlanner, controller_for
from scheduler.model_spec import ModelSpec
from scheduler.nanobatch import NanoPlan
from scheduler.nanobatch_planner import NanoPlanner
from scheduler.outlook import Outlook
from scheduler.plan_commits import PlanCommits
from scheduler.policy import policy_named, with_preset
from scheduler.prefill_run import RunTable
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request, RequestStatus
from scheduler.request_lives import RequestLives
from scheduler.request_pages import RequestPages
from scheduler.run_lives import RunLives
from scheduler.scheduler_stats import SchedulerStats
from scheduler.step import (
    AbortRequest,
    Arrival,
    CopyDone,
    Event,
    LaneFinished,
    LanePlan,
    LaneResult,
    Order,
    ScheduledRequest,
    Timer,
    TokenOutput,
)

RUNNING, PREEMPTED, FINISHED = RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.FINISHED
MISSING = -2  # no token where one was due; -1 is the contract's "the logits were not finite"
# Builds a named tuple from its fields in order, at half its constructor's price; for the two per request and step.
make_tuple = tuple.__new__


class Scheduler:
    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None = None, spec: ModelSpec | None = None
    ) -> None:
        """cost_model: of this machine, for policies that predict; None: they go by their fixed limits. spec: what the
        program's nodes are, where no cost model knows it; only nano-batches ask."""
        config = with_preset(config)
        self.config = config
        self.cost_model = cost_model
        self._policy = policy_named(config.policy)
        self._pages = RequestPages(config)
        self._waiting = WaitingQueue()
        self._running = RunningList()
        self._runs = RunTable()
        self._outlook = Outlook(config, cost_model, self._running, self._waiting, self._runs, self._pages)
        self._controller = controller_for(config, self._policy, cost_model)
        self._order = self._policy.order(config, cost_model) if self._policy.order is not None else None
        peak = self._policy.peak(config) if self._policy.peak is not None else None
        self._lives = lives = RequestLives(
            config, self._policy, self._pages, self._waiting, self._running, order=self._order,
            controller=self._controller, peak=peak,
        )  # fmt: skip
        self._composer = Composer(
            config, self._policy, self._running, self._waiting, self._pages, lives.preempt, lambda: len(lives.draining),
            self._outlook, peak,
        )  # fmt: skip
        self._planner: LanePlanner | None = None  # None: plans are the composer's, whole and of one lane's kind
        if self._controller is not None:
            self._planner = LanePlanner(config, self._controller, self._composer, self._outlook, self._runs)
        self._run_lives = RunLives(
            config.num_nodes, self._runs, self._pages, self._order, preempt=lives.preempt, drained=lives.drained
        )
        lives.run_lives = self._run_lives
        self.nano = NanoPlanner(config, cost_model, spec) if config.nano_batches != "off" else None
        self._outlook.nano = self.nano
        window = cost_model.window if cost_model is not None else 0
        self._commits = PlanCommits(config, self._pages, self._running, self._run_lives, lives.free_rows, window)
        self._lanes = self._commits.lanes
        self._free_rows = lives.free_rows

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
        return self._lives.take_outputs()

    def take_orders(self) -> list[Order]:
        """What to do with plans in flight and runs at rest, since the last call, after the plans were launched."""
        return self._run_lives.take_orders()

    @property
    def num_unfinished(self) -> int:
        return len(self._lives.unfinished)

    @property
    def num_plans_in_flight(self) -> int:
        return sum(len(flights) for flights in self._lanes)

    @property
    def is_idle(self) -> bool:
        """Nothing to do and nothing in flight: every page is free or cached."""
        return not self._lives.unfinished and not any(self._lanes) and not self._runs

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
            num_draining=len(self._lives.draining),
            num_free_pages=pages.num_free_pages,
            num_cached_pages=pages.num_evictable_pages,
            num_live_pages=num_live,
            kv_usage=num_live / pages.num_pages,
            num_preemptions=self._lives.num_preemptions,
            num_prefix_query_tokens=self._commits.num_prefix_query_tokens,
            num_prefix_hit_tokens=self._commits.num_prefix_hit_tokens,
            goodput=self._lives.goodput.stats(),
            num_pauses=self._run_lives.num_pauses,
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
        holders = [*self._running, *self._lives.draining]
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
            self._lives.arrive(event.request, now)
        elif isinstance(event, AbortRequest):
            request = self._lives.unfinished.get(event.request_id)
            if request is not None:  # else it ended while the abort was on its way
                self._lives.finish(request, event.reason, now)
        elif not isinstance(event, (CopyDone, Timer)):  # those change nothing by themselves: they wake the planner
            raise TypeError(f"Scheduler: got event {type(event).__name__}, wanted one of scheduler.step.Event")

    def _land(self, result: LaneResult, now: float) -> None:
        """A plan's result: its tokens are computed, its samples known."""
        flights = self._lanes[result.lane] if 0 <= result.lane < len(self._lanes) else ()
        if not flights or flights[0].plan.plan_id != result.plan_id:
            wanted = flights[0].plan.plan_id if flights else "none, nothing is in flight there"
            raise ValueError(f"LaneFinished: got plan {result.plan_id} of lane {result.lane}, wanted {wanted}")
        flight = flights.popleft()
        for node in flight.copy_sources:
            self._pages.release_source(node)
        if flight.run is not None and not self._run_lives.land_part(flight.run, flight.plan, result, now):
            return  # the run goes on: nothing is computed yet

        token_of = dict(result.sampled)
        why_failed = dict(result.failed)
        pages, outputs, frees_windows = self._pages, self._lives.outputs, self._pages.frees_windows
        for request, (request_id, _, _, num_tokens, _, samples) in zip(
            flight.requests, flight.plan.requests, strict=True
        ):
            request.num_plans_in_flight -= 1
            if request.status is FINISHED:
                if request.num_plans_in_flight == 0:
                    self._lives.drained(request)
                continue
            token_id = token_of.get(request_id, MISSING) if samples else 0
            if token_id < 0 or (why_failed and request_id in why_failed):
                # Its KV is not to be trusted: nothing of this chunk is counted or published.
                missing = (
                    "the lane's result names no token for it" if token_id == MISSING else "the logits were not finite"
                )
                self._lives.finish(request, "error", now, why_failed.get(request_id, missing))
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
                    first_s = request.first_scheduled_s
                    self._lives.has_first_token(request, now)
                num_cached = request.num_cached_tokens
                output = (request_id, (token_id,), finish_reason, stop_token_id, num_cached, None, first_s)
                outputs.append(make_tuple(TokenOutput, output))
                if finish_reason is not None:
                    self._lives.retire(request, finish_reason, now)
            if request.status is PREEMPTED and request.num_plans_in_flight == 0:
                self._lives.drained(request)

    # Plans

    def _plan_lanes(self, now: float) -> list[LanePlan]:
        self._outlook.now = now
        if self._order is not None:
            self._rerank(now)
        if self._planner is not None:
            return self._plan_roles(now)
        config, plans = self.config, []
        for lane, flights in enumerate(self._lanes):
            while len(flights) < config.max_plans_in_flight and (self._running or self._waiting):
                composition = self._composer.compose(lane, len(self._free_rows), self.num_plans_in_flight == 0)
                if composition.shares:
                    plans.append(self._commits.step(composition, now, config.lane_shares[lane]))
                elif not composition.has_preempted:
                    break  # else a preemption made room for those who wait
        return plans

    def _cut(self, requests: Sequence[ScheduledRequest]) -> NanoPlan | None:
        if self.nano is None:
            return None
        return self.nano.plan(requests, self._planner.arrangement.num_nano_batches)

    def hear_step(self, plan: LanePlan, seconds: float) -> None:
        """A whole step took so long, alone on the chip: whether nano-batches pay is found out so."""
        if self.nano is not None:
            self.nano.observe(plan, seconds)

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
                if lane == PREFILL_LANE and flights and self._runs.in_flight() is not None:
                    break  # prompts go one run at a time: whatever the arrangement, nothing could be begun behind it
                if not has_arranged:
                    planner.arrange()
                    has_arranged = True
                is_idle = self.num_plans_in_flight == 0 and not self._runs
                work = planner.next_work(lane, len(flights), len(self._free_rows), is_idle)
                if work is None:
                    break
                if work.run is not None:
                    plans.append(self._commits.part(lane, work.run, work.last, now, work.share))
                elif work.composition.shares:
                    bounds = planner.bounds_of(work.composition.num_tokens) if work.begins_run else None
                    cut = self._cut if work.num_nano_batches != 1 else None
                    plans.append(self._commits.step(work.composition, now, work.share, bounds, work.last, cut))
                elif not work.composition.has_preempted:
                    break
        run = planner.run_to_pause()
        if run is not None:
            self._run_lives.pause(run)
        return plans
