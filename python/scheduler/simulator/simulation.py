"""The event loop: a trace's requests, the real Scheduler, lanes in virtual time.

    arrivals ──┐                                 ┌─> plans ──> VirtualLanes
               ├──> Scheduler.on_events(now) ────┼─> orders ──────┘│ a plan ends, its result is known a little later
    results  ──┘                                 └─> outputs ──> RequestRecord
       └───────────────────────────────────────────────────────────┘

What is due at the same nanosecond goes to the scheduler in one call, results before arrivals, as the engine does it. The
same inputs give the same run: there is no wall clock, and whatever is random carries a seed.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.model_spec import ModelSpec
from scheduler.request import Request
from scheduler.scheduler import Scheduler, SchedulerStats
from scheduler.simulator.costs import NANOSECONDS, Costs
from scheduler.simulator.lanes import FinishedStep, VirtualLanes
from scheduler.simulator.traces import TraceRequest, page_keys
from scheduler.step import Arrival, LaneFinished, LanePlan, LaneResult

SAMPLED_TOKEN, STOP_TOKEN = 1, 0
# A row of a plan -> the token it yields
Sampler = Callable[[LanePlan], tuple[tuple[str, int], ...]]


@dataclass(frozen=True, slots=True)
class ServiceTargets:
    """What every request of a run asks for, where its trace says nothing; None: nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None


@dataclass(slots=True)
class RequestRecord:
    """One request's life, in nanoseconds of virtual time."""

    arrival_ns: int
    num_prompt_tokens: int
    num_tokens: int = 0  # generated
    first_token_ns: int | None = None
    last_token_ns: int = 0
    finish_reason: str | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class SimulationResult:
    config: SchedulerConfig
    targets: ServiceTargets
    records: dict[str, RequestRecord]
    inter_token_s: array  # of all requests, in order of time
    end_ns: int
    num_steps: int  # plans; a run in parts is several
    num_step_tokens: int
    busy_ns: list[int]  # per lane
    compute_s: float  # that the steps' operations keep the compute units of the whole machine busy
    num_bytes: float  # that the steps moved
    kv_usage_mean: float  # over time
    kv_usage_peak: float
    step_s: array  # durations of plans, in order
    stats: SchedulerStats
    wall_s: float
    plans: list[LanePlan] = field(default_factory=list)  # if they were kept

    @property
    def duration_s(self) -> float:
        return self.end_ns / NANOSECONDS


