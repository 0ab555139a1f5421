"""Policies as presets, timers, and the two queues."""

import pytest

from scheduler import Timer
from scheduler.policy import Policy, policy_named, register_policy
from scheduler.queues import RunningList, WaitingQueue
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.fake_runner import STOP_TOKEN_ID, reference_output
from tests.scheduler.tiny_requests import CONFIG, config_with, request, shares


def test_a_policy_is_a_preset_that_changes_one_decision():
    name = "shortest prompt first"
    register_policy(Policy(name, rank=lambda request, sequence: (request.num_prompt_tokens, sequence)))
    with pytest.raises(ValueError, match="exists already"):
        register_policy(Policy(name))
    assert policy_named("fcfs").rank is policy_named("default").rank
    checked = CheckedScheduler(config_with(policy=name, max_num_seqs=1, max_plans_in_flight=1))
    checked.arrive(request("running", 4, 1))
    checked.arrive(request("long", 12, 1, first=50))
    checked.arrive(request("short", 2, 1, first=90))
    (plan,) = checked.land()
    assert set(shares(plan)) == {"short"}


def test_a_timer_wakes_the_planner_without_changing_anything():
    checked = CheckedScheduler(CONFIG)
    assert checked.send(Timer("tick")) == []
    checked.arrive(request("a"))
    assert checked.wake() == []


def test_the_waiting_queue_skips_those_who_left_and_forgets_them():
    queue = WaitingQueue()
    requests = [request(f"r{index}") for index in range(300)]
    for index, entry in enumerate(requests):
        entry.rank = (index,)
        queue.push(entry)
    for entry in requests[:299]:
        queue.remove(entry)
    assert len(queue) == 1
    assert len(queue._heap) < 100
    assert queue.peek() is requests[299]
    assert queue.pop() is requests[299]
    assert queue.peek() is None
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


def test_the_running_list_is_in_rank_order():
    running = RunningList()
    entries = {}
    for value in (3, 1, 2):
        entries[value] = request(f"r{value}")
        entries[value].rank = (value,)
        running.add(entries[value])
    assert [entry.rank for entry in running] == [(1,), (2,), (3,)]
    assert running.ranked_below(entries[1]) == [entries[2], entries[3]]
    running.remove(entries[2])
    with pytest.raises(ValueError, match="not running"):
        running.remove(entries[2])


def test_the_reference_of_these_tests_ends_for_both_reasons():
    reasons = {
        reference_output(request(f"r{i}", 5, 12, first=i, stop_token_ids=frozenset([STOP_TOKEN_ID])))[1]
        for i in range(20)
    }
    assert reasons == {"stop", "length"}
