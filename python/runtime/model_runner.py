"""Executes LanePlans: native rows, frames and lanes behind the scheduler's contract (scheduler/step.py).

The engine thread alone calls this. A plan becomes a prepared frame and one submitted range; its completion becomes
a LaneResult. While plan i runs, plan i+1 may be prepared and queued: it names rows, and the tokens it starts from
are read from those rows when its first node runs.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from runtime import _native
from runtime.messages import TokenLogprobs
from scheduler.step import LanePlan, LaneResult

# Frames rest in a ring: one running, one queued behind it, one whose results are being read.
FRAMES_PER_LANE = 3


@dataclass(slots=True)
class _Flight:
    """A plan on its way."""

    plan: LanePlan
    frame: object
    lane: object


class ModelRunner:
    """Owns the native state of an engine: KV arena, rows, frames, lanes."""

    def __init__(
        self, program, kv_plan, device, *, vocab_size: int, max_num_seqs: int, max_num_batched_tokens: int,
        lanes: list, completions, is_traced: bool = False,
    ):  # fmt: skip
        """``device``: of the program (runtime.devices). ``lanes``: its lanes, which report to ``completions``."""
        self.program = program
        self.kv_plan = kv_plan
        self.completions = completions
        self.arena = device.kv_arena(kv_plan.groups, kv_plan.num_pages)
        self.rows = device.row_store(
            max_num_seqs, kv_plan.max_model_len, kv_plan.num_groups, kv_plan.page_size, vocab_size
        )
        self.lanes = lanes
        for lane in self.lanes:
            lane.set_tracing(is_traced)
        self._new_frame = lambda: _native.Frame(program, self.arena, self.rows, max_num_batched_tokens, max_num_seqs)
        self._free_frames = [self._new_frame() for _ in range(FRAMES_PER_LANE * len(self.lanes))]
        self._flights: dict[tuple[int, int], _Flight] = {}  # (lane, ticket) ->

    def capture_graphs(self) -> None:
        """Captures every lane's decode graphs; returns when they are there. Raises RuntimeError with what failed."""
        frame = self._new_frame()  # one that holds no step
        for lane in self.lanes:
            lane.capture_graphs(frame)
            while not (completions := self.completions.wait_any(-1.0)):
                pass
            if completions[0]["error"]:
                raise RuntimeError(f"capture of decode graphs: {completions[0]['error']}")

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def check_sampling(self, sampling) -> None:
        """Raises ValueError for native sampling parameters that the device does not take."""
        self.rows.check_sampling(sampling)

    def admit(self, row: int, token_ids, num_prompt_tokens: int, sampling) -> None:
        """Writes a row's known tokens and its native sampling parameters. Raises ValueError on a bad id or parameter."""
        self.rows.admit(row, array("i", token_ids), num_prompt_tokens, sampling)

    def launch(self, plan: LanePlan) -> None:
        """Prepares a frame for the plan and queues it on its lane. Raises ValueError when the plan is malformed."""
        num_arena_pages = self.kv_plan.num_pages
        for reset in plan.resets:
            for group, pages in enumerate(reset.pages):
                self.rows.set_pages(reset.row, group, 0, pages, num_arena_pages)
        quadruples = array("i")
        for scheduled in plan.requests:
            for group, pages in enumerate(scheduled.new_pages):
                if pages:
                    self.rows.append_pages(scheduled.row, group, pages, num_arena_pages)
            quadruples.extend((scheduled.row, scheduled.start, scheduled.num_tokens, scheduled.samples))
        frame = self._free_frames.pop()
        try:
            frame.prepare(quadruples, [(copy.source_page, copy.target_page) for copy in plan.copies])
            first, last = plan.node_range or (0, self.program.num_nodes)
            lane = self.lanes[plan.lane]
            ticket = lane.submit(frame, first, last)
        except Exception:
            self._free_frames.append(frame)
            raise
        self._flights[plan.lane, ticket] = _Flight(plan, frame, lane)

    def finish(self, completion: dict, wants_logprobs) -> tuple[LaneResult, dict[str, TokenLogprobs], LanePlan]:
        """A completion's plan and result. ``wants_logprobs(request_id)`` tells whose log probabilities to read."""
        flight = self._flights.pop((completion["lane"], completion["ticket"]))
        plan, frame = flight.plan, flight.frame
        logprobs: dict[str, TokenLogprobs] = {}
        if completion["error"]:
            failed = tuple((scheduled.request_id, completion["error"]) for scheduled in plan.requests)
            result = LaneResult(plan.plan_id, plan.lane, (), failed)
        else:
            sampling = [scheduled.request_id for scheduled in plan.requests if scheduled.samples]
            result = LaneResult(plan.plan_id, plan.lane, tuple(zip(sampling, frame.sampled_tokens(), strict=True)))
            for logit_row, request_id in enumerate(sampling):
                if wants_logprobs(request_id):
                    token, logprob, rank, top = frame.sampled_logprobs(logit_row)
                    logprobs[request_id] = TokenLogprobs(token, logprob, rank, tuple(top))
        self._free_frames.append(frame)
        return result, logprobs, plan
