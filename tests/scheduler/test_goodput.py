"""Targets kept and missed, by hand, and as the scheduler counts them."""

import pytest

from scheduler import AbortRequest, Arrival, LaneFinished, LaneResult, Request, Scheduler, SchedulerConfig
from scheduler.goodput import GoodputCounter, outcome_of


@pytest.mark.parametrize(
    ("targets", "first", "end", "num_tokens", "kept"),
    [
        ((1.0, 0.1, None), 0.9, 1.8, 10, (True, True, None)),
        ((1.0, 0.1, None), 1.1, 1.9, 10, (False, True, None)),
        ((1.0, 0.1, None), 0.9, 1.9, 10, (True, False, None)),
        ((None, None, 2.0), 1.5, 2.0, 3, (None, None, True)),
        ((None, None, 2.0), 1.5, 2.1, 3, (None, None, False)),
        ((1.0, 0.1, 2.0), None, 1.0, 0, (False, False, True)),
        ((None, 0.001, None), 5.0, 9.0, 1, (None, True, None)),  # one token has no time between tokens
        ((None, None, None), None, 9.0, 0, (None, None, None)),
    ],
)
def test_outcomes(targets, first, end, num_tokens, kept):
    outcome = outcome_of(*targets, first_token_s=first, end_s=end, num_tokens=num_tokens)
    assert tuple(outcome) == kept
    assert outcome.is_good == (False not in kept)
    assert outcome.has_targets == any(one is not None for one in kept)


def test_a_failed_request_keeps_nothing():
    counter = GoodputCounter()
    counter.add(outcome_of(1.0, None, None, first_token_s=0.5, end_s=0.6, num_tokens=2), 2, has_failed=True)
    stats = counter.stats()
    assert (stats.num_finished, stats.num_good, stats.num_good_tokens) == (1, 0, 0)
    assert (stats.num_ttft_targets, stats.num_ttft_kept) == (1, 0)


def test_the_scheduler_counts_by_its_clock_from_arrival():
    scheduler = Scheduler(SchedulerConfig(num_pages=64, max_plans_in_flight=1))
    levels = {
        "in time": {"ttft_s": 1.0, "tpot_s": 1.0},
        "late first": {"ttft_s": 0.5, "tpot_s": 1.0},
        "slow": {"ttft_s": 1.0, "tpot_s": 0.9},
        "late end": {"deadline_s": 3.9},
        "free": {},
    }
    arrivals = [Arrival(Request(name, (1, 2), 4, arrival_s=10.0, **level)) for name, level in levels.items()]
    arrivals.append(Arrival(Request("leaves", (1, 2), 4, arrival_s=10.0, ttft_s=1.0)))
    plans = scheduler.on_events(arrivals, 10.0)
    now = 10.0
    while plans:
        now += 1.0  # the first token after 1 s, then one a second
        (plan,) = plans
        sampled = tuple((scheduled.request_id, 7) for scheduled in plan.requests)
        events = [LaneFinished(LaneResult(plan.plan_id, plan.lane, sampled))]
        if now == 12.0:
            events.append(AbortRequest("leaves"))
        plans = scheduler.on_events(events, now)
    stats = scheduler.stats().goodput
    assert stats.num_finished == 5  # who left counts nowhere
    assert (stats.num_with_targets, stats.num_good_with_targets) == (4, 1)
    assert (stats.num_good, stats.num_good_tokens) == (2, 8)
    assert (stats.num_ttft_targets, stats.num_ttft_kept) == (3, 2)
    assert (stats.num_tpot_targets, stats.num_tpot_kept) == (3, 2)
    assert (stats.num_deadlines, stats.num_deadlines_kept) == (1, 0)


@pytest.mark.parametrize("field", ["ttft_s", "tpot_s", "deadline_s"])
def test_targets_must_be_positive(field):
    with pytest.raises(ValueError, match=field):
        Request("a", (1,), 1, **{field: 0.0})
