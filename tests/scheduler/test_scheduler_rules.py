"""The scheduler's rules, one sentence each, on tiny pools and without a model."""

import dataclasses

import pytest

from scheduler import (
    AbortRequest,
    Arrival,
    LaneFinished,
    LaneResult,
    Request,
    RequestStatus,
    Scheduler,
    SchedulerConfig,
    Timer,
)
from scheduler.policy import Policy, policy_named, register_policy
from scheduler.queues import RunningList, WaitingQueue
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.fake_runner import STOP_TOKEN_ID, reference_output

CONFIG = SchedulerConfig(
    num_pages=16, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, min_copy_tokens=2
)


def config_with(**fields):
    return dataclasses.replace(CONFIG, **fields)


def request(request_id, num_prompt=6, max_tokens=4, first=10, **fields):
    """A request that no other shares a prefix with, if `first` differs; it never stops early unless told to."""
    return Request(request_id, [first + i for i in range(num_prompt)], max_tokens, **fields)


def shares(plan):
    return {scheduled.request_id: (scheduled.start, scheduled.num_tokens) for scheduled in plan.requests}


# Composition of a plan


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


# Ends


def test_length_is_foreseen_so_nothing_is_scheduled_beyond_it():
    checked = CheckedScheduler(CONFIG)
    checked.arrive(request("a", 6, 3))
    checked.run_until_idle()
    assert [shares(plan) for plan in checked.plans] == [{"a": (0, 6)}, {"a": (6, 1)}, {"a": (7, 1)}]
    assert checked.finish_reasons == {"a": "length"}


def test_what_a_later_plan_yields_for_an_ended_request_is_dropped_and_its_pages_wait_for_that_plan():
    config = config_with(enable_prefix_caching=False)
    scheduler = Scheduler(config)
    first, second = scheduler.on_event(Arrival(request("a", stop_token_ids=frozenset([7]))), 0.0)
    scheduler.on_event(LaneFinished(LaneResult(first.plan_id, 0, (("a", 7),))), 1.0)
    (output,) = scheduler.take_outputs()
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ((7,), "stop", 7)
    stats = scheduler.stats()
    assert (stats.num_draining, stats.num_free_pages) == (1, 14)
    assert scheduler.num_unfinished == 0
    assert not scheduler.is_idle
    scheduler.on_event(LaneFinished(LaneResult(second.plan_id, 0, (("a", 3),))), 2.0)
    assert scheduler.take_outputs() == []
    assert scheduler.stats().num_free_pages == 16
    assert scheduler.is_idle
    scheduler.check_integrity()


def test_a_row_is_not_reused_while_a_plan_in_flight_names_it():
    scheduler = Scheduler(config_with(max_num_seqs=1))
    first, second = scheduler.on_event(Arrival(request("a", stop_token_ids=frozenset([7]))), 0.0)
    scheduler.on_event(Arrival(request("b", first=50)), 0.0)
    assert scheduler.on_event(LaneFinished(LaneResult(first.plan_id, 0, (("a", 7),))), 1.0) == []
    plans = scheduler.on_event(LaneFinished(LaneResult(second.plan_id, 0, (("a", 1),))), 2.0)
    assert [shares(plan) for plan in plans] == [{"b": (0, 6)}, {"b": (6, 1)}]
    assert plans[0].requests[0].row == 0


def test_a_stop_id_before_min_tokens_does_not_end_a_request():
    scheduler = Scheduler(config_with(max_plans_in_flight=1))
    (plan,) = scheduler.on_event(Arrival(request("a", max_tokens=9, stop_token_ids=frozenset([7]), min_tokens=2)), 0.0)
    reasons = []
    while plan is not None:
        plans = scheduler.on_event(LaneFinished(LaneResult(plan.plan_id, 0, (("a", 7),))), 1.0)
        reasons += [output.finish_reason for output in scheduler.take_outputs()]
        plan = plans[0] if plans else None
    assert reasons == [None, None, "stop"]


@pytest.mark.parametrize("num_landed", [0, 1, 2, 3])
def test_an_abort_at_any_moment_answers_once_and_gives_everything_back(num_landed):
    checked = CheckedScheduler(config_with(max_num_batched_tokens=4))
    checked.arrive(request("a", 10, 4))
    checked.arrive(request("b", 10, 4, first=50))
    for _ in range(num_landed):
        checked.land()
    checked.abort("a", "client left")
    checked.abort("a", "again")
    checked.run_until_idle()
    checked.check_answers()
    assert checked.finish_reasons["a"] == "client left"
    assert checked.finish_reasons["b"] == "length"
    assert checked.scheduler.stats().num_live_pages == 0


