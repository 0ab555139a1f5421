"""What a scheduler says of itself, for metrics and reports."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from scheduler.goodput import GoodputStats


class SchedulerStats(NamedTuple):
    """A snapshot for metrics. Counters count from the scheduler's start."""

    num_running: int  # requests that hold a row and may be scheduled
    num_waiting: int
    num_draining: int  # ended or preempted, still named by a plan in flight
    num_free_pages: int
    num_cached_pages: int  # in the prefix cache and evictable
    num_live_pages: int  # held by requests
    kv_usage: float  # live / total, 0..1
    num_preemptions: int
    num_prefix_query_tokens: int  # prompt tokens of admitted requests
    num_prefix_hit_tokens: int  # of those, found in the prefix cache
    goodput: GoodputStats = GoodputStats()  # service levels kept and missed
    num_pauses: int = 0  # prefills that stopped for one that ranks before them, or for more of the chip
    num_moves: int = 0  # of the border between prefill and decode
    arrangements: Mapping[str, int] = MappingProxyType({})  # what the controller decided -> times
