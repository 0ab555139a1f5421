"""Pages given, taken back, shared and copied, one rule a sentence, on tiny pools."""

from scheduler import Request, RequestStatus
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.tiny_requests import config_with, request, shares


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