class Simulation:
    """One run. observe(step) hears of every finished step; keep_plans keeps the scheduler's decisions for comparison."""

    def __init__(
        self, config: SchedulerConfig, costs: Costs, requests: Sequence[TraceRequest] | None = None, *,
        targets: ServiceTargets | None = None, ends_by_stop: bool = False,
        cost_model: CostModel | None = None, observe: Callable[[FinishedStep], None] | None = None,
        keep_plans: bool = False, max_steps: int | None = None, spec: ModelSpec | None = None,
    ) -> None:  # fmt: skip
        """cost_model: what the scheduler's policies predict with; costs may know better. ends_by_stop: an answer ends by a
        stop token that the scheduler does not foresee, as a chat's does; else by its length. max_steps: give up after so
        many, with RuntimeError. spec: of the model, for nano-batches without a cost model."""
        self.config = config
        self.scheduler = Scheduler(config, cost_model, spec)
        self._costs = costs
        self._lanes = VirtualLanes(self.scheduler.config.num_lanes, costs, config.num_nodes)
        self._targets = targets or ServiceTargets()
        self._observe = observe
        self._plans: list[LanePlan] | None = [] if keep_plans else None
        self._max_steps = max_steps
        self._arrivals: list[tuple[int, Request]] = []
        self._records: dict[str, RequestRecord] = {}
        self._left_to_stop: dict[str, int] = {}
        self._before_call: Callable[[int], None] | None = None
        # As the engine does it: of steps that had the chip alone, for nano-batches on trial.
        self._hears_steps = self.scheduler.nano is not None and self.scheduler.config.num_lanes == 1
        self._sample: Sampler = self._sample_until_stop if ends_by_stop else _sample_by_length
        if requests is not None:
            for index, one in enumerate(requests):
                self._add_trace_request(f"r{index}", one, ends_by_stop)

    def _add_trace_request(self, request_id: str, one: TraceRequest, ends_by_stop: bool) -> None:
        config, targets = self.config, self._targets
        # Nobody knows the tokens: positions stand for them, and the trace's ids (or the request's own name) for what is
        # equal. One that asks for more context than there is is cut to it, as a server's default max_tokens would be.
        num_output = min(one.num_output_tokens, max(1, config.max_model_len - one.num_prompt_tokens))
        max_tokens = max(1, config.max_model_len - one.num_prompt_tokens) if ends_by_stop else num_output
        keys = page_keys(one, config.page_size)
        request = Request(
            request_id, range(one.num_prompt_tokens), max_tokens,
            frozenset([STOP_TOKEN]) if ends_by_stop else frozenset(), arrival_s=one.arrival_s,
            namespace="" if keys is not None else request_id, page_keys=keys, ttft_s=targets.ttft_s,
            tpot_s=targets.tpot_s, deadline_s=targets.deadline_s, user=one.user,
        )  # fmt: skip
        if ends_by_stop:
            self._left_to_stop[request_id] = num_output
        self.add(round(one.arrival_s * NANOSECONDS), request)

    def add(self, arrival_ns: int, request: Request) -> None:
        """A request of the caller's own making; requests are added in order of arrival."""
        if self._arrivals and arrival_ns < self._arrivals[-1][0]:
            raise ValueError(f"Simulation.add: {request.request_id!r} arrives before one that was added earlier")
        self._arrivals.append((arrival_ns, request))
        self._records[request.request_id] = RequestRecord(arrival_ns, request.num_prompt_tokens)

    def sample_with(self, sample: Sampler) -> None:
        """Tokens come from the caller (a recorded run's)."""
        self._sample = sample

    def before_calls(self, hear: Callable[[int], None]) -> None:
        """hear(number of calls made so far) before every call of the scheduler. What steps took, the scheduler then hears
        from it alone."""
        self._before_call = hear
        self._hears_steps = False

    def plan_of(self, plan_id: int) -> LanePlan:
        """If plans are kept. Raises KeyError for one that was not made."""
        if not self._plans or plan_id > len(self._plans):
            raise KeyError(plan_id)
        return self._plans[plan_id - 1]

    def _sample_until_stop(self, plan: LanePlan) -> tuple[tuple[str, int], ...]:
        sampled = []
        for request_id, _, _, _, _, samples in plan.requests:
            if samples:
                left = self._left_to_stop[request_id] = self._left_to_stop[request_id] - 1
                sampled.append((request_id, SAMPLED_TOKEN if left > 0 else STOP_TOKEN))
        return tuple(sampled)

    def run(self) -> SimulationResult:
        """Until every request is answered and every step has ended."""
        had_gc = gc.isenabled()
        gc.disable()  # a run makes and drops millions of acyclic objects; walking the live ones doubles its time
        try:
            return self._run()
        finally:
            if had_gc:
                gc.enable()

    def _run(self) -> SimulationResult:
        started_s = time.perf_counter()
        scheduler, lanes, costs = self.scheduler, self._lanes, self._costs
        arrivals, num_arrivals, next_arrival = self._arrivals, len(self._arrivals), 0
        # Heap of (due, rank, result, its step) on their way to the scheduler
        results: list[tuple[int, int, LaneResult, FinishedStep]] = []
        heard_ns = [0] * scheduler.config.num_lanes  # when the lane's latest result is heard of: they come in order
        inter_token_s, step_s = array("d"), array("d")
        num_steps = num_step_tokens = num_calls = 0
        compute_s = num_bytes = kv_time = kv_peak = 0.0
        now_ns = kv_since_ns = end_ns = 0
        kv_usage = 0.0
        while True:
            due = [arrivals[next_arrival][0]] if next_arrival < num_arrivals else []
            end = lanes.next_end_ns()
            if end is not None:
                due.append(end)
            if results:
                due.append(results[0][0])
            if not due:
                break
            now_ns = min(due)

            if end is not None and end <= now_ns:
                for step in lanes.finish(now_ns):
                    plan = step.plan
                    num_steps += 1
                    if step.ends_run:
                        num_step_tokens += plan.num_tokens
                    compute_s += step.cost.compute_s * plan.share
                    num_bytes += step.cost.num_bytes
                    step_s.append((step.end_ns - step.start_ns) / NANOSECONDS)
                    if self._observe is not None:
                        self._observe(step)
                    lane = plan.lane
                    heard_ns[lane] = max(heard_ns[lane], now_ns + costs.result_delay_ns(plan))
                    sampled = self._sample(plan) if step.ends_run else ()
                    result = LaneResult(plan.plan_id, lane, sampled, (), step.cursor)
                    heappush(results, (heard_ns[lane], costs.result_rank(plan), result, step))
                if self._max_steps is not None and num_steps > self._max_steps:
                    raise RuntimeError(f"Simulation: not at an end after {self._max_steps} steps")

            events: list = []
            while results and results[0][0] <= now_ns:
                _, _, result, step = heappop(results)
                events.append(LaneFinished(result))
                if self._hears_steps and step.plan.node_range is None and not step.is_stopped:
                    scheduler.hear_step(step.plan, (step.end_ns - step.start_ns) / NANOSECONDS)
            while next_arrival < num_arrivals and arrivals[next_arrival][0] <= now_ns:
                events.append(Arrival(arrivals[next_arrival][1]))
                next_arrival += 1
            if not events:
                continue
            if self._before_call is not None:
                self._before_call(num_calls)
            num_calls += 1
            plans = scheduler.on_events(events, now_ns / NANOSECONDS)
            for plan in plans:
                lanes.submit(plan, now_ns)
            for order in scheduler.take_orders():
                lanes.carry_out(order, now_ns)
            if self._plans is not None:
                self._plans.extend(plans)
            kv_time += kv_usage * (now_ns - kv_since_ns)
            kv_since_ns, kv_usage = now_ns, scheduler.kv_usage
            kv_peak = max(kv_peak, kv_usage)
            end_ns = now_ns
            self._take_outputs(now_ns, inter_token_s)
        if scheduler.num_unfinished:
            raise RuntimeError(f"Simulation: {scheduler.num_unfinished} requests were never answered")
        if lanes.num_resting:
            raise RuntimeError(f"Simulation: {lanes.num_resting} runs rest although every request is answered")
        return SimulationResult(
            self.config, self._targets, self._records, inter_token_s, end_ns, num_steps, num_step_tokens,
            lanes.busy_ns, compute_s, num_bytes, kv_time / end_ns if end_ns else 0.0, kv_peak, step_s,
            scheduler.stats(), time.perf_counter() - started_s, self._plans or [],
        )  # fmt: skip

    def _take_outputs(self, now_ns: int, inter_token_s: array) -> None:
        records = self._records
        for request_id, token_ids, finish_reason, _, num_cached_tokens, _, _ in self.scheduler.take_outputs():
            record = records[request_id]
            if token_ids:
                if record.first_token_ns is None:
                    record.first_token_ns = now_ns
                    record.num_cached_tokens = num_cached_tokens
                else:
                    inter_token_s.append((now_ns - record.last_token_ns) / NANOSECONDS)
                record.last_token_ns = now_ns
                record.num_tokens += len(token_ids)
            if finish_reason is not None:
                record.finish_reason = finish_reason
                if record.first_token_ns is None:
                    record.last_token_ns = now_ns


def _sample_by_length(plan: LanePlan) -> tuple[tuple[str, int], ...]:
    return tuple([(scheduled[0], SAMPLED_TOKEN) for scheduled in plan.requests if scheduled[5]])
