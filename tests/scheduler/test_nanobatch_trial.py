"""Nano-batches are used where measurement says that they pay, and nowhere else."""

from __future__ import annotations

import pytest

from scheduler.nanobatch_trial import MAX_UNANSWERED_STEPS, RETRY_STEPS, TRIAL_STEPS, NanoTrial


def run(trial: NanoTrial, num_steps: int, whole_s: float, cut_s: float, kind: str = "k", delay: int = 0) -> list[bool]:
    """Steps of 100 tokens; results arrive `delay` steps late, as plans queue ahead. What was chosen."""
    chosen: list[bool] = []
    for i in range(num_steps + delay):
        if i < num_steps:
            chosen.append(trial.chooses_nano(kind))
        if i >= delay:
            is_cut = chosen[i - delay]
            trial.observe(kind, is_cut, 100, cut_s if is_cut else whole_s)
    return chosen


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_the_first_steps_alternate_and_then_the_better_way_is_kept(delay):
    for cut_s, wanted in ((0.9, True), (0.98, False), (1.0, False), (1.5, False)):
        trial = NanoTrial()
        chosen = run(trial, 200, 1.0, cut_s, delay=delay)
        assert chosen[:TRIAL_STEPS] == [False, True] * (TRIAL_STEPS // 2)
        assert set(chosen[TRIAL_STEPS + delay :]) == {wanted}
        assert trial.verdict("k") is wanted
        (line,) = trial.describe()
        assert line.startswith(f"k: {'cut' if wanted else 'whole'}: {cut_s * 1e4:.1f} us per token cut, 10000.0 whole")


def test_one_step_that_was_delayed_decides_nothing():
    trial = NanoTrial()
    for i in range(TRIAL_STEPS):
        is_cut = trial.chooses_nano("k")
        trial.observe("k", is_cut, 100, 9.0 if i == 1 else 0.8 if is_cut else 1.0)
    assert trial.verdict("k") is True


def test_tokens_are_what_steps_are_compared_by():
    trial = NanoTrial()
    for _ in range(TRIAL_STEPS):
        is_cut = trial.chooses_nano("k")
        trial.observe("k", is_cut, 200 if is_cut else 100, 1.8 if is_cut else 1.0)
    assert trial.verdict("k") is True


def test_kinds_are_apart_and_unknown_ones_are_not_kept():
    trial = NanoTrial()
    run(trial, 20, 1.0, 0.5, "pays")
    run(trial, 20, 1.0, 2.0, "loses")
    trial.observe("never asked", True, 100, 1.0)
    assert trial.verdict("pays") is True and trial.verdict("loses") is False and trial.verdict("never asked") is None
    assert len(trial.describe()) == 2


def test_it_is_tried_again_rarely_and_ever_more_rarely():
    trial = NanoTrial()
    chosen = run(trial, 8 * RETRY_STEPS, 1.0, 1.2)
    tries = [i for i, is_cut in enumerate(chosen) if is_cut]
    half = TRIAL_STEPS // 2
    assert len(tries) == 4 * half
    for i, times in enumerate((1, 2, 4), 1):
        gap = tries[i * half] - tries[i * half - 1]
        assert times * RETRY_STEPS <= gap <= times * RETRY_STEPS + 3


def test_a_machine_that_changed_is_noticed_at_the_next_try():
    trial = NanoTrial()
    assert not any(run(trial, RETRY_STEPS, 1.0, 1.2)[TRIAL_STEPS:])
    assert all(run(trial, 4 * TRIAL_STEPS, 1.0, 0.8)[3 * TRIAL_STEPS :])


def test_where_nobody_measures_the_cost_model_is_believed():
    trial = NanoTrial()
    chosen = [trial.chooses_nano("k") for _ in range(100)]
    assert all(chosen[MAX_UNANSWERED_STEPS:])
    assert trial.describe() == ["k: cut, as predicted: nothing was measured"]
    assert run(trial, 100, 1.0, 1.2)[-1] is False  # until somebody does
