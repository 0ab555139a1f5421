"""A run that happened, kept so that it can be run again: when requests came, how long each step took, what it sampled.

    recorder = RecordingScheduler(config)        # in place of the engine's Scheduler
    ... the engine runs; spans[plan_id] = (start_ns, end_ns) of every plan, from its lane ...
    recorded = recorder.recorded_run(spans)
    recorded.replay().plans == recorder.plans    # the same decisions, from the same durations

Decisions depend on what the scheduler hears and in which order, so the recording holds the engine's clock at every call and
the order of results within one; the simulator must come to the same calls by itself. Where a pause came is recorded as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.model_spec import ModelSpec
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.simulator.costs import NANOSECONDS, RecordedCosts
from scheduler.simulator.simulation import Simulation, SimulationResult
from scheduler.step import AbortRequest, Arrival, Event, LaneFinished, LanePlan


def copy_of(request: Request) -> Request:
    """As it was when it arrived."""
    return Request(
        request.request_id, request.prompt_token_ids, request.max_tokens, request.stop_token_ids,
        min_tokens=request.min_tokens, priority=request.priority, arrival_s=request.arrival_s,
        namespace=request.namespace, page_keys=request.page_keys, ttft_s=request.ttft_s, tpot_s=request.tpot_s,
        deadline_s=request.deadline_s, user=request.user,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordedRun:
    config: SchedulerConfig
    arrivals: tuple[tuple[int, Request], ...]  # (when the scheduler heard of it, a copy as it arrived)
    durations_ns: Mapping[int, int]  # plan id -> from its launch, or the end of the step before it on its lane
    delays_ns: Mapping[int, int]  # plan id -> from the end of its step until the scheduler heard of it
    ranks: Mapping[int, int]  # plan id -> place of its result among all
    cursors: Mapping[int, int]  # plan id -> where it rested, if it was paused
    sampled: Mapping[int, tuple[tuple[str, int], ...]]  # plan id -> what it yielded
    # (calls of the scheduler before it, arguments) of CostModel.observe, and of Scheduler.hear_step with the plan's id
    observations: tuple[tuple[int, tuple], ...] = ()
    steps_heard: tuple[tuple[int, int, float], ...] = ()
    spec: ModelSpec | None = None

    def replay(self, cost_model: CostModel | None = None) -> SimulationResult:
        """cost_model: as the recorded scheduler's was at the start; it learns again what that one learned. Raises KeyError
        where the simulated scheduler makes a plan that the recorded one did not."""
        costs = RecordedCosts(self.durations_ns, self.delays_ns, self.ranks, self.cursors)
        simulation = Simulation(self.config, costs, cost_model=cost_model, keep_plans=True, spec=self.spec)
        for arrival_ns, request in self.arrivals:
            simulation.add(arrival_ns, copy_of(request))
        simulation.sample_with(lambda plan: self.sampled[plan.plan_id])
        observations, steps = deque(self.observations), deque(self.steps_heard)

        def learn(num_calls: int) -> None:
            while cost_model is not None and observations and observations[0][0] <= num_calls:
                cost_model.observe(*observations.popleft()[1])
            while steps and steps[0][0] <= num_calls:
                _, plan_id, seconds = steps.popleft()
                simulation.scheduler.hear_step(simulation.plan_of(plan_id), seconds)

        simulation.before_calls(learn)
        return simulation.run()


class RecordingScheduler(Scheduler):
    """A Scheduler that notes every call. Runs with aborts or failed rows are not recorded: ValueError."""

    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None = None, spec: ModelSpec | None = None
    ) -> None:
        super().__init__(config, cost_model, spec)
        self._spec = spec
        self.plans: list[LanePlan] = []
        self._launched_ns: dict[int, int] = {}
        self._heard_ns: dict[int, int] = {}  # in the order in which results came
        self._cursors: dict[int, int] = {}
        self._arrivals: list[tuple[int, Request]] = []
        self._sampled: dict[int, tuple[tuple[str, int], ...]] = {}
        self._unusable = ""
        self._num_calls = 0
        self._observations: list[tuple[int, tuple]] = []
        self._steps_heard: list[tuple[int, int, float]] = []
        if cost_model is not None:
            observe = cost_model.observe

            def observe_and_note(*arguments) -> None:
                self._observations.append((self._num_calls, arguments))
                observe(*arguments)

            cost_model.observe = observe_and_note

    def on_event(self, event: Event, now: float) -> list[LanePlan]:
        return self.on_events([event], now)

    def on_events(self, events: Iterable[Event], now: float) -> list[LanePlan]:
        events, now_ns = list(events), round(now * NANOSECONDS)
        for event in events:
            if isinstance(event, Arrival):
                self._arrivals.append((now_ns, copy_of(event.request)))
            elif isinstance(event, LaneFinished):
                result = event.result
                self._heard_ns[result.plan_id] = now_ns
                self._sampled[result.plan_id] = result.sampled
                if result.cursor is not None:
                    self._cursors[result.plan_id] = result.cursor
                if result.failed:
                    self._unusable = f"plan {result.plan_id} failed"
            elif isinstance(event, AbortRequest):
                self._unusable = f"{event.request_id!r} was aborted"
        self._num_calls += 1
        plans = super().on_events(events, now)
        for plan in plans:
            self._launched_ns[plan.plan_id] = now_ns
        self.plans.extend(plans)
        return plans

    def hear_step(self, plan: LanePlan, seconds: float) -> None:
        if self.nano is not None:
            self._steps_heard.append((self._num_calls, plan.plan_id, seconds))
        super().hear_step(plan, seconds)

    def recorded_run(self, spans_ns: Mapping[int, tuple[int, int]]) -> RecordedRun:
        """spans_ns: plan id -> (start, end) of its step on the same clock as `now`."""
        if self._unusable:
            raise ValueError(f"RecordingScheduler: {self._unusable}; only runs to the end can be replayed")
        durations_ns, delays_ns = {}, {}
        free_ns = dict.fromkeys(range(self.config.num_lanes), 0)
        for plan in self.plans:
            end_ns = spans_ns[plan.plan_id][1]
            durations_ns[plan.plan_id] = end_ns - max(self._launched_ns[plan.plan_id], free_ns[plan.lane])
            delays_ns[plan.plan_id] = self._heard_ns[plan.plan_id] - end_ns
            free_ns[plan.lane] = end_ns
        ranks = {plan_id: rank for rank, plan_id in enumerate(self._heard_ns)}
        return RecordedRun(
            self.config, tuple(self._arrivals), durations_ns, delays_ns, ranks, self._cursors, self._sampled,
            tuple(self._observations), tuple(self._steps_heard), self._spec,
        )  # fmt: skip
