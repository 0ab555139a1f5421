"""What the tests of the scheduler's rules share: a tiny pool, and requests that share nothing."""

from __future__ import annotations

import dataclasses

from scheduler import LanePlan, Request, SchedulerConfig

CONFIG = SchedulerConfig(
    num_pages=16, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, min_copy_tokens=2
)


def config_with(**fields) -> SchedulerConfig:
    return dataclasses.replace(CONFIG, **fields)


def request(request_id: str, num_prompt: int = 6, max_tokens: int = 4, first: int = 10, **fields) -> Request:
    """A request that no other shares a prefix with, if `first` differs; it never stops early unless told to."""
    return Request(request_id, [first + i for i in range(num_prompt)], max_tokens, **fields)


def shares(plan: LanePlan) -> dict[str, tuple[int, int]]:
    """Request id -> (start, tokens)."""
    return {scheduled.request_id: (scheduled.start, scheduled.num_tokens) for scheduled in plan.requests}
