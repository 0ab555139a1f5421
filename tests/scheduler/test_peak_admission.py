"""Admission by predicted peak of KV: against the future played step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.peak_admission import (
    FIRST_GUESS_TOKENS,
    HeldTokens,
    MeanDecodeLength,
    PeakAdmission,
    admits_by_peak,
    predicted_peak_tokens,
)
from scheduler.request import Request

HELD = st.lists(st.builds(HeldTokens, st.integers(1, 50), st.integers(1, 20)), max_size=8)


def played_peak(held: list[HeldTokens]) -> int:
    """Every step all that are left gain a token; who has generated what it was to gives its KV back after that step."""
    return max(
        (
            sum(num + t for num, remaining in held if remaining >= t)
            for t in range(1, max([r for _, r in held] + [0]) + 1)
        ),
        default=0,
    )


@given(HELD)
def test_the_peak_is_that_of_the_future_played_step_by_step(held):
    assert predicted_peak_tokens(held) == played_peak(held)


@given(HELD, st.builds(HeldTokens, st.integers(1, 50), st.integers(1, 20)), st.integers(1, 400))
def test_a_request_comes_in_when_the_peak_with_it_fits(held, candidate, num_kv_tokens):
    fits = played_peak([*held, candidate]) <= num_kv_tokens
    assert admits_by_peak(held, candidate, num_kv_tokens) == (fits or not held)
    # More room never keeps anybody out.
    assert admits_by_peak(held, candidate, num_kv_tokens + 1) or not admits_by_peak(held, candidate, num_kv_tokens)


def test_who_ends_early_makes_room_for_the_growth_of_the_rest():
    """70 tokens now, of which 50 are about to go: a sum of all that is held and will come would say 96."""
    held = [HeldTokens(50, 2), HeldTokens(20, 20)]
    assert predicted_peak_tokens(held) == 74
    assert admits_by_peak(held, HeldTokens(10, 4), 86) and not admits_by_peak(held, HeldTokens(11, 2), 86)


def test_what_remains_is_the_mean_less_what_is_there():
    peak = PeakAdmission(SchedulerConfig(num_pages=64, page_size=16))
    for _ in range(MeanDecodeLength.PRETENDED):  # as many as are pretended
        peak._mean.hear_finished(2 * 100 - FIRST_GUESS_TOKENS)
    assert peak._mean.tokens == 100

    def held(num_generated: int, max_tokens: int) -> HeldTokens:
        request = Request("r", range(7), max_tokens)
        request.output_token_ids.extend(range(num_generated))
        return peak.held_by([request])[0]

    assert held(30, 1000) == HeldTokens(7 + 30 + 15, 70)
    assert held(30, 50).num_remaining == 20
    assert held(130, 1000).num_remaining == 1


def test_the_mean_length_begins_with_a_guess():
    mean = MeanDecodeLength(100)
    assert mean.tokens == 100
    for _ in range(8):
        mean.hear_finished(300)
    assert mean.tokens == pytest.approx(200)
    with pytest.raises(ValueError, match="first_guess 0, wanted at least 1"):
        MeanDecodeLength(0)