def test_an_abort_of_a_queued_or_unknown_request_is_answered_or_ignored():
    checked = CheckedScheduler(config_with(max_num_seqs=1))
    checked.arrive(request("a"))
    checked.arrive(request("b", first=50))
    checked.abort("b")
    assert checked.finish_reasons == {"b": "abort"}
    assert checked.scheduler.stats().num_waiting == 0
    checked.send(AbortRequest("nobody"))
    checked.run_until_idle()
    checked.check_answers()


def test_a_request_id_may_be_used_again_after_its_end():
    checked = CheckedScheduler(CONFIG)
    checked.arrive(request("a"))
    with pytest.raises(ValueError, match="'a' is in use"):
        checked.scheduler.on_event(Arrival(request("a")), 0.0)
    checked.abort("a")
    scheduler = checked.scheduler
    checked.run_until_idle()
    (plan, _) = scheduler.on_event(Arrival(request("a")), 9.0)
    assert "a" in shares(plan)


def test_failures_end_one_request_with_its_reason_and_leave_the_others():
    scheduler = Scheduler(config_with(max_num_batched_tokens=64, max_plans_in_flight=1))
    (plan,) = scheduler.on_event(Arrival(request("before", 1, 1)), 0.0)
    for index, request_id in enumerate(["nan", "failed", "unnamed", "good"]):
        scheduler.on_event(Arrival(request(request_id, 6, 2, first=20 * index)), 0.0)
    (plan,) = scheduler.on_event(LaneFinished(LaneResult(plan.plan_id, 0, (("before", 1),))), 0.0)
    assert set(shares(plan)) == {"nan", "failed", "unnamed", "good"}
    scheduler.take_outputs()
    result = LaneResult(plan.plan_id, 0, (("nan", -1), ("good", 3)), failed=(("failed", "the device fell over"),))
    scheduler.on_event(LaneFinished(result), 1.0)
    outputs = {output.request_id: output for output in scheduler.take_outputs()}
    assert outputs["good"].token_ids == (3,)
    assert outputs["good"].finish_reason is None
    assert outputs["nan"].finish_reason == "error"
    assert "not finite" in outputs["nan"].error
    assert outputs["failed"].error == "the device fell over"
    assert "names no token" in outputs["unnamed"].error
    scheduler.check_integrity()


def test_a_result_out_of_turn_is_refused_and_changes_nothing():
    scheduler = Scheduler(CONFIG)
    first, second = scheduler.on_event(Arrival(request("a")), 0.0)
    for plan_id, lane in ((second.plan_id, 0), (99, 0), (first.plan_id, 1), (first.plan_id, -1)):
        with pytest.raises(ValueError, match=f"got plan {plan_id} of lane {lane}"):
            scheduler.on_event(LaneFinished(LaneResult(plan_id, lane)), 1.0)
    assert scheduler.num_plans_in_flight == 2
    assert scheduler.take_outputs() == []


# Refusals


def test_a_request_that_cannot_fit_even_alone_is_refused_with_both_numbers():
    checked = CheckedScheduler(config_with(num_pages=4))
    assert checked.arrive(request("big", 14, 4)) == []
    assert checked.finish_reasons["big"] == "error"
    assert "17 tokens (5 pages)" in checked.errors["big"]
    assert "16 tokens are available (4 pages)" in checked.errors["big"]
    checked.arrive(request("fits", 14, 3))  # its last token needs no KV
    checked.run_until_idle()
    checked.check_answers()
    assert checked.finish_reasons["fits"] == "length"


def test_a_request_beyond_the_context_is_refused_with_both_numbers():
    checked = CheckedScheduler(config_with(num_pages=64))
    checked.arrive(request("a", 60, 5))
    assert "65 tokens" in checked.errors["a"]
    assert "64" in checked.errors["a"]


