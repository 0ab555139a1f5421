"""Nobody starves: under endless overload by requests that could be in time, those that cannot be get their turns within the
bound of hopeless_line.py."""

from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.controllers import hopeless_line
from scheduler.controllers.hopeless_line import HopelessLine, front_rank
from scheduler.controllers.slack_order import SlackOrder
from scheduler.prefill_run import PrefillRun
from scheduler.request import Request, RequestStatus
from scheduler.step_shape import StepShape
from tests.scheduler.policy_runs import arrivals, with_own_targets

CONFIG = SchedulerConfig(num_pages=4096, max_num_batched_tokens=2048)
NO_TURNS = mock.patch.object(HopelessLine, "turns", lambda self, now: iter(()))


def request(name: str, arrival_s: float = 0.0, priority: int = 0, ttft_s: float = 1.0) -> Request:
    return Request(name, range(100), 4, arrival_s=arrival_s, priority=priority, ttft_s=ttft_s)


def served_under_endless_overload(
    work: list[tuple[float, float, float]], begun_s: float, overload_s: float, limit_s: float
) -> list[tuple[Request, float, float]]:
    """One server that serves whoever ranks first, and has always somebody to serve who can be in time, overload_s each.
    work: (arrival, target, seconds of the prompt) of those who are late from the start, which is begun_s.
    [(request, when it had its first token, its seconds)], up to limit_s."""
    order, waiting, seconds, served = SlackOrder(CONFIG, None), [], {}, []
    for sequence, (arrival_s, target_s, prompt_s) in enumerate(work):
        one = request(f"late{sequence}", arrival_s, ttft_s=target_s)
        one.rank = order.rank(one, sequence, begun_s)
        waiting.append(one)
        seconds[one] = prompt_s
    now = begun_s
    while waiting and now < limit_s:
        for one, rank in order.due(now):
            one.rank = rank
        first = min(waiting, key=lambda one: one.rank)
        if first.rank[1] == 1:  # somebody in time ranks before it
            now += overload_s
            continue
        first.status, first.first_scheduled_s, first.next_start = RequestStatus.RUNNING, now, 100
        now += seconds[first]
        first.num_expected_tokens, first.first_token_s = 101, now
        order.ended(first)
        waiting.remove(first)
        served.append((first, now, seconds[first]))
    return served


LATE = st.tuples(st.floats(0.0, 20.0), st.floats(0.05, 3.0), st.floats(0.001, 0.1))


@settings(max_examples=40, deadline=None)
@given(st.lists(LATE, min_size=1, max_size=8), st.floats(0.1, 0.5))
def test_every_hopeless_request_is_served_within_the_bound(work, overload_s):
    share, lateness = hopeless_line.SHARE, hopeless_line.LATENESS
    begun_s = max(arrival_s + 2.0 * target_s for arrival_s, target_s, _ in work)
    due_s = {f"late{place}": arrival_s + lateness * target_s for place, (arrival_s, target_s, _) in enumerate(work)}
    bounds = {}
    for name in due_s:  # each turn waits for the step that runs, and its own time and pause come before the next
        ahead = [work[place] for place, other in enumerate(due_s) if due_s[other] <= due_s[name]]
        wait_s = sum(overload_s + prompt_s / share for _, _, prompt_s in ahead)
        bounds[name] = max(due_s[name], begun_s) + wait_s
    limit_s = max(bounds.values()) + 1.0
    served = served_under_endless_overload(work, begun_s, overload_s, limit_s)
    assert len(served) == len(work)
    for one, when_s, _ in served:
        assert when_s <= bounds[one.request_id] + 1e-6
    for (_, earlier_s, prompt_s), (_, later_s, own_s) in pairwise(served):
        assert later_s - own_s - earlier_s >= prompt_s * (1.0 / share - 1.0) - 1e-6  # and no more than the share
    with NO_TURNS:  # switched off they starve
        assert served_under_endless_overload(work, begun_s, overload_s, limit_s) == []


@pytest.mark.parametrize("policy", ["flowprefill", "arbitrate"])
def test_a_turn_comes_in_the_scheduler_while_overload_lasts(policy):
    """One that is late at arrival, into more than the (simulated) chip can answer, all of which could be in time."""
    overload = arrivals(60.0, 6.0, lambda rng: (rng.randint(2000, 3000), 8), seed=3)
    late = (1.0, 3000, 8, 0.001)
    drawn = [(one.arrival_s, one.num_prompt_tokens, one.num_output_tokens, 0.5) for one in overload]

    def first_token_s() -> float:
        records = with_own_targets(policy, sorted([late, *drawn])).run().records
        return records[f"r{sorted([late, *drawn]).index(late)}"].first_token_ns / 1e9

    assert first_token_s() < 2.0
    with NO_TURNS:
        assert first_token_s() > overload[-1].arrival_s


def test_one_that_was_served_in_between_takes_no_turn_but_is_not_preempted_for_ever():
    line = HopelessLine()
    served, waits = request("served"), request("waits")
    for sequence, one in enumerate((served, waits)):
        one.rank = (0, 1, -1.0, sequence)
        line.add(one, sequence, 1.0)
    served.status, served.first_token_s = RequestStatus.RUNNING, 1.0
    served.next_start, served.num_expected_tokens = 100, 101
    assert list(line.turns(4.9)) == []
    assert list(line.turns(5.0)) == [(served, front_rank(served)), (waits, front_rank(waits))]
    served.rank = front_rank(served)
    assert list(line.turns(5.1)) == [(waits, front_rank(waits))]  # until the scheduler could change its place
    waits.rank = front_rank(waits)
    assert list(line.turns(5.2)) == [] and len(line) == 1


def test_those_that_leave_are_forgotten_and_an_empty_line_too():
    order = SlackOrder(CONFIG, None)
    for index in range(300):
        one = request(f"r{index}", priority=index % 2, ttft_s=0.1)
        one.rank = order.rank(one, index, 1.0)
        one.finish_reason = "abort"
        order.ended(one)
    assert all(len(line._due) <= 64 for line in order._lines.values())
    assert list(order.due(2.0)) == [] and order._lines == {}


def test_a_run_whose_lead_has_left_is_led_by_the_first_of_the_others():
    first, second, third = (request(name) for name in ("first", "second", "third"))
    first.rank, second.rank, third.rank = (0, 0, 1.0, 1), (0, 0, 2.0, 2), (0, 0, 3.0, 3)
    run = PrefillRun(1, [first, second, third], (), StepShape(0, 0, 0), [], 0.0, (9,))
    assert run.lead is first
    first.finish_reason, third.rank = "abort", (0, 0, 1.5, 3)
    assert run.lead is third


def test_a_run_is_brought_to_the_front_with_its_lead():
    lead, member = request("lead", ttft_s=100.0), request("member", ttft_s=0.1)
    order = SlackOrder(CONFIG, None)
    for sequence, one in enumerate((lead, member)):
        one.rank = order.rank(one, sequence, 1.0)
    member.run = lead.run = PrefillRun(1, [lead, member], (), StepShape(0, 0, 0), [], 0.0, (9,))
    for one, rank in order.due(1.0):
        one.rank = rank
    assert (lead.rank, member.rank) == (front_rank(lead), front_rank(member))
    assert list(order.due(1000.0)) == [] and lead.rank[1] == 0  # nor does the lead's own deadline take it back
