"""Executes LanePlans: native rows, frames and lanes behind the scheduler's contract (scheduler/step.py).

The engine thread alone calls this. A plan becomes a prepared frame and one submitted range; its completion becomes
a LaneResult. While plan i runs, plan i+1 may be prepared and queued: it names rows, and the tokens it starts from
are read from those rows when its first node runs. Between two parts of a run its frame rests here.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime import _native
from runtime.lane_bank import NANO_COMPUTE, NANO_MEMORY, LaneBank
from runtime.messages import TokenLogprobs
from runtime.nano_runner import NanoFlight, NanoRunner
from runtime.run_frames import RunFrames
from scheduler.step import DropRun, LanePlan, LaneResult, Order

# Frames rest in a ring: one running, one queued behind it, one whose results are being read.
FRAMES_PER_LANE = 3
_NANO_TICKET = -1  # its ranges have tickets of their own


@dataclass(slots=True)
class _Flight:
    """A plan on its way."""

    plan: LanePlan
    frame: object
    lane: object  # native; None: a step in nano-batches, on lanes of its own
    nano: NanoFlight | None = None
    ticket: int = 0  # 0: held back until the plans before it, on another native lane, have ended
    is_pausing: bool = False


class ModelRunner:
    """Owns the native state of an engine: KV arena, rows, frames, lanes."""

    def __init__(
        self, program, kv_plan, device, *, vocab_size: int, max_num_seqs: int, max_num_batched_tokens: int,
        bank: LaneBank, completions, max_resting_runs: int = 0, num_nano_frames: int = 0,
    ):  # fmt: skip
        """``device``: of the program (runtime.devices). ``bank``: its lanes, which report to ``completions``."""
        self.program = program
        self.kv_plan = kv_plan
        self.completions = completions
        self.arena = device.kv_arena(kv_plan.groups, kv_plan.num_pages)
        self.rows = device.row_store(
            max_num_seqs, kv_plan.max_model_len, kv_plan.num_groups, kv_plan.page_size, vocab_size
        )
        self.bank = bank
        self._frame_sizes = (max_num_batched_tokens, max_num_seqs)
        at_start = FRAMES_PER_LANE * bank.num_roles
        self._frames = RunFrames(self._new_frame, at_start, at_start + max_resting_runs + num_nano_frames)
        self._nano = NanoRunner(bank, self._frames)
        # Plans of each role in flight, oldest first.
        self._flights: list[deque[_Flight]] = [deque() for _ in range(bank.num_roles)]

    def _new_frame(self):
        return _native.Frame(self.program, self.arena, self.rows, *self._frame_sizes)

    def capture_graphs(self) -> None:
        """Captures the graphs of all decode lanes; returns when they are there. Raises RuntimeError with what failed."""
        frame = self._new_frame()  # one that holds no step
        for lane in self.bank.decode_lanes:
            lane.capture_graphs(frame)
            while not (completions := self.completions.wait_any(-1.0)):
                pass
            if completions[0]["error"]:
                raise RuntimeError(f"capture of decode graphs: {completions[0]['error']}")

    @property
    def num_in_flight(self) -> int:
        return sum(len(flights) for flights in self._flights)

    def has_in_flight(self, role: int) -> bool:
        """Plans of this lane of the scheduler are queued or running."""
        return role < len(self._flights) and bool(self._flights[role])

    def check_sampling(self, sampling) -> None:
        """Raises ValueError for native sampling parameters that the device does not take."""
        self.rows.check_sampling(sampling)

    def admit(self, row: int, token_ids, num_prompt_tokens: int, sampling) -> None:
        """Writes a row's known tokens and its native sampling parameters. Raises ValueError on a bad id or parameter."""
        self.rows.admit(row, array("i", token_ids), num_prompt_tokens, sampling)

    def launch(self, plan: LanePlan) -> None:
        """Prepares a frame for the plan, or takes the one of its run, and queues it on the lane of its share. Raises
        ValueError when the plan is malformed."""
        if plan.continues:
            flight = _Flight(plan, self._frames.resume(plan.continues), self.bank.lane(plan.lane, plan.share))
        else:
            self._append_pages(plan)
            if plan.nano is not None:
                flight = _Flight(plan, None, None, self._nano.prepare(plan))
            else:
                flight = _Flight(plan, self._prepared_frame(plan), self.bank.lane(plan.lane, plan.share))
        flights = self._flights[plan.lane]
        # Plans of a role follow each other, also when the border has moved: what one native lane runs is over before
        # another begins.
        if not flights or (flights[-1].ticket and flights[-1].lane is flight.lane):
            try:
                self._submit(flight)
            except ValueError:
                if flight.nano is None:  # of a step in nano-batches some ranges may be on their way
                    self._give_back(flight)
                raise
        flights.append(flight)

    def _append_pages(self, plan: LanePlan) -> None:
        num_arena_pages = self.kv_plan.num_pages
        for reset in plan.resets:
            for group, pages in enumerate(reset.pages):
                self.rows.set_pages(reset.row, group, 0, pages, num_arena_pages)
        for scheduled in plan.requests:
            for group, pages in enumerate(scheduled.new_pages):
                if pages:
                    self.rows.append_pages(scheduled.row, group, pages, num_arena_pages)

    def _prepared_frame(self, plan: LanePlan):
        quadruples = array("i")
        for scheduled in plan.requests:
            quadruples.extend((scheduled.row, scheduled.start, scheduled.num_tokens, scheduled.samples))
        frame = self._frames.take()
        try:
            frame.prepare(quadruples, [(copy.source_page, copy.target_page) for copy in plan.copies])
        except Exception:
            self._frames.give_back(frame)
            raise
        return frame

    def _submit(self, flight: _Flight) -> None:
        if flight.nano is not None:
            self._nano.submit(flight.plan, flight.nano)
            flight.ticket = _NANO_TICKET
            return
        first, last = flight.plan.node_range or (0, self.program.num_nodes)
        flight.ticket = flight.lane.submit(flight.frame, first, last)
        if flight.is_pausing:
            flight.lane.request_stop(flight.ticket)

    def carry_out(self, orders: Sequence[Order]) -> None:
        """Pauses plans in flight, frees the frames of runs that will not go on."""
        for order in orders:
            if isinstance(order, DropRun):
                self._frames.drop(order.run_id)
                continue
            for flight in self._flights[order.lane]:
                if flight.plan.plan_id == order.plan_id:
                    flight.is_pausing = True
                    if flight.ticket and flight.nano is None:
                        flight.lane.request_stop(flight.ticket)

    def gather(self, completion: dict) -> dict | None:
        """A range's completion as a plan's; None: other ranges of its step in nano-batches are still on their way."""
        if self.bank.role_of(completion["lane"]) in (NANO_COMPUTE, NANO_MEMORY):
            return self._nano.gather(completion)
        return completion

    def finish(self, completion: dict, wants_logprobs) -> tuple[LaneResult, dict[str, TokenLogprobs], LanePlan]:
        """The result of a completed plan, and the plan. ``wants_logprobs(request_id)`` tells whose log probabilities to
        read."""
        role = self.bank.role_of(completion["lane"])
        flights = self._flights[role]
        flight = flights.popleft()
        nano = completion.get("nano_flight")
        if nano is not flight.nano or (nano is None and flight.ticket != completion["ticket"]):
            raise RuntimeError(f"lane {role}: ticket {completion['ticket']} came before {flight.ticket}")
        self._submit_held(flights)
        plan, frame = flight.plan, flight.frame
        logprobs: dict[str, TokenLogprobs] = {}
        if completion["error"]:
            failed = tuple((scheduled.request_id, completion["error"]) for scheduled in plan.requests)
            self._give_back(flight)
            return LaneResult(plan.plan_id, plan.lane, (), failed), logprobs, plan
        if completion["cursor"] < self.program.num_nodes:
            self._frames.rest(plan.run_id, frame)
            cursor = completion["cursor"] if completion["was_stopped"] else None
            return LaneResult(plan.plan_id, plan.lane, cursor=cursor), logprobs, plan
        if nano is not None:
            sampled = self._nano.sampled(nano)
        else:
            sampling = [scheduled.request_id for scheduled in plan.requests if scheduled.samples]
            tokens = zip(sampling, frame.sampled_tokens(), strict=True)
            sampled = [(request_id, token, frame, row) for row, (request_id, token) in enumerate(tokens)]
        for request_id, _, of_frame, row in sampled:
            if wants_logprobs(request_id):
                token, logprob, rank, top = of_frame.sampled_logprobs(row)
                logprobs[request_id] = TokenLogprobs(token, logprob, rank, tuple(top))
        result = LaneResult(plan.plan_id, plan.lane, tuple([each[:2] for each in sampled]))
        self._give_back(flight)
        return result, logprobs, plan

    def _give_back(self, flight: _Flight) -> None:
        if flight.nano is not None:
            self._nano.finish(flight.nano)
        else:
            self._frames.give_back(flight.frame)

    def _submit_held(self, flights: deque[_Flight]) -> None:
        """Plans behind one that has ended, as far as they go to the same native lane."""
        for before, flight in zip((None, *flights), flights, strict=False):
            if flight.ticket:
                continue
            if before is not None and not (before.ticket and before.lane is flight.lane):
                return
            self._submit(flight)
