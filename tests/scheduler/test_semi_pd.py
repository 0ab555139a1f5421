"""semi-PD's curves and step rule, told what was observed."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.controllers.semi_pd import MAX_STEPS, WINDOW, InverseCurve, SemiPd, quantile
from scheduler.request import Request

RUNGS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@given(st.floats(0.05, 5.0), st.floats(0.0, 2.0), st.lists(st.floats(0.05, 1.0), min_size=2, max_size=8, unique=True))
def test_the_curve_is_found_from_points_that_lie_on_it(a, b, abscissas):
    curve = InverseCurve()
    for u in abscissas:
        curve.add(u, a / u + b)
    if max(abscissas) - min(abscissas) > 0.05:
        assert curve.coefficients() == pytest.approx((a, b), rel=1e-3, abs=1e-3)


def test_one_abscissa_is_a_curve_through_the_origin_and_none_is_an_error():
    curve = InverseCurve()
    with pytest.raises(ValueError, match="no point"):
        curve.coefficients()
    curve.add(0.5, 2.0)
    curve.add(0.5, 4.0)
    assert curve.at(1.0) == pytest.approx(1.5)


def test_old_windows_are_forgotten():
    curve = InverseCurve()
    curve.add(0.5, 10.0)
    for _ in range(40):
        curve.forget()
        curve.add(0.5, 1.0)
    assert curve.at(0.5) == pytest.approx(1.0, rel=0.01)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_the_smallest_value_that_so_many_do_not_exceed(values, share):
    found = quantile(values, share)
    assert found in values and sum(value <= found for value in values) >= share * len(values) - 1e-9
    smaller = [value for value in values if value < found]
    assert len(smaller) < share * len(values)


def config(rungs=RUNGS) -> SchedulerConfig:
    return SchedulerConfig(num_pages=64, rungs=rungs, lanes="auto")


def observe(controller: SemiPd, ttft: float, tpot: float, start_s: float, num: int = 20) -> float:
    """A window of requests whose latencies are so many times their targets; decisions on the way."""
    now = start_s
    for index in range(num):
        one = Request(f"r{start_s}{index}", (1, 2), 20, arrival_s=now, ttft_s=1.0, tpot_s=0.1)
        one.first_scheduled_s = now + 0.9 * ttft
        one.first_token_s = now + ttft
        one.output_token_ids = [1] * 11
        controller.hear_first_token(one, one.first_token_s)
        controller.hear_finished(one, one.first_token_s + 10 * 0.1 * tpot)
        now += 1.0
    for _ in range(WINDOW):
        controller.arrange(SimpleNamespace(now=now))
    return now


def test_it_starts_as_the_authors_code_does_and_with_two_cores_overlaps():
    assert SemiPd(config()).shares == (0.5, 0.5)  # 80:100 by its parts, 44:56, at the nearest cut
    assert SemiPd(config(rungs=(0.5,))).shares == (1.0, 1.0)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_both_pass_or_both_fail_keep(factor):
    controller = SemiPd(config())
    now, before = 0.0, controller.shares
    for _ in range(5):
        now = observe(controller, factor, factor, now)
    assert controller.shares == before


@pytest.mark.parametrize(("ttft", "tpot"), [(1.6, 0.5), (0.5, 1.6)])
def test_the_side_that_fails_gets_more_and_no_faster_than_max_steps(ttft, tpot):
    controller = SemiPd(config())
    before = controller.shares
    observe(controller, ttft, tpot, 0.0)
    x, y = controller.shares
    part_before, part = before[0] / sum(before), x / (x + y)
    assert part > part_before if ttft > 1 else part < part_before
    assert abs(RUNGS.index(before[0]) - RUNGS.index(x)) <= MAX_STEPS


def test_a_near_miss_moves_less_than_a_wide_one():
    near, wide = SemiPd(config()), SemiPd(config())
    observe(near, 0.5, 1.05, 0.0)
    observe(wide, 0.5, 4.0, 0.0)
    assert near.shares[0] / near.shares[1] > wide.shares[0] / wide.shares[1]


def test_requests_without_targets_move_nothing():
    controller = SemiPd(config())
    before = controller.shares
    for index in range(50):
        one = Request(f"r{index}", (1, 2), 20)
        one.first_scheduled_s, one.first_token_s, one.output_token_ids = 0.0, 100.0, [1] * 5
        controller.hear_first_token(one, 100.0)
        controller.hear_finished(one, 1000.0)
    for _ in range(3 * WINDOW):
        controller.arrange(SimpleNamespace(now=1000.0))
    assert controller.shares == before
