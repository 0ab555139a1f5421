"""What a lane does next, under the controller's arrangement: a step, a part of a prefill, or nothing.

    one lane,  token       steps of decodes and prompt chunks, as the policy composes them
    one lane,  layer       a step of decodes, then a part of the run: one group of layers; and so on in turn
    one lane,  operator    the same, but the part ends at the last operator that fits the time that decodes leave
    two lanes              decodes on lane 0, prompts on lane 1: chunks (token), or whole runs that can be paused

A lane whose other half has nothing to do takes the whole chip. Arrangements may change at any boundary: a run that rests
goes on wherever prompts go then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from scheduler.arrangement import DECODE_LANE, PREFILL_LANE, Arrangement, Controller, FixedArrangement
from scheduler.composer import Composer, Composition
from scheduler.config import SchedulerConfig, parse_lanes
from scheduler.controllers.layered import group_bounds, num_layer_groups
from scheduler.cost_model import CostModel
from scheduler.outlook import Outlook
from scheduler.policy import Policy
from scheduler.prefill_run import PrefillRun, RunTable
from scheduler.request import Request
from scheduler.step_shape import StepShape

WHOLE_CHIP = 1.0
MOST_TURNS_WAITED = 16


class NextWork(NamedTuple):
    """composition: a new plan of these requests. run: the next part of this run, up to node `last`."""

    share: float
    composition: Composition | None = None
    begins_run: bool = False  # the composition is a prefill that goes in parts
    run: PrefillRun | None = None
    last: int = 0
    num_nano_batches: int = 1


def controller_for(config: SchedulerConfig, policy: Policy, cost_model: CostModel | None) -> Controller | None:
    """None: one lane, prompts cut by tokens, no nano-batches: plans are the composer's and nothing else decides."""
    shares = parse_lanes(config.lanes)
    # 0: as many as pay, which is found out on live steps
    num_nano_batches = {"off": 1, "auto": 0, "2": 2, "3": 3, "4": 4}[config.nano_batches]
    if shares is not None:
        share_of_prefill, share_of_decode = _at_rung(shares, config.rungs)
        text = f"--lanes {config.lanes}: prefill {share_of_prefill:.0%}, decode {share_of_decode:.0%}"
        return FixedArrangement(Arrangement(share_of_prefill, share_of_decode, config.prefill, reason=text))
    if policy.controller is not None and (config.lanes == "auto" or policy.lanes == config.lanes):
        return policy.controller(config, cost_model)
    if config.lanes == "auto":
        from scheduler.controllers.arbitration import Arbitration

        return Arbitration(config, cost_model)
    if config.prefill == "token" and num_nano_batches == 1:
        return None
    return FixedArrangement(
        Arrangement(granularity=config.prefill, num_nano_batches=num_nano_batches, reason="by flag")
    )


def _at_rung(shares: tuple[float, float], rungs: Sequence[float]) -> tuple[float, float]:
    """The nearest cut that the chip has. Shares that overlap are no cut: both lanes have what they ask for."""
    prefill, decode = shares
    if prefill + decode > 1.0 + 1e-9 or not rungs:
        return shares
    rung = min(rungs, key=lambda rung: abs(rung - prefill))
    return rung, 1.0 - rung


