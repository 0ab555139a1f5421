"""The native lanes of an engine: one for each part of the chip that a role's plans may get.

The scheduler's lanes are roles (decode, prefill) whose plans say what share of the chip they get. Here a share becomes a
native lane: a set of cores, or a stream over some of a GPU's SMs. All of them are made at start and sleep until they get
work, so moving the border between prefill and decode is submitting to another one. Weights, pages and rows serve them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.arrangement import DECODE_LANE, PREFILL_LANE
from scheduler.config import parse_lanes

WHOLE = 1.0
ALL_CUTS = tuple(eighth / 8 for eighth in range(1, 8))  # shares of prefill that a movable border is offered
# Beside the scheduler's lanes: the two over which a step's nano-batches interleave.
NANO_COMPUTE, NANO_MEMORY = 2, 3
_ROLE_NAMES = {
    DECODE_LANE: "decode", PREFILL_LANE: "prefill", NANO_COMPUTE: "nano-batches, compute", NANO_MEMORY: "memory",
}  # fmt: skip


class LaneBank:
    """``lanes``: off, auto or P:D, as the flag has it. Raises ValueError for a cut that the chip cannot have."""

    def __init__(
        self,
        device,
        completions,
        lanes: str,
        max_num_seqs: int,
        is_traced: bool = False,
        has_nano_batches: bool = False,
    ):
        self._lanes: dict[tuple[int, float], Any] = {}  # (role, share) ->
        self._roles: list[int] = []  # of native lanes, by their index
        self._texts: list[str] = []
        self.rungs: tuple[float, ...] = ()  # shares of prefill at which the chip is cut
        if lanes in ("", "off"):
            self._add(DECODE_LANE, WHOLE, device.engine_lane(0, completions, max_num_seqs))
        else:
            self._open_roles(device, completions, lanes, max_num_seqs)
        if has_nano_batches:
            self._open_nano(device, completions)
        for lane in self.native_lanes:
            lane.set_tracing(is_traced)

    def _open_roles(self, device, completions, lanes: str, max_num_seqs: int) -> None:
        wanted = parse_lanes(lanes)
        partitions = device.partitions(_cuts_wanted(wanted))
        self._partitions = partitions  # a GPU's ladder owns the streams
        shares = {DECODE_LANE: {WHOLE}, PREFILL_LANE: {WHOLE}}
        if wanted is None or sum(wanted) <= WHOLE + 1e-9:
            if wanted is not None and not partitions.rungs:
                raise ValueError(f"lanes: got {lanes!r}, but {partitions.why_whole}; 100:100 shares it in time")
            self.rungs = partitions.rungs
            for rung in partitions.rungs:
                shares[PREFILL_LANE].add(rung)
                shares[DECODE_LANE].add(1.0 - rung)
        else:  # shares that overlap: both as wide as asked for, the system shares the chip in time
            shares[PREFILL_LANE].add(wanted[0])
            shares[DECODE_LANE].add(wanted[1])
        for role in (DECODE_LANE, PREFILL_LANE):
            for share in sorted(shares[role]):
                graph_rows = max_num_seqs if role == DECODE_LANE else 0
                lane, text = partitions.lane(len(self._roles), completions, role == PREFILL_LANE, share, graph_rows)
                self._add(role, share, lane)
                self._texts.append(f"{_ROLE_NAMES[role]} {share:.0%}: {text}")

    def _open_nano(self, device, completions) -> None:
        """At every cut: compute operators on the first part, memory operators on the second; a chip that cannot be cut is
        all of it for both."""
        partitions = self._nano_partitions = device.partitions(_cuts_wanted(None))
        for share in partitions.rungs or (WHOLE,):
            for role, part in ((NANO_COMPUTE, share), (NANO_MEMORY, 1.0 - share if partitions.rungs else WHOLE)):
                lane, text = partitions.lane(len(self._roles), completions, role == NANO_COMPUTE, part, 0)
                self._add(role, part, lane)
                self._texts.append(f"{_ROLE_NAMES[role]} {part:.0%}: {text}")
        self.rungs = self.rungs or partitions.rungs

    def _add(self, role: int, share: float, lane) -> None:
        self._lanes[role, share] = lane
        self._roles.append(role)

    @property
    def native_lanes(self) -> list[Any]:
        return list(self._lanes.values())

    @property
    def decode_lanes(self) -> list[Any]:
        """On a GPU those that replay graphs."""
        return [lane for (role, _), lane in self._lanes.items() if role == DECODE_LANE]

    @property
    def num_roles(self) -> int:
        """Lanes of the scheduler."""
        return len({role for role in self._roles if role in (DECODE_LANE, PREFILL_LANE)})

    def role_of(self, native_index: int) -> int:
        return self._roles[native_index]

    def lane(self, role: int, share: float) -> Any:
        """The lane of this role whose share is nearest."""
        found = self._lanes.get((role, share))
        if found is None:
            shares = [each for owner, each in self._lanes if owner == role]
            found = self._lanes[role, min(shares, key=lambda each: abs(each - share))]
        return found

    def describe(self) -> str:
        return "; ".join(self._texts) or "one, the whole chip"


def _cuts_wanted(wanted: tuple[float, float] | None) -> tuple[float, ...]:
    """Shares of the first part at which the chip shall be cut: every eighth, or the one that was asked for."""
    if wanted is None:
        return ALL_CUTS
    return (wanted[0],) if sum(wanted) <= WHOLE + 1e-9 else ()


class CorePartitions:
    """Cores cut in two: prefill takes the first ones, decode the last."""

    def __init__(self, cores: Sequence[int], cuts: Sequence[float]):
        self._cores = list(cores)
        num = len(self._cores)
        firsts = sorted({min(max(round(cut * num), 1), num - 1) for cut in cuts}) if num > 1 else []
        self.rungs = tuple(first / num for first in firsts)
        self.why_whole = "one core cannot be cut"

    def cores(self, is_first: bool, share: float) -> list[int]:
        """Of a part of this size; at least one."""
        num = max(1, round(share * len(self._cores)))
        return self._cores[:num] if is_first else self._cores[-num:]

    def lane(self, index: int, completions, is_first: bool, share: float, graph_rows: int) -> tuple[Any, str]:
        from runtime import _native

        cores = self.cores(is_first, share)
        return _native.Lane(index, cores, len(cores), completions), f"cores {', '.join(map(str, cores))}"


class SmPartitions:
    """A GPU's ladder of splits; the second part of a rung is what the first leaves."""

    def __init__(self, gpu, cuts: Sequence[float], launches_graphs: bool):
        from runtime import _native

        self._gpu = gpu
        self._launches_graphs = launches_graphs
        self._ladder = _native.GpuLadder(gpu, list(cuts))
        whole = self._ladder.whole["num_sms"]
        self._parts = {}  # share of the first part -> (first, second)
        for first, second in self._ladder.rungs:
            share = first["num_sms"] / whole
            if 0.0 < share < 1.0:
                self._parts[share] = (first, second)
            elif not self._ladder.is_isolated:  # plain streams, kept apart by the blocks of their kernels alone
                total = first["num_ctas"] + second["num_ctas"]
                self._parts[first["num_ctas"] / total] = (first, second)
        self.rungs = tuple(sorted(self._parts))
        self.why_whole = self._ladder.note

    def lane(self, index: int, completions, is_first: bool, share: float, graph_rows: int) -> tuple[Any, str]:
        from runtime import _native

        cut = share if is_first else 1.0 - share
        part = next((parts[not is_first] for rung, parts in self._parts.items() if abs(rung - cut) < 1e-9), None)
        stream, num_ctas, text = 0, 0, "all SMs"
        if part is not None:
            stream, num_ctas = part["stream"], part["num_ctas"]
            text = f"{part['num_sms']} SMs" + ("" if self._ladder.is_isolated else f", {num_ctas} blocks")
        lane = _native.GpuLane(
            index, self._gpu, completions, stream, num_ctas, max_graph_rows=graph_rows if self._launches_graphs else 0
        )
        return lane, text
