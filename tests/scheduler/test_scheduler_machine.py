"""Any sequence of events keeps the invariants, and each invariant's check fails when its mechanism is switched off."""

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler import Request, RequestStatus, SchedulerConfig
from scheduler.composed_pages import ComposedPages
from scheduler.composer import Composer
from scheduler.lane_planner import LanePlanner
from scheduler.prefill_run import RunTable
from scheduler.prefix_cache import PrefixCache
from scheduler.request_lives import RequestLives
from scheduler.request_pages import RequestPages
from scheduler.run_lives import RunLives
from scheduler.scheduler import Scheduler
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.chosen_arrangement import ARRANGEMENTS, ChosenArrangement
from tests.scheduler.fake_runner import STOP_TOKEN_ID, VOCAB_SIZE
from tests.scheduler.random_walk import LAYER_STARTS, NODES, TPOT_TARGETS_S, tiny_cost_model, walk

POLICIES = ("default", "prefill-first", "fastgen")
SYSTEMS = ("layered", "flowprefill", "two-lanes", "semi-pd", "nexus", "arbitrate")
# Lanes without roles are (policy, number of lanes, "", ""); roles (policy, 1, lanes, prefill).
WAYS = (
    *((policy, num_lanes, "", "") for policy in POLICIES for num_lanes in (1, 2)),
    *((policy, 1, "", "") for policy in SYSTEMS),
    *(("default", 1, lanes, prefill) for lanes in ("off", "50:50", "100:100") for prefill in ("layer", "operator")),
    *(("chosen-arrangement", 1, "", ""), ("chosen-order", 1, "", "")) * 6,
)
STEMS = ([1, 2, 3, 4, 0, 6, 1, 1, 2, 0, 3, 3, 4, 6, 2, 1, 0, 1, 2, 6] * 2, [6, 6, 1, 0, 2, 4, 3, 1] * 5)