class LanePlanner:
    def __init__(
        self, config: SchedulerConfig, controller: Controller, composer: Composer, outlook: Outlook,
        runs: RunTable,
    ) -> None:  # fmt: skip
        self._config = config
        self._controller = controller
        self._composer = composer
        self._outlook = outlook
        self._runs = runs
        self._has_parts = config.num_nodes > 0 and len(config.layer_starts) > 0
        self._num_turns_waited = 0  # in which decodes went on alone though a run rested
        self._part_was_last = False  # lane 0 takes turns between decodes and parts
        # Who runs comes before who waits: nobody is admitted while a decode lacks a page, or the page that a prompt was
        # preempted for would go to it again, for ever.
        self._can_admit = True
        self.arrangement = Arrangement()
        self._border: tuple[float, float] | None = None  # the shares when both sides last had something to do
        self.num_moves = 0  # of the border between the lanes, or between one lane and two
        self.counts: dict[str, int] = {}  # arrangement -> times it was decided on

    def arrange(self) -> Arrangement:
        """Asks the controller. A granularity or a number of nano-batches that was asked for stands; without a program's
        nodes only tokens are cut."""
        decided = self._controller.arrange(self._outlook)
        if self._config.prefill and self._config.prefill != decided.granularity:
            decided = replace(decided, granularity=self._config.prefill)
        if self._config.nano_batches in ("2", "3", "4") and not decided.is_spatial:
            decided = replace(decided, num_nano_batches=int(self._config.nano_batches))
        if not self._has_parts and decided.granularity != "token":
            decided = replace(decided, granularity="token")
        self.arrangement = decided
        border = decided.prefill_share, decided.decode_share
        # One lane because a side has nothing to do is no move: the other has the whole chip meanwhile.
        if border != self._border and (
            decided.is_spatial or (self._outlook.has_prefill() and self._outlook.has_decode())
        ):
            self.num_moves += self._border is not None
            self._border = border
        key = _describe(decided)
        self.counts[key] = self.counts.get(key, 0) + 1
        return decided

    def next_work(self, lane: int, num_in_flight: int, num_free_rows: int, is_idle: bool) -> NextWork | None:
        """num_in_flight: plans of this lane."""
        arrangement = self.arrangement
        if lane == PREFILL_LANE:
            return self._next_of_prompts(lane, num_in_flight, num_free_rows, is_idle)
        if arrangement.is_spatial:
            composition = self._compose_decodes(is_idle)
            share = arrangement.decode_share if self._outlook.is_prefilling() else WHOLE_CHIP
            return NextWork(share, composition)
        if arrangement.granularity == "token" and not self._runs:
            composition = self._composer.compose(lane, num_free_rows, is_idle, arrangement.token_budget)
            return NextWork(WHOLE_CHIP, composition, num_nano_batches=arrangement.num_nano_batches)
        return self._next_in_turn(arrangement, num_in_flight, num_free_rows, is_idle)

    def _next_of_prompts(self, lane: int, num_in_flight: int, num_free_rows: int, is_idle: bool) -> NextWork | None:
        arrangement, composer = self.arrangement, self._composer
        if not arrangement.is_spatial:
            return None
        share = arrangement.prefill_share if self._outlook.has_decode() else WHOLE_CHIP
        if arrangement.granularity == "token" and not self._runs:
            budget = arrangement.token_budget
            return NextWork(share, composer.compose_prompts(lane, num_free_rows, is_idle, budget, self._can_admit))
        # One at a time: what waits in a lane's queue could not be overtaken by an arrival that ranks before it.
        if num_in_flight or self._runs.in_flight() is not None:
            return None
        run = self._resting_run_to_go_on(lane)
        if run is None:
            composition = composer.compose_run(lane, num_free_rows, is_idle, self._can_admit)
            if composition.shares or composition.has_preempted:
                return NextWork(share, composition, begins_run=True, last=self._config.num_nodes)
            run = self._runs.first_resting()  # whoever ranks before it cannot begin after all
        return NextWork(share, run=run, last=self._config.num_nodes) if run is not None else None

    def _next_in_turn(
        self, arrangement: Arrangement, num_in_flight: int, num_free_rows: int, is_idle: bool
    ) -> NextWork | None:
        """One lane: decodes and parts of prefills take turns; either goes on alone when the other has nothing, or when no
        operator fits the time that decodes leave."""
        if self._part_was_last or not self._can_admit:
            composition = self._compose_decodes(is_idle)
            if composition.shares or composition.has_preempted:
                self._part_was_last = not composition.shares
                return NextWork(WHOLE_CHIP, composition)
        part = self._next_part(arrangement, num_free_rows, is_idle, can_wait=True)
        if part is None and not self._part_was_last:
            composition = self._compose_decodes(is_idle)
            if composition.shares or composition.has_preempted:
                return NextWork(WHOLE_CHIP, composition)
        if part is None and not num_in_flight:  # decodes that could not go on either are nothing to wait for
            part = self._next_part(arrangement, num_free_rows, is_idle, can_wait=False)
        if part is not None and (part.run is not None or part.composition.shares):
            self._part_was_last = True
        return part

    def _compose_decodes(self, is_idle: bool) -> Composition:
        composition = self._composer.compose_decodes(DECODE_LANE, is_idle)
        self._can_admit = not (composition.has_stalled or composition.has_preempted)
        return composition

    def _next_part(
        self, arrangement: Arrangement, num_free_rows: int, is_idle: bool, can_wait: bool
    ) -> NextWork | None:
        """None: no prompt can go on now, or may not yet (can_wait)."""
        if self._runs.in_flight() is not None:
            return None
        run = self._resting_run_to_go_on(DECODE_LANE)
        if run is None:
            if arrangement.granularity == "token":
                return None
            composition = self._composer.compose_run(DECODE_LANE, num_free_rows, is_idle, self._can_admit)
            if composition.has_preempted and not composition.shares:
                return NextWork(WHOLE_CHIP, composition)
            if not composition.shares:
                run = self._runs.first_resting()  # whoever ranks before it cannot begin after all
                if run is None:
                    return None
        if run is not None and can_wait and self._has_to_wait(run, arrangement.segment_s):
            return None
        self._num_turns_waited = 0
        if run is not None:
            return NextWork(WHOLE_CHIP, run=run, last=self._part_end(run.shape, run.cursor, run.bounds, arrangement))
        shape = StepShape(0, 0, 0)
        for request, num_tokens in composition.shares:
            shape = shape.plus_chunk(request.next_start, num_tokens)
        last = self._part_end(shape, 0, self.bounds_of(shape.num_tokens), arrangement)
        return NextWork(WHOLE_CHIP, composition, begins_run=True, last=last)

    def bounds_of(self, num_tokens: int) -> tuple[int, ...]:
        """Where the parts of a run of so many tokens end."""
        config = self._config
        if self.arrangement.granularity != "layer" or self.arrangement.is_spatial:
            return (config.num_nodes,)
        decodes = self._outlook.decodes(DECODE_LANE)
        num_groups = num_layer_groups(num_tokens, len(config.layer_starts), self._outlook.cost_model, decodes)
        return group_bounds(config.layer_starts, config.num_nodes, num_groups)

    def _part_end(self, shape: StepShape, cursor: int, bounds: tuple[int, ...], arrangement: Arrangement) -> int:
        """The node at which the next part of a run ends, on the lane of the decodes."""
        config, model = self._config, self._outlook.cost_model
        if arrangement.is_spatial or not self._outlook.has_decode():
            # Nobody waits between two parts. What arrives meanwhile can have it paused.
            return config.num_nodes if arrangement.granularity != "layer" else _next_bound(bounds, cursor)
        if arrangement.granularity == "layer" or len(bounds) > 1:
            return _next_bound(bounds, cursor)
        decodes = self._outlook.decodes(DECODE_LANE)
        limit_s = arrangement.segment_s
        if not limit_s and model is not None and decodes.tightest_tpot_s is not None:
            limit_s = decodes.tightest_tpot_s - model.guarded_step_s(decodes.shape)
        if not limit_s or model is None:
            # Nobody says how long decodes may wait: as long as for a group of layers.
            num_groups = num_layer_groups(shape.num_tokens, len(config.layer_starts), None, decodes)
            return _next_bound(group_bounds(config.layer_starts, config.num_nodes, num_groups), cursor)
        return model.last_node_within(shape, cursor, limit_s)

    def _has_to_wait(self, run: PrefillRun, limit_s: float) -> bool:
        """Its next operator takes longer than decodes can wait (on two cores one of 2,048 tokens takes 20 ms): they gather
        credit first, for some turns. Without an end to that, who hardly keeps a target would keep prompts out for ever."""
        model = self._outlook.cost_model
        if model is None or not limit_s or len(run.bounds) > 1 or not self._outlook.has_decode():
            return False
        if (
            self._num_turns_waited >= MOST_TURNS_WAITED
            or model.range_s(run.shape, run.cursor, run.cursor + 1) <= limit_s
        ):
            return False
        self._num_turns_waited += 1
        return True

    def _resting_run_to_go_on(self, lane: int) -> PrefillRun | None:
        """The resting run whose turn it is; None: a new one comes before it, or there is none."""
        run = self._runs.first_resting()
        if run is None or len(run.bounds) > 1:
            return run
        if self.arrangement.granularity == "token":
            return run  # no new run begins: those that have begun end first
        lead = self._composer.run_lead(lane)
        if lead is None or run.lead.rank < lead.rank or not self._has_frame_for(lead) or not self._can_begin(lead):
            return run
        return None

    def run_to_pause(self) -> PrefillRun | None:
        """The run whose part in flight should stop because somebody now ranks before it and could begin."""
        run = self._runs.in_flight()
        if run is None or run.is_pausing or len(run.bounds) > 1:
            return None
        if run.plan.share < WHOLE_CHIP and not self._outlook.has_decode() and self._gains_by_whole_chip(run):
            return run
        resting = self._runs.first_resting()
        if resting is not None and resting.lead.rank < run.lead.rank:
            return run
        if self.arrangement.granularity == "token":
            return None  # no new run begins: one that stopped would be the next to go on, and be stopped again
        lead = self._composer.run_lead(run.plan.lane)
        is_first = lead is not None and lead.rank < run.lead.rank
        return run if is_first and self._has_frame_for(lead) and self._can_begin(lead) else None

    def _gains_by_whole_chip(self, run: PrefillRun) -> bool:
        """The decodes beside it are over. Long runs beside short answers had most of their time on a part of the chip whose
        other part was idle: a real run of prompts of 2,000 to 3,000 tokens and answers of 8 took 1.8 times as long as on one
        lane."""
        model = self._outlook.cost_model
        if model is None:
            return True
        first, last = run.plan.node_range or (0, self._config.num_nodes)
        now_s, whole_s = (model.range_s(run.shape, first, last, share) for share in (run.plan.share, WHOLE_CHIP))
        if now_s <= 0.0:  # a node that only copies pages, on a machine whose steps have no overhead
            return False
        left = 1.0 - min((self._outlook.now - run.part_started_s) / now_s, 1.0)
        # It stops behind the node that has begun, and the rest begins a plan's overhead later.
        pause_s = model.longest_node_s(run.shape, run.plan.share) + model.overhead_s(run.shape)
        return left * (now_s - whole_s) > 2.0 * pause_s

    def _has_frame_for(self, lead: Request) -> bool:
        """The last one is kept for who needs it for half as long as the others theirs, or less. (A third long prompt
        that ranks before two that rest would take it, and all who come after would have to wait for its end.)"""
        num_left = self._config.max_resting_runs - len(self._runs)
        if num_left != 1 or not self._runs:
            return num_left > 0
        num_nodes = self._config.num_nodes
        least = min(run.num_tokens * (num_nodes - run.cursor) for run in self._runs)
        return 2 * (lead.num_expected_tokens - lead.next_start) * num_nodes <= least

    def _can_begin(self, lead: Request) -> bool:
        return (lead.row is not None or self._can_admit) and self._composer.could_begin(lead)


def _next_bound(bounds: tuple[int, ...], cursor: int) -> int:
    return next(bound for bound in bounds if bound > cursor)


def _describe(arrangement: Arrangement) -> str:
    """Short: what is counted."""
    text = arrangement.granularity
    if arrangement.num_nano_batches != 1:
        text = f"{arrangement.num_nano_batches or 'best'} nano-batches"
    if arrangement.is_spatial:
        return f"{arrangement.prefill_share * 100:.0f}:{arrangement.decode_share * 100:.0f} {text}"
    return f"one lane, {text}"
