"""How requests end, are aborted, fail and are refused, one rule a sentence, on tiny pools."""

import pytest

from scheduler import AbortRequest, Arrival, LaneFinished, LaneResult, Request, Scheduler
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.tiny_requests import CONFIG, config_with, request, shares


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