def test_bad_requests_and_configurations_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match="empty prompt"):
        Request("a", (), 1)
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        Request("a", (1,), 0)
    with pytest.raises(ValueError, match="min_tokens: got -1"):
        Request("a", (1,), 1, min_tokens=-1)
    with pytest.raises(TypeError, match="prompt_token_ids: got str"):
        Request("a", "text", 1)
    for field, value in {
        "num_pages": 0,
        "page_size": 0,
        "max_num_seqs": 0,
        "max_num_batched_tokens": 0,
        "max_plans_in_flight": 0,
        "max_prefill_chunk": -1,
        "min_copy_tokens": 0,
        "watermark": 1.0,
        "kv_group_windows": (),
        "lane_shares": (0.0,),
    }.items():
        with pytest.raises(ValueError, match=f"SchedulerConfig.{field}: got"):
            config_with(**{field: value})
    with pytest.raises(ValueError, match=r"policy: got 'nobody', wanted one of .*default"):
        Scheduler(config_with(policy="nobody"))


# Pages


def test_new_pages_are_announced_once_and_only_when_needed():
    checked = CheckedScheduler(config_with(max_plans_in_flight=1, kv_group_windows=(0, 0)))
    checked.arrive(request("a", 6, 6))
    checked.run_until_idle()
    announced = [[len(pages) for pages in plan.requests[0].new_pages] for plan in checked.plans]
    assert announced == [[2, 2], [0, 0], [0, 0], [1, 1], [0, 0], [0, 0]]


def test_the_lowest_ranked_is_preempted_when_pages_run_out_and_still_answers_right():
    checked = CheckedScheduler(config_with(num_pages=8, max_num_batched_tokens=64, watermark=0.0))
    checked.arrive(request("first", 10, 14, arrival_s=0.0))
    checked.arrive(request("second", 10, 14, first=50, arrival_s=1.0))
    checked.run_until_idle()
    checked.check_answers()
    assert checked.requests["first"].num_preemptions == 0
    assert checked.requests["second"].num_preemptions >= 1
    assert checked.scheduler.stats().num_preemptions >= 1
    resumed = [plan.admissions for plan in checked.plans if any(a.request_id == "second" for a in plan.admissions)]
    assert len(resumed) >= 2
    assert len(resumed[-1][0].token_ids) > 10, "it resumes with what it generated"


def test_a_higher_priority_is_preempted_last_even_if_it_came_last():
    checked = CheckedScheduler(config_with(num_pages=8, max_num_batched_tokens=64, watermark=0.0))
    checked.arrive(request("late but low value", 10, 14, priority=-1, arrival_s=5.0))
    checked.arrive(request("early", 10, 14, first=50, priority=0, arrival_s=1.0))
    checked.run_until_idle()
    checked.check_answers()
    assert checked.requests["late but low value"].num_preemptions == 0


def test_a_token_in_flight_at_preemption_is_kept():
    checked = CheckedScheduler(
        config_with(num_pages=8, max_num_batched_tokens=64, watermark=0.0, enable_prefix_caching=False)
    )
    checked.arrive(request("first", 10, 14))
    checked.arrive(request("second", 10, 14, first=50, arrival_s=1.0))
    second = checked.requests["second"]
    while second.status is not RequestStatus.PREEMPTED:
        checked.land()
    num_outputs, num_in_flight = second.num_output_tokens, second.num_plans_in_flight
    assert num_in_flight >= 1
    for _ in range(num_in_flight):
        checked.land()
    assert second.num_output_tokens > num_outputs
    checked.run_until_idle()
    checked.check_answers()


def test_a_later_request_starts_at_the_cached_prefix_and_in_the_middle_of_a_copied_page():
    checked = CheckedScheduler(config_with(max_num_batched_tokens=64))
    checked.arrive(request("a", 12, 2))
    checked.run_until_idle()
    prompt = [10 + i for i in range(11)] + [99, 98]  # two full pages and three tokens of a's third page
    plan = checked.arrive(Request("b", prompt, 2))[0]
    assert shares(plan) == {"b": (11, 2)}
    (copy,) = plan.copies
    (reset,) = plan.resets
    assert reset.pages[0][2] == copy.target_page
    assert copy.source_page not in reset.pages[0]
    assert plan.admissions[0].num_computed_tokens == 11
    assert plan.admissions[0].token_ids == tuple(prompt)
    checked.run_until_idle()
    checked.check_answers()
    assert checked.runner.num_copies == 1
    stats = checked.scheduler.stats()
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (25, 11)


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation():
    checked = CheckedScheduler(config_with(max_num_batched_tokens=64, num_pages=32))
    first = request("turn 1", 6, 7)
    checked.arrive(first)
    checked.run_until_idle()
    history = [*first.prompt_token_ids, *first.output_token_ids]
    plan = checked.arrive(Request("turn 2", [*history, 77, 78], 3))[0]
    assert shares(plan) == {"turn 2": (12, 3)}
    checked.run_until_idle()
    checked.check_answers()


