"""A scheduler, a runner and every invariant after every event.

Plans run as late as possible, when their result is asked for: a page that was given away too early has been given away.
"""

from __future__ import annotations

import random
from collections import deque

from scheduler import (
    AbortRequest,
    Arrival,
    LaneFinished,
    LanePlan,
    Request,
    Scheduler,
    SchedulerConfig,
    Timer,
    TokenOutput,
)
from scheduler.step import DropRun
from tests.scheduler.fake_runner import FakeRunner, reference_output


class CheckedScheduler:
    def __init__(self, config: SchedulerConfig, scheduler: Scheduler | None = None, seed: int = 0) -> None:
        """seed: of where paused plans stop, when land() is not told."""
        self.scheduler = scheduler or Scheduler(config)
        self.config = config = self.scheduler.config
        self.requests: dict[str, Request] = {}
        self.runner = FakeRunner(config, self.requests)
        self.lanes: list[deque[LanePlan]] = [deque() for _ in range(config.num_lanes)]
        self.tables: dict[int, list[list[int]]] = {}  # row -> page tables as plans have announced them
        self.named_pages: dict[int, dict[int, str]] = {}  # run not at its end -> page -> request that names it
        self.resting: dict[int, LanePlan] = {}  # run between two parts -> its latest part
        self.pausing: set[int] = set()  # plans in flight that were asked to stop
        self.outputs: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, str] = {}
        self.errors: dict[str, str | None] = {}
        self.num_outputs: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.plans: list[LanePlan] = []
        self.num_events = 0
        self.num_stops = 0  # paused plans that stopped before their end
        self.num_drops = 0
        self.num_failures = 0
        self.now = 0.0
        self._rng = random.Random(seed)

    # Events

    def arrive(self, request: Request) -> list[LanePlan]:
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        return self.send(Arrival(request))

    def abort(self, request_id: str, reason: str = "abort") -> list[LanePlan]:
        if request_id not in self.finish_reasons:
            self.aborted.add(request_id)
        return self.send(AbortRequest(request_id, reason))

    def land(self, lane: int = 0, stop_at: float | None = None, error: str | None = None) -> list[LanePlan]:
        """The oldest plan in flight on the lane runs and reports. stop_at: where in its range it stops if it was paused, 0
        before its first node, 1 it had ended; None: at random. error: it fails."""
        plan = self.lanes[lane][0]
        stop_node = None
        if plan.plan_id in self.pausing:
            first, last = plan.node_range or (0, self.runner.num_nodes)
            place = first + int((self._rng.random() if stop_at is None else stop_at) * (last - first + 1))
            stop_node = place if place < last else None
        result = self.runner.run(plan, stop_node, error)
        self.num_stops += result.cursor is not None
        self.num_failures += error is not None
        self.lanes[lane].popleft()
        self.pausing.discard(plan.plan_id)
        if plan.run_id in self.runner.frames:
            self.resting[plan.run_id] = plan
        else:
            del self.named_pages[plan.run_id]
        return self.send(LaneFinished(result))

    def busy_lanes(self) -> list[int]:
        return [lane for lane, plans in enumerate(self.lanes) if plans]

    def run_until_idle(self, stop_at: float | None = None, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            busy = self.busy_lanes()
            if not busy:
                assert self.scheduler.num_unfinished == 0, f"stuck with {self.scheduler.num_unfinished} requests"
                assert not self.runner.frames, f"runs {list(self.runner.frames)} rest and nobody goes on with them"
                return
            self.land(self._rng.choice(busy), stop_at)
        raise AssertionError(f"not idle after {max_steps} steps")

    def send(self, event) -> list[LanePlan]:
        self.now += 1.0
        self.num_events += 1
        plans = self.scheduler.on_event(event, self.now)
        orders = self.scheduler.take_orders()
        for order in orders:  # a plan of the same round may hold the pages of a run that was dropped
            if isinstance(order, DropRun):
                self._drop(order.run_id)
        for plan in plans:
            self._check_plan(plan)
        for order in orders:
            if not isinstance(order, DropRun):
                assert order.plan_id in [plan.plan_id for plan in self.lanes[order.lane]], f"{order}: not in flight"
                assert order.plan_id not in self.pausing, f"{order}: asked for twice"
                self.pausing.add(order.plan_id)
        for output in self.scheduler.take_outputs():
            self._check_output(output)
        self.check()
        return plans

    def wake(self) -> list[LanePlan]:
        return self.send(Timer())

    def _drop(self, run_id: int) -> None:
        assert run_id in self.resting, f"run {run_id} was dropped and does not rest"
        self.runner.drop(run_id)
        del self.resting[run_id], self.named_pages[run_id]
        self.num_drops += 1

    # Invariants

    def check(self) -> None:
        self.scheduler.check_integrity()
        pool = self.scheduler._pages._pool
        for run_id, named in self.named_pages.items():
            for page_id, request_id in named.items():
                assert not pool.is_free(page_id), f"page {page_id} is free while run {run_id} names it ({request_id})"
        runs_in_flight: dict[int, int] = {}
        lanes_of: dict[str, set[int]] = {}
        for lane, plans in enumerate(self.lanes):
            assert len(plans) <= self.config.max_plans_in_flight
            for plan in plans:
                runs_in_flight[plan.run_id] = runs_in_flight.get(plan.run_id, 0) + 1
                for scheduled in plan.requests:
                    lanes_of.setdefault(scheduled.request_id, set()).add(lane)
        assert all(len(lanes) == 1 for lanes in lanes_of.values()), "a request is in flight on two lanes"
        assert all(count == 1 for count in runs_in_flight.values()), "two parts of a run are in flight"
        assert not runs_in_flight.keys() & self.resting.keys(), "a part is in flight, and its run rests"
        assert self.named_pages.keys() == runs_in_flight.keys() | self.resting.keys()
        assert len(self.scheduler._runs) <= self.config.max_resting_runs

    def _check_plan(self, plan: LanePlan) -> None:
        assert not self.plans or plan.plan_id > self.plans[-1].plan_id
        self.plans.append(plan)
        assert 1 <= plan.num_tokens <= self.config.max_num_batched_tokens, "the token budget"
        assert 0.0 < plan.share <= 1.0
        rows = [scheduled.row for scheduled in plan.requests]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < self.config.max_num_seqs for row in rows)
        assert {admission.row for admission in plan.admissions} <= set(rows)
        if self.config.max_prefill_chunk:
            assert all(scheduled.num_tokens <= self.config.max_prefill_chunk for scheduled in plan.requests)
        self._check_roles(plan)
        if plan.continues:
            before = self.resting.pop(plan.continues, None)
            assert before is not None, f"plan {plan.plan_id} goes on with run {plan.continues}, which does not rest"
        self._check_rows(plan, set(rows))
        if not plan.continues:
            self._check_pages(plan)
        self.lanes[plan.lane].append(plan)

    def _check_roles(self, plan: LanePlan) -> None:
        """Lane 1 computes prompts; lane 0, as long as there are two, decodes."""
        if not self.config.has_roles or plan.continues:
            return
        admitted = {admission.request_id for admission in plan.admissions}  # the cache may have left one token
        for scheduled in plan.requests:
            num_pending = self.requests[scheduled.request_id].num_known_tokens - scheduled.start
            is_prompt = num_pending > 1 or scheduled.request_id in admitted
            assert plan.lane == 0 or is_prompt, f"{scheduled} decodes on the lane of the prompts"
            if plan.lane == 0 and self.scheduler._planner.arrangement.is_spatial:
                assert not is_prompt and scheduled.num_tokens == 1, f"{scheduled} of a prompt on the lane of decodes"

    def _check_rows(self, plan: LanePlan, rows: set[int]) -> None:
        """What a run holds is nobody else's before its end, whether it is in flight or rests."""
        others = [other for plans in self.lanes for other in plans]
        rows_in_flight = {scheduled.row for other in others for scheduled in other.requests}
        rows_of_runs = {scheduled.row for other in self.resting.values() for scheduled in other.requests}
        parts = [other for other in others if other.node_range is not None]
        rows_of_runs |= {scheduled.row for other in parts for scheduled in other.requests}
        assert not rows & rows_of_runs, "a row of a run is in another plan"
        admitted = {admission.row for admission in plan.admissions}
        assert not admitted & (rows_in_flight | rows_of_runs), "row reused in flight"

    def _check_pages(self, plan: LanePlan) -> None:
        for reset in plan.resets:
            self.tables[reset.row] = [list(table) for table in reset.pages]
        written = [copy.target_page for copy in plan.copies]
        named: dict[int, str] = {copy.source_page: "copy" for copy in plan.copies}
        for scheduled in plan.requests:
            for table, new_pages in zip(self.tables[scheduled.row], scheduled.new_pages, strict=True):
                table.extend(new_pages)
                written.extend(new_pages)
            for table, window in zip(self.tables[scheduled.row], self.config.kv_group_windows, strict=True):
                first_seen = max(0, scheduled.start - window + 1) if window else 0
                for page_id in table[first_seen // self.config.page_size :]:
                    named[page_id] = scheduled.request_id
        assert len(set(written)) == len(written), "a page was handed out twice in one plan"
        for other_id, other in self.named_pages.items():
            taken = set(other).intersection(written)
            assert not taken, f"pages {taken} were handed out by plan {plan.plan_id} while run {other_id} names them"
        self.named_pages[plan.run_id] = named

    def _check_output(self, output: TokenOutput) -> None:
        assert output.request_id not in self.finish_reasons, "an output after the last one"
        self.outputs[output.request_id].extend(output.token_ids)
        count = self.num_outputs[output.request_id] = self.num_outputs.get(output.request_id, 0) + 1
        assert count == 1 or output.first_scheduled is None
        if output.finish_reason is not None:
            self.finish_reasons[output.request_id] = output.finish_reason
            self.errors[output.request_id] = output.error
            assert (output.finish_reason == "error") == (output.error is not None)
        if output.finish_reason == "stop":
            assert output.stop_token_id == output.token_ids[-1]

    def check_answers(self) -> None:
        """When idle: everybody was answered, with the tokens of the reference or a reason."""
        for request_id, request in self.requests.items():
            assert request_id in self.finish_reasons, f"{request!r} was never answered"
            wanted, reason = reference_output(request)
            got = self.outputs[request_id]
            if request_id in self.aborted or self.finish_reasons[request_id] == "error":
                assert got == wanted[: len(got)], request_id
            else:
                assert (got, self.finish_reasons[request_id]) == (wanted, reason), request_id
