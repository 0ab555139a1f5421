"""Whether nano-batches pay on this machine, found out on live steps: where they don't, they are not used.

The cost model's word is enough to try, not to go on. Of the first steps of a kind that the search would cut, every other
one is run as one batch; then the two are compared in seconds per token. Cutting must be at least 3 % better, else steps of
this kind stay whole. The question is asked again rarely, and ever more rarely while the answer stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from statistics import median
from typing import Any

TRIAL_STEPS = 8  # of a kind, half of them cut
REQUIRED_GAIN = 0.03  # of seconds per token
RETRY_STEPS = 2000  # of a kind, before the first repetition; then twice as many each time, up to:
MAX_RETRY_STEPS = 64_000
# Steps are planned a few ahead of their results. After so many without any result nobody measures, as in a simulation.
MAX_UNANSWERED_STEPS = 2 * TRIAL_STEPS


class _Kind:
    """What is known of one kind of steps."""

    __slots__ = ("cut_s", "gain", "is_measured", "num_asked", "num_since", "retry_after", "uses_nano", "whole_s")

    def __init__(self) -> None:
        self.whole_s: list[float] = []  # seconds per token, of this trial or the last
        self.cut_s: list[float] = []
        self.num_asked = 0  # in this trial
        self.num_since = 0  # steps since it was decided
        self.retry_after = 0  # 0: there was no trial yet
        self.uses_nano: bool | None = None  # None: on trial
        self.is_measured = False  # uses_nano is a trial's result, not the cost model's word
        self.gain = 0.0  # measured

    def begin(self) -> None:
        self.whole_s, self.cut_s = [], []
        self.num_asked = 0
        self.uses_nano, self.is_measured = None, False


class NanoTrial:
    """Deterministic given what it is asked and told, in order."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}

    def chooses_nano(self, kind: Hashable) -> bool:
        """Whether the next step of this kind, which could be cut, shall be."""
        state = self._kinds.setdefault(kind, _Kind())
        if state.uses_nano is not None:
            state.num_since += 1
            if not state.is_measured or state.num_since <= state.retry_after:
                return state.uses_nano
            state.begin()
        state.num_asked += 1
        if state.num_asked > MAX_UNANSWERED_STEPS and not (state.whole_s or state.cut_s):
            state.uses_nano = True  # nobody measures: the cost model's word stands
            return True
        # The first of a pair is whole: the first steps of a run are slow, and cutting must not win by that.
        return state.num_asked % 2 == 0

    def observe(self, kind: Hashable, is_nano: bool, num_tokens: int, seconds: float) -> None:
        """A step of this kind took so long. Steps of kinds that nobody asked for are not kept."""
        state = self._kinds.get(kind)
        if state is None or state.is_measured or num_tokens < 1 or seconds <= 0.0:
            return
        if state.uses_nano is not None:
            state.begin()  # the model's word was taken while nobody measured; now somebody does
        (state.cut_s if is_nano else state.whole_s).append(seconds / num_tokens)
        if min(len(state.whole_s), len(state.cut_s)) * 2 >= TRIAL_STEPS:
            _decide(state)

    def verdict(self, kind: Hashable) -> bool | None:
        """Whether steps of this kind are cut; None: not decided."""
        state = self._kinds.get(kind)
        return state.uses_nano if state is not None else None

    def describe(self, kind_words: Callable[[Any], str] = str) -> list[str]:
        """One line per kind that was tried, in the order of the first try. kind_words: how to name a kind."""
        return [f"{kind_words(kind)}: {_words(state)}" for kind, state in self._kinds.items()]


def _decide(state: _Kind) -> None:
    # Medians: one step that something else delayed says nothing.
    before, state.gain = state.gain, 1.0 - median(state.cut_s) / median(state.whole_s)
    state.uses_nano, state.is_measured = state.gain >= REQUIRED_GAIN, True
    state.num_since = 0
    is_same = state.retry_after > 0 and (before >= REQUIRED_GAIN) == state.uses_nano
    state.retry_after = min(2 * state.retry_after, MAX_RETRY_STEPS) if is_same else RETRY_STEPS


def _words(state: _Kind) -> str:
    if state.uses_nano is None:
        return f"on trial, {len(state.cut_s)} steps cut and {len(state.whole_s)} whole"
    if not state.is_measured:
        return "cut, as predicted: nothing was measured"
    cut_us, whole_us = median(state.cut_s) * 1e6, median(state.whole_s) * 1e6
    return (
        f"{'cut' if state.uses_nano else 'whole'}: {cut_us:.1f} us per token cut, {whole_us:.1f} whole "
        f"({state.gain:+.1%}, wanted {REQUIRED_GAIN:+.0%})"
    )