def test_the_copy_is_left_out_when_only_that_lets_a_lone_request_fit():
    checked = CheckedScheduler(config_with(num_pages=4, max_num_batched_tokens=64))
    checked.arrive(request("a", 8, 1))
    checked.run_until_idle()
    prompt = [10, 11, 12, 13, 14, 15, *range(90, 100)]
    (plan, *_) = checked.arrive(Request("b", prompt, 1))
    assert shares(plan) == {"b": (4, 12)}
    assert plan.copies == ()
    checked.run_until_idle()
    checked.check_answers()


def test_cached_pages_make_way_for_running_requests():
    checked = CheckedScheduler(config_with(num_pages=6, max_num_batched_tokens=64))
    for index in range(5):
        checked.arrive(request(f"r{index}", 16, 4, first=100 * index))
        checked.run_until_idle()
    checked.check_answers()
    stats = checked.scheduler.stats()
    assert stats.num_preemptions == 0
    assert stats.num_cached_pages > 0
    assert stats.kv_usage == 0.0


def test_after_a_reset_nothing_computed_before_is_found():
    checked = CheckedScheduler(config_with(max_num_batched_tokens=64, num_pages=32))
    checked.arrive(request("a", 12, 20))
    checked.land()
    checked.scheduler.reset_prefix_cache()
    checked.check()
    plan = checked.arrive(request("b", 12, 2)) + checked.land()
    assert shares(plan[0])["b"] == (0, 12)
    checked.run_until_idle()
    checked.check_answers()
    assert checked.scheduler.stats().num_prefix_hit_tokens == 0


def test_without_prefix_caching_a_windowed_group_gives_pages_back_as_the_window_moves():
    config = config_with(num_pages=7, kv_group_windows=(6,), enable_prefix_caching=False, max_num_batched_tokens=8)
    checked = CheckedScheduler(config)
    checked.arrive(request("a", 24, 24))  # 12 pages if nothing came back
    checked.run_until_idle()
    checked.check_answers()
    assert checked.finish_reasons["a"] == "length"
    assert checked.scheduler.stats().num_preemptions == 0


def test_with_prefix_caching_a_windowed_group_keeps_its_pages():
    checked = CheckedScheduler(config_with(num_pages=7, kv_group_windows=(6,), max_num_batched_tokens=8))
    checked.arrive(request("a", 24, 24))
    assert "12 pages" in checked.errors["a"]


def test_a_request_alone_whose_pages_have_cached_twins_recomputes_rather_than_hangs():
    checked = CheckedScheduler(config_with(num_pages=8, max_num_batched_tokens=64, watermark=0.0))
    checked.arrive(request("before", 1, 1, first=90))
    checked.arrive(request("before too", 1, 1, first=91))
    for request_id in ("a", "b"):  # admitted in one plan: both compute the same three pages, one of them publishes
        checked.arrive(request(request_id, 13, 2 if request_id == "a" else 19))
    checked.run_until_idle()
    checked.check_answers()
    assert checked.requests["b"].num_preemptions == 1


def test_a_trace_supplies_page_keys_and_no_token_values():
    checked = CheckedScheduler(config_with(max_num_batched_tokens=64, num_pages=64))
    checked.arrive(Request("a", range(14), 2, page_keys=(7, 8, 9)))
    checked.run_until_idle()
    plan = checked.arrive(Request("b", range(18), 2, page_keys=(7, 8, 5, 6)))[0]
    assert shares(plan) == {"b": (8, 10)}
    assert plan.copies == ()
    checked.run_until_idle()
    assert checked.scheduler.stats().num_prefix_hit_tokens == 8


# Lanes


def test_a_request_is_in_flight_on_one_lane_and_moves_only_when_it_has_landed():
    checked = CheckedScheduler(config_with(lane_shares=(0.6, 0.4), max_plans_in_flight=1))
    (plan,) = checked.arrive(request("a", 16, 6))
    assert (plan.lane, plan.share) == (0, 0.6)
    (plan,) = checked.arrive(request("b", 16, 6, first=50, arrival_s=1.0))
    assert (plan.lane, plan.share, set(shares(plan))) == (1, 0.4, {"b"})
    checked.land(1)
    checked.run_until_idle()
    checked.check_answers()


# Policies and queues


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
