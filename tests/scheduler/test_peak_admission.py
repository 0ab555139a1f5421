"""Admission by predicted peak of KV: against the future played step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.peak_admission import (
    HeldTokens,
    MeanDecodeLength,
    admits_by_peak,
    predicted_peak_tokens,
    remaining_tokens,
)

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
    assert remaining_tokens(30, 1000, 100.4) == 70
    assert remaining_tokens(30, 50, 100.0) == 20
    assert remaining_tokens(130, 1000, 100.0) == 1
    mean = MeanDecodeLength(100)
    assert mean.tokens == 100
    for _ in range(8):
        mean.hear_finished(300)
    assert mean.tokens == pytest.approx(200)
    with pytest.raises(ValueError, match="first_guess 0, wanted at least 1"):
        MeanDecodeLength(0)
