"""What a plan holds, one rule a sentence, on tiny pools and without a model."""

import pytest

from scheduler import Arrival, Scheduler
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.fake_runner import STOP_TOKEN_ID
from tests.scheduler.tiny_requests import CONFIG, config_with, request, shares


def test_a_decode_is_planned_while_the_token_it_reads_is_in_flight():
    checked = CheckedScheduler(CONFIG)
    prefill, decode = checked.arrive(request("a"))
    assert shares(prefill) == {"a": (0, 6)}
    assert prefill.requests[0].samples
    assert shares(decode) == {"a": (6, 1)}
    assert decode.requests[0].samples
    assert checked.requests["a"].num_in_flight_tokens == 7
    checked.run_until_idle()
    checked.check_answers()


def test_with_one_plan_in_flight_nothing_is_planned_ahead():
    checked = CheckedScheduler(config_with(max_plans_in_flight=1))
    (plan,) = checked.arrive(request("a"))
    assert shares(plan) == {"a": (0, 6)}
    (plan,) = checked.land()
    assert shares(plan) == {"a": (6, 1)}


def test_decodes_come_first_and_prompts_are_cut_to_fill_the_budget():
    checked = CheckedScheduler(config_with(max_num_batched_tokens=8, max_plans_in_flight=1, num_pages=64))
    checked.arrive(request("a", 4, 8))
    checked.arrive(request("b", 20, 4, first=40))
    checked.arrive(request("c", 5, 4, first=80))
    (plan,) = checked.land()
    assert shares(plan) == {"a": (4, 1), "b": (0, 7)}
    (plan,) = checked.land()
    assert shares(plan) == {"a": (5, 1), "b": (7, 7)}
    (plan,) = checked.land()
    assert shares(plan) == {"a": (6, 1), "b": (14, 6), "c": (0, 1)}
    assert [scheduled.samples for scheduled in plan.requests] == [True, True, False]
    assert plan.num_tokens == 8


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
@pytest.mark.parametrize("max_prefill_chunk", [0, 3])
def test_budget_and_chunk_size_never_change_an_answer(budget, max_prefill_chunk):
    checked = CheckedScheduler(
        config_with(max_num_batched_tokens=budget, max_prefill_chunk=max_prefill_chunk, num_pages=64)
    )
    for index in range(6):
        checked.arrive(
            request(f"r{index}", 3 + 5 * index, 5, first=30 * (index % 2), stop_token_ids=frozenset([STOP_TOKEN_ID]))
        )
    checked.run_until_idle()
    checked.check_answers()
    if budget == 7 and not max_prefill_chunk:
        assert any(len(plan.requests) > 1 and plan.num_tokens == 7 for plan in checked.plans)


def test_requests_that_arrive_together_start_together():
    scheduler = Scheduler(config_with(max_num_batched_tokens=64))
    events = [Arrival(request(request_id, first=30 * index)) for index, request_id in enumerate("abc")]
    first, second = scheduler.on_events(events, 0.0)
    assert shares(first) == {"a": (0, 6), "b": (0, 6), "c": (0, 6)}
    assert shares(second) == {"a": (6, 1), "b": (6, 1), "c": (6, 1)}


def test_an_event_of_a_foreign_type_is_refused():
    with pytest.raises(TypeError, match="got event str"):
        Scheduler(CONFIG).on_event("arrival", 0.0)


def test_a_lower_priority_value_overtakes_the_queue_and_equals_keep_their_order():
    checked = CheckedScheduler(config_with(max_num_seqs=1, max_plans_in_flight=1))
    for index, (request_id, priority) in enumerate([("a", 0), ("b", 1), ("c", 1), ("d", 0)]):
        checked.arrive(request(request_id, 4, 1, first=10 * index, priority=priority, arrival_s=float(index)))
    order = []
    while checked.lanes[0]:
        order.extend(shares(checked.lanes[0][0]))
        checked.land()
    assert order == ["a", "d", "b", "c"]


def test_the_head_of_the_queue_is_not_overtaken_by_one_that_would_fit():
    checked = CheckedScheduler(
        config_with(num_pages=8, max_num_batched_tokens=64, max_plans_in_flight=1, watermark=0.0)
    )
    checked.arrive(request("a", 16, 4))
    checked.arrive(request("big", 20, 4, first=100))
    checked.arrive(request("small", 2, 2, first=200))
    (plan,) = checked.land()
    assert shares(plan) == {"a": (16, 1)}
    checked.run_until_idle()
    checked.check_answers()


def test_an_admission_leaves_the_watermark_to_those_who_run():
    fields = {"num_pages": 10, "max_num_batched_tokens": 64, "max_plans_in_flight": 1}
    for watermark, is_admitted in ((0.0, True), (0.3, False)):
        checked = CheckedScheduler(config_with(watermark=watermark, **fields))
        checked.arrive(request("a", 14, 6))  # 4 pages
        checked.arrive(request("b", 14, 2, first=100))  # 4 pages: 2 would be left
        (plan,) = checked.land()
        assert ("b" in shares(plan)) == is_admitted
        checked.run_until_idle()
        checked.check_answers()


def test_the_same_events_give_the_same_plans():
    def run():
        checked = CheckedScheduler(config_with(num_pages=12))
        for index in range(8):
            checked.arrive(request(f"r{index}", 5 + index, 6, first=index % 3))
        checked.abort("r5")
        checked.run_until_idle()
        return checked.plans

    assert run() == run()


def test_a_request_is_in_flight_on_one_lane_and_moves_only_when_it_has_landed():
    checked = CheckedScheduler(config_with(lane_shares=(0.6, 0.4), max_plans_in_flight=1))
    (plan,) = checked.arrive(request("a", 16, 6))
    assert (plan.lane, plan.share) == (0, 0.6)
    (plan,) = checked.arrive(request("b", 16, 6, first=50, arrival_s=1.0))
    assert (plan.lane, plan.share, set(shares(plan))) == (1, 0.4, {"b"})
    checked.land(1)
    checked.run_until_idle()
    checked.check_answers()
