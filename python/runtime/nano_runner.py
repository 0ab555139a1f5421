"""Runs a step that is cut into nano-batches: a frame for each, their ranges interleaved over two native lanes.

Ranges wait for each other natively (``after`` of Lane.submit), so no Python runs between operators. All ranges of a plan are
submitted at once; those of the next plan follow on the same lanes, after the last ranges of this one, whose sampled tokens
they read. Copies of pages are the first nano-batch's; the others begin after them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from runtime.lane_bank import NANO_COMPUTE, NANO_MEMORY, LaneBank
from runtime.run_frames import RunFrames
from scheduler.nanobatch import split_requests
from scheduler.step import LanePlan


@dataclass(slots=True)
class NanoFlight:
    """The ranges of one plan on their way."""

    frames: list[Any]
    pieces: list[tuple]  # ScheduledRequests of each nano-batch
    num_left: int
    ends: list[Any] = field(default_factory=list)  # RangeSignal of each frame's last range
    completions: list[dict] = field(default_factory=list)
    nano_of: dict[tuple[int, int], int] = field(default_factory=dict)  # (native lane, ticket) -> nano-batch


class NanoRunner:
    def __init__(self, bank: LaneBank, frames: RunFrames):
        self._bank = bank
        self._frames = frames
        self._flights: dict[tuple[int, int], NanoFlight] = {}  # (native lane, ticket) ->
        self._last_ends: list[Any] = []

    def prepare(self, plan: LanePlan) -> NanoFlight:
        """A prepared frame for each nano-batch. Pages have been appended to the rows. Raises ValueError for a bad plan."""
        pieces = split_requests(plan.requests, plan.nano.token_counts)
        flight = NanoFlight([], pieces, len(plan.nano.ranges))
        try:
            for index, piece in enumerate(pieces):
                quadruples = array("i")
                for scheduled in piece:
                    quadruples.extend((scheduled.row, scheduled.start, scheduled.num_tokens, scheduled.samples))
                copies = [(copy.source_page, copy.target_page) for copy in plan.copies] if index == 0 else []
                flight.frames.append(self._frames.take())
                flight.frames[-1].prepare(quadruples, copies)
        except Exception:
            self._give_back(flight)
            raise
        return flight

    def submit(self, plan: LanePlan, flight: NanoFlight) -> None:
        shares, ranges = plan.nano.shares, plan.nano.ranges
        lanes = [self._bank.lane(NANO_COMPUTE, shares[0]), self._bank.lane(NANO_MEMORY, shares[1])]
        signals: list[Any] = []
        last: list[Any] = [None] * len(flight.frames)
        before = [signal for signal in self._last_ends if not signal.has_ended]
        for entry in ranges:
            after = [signals[index] for index in entry.after]
            if last[entry.nano] is not None:
                after.append(last[entry.nano])
            else:
                after.extend(before)
                if plan.copies and signals:
                    after.append(signals[0])
            lane, frame = lanes[entry.lane], flight.frames[entry.nano]
            ticket, signal = lane.submit_with_signal(frame, entry.first, entry.last, after)
            signals.append(signal)
            last[entry.nano] = signal
            key = lane.lane_idx, ticket
            self._flights[key] = flight
            flight.nano_of[key] = entry.nano
        self._last_ends = last

    def gather(self, completion: dict) -> dict | None:
        """The completion of the whole step, when this range was its last; else None."""
        key = completion["lane"], completion["ticket"]
        flight = self._flights.pop(key)
        flight.completions.append(completion)
        flight.num_left -= 1
        if flight.num_left:
            return None
        parts = flight.completions
        spans = [
            (node, start, end, self._bank.role_of(part["lane"]), flight.nano_of[part["lane"], part["ticket"]])
            for part in parts
            for node, start, end in part["spans"]
        ]
        errors = [part["error"] for part in parts if part["error"]]
        return {
            "lane": 0, "ticket": 0, "first_node": 0, "cursor": max(part["cursor"] for part in parts),
            "was_stopped": False, "error": errors[0] if errors else "", "spans": [],
            "start_ns": min(part["start_ns"] for part in parts), "end_ns": max(part["end_ns"] for part in parts),
            "nano_spans": sorted(spans, key=lambda span: span[1]), "nano_flight": flight,
        }  # fmt: skip

    def sampled(self, flight: NanoFlight) -> list[tuple[str, int, Any, int]]:
        """(request_id, token, frame, logit row) of every request that samples, in plan order."""
        found = []
        for frame, piece in zip(flight.frames, flight.pieces, strict=True):
            sampling = [scheduled.request_id for scheduled in piece if scheduled.samples]
            tokens = frame.sampled_tokens() if sampling else []
            rows = enumerate(zip(sampling, tokens, strict=True))
            found += [(request_id, token, frame, row) for row, (request_id, token) in rows]
        return found

    def finish(self, flight: NanoFlight) -> None:
        self._give_back(flight)

    def _give_back(self, flight: NanoFlight) -> None:
        for frame in flight.frames:
            self._frames.give_back(frame)