class SchedulerMachine(RuleBasedStateMachine):
    """CheckedScheduler checks pages, rows, budgets, positions and KV contents at every event it passes on."""

    @initialize(
        windows=st.sampled_from([(0,), (0, 6), (5,)]),
        num_pages=st.integers(5, 24),
        max_num_seqs=st.integers(1, 4),
        budget=st.sampled_from([1, 4, 7, 32]),
        max_prefill_chunk=st.sampled_from([0, 5]),
        max_plans_in_flight=st.integers(1, 3),
        has_cache=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        way=st.sampled_from(WAYS),
        max_resting_runs=st.integers(1, 3),
    )
    def start(
        self,
        windows,
        num_pages,
        max_num_seqs,
        budget,
        max_prefill_chunk,
        max_plans_in_flight,
        has_cache,
        watermark,
        way,
        max_resting_runs,
    ):
        policy, num_lanes, lanes, prefill = way
        config = SchedulerConfig(
            num_pages=num_pages * len(windows),
            page_size=4,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=48,
            max_prefill_chunk=max_prefill_chunk,
            max_plans_in_flight=max_plans_in_flight,
            kv_group_windows=windows,
            enable_prefix_caching=has_cache,
            min_copy_tokens=2,
            watermark=watermark,
            lane_shares=(1.0 / num_lanes,) * num_lanes,
            policy=policy,
            lanes=lanes,
            prefill=prefill,
            num_nodes=len(NODES),
            layer_starts=LAYER_STARTS,
            max_resting_runs=max_resting_runs,
        )
        self.checked = CheckedScheduler(config, Scheduler(config, tiny_cost_model()))

    @rule(
        stem=st.sampled_from(STEMS),
        num_shared=st.integers(0, 30),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
        max_tokens=st.integers(1, 16),
        stops=st.booleans(),
        min_tokens=st.integers(0, 2),
        tpot_s=st.sampled_from(TPOT_TARGETS_S),
        priority=st.integers(-1, 1),
        namespace=st.sampled_from(["", "adapter"]),
    )
    def arrive(self, stem, num_shared, own, max_tokens, stops, min_tokens, tpot_s, priority, namespace):
        self.checked.arrive(
            Request(
                f"r{len(self.checked.requests)}",
                stem[:num_shared] + own,
                max_tokens,
                frozenset([STOP_TOKEN_ID]) if stops else frozenset(),
                min_tokens=min_tokens,
                priority=priority,
                arrival_s=self.checked.now,
                namespace=namespace,
                tpot_s=tpot_s,
            )
        )

    @precondition(lambda self: isinstance(self.checked.scheduler._controller, ChosenArrangement))
    @rule(arrangement=st.sampled_from(ARRANGEMENTS))
    def rearrange(self, arrangement):
        self.checked.scheduler._controller.arrangement = arrangement

    @precondition(lambda self: self.checked.scheduler.num_plans_in_flight)
    @rule(lane=st.integers(0, 1), num_results=st.integers(1, 4), stop_at=st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    def land(self, lane, num_results, stop_at):
        """stop_at: where those stop that were paused."""
        for _ in range(num_results):
            busy = self.checked.busy_lanes()
            if busy:
                self.checked.land(busy[lane % len(busy)], stop_at)

    @precondition(lambda self: self.checked.scheduler.num_plans_in_flight)
    @rule(lane=st.integers(0, 1))
    def fail(self, lane):
        busy = self.checked.busy_lanes()
        self.checked.land(busy[lane % len(busy)], error="the device fell over")

    @precondition(lambda self: self.checked.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.checked.abort(data.draw(st.sampled_from(sorted(self.checked.requests))))

    @rule()
    def reset_prefix_cache(self):
        self.checked.scheduler.reset_prefix_cache()

    @invariant()
    def everything_holds(self):
        if hasattr(self, "checked"):
            self.checked.check()

    def teardown(self):
        if hasattr(self, "checked"):
            self.checked.run_until_idle()
            self.checked.check_answers()
            assert self.checked.scheduler.stats().num_live_pages == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("policy", POLICIES[1:] + SYSTEMS)
def test_random_lives_under_every_policy(policy):
    lives = [walk(seed, policy=policy) for seed in range(25)]
    assert sum(life.scheduler.stats().num_preemptions for life in lives) > 10


@pytest.mark.parametrize("seed", range(40))
def test_random_lives_end_with_the_right_answers_and_all_pages_back(seed):
    walk(seed)


RESTLESS = {
    "policy": "chosen-order", "max_resting_runs": 3, "max_num_seqs": 5, "num_pages": 40, "kv_group_windows": (0,),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_pauses_that_come_before_anything_was_done_keep_nobody_from_ending(seed):
    walk(seed, stop_at=0.0, **RESTLESS)


SHORT_OF_PAGES = {
    "policy": "flowprefill", "prefill": "token", "num_pages": 8, "kv_group_windows": (0,), "max_num_seqs": 3,
    "max_num_batched_tokens": 7,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_a_decode_without_a_page_does_not_keep_those_that_rank_before_it(seed):
    walk(seed, **SHORT_OF_PAGES)


def test_the_random_lives_meet_what_they_are_meant_to_meet():
    lives = [walk(seed) for seed in range(40)]
    assert sum(life.scheduler.stats().num_preemptions for life in lives) > 20
    assert sum(life.runner.num_copies for life in lives) > 20
    assert sum(life.scheduler.stats().num_prefix_hit_tokens for life in lives) > 200
    assert sum(life.num_stops for life in lives) > 10
    assert sum(life.num_drops for life in lives) > 5
    assert sum(life.num_failures for life in lives) > 5
    assert sum(life.scheduler.stats().num_moves for life in lives) > 100
    parts = [plan for life in lives for plan in life.plans if plan.continues]
    assert {plan.lane for plan in parts} == {0, 1}
    reasons = {reason for life in lives for reason in life.finish_reasons.values()}
    assert reasons == {"stop", "length", "abort", "error"}


# Ablations: what each mechanism is for. The walk must fail without it.


def _release_pages_at_once(self, request):
    pages = self._pages
    for table, num_released in zip(request.pages, request.num_window_released, strict=True):
        pages._pool.release(table[num_released:])
    request.pages = [[] for _ in request.pages]
    if request.cache_node is not None:
        pages._cache.unlock(request.cache_node)
        request.cache_node, request.publish_at = None, 1 << 60
    self.draining.add(request)
    if request.num_plans_in_flight == 0:
        self.drained(request)


def _release_row_at_once(self, request):
    self.draining.add(request)
    self.drained(request)


def _publish_in_flight_pages(self, request):
    request.num_computed_tokens = min(request.next_start, request.num_known_tokens)
    publish(self, request)


def _release_window_a_page_early(self, request):
    for group, _window in self._windows:
        first_needed = (request.num_computed_tokens + self.page_size) // self.page_size
        num_released = request.num_window_released[group]
        if num_released < first_needed <= len(request.pages[group]):
            self._pool.release(request.pages[group][num_released:first_needed])
            request.num_window_released[group] = first_needed


def _pending_prefills_in_runs_too(self, lane):
    runs = [(request, request.run) for request in self._running]
    for request, _ in runs:
        request.run = None
    try:
        return pending_prefills(self, lane)
    finally:
        for request, run in runs:
            request.run = run


def _first_of_all(self):
    return min(self, key=lambda run: run.lead.rank, default=None)


def _land_as_ended(self, run, plan, result, now):
    return land_part(self, run, plan, replace(result, cursor=None), now)


def _drop_as_computed(self, run):
    progress = [(request, request.next_start, request.num_expected_tokens) for request in run.requests]
    drop(self, run)
    for request, next_start, num_expected_tokens in progress:
        if request.status is RequestStatus.RUNNING:
            request.next_start, request.num_expected_tokens = next_start, num_expected_tokens


def _end_forgetting_copies(self, run):
    end_run(self, run)
    run.copy_sources = []


def _pause_for_who_cannot_begin(self):
    arrangement = self.arrangement
    self.arrangement = replace(arrangement, granularity="operator")
    try:
        return run_to_pause(self)
    finally:
        self.arrangement = arrangement


def _compose_by_rank_while_all_have_pages(self, prefills, composition, *rest):
    if not (composition.has_stalled or composition.has_preempted):
        compose_by_rank(self, prefills, composition, *rest)


run_to_pause, compose_by_rank = LanePlanner.run_to_pause, Composer._compose_by_rank
publish, make_room, pending_prefills = RequestPages.publish, ComposedPages._make_room, Composer._pending_prefills
land_part, drop, end_run = RunLives.land_part, RunLives.drop, RunLives._end

ABLATIONS = {
    "pages wait for plans in flight": mock.patch.object(RequestLives, "_drain", _release_pages_at_once),
    "rows wait for plans in flight": mock.patch.object(RequestLives, "_drain", _release_row_at_once),
    "a copied page is really copied": mock.patch.object(
        RequestPages,
        "copy_matched_part",
        lambda self, request, source: self.extend(request, request.page_capacity + 1) and [],
    ),
    "a copy's source is held": mock.patch.multiple(
        RequestPages,
        _hold_source=lambda self, node: None,
        release_source=lambda self, node: None,
        check_integrity=lambda self, holders: None,
    ),
    "namespaces are part of the key": mock.patch.object(
        PrefixCache, "_key", lambda self, request, page_idx, tokens: tokens if page_idx else ("", tokens)
    ),
    "only final pages are published": mock.patch.object(RequestPages, "publish", _publish_in_flight_pages),
    "windows are kept whole": mock.patch.object(RequestPages, "release_outside_windows", _release_window_a_page_early),
    "preemption makes room": mock.patch.object(ComposedPages, "_make_room", return_value=False),
    "a lone request gives up its twins": mock.patch.object(
        ComposedPages,
        "_make_room",
        lambda self, request, *rest: bool(self._running.ranked_below(request)) and make_room(self, request, *rest),
    ),
    "what a run holds is in no other plan": mock.patch.object(
        Composer, "_pending_prefills", _pending_prefills_in_runs_too
    ),
    "a part waits for the result of the one before": mock.patch.multiple(
        RunTable, first_resting=_first_of_all, in_flight=lambda self: None
    ),
    "a part begins where its run rests": mock.patch.object(RunLives, "land_part", _land_as_ended),
    "what a dropped run computed is forgotten": mock.patch.object(RunLives, "drop", _drop_as_computed),
    "who ranks first goes on while others lack pages": mock.patch.object(
        Composer, "_compose_by_rank", _compose_by_rank_while_all_have_pages
    ),
    "a run stops only for who can begin": mock.patch.object(LanePlanner, "run_to_pause", _pause_for_who_cannot_begin),
    "a dropped run's copies are not trusted": mock.patch.object(RunLives, "_end", _end_forgetting_copies),
}


@pytest.mark.parametrize("mechanism", ABLATIONS)
def test_the_checks_fail_when_a_mechanism_is_switched_off(mechanism):
    overrides = {}
    if mechanism == "windows are kept whole":
        overrides = {"kv_group_windows": (5,), "enable_prefix_caching": False}
    if mechanism == "a lone request gives up its twins":
        overrides = {"num_pages": 12, "kv_group_windows": (0,), "enable_prefix_caching": True, "watermark": 0.0}
    if mechanism == "a dropped run's copies are not trusted":
        overrides = {
            "lanes": "50:50", "prefill": "operator", "num_pages": 16, "kv_group_windows": (0,), "min_copy_tokens": 1,
            "max_num_batched_tokens": 64, "max_num_seqs": 5, "enable_prefix_caching": True, "max_prefill_chunk": 0,
            "watermark": 0.0,
        }  # fmt: skip

    if mechanism == "who ranks first goes on while others lack pages":
        overrides = SHORT_OF_PAGES
    if mechanism == "a run stops only for who can begin":
        overrides = {"stop_at": 0.0, **RESTLESS}

    def live():
        for seed in range(200):
            walk(seed, **overrides)

    with ABLATIONS[mechanism], pytest.raises((AssertionError, ValueError, IndexError)):
        live()
