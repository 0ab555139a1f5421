"""Scheduling: pure Python, standard library only. The engine and the simulator drive the same objects.

scheduler = Scheduler(SchedulerConfig(num_pages=1024))
plans = scheduler.on_event(Arrival(Request("a", (1, 2, 3), max_tokens=8)), now)
...run each plan...
plans = scheduler.on_event(LaneFinished(LaneResult(plan_id, lane, sampled)), now)
outputs = scheduler.take_outputs()
"""

from scheduler.config import SchedulerConfig
from scheduler.request import Request, RequestStatus
from scheduler.scheduler import Scheduler, SchedulerStats
from scheduler.step import (
    AbortRequest,
    Admission,
    Arrival,
    CopyDone,
    LaneFinished,
    LanePlan,
    LaneResult,
    PageCopy,
    PageTableReset,
    ScheduledRequest,
    Timer,
    TokenOutput,
)

__all__ = [
    "AbortRequest",
    "Admission",
    "Arrival",
    "CopyDone",
    "LaneFinished",
    "LanePlan",
    "LaneResult",
    "PageCopy",
    "PageTableReset",
    "Request",
    "RequestStatus",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Timer",
    "TokenOutput",
]
