"""A run in flight stops only for somebody who then begins: else it goes on, is stopped again before its first node, and
never ends. Stops come as early as they can here (``stop_at=0``), as they do where the host is faster than a node."""

from __future__ import annotations

import pytest

from scheduler import Arrival, Request, SchedulerConfig
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.fake_runner import VOCAB_SIZE
from tests.scheduler.random_walk import LAYER_STARTS, NODES, walk


def config_of(**overrides) -> SchedulerConfig:
    fields = {
        "num_pages": 40, "page_size": 4, "max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 200,
        "enable_prefix_caching": False, "watermark": 0.0, "prefill": "operator", "num_nodes": len(NODES),
        "layer_starts": LAYER_STARTS,
    }  # fmt: skip
    return SchedulerConfig(**{**fields, **overrides})


def request_of(name: str, num_tokens: int, priority: int, max_tokens: int = 2) -> Request:
    return Request(name, [place % VOCAB_SIZE for place in range(num_tokens)], max_tokens, priority=priority)


def begin_together(checked: CheckedScheduler, *requests: Request) -> None:
    """One run of all of them is in flight."""
    for request in requests:
        checked.requests[request.request_id] = request
        checked.outputs[request.request_id] = []
    (plan,) = checked.scheduler.on_events(map(Arrival, requests), checked.now)
    checked._check_plan(plan)
    assert len(plan.requests) == len(requests)


@pytest.mark.parametrize("lanes", ["off", "50:50"])
@pytest.mark.parametrize("num_pages", [40, 7])
def test_a_run_does_not_stop_for_who_waits_for_what_the_run_itself_holds(lanes, num_pages):
    """One of two prompts of a run was aborted: its row and pages come back with the run's end, not before."""
    has_pages = num_pages == 40  # else it is pages that the urgent request lacks
    checked = CheckedScheduler(config_of(lanes=lanes, num_pages=num_pages, max_num_seqs=2 if has_pages else 3))
    begin_together(checked, request_of("long", 10, 1), request_of("aborted", 10, 1))
    checked.abort("aborted")
    checked.arrive(request_of("urgent", 10, 0))
    assert not checked.pausing
    checked.run_until_idle(stop_at=0.0, max_steps=30)
    checked.check_answers()


def test_a_run_stops_for_who_has_row_and_pages():
    checked = CheckedScheduler(config_of(lanes="off", max_num_seqs=3))
    begin_together(checked, request_of("long", 10, 1), request_of("aborted", 10, 1))
    checked.abort("aborted")
    checked.arrive(request_of("urgent", 10, 0))
    assert checked.pausing
    checked.run_until_idle(stop_at=0.0, max_steps=30)
    checked.check_answers()
    assert checked.num_stops == 1


PAUSED_IN_VAIN = {
    # Who is refused by the predicted peak of KV.
    "peak": {"policy": "nanoflow", "nano_batches": "off", "prefill": "operator", "lanes": "off", "num_pages": 16,
             "max_num_batched_tokens": 16},
    # Who was preempted and comes back only when all of it fits, though a first run of it would.
    "preempted": {"policy": "default", "prefill": "operator", "lanes": "off", "num_pages": 14, "max_num_batched_tokens": 7},
}  # fmt: skip


ARBITRATED = {"policy": "arbitrate", "num_pages": 16}


@pytest.mark.parametrize(("why", "seeds"), [("peak", range(20)), ("preempted", range(170, 185))])
def test_a_run_does_not_stop_for_who_would_be_refused(why, seeds):
    for seed in seeds:
        walk(
            seed,
            stop_at=0.0,
            kv_group_windows=(0,),
            max_num_seqs=3,
            max_resting_runs=1 + seed % 3,
            **PAUSED_IN_VAIN[why],
        )


def test_a_part_that_takes_no_time_at_all_by_the_model_is_no_reason_to_stop():
    """The first node alone, which copies pages, on a machine without overheads, on half of the chip, beside nobody."""
    for seed in range(20, 30):
        walk(seed, stop_at=0.0, kv_group_windows=(0,), max_num_seqs=3, max_resting_runs=1 + seed % 3, **ARBITRATED)
