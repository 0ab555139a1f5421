"""Nano-batches: one step's rows, cut into a few consecutive parts whose operators interleave over two lanes.

    rows        0 ........ 383 | 384 .................. 1023        two nano-batches, in plan order
    lane 0      qkv0  qkv1      | o1 gate_up1 down1 | o0 ...        compute: one operator at a time
    lane 1             attn0           attn1 ...                    memory: one operator at a time

Each lane has its share of the chip and runs its operators one after the other, so that two operators of the same
resource class never overlap, while a compute operator of one nano-batch runs beside a memory operator of another
(NanoFlow, arXiv 2408.12757, sections 4.1 and 4.2). Within a nano-batch the order of the program holds. Across
nano-batches an operator waits for another only where the operators depend on each other and their rows meet: that is
attention, where a prompt's chunk is cut in the middle, for its later tokens read the keys that the earlier ones append.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.step import ScheduledRequest

COMPUTE_LANE, MEMORY_LANE = 0, 1
MAX_NANO_BATCHES = 4


class NanoRange(NamedTuple):
    """Consecutive nodes of one nano-batch on one lane."""

    nano: int  # which nano-batch, 0 first in plan order
    first: int  # node
    last: int  # one past the last node
    lane: int  # COMPUTE_LANE or MEMORY_LANE
    after: tuple[int, ...] = ()  # earlier entries of NanoPlan.ranges, on the other lane, that must have ended


@dataclass(frozen=True, slots=True)
class NanoPlan:
    """How a step is cut. `ranges` is in the order of submission: each lane runs its entries in this order."""

    token_counts: tuple[int, ...]  # of each nano-batch, in plan order; they add up to the plan's tokens
    shares: tuple[float, float]  # of the chip, for the compute and the memory lane
    ranges: tuple[NanoRange, ...]
    reason: str = ""  # for people

    @property
    def num_nano(self) -> int:
        return len(self.token_counts)


def split_requests(
    requests: Sequence[ScheduledRequest], token_counts: Sequence[int]
) -> list[tuple[ScheduledRequest, ...]]:
    """The requests of each nano-batch. A request that is cut appears in several: its new pages come with the first piece
    (whoever prepares frames appends them before the first node), and only the last piece samples. Raises ValueError if
    the counts are not positive or do not add up."""
    total = sum(scheduled.num_tokens for scheduled in requests)
    if not token_counts or min(token_counts) < 1 or sum(token_counts) != total:
        raise ValueError(f"split_requests: got token_counts {tuple(token_counts)}, wanted positive ones of sum {total}")
    pieces: list[tuple[ScheduledRequest, ...]] = []
    index, num_taken = 0, 0  # of requests[index], how many tokens went to earlier nano-batches
    for count in token_counts:
        piece: list[ScheduledRequest] = []
        while count:
            scheduled = requests[index]
            num_left = scheduled.num_tokens - num_taken
            num = min(count, num_left)
            if num == scheduled.num_tokens:
                piece.append(scheduled)
            else:
                new_pages = scheduled.new_pages if num_taken == 0 else tuple(() for _ in scheduled.new_pages)
                piece.append(
                    ScheduledRequest(
                        scheduled.request_id, scheduled.row, scheduled.start + num_taken, num, new_pages,
                        scheduled.samples and num == num_left,
                    )
                )  # fmt: skip
            count -= num
            num_taken += num
            if num == num_left:
                index, num_taken = index + 1, 0
        pieces.append(tuple(piece))
    return pieces


def cut_chunks(requests: Sequence[ScheduledRequest], token_counts: Sequence[int]) -> tuple[bool, ...]:
    """For each boundary between two nano-batches: whether it lies inside a request's tokens. Those of one request that
    spans three nano-batches are a chain, so neighbours are all that need be looked at."""
    boundaries, reached = [], 0
    for count in token_counts[:-1]:
        reached += count
        boundaries.append(reached)
    is_cut, end, index = [], 0, 0
    for scheduled in requests:
        start, end = end, end + scheduled.num_tokens
        while index < len(boundaries) and boundaries[index] < end:
            is_cut.append(boundaries[index] > start)
            index += 1
    return tuple(is_cut)
