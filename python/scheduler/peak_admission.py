"""Admission by predicted peak of KV (NanoFlow, arXiv 2408.12757, section 4.3).

Every request that runs grows by a token a step and ends some day, when all of its KV is free again. If each is taken to end
at the mean length of past answers, the future use of KV is known: it rises by the number of requests that run and falls
when one ends. A prompt is let in only if the highest point of that curve, with it, is within what there is; so the chip
is as full as it may be, and nobody has to give way later.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.request import Request

# Builds a named tuple from its fields in order, at half its constructor's price.
make_tuple = tuple.__new__

FIRST_GUESS_TOKENS = 256  # length of an answer, until answers have ended


class HeldTokens(NamedTuple):
    """A request's KV as it is and as it is going to be."""

    num_tokens: int  # that its KV holds now, its whole prompt included
    num_remaining: int  # that it is going to generate, at least 1


class MeanDecodeLength:
    """Mean length of the answers that ended. A few pretended ones begin it, so that the first real ones do not rule."""

    PRETENDED = 8

    def __init__(self, first_guess: int) -> None:
        if first_guess < 1:
            raise ValueError(f"MeanDecodeLength: got first_guess {first_guess}, wanted at least 1 token")
        self._num, self._sum = self.PRETENDED, self.PRETENDED * first_guess

    def hear_finished(self, num_output_tokens: int) -> None:
        self._num += 1
        self._sum += num_output_tokens

    @property
    def tokens(self) -> float:
        return self._sum / self._num


def predicted_peak_tokens(held: Iterable[HeldTokens]) -> int:
    """The most KV tokens that these requests hold at the same time from now on. Use is highest when one is about to end;
    after that many steps all who end later still hold what they have by then."""
    peak = sum_alive = 0
    latest_first = sorted(held, key=itemgetter(1), reverse=True)
    for num_alive, (num_tokens, num_remaining) in enumerate(latest_first, 1):
        sum_alive += num_tokens
        # Those that end at the same step are all alive then: the last of them gives the largest sum.
        sum_then = sum_alive + num_alive * num_remaining
        if sum_then > peak:
            peak = sum_then
    return peak


def admits_by_peak(held: Iterable[HeldTokens], candidate: HeldTokens, num_kv_tokens: int) -> bool:
    """Whether the candidate may begin beside those that run (prompts that are not done included), so that the predicted
    peak fits in num_kv_tokens. Alone it always may: nobody can make room for it."""
    running = list(held)
    return not running or predicted_peak_tokens([*running, candidate]) <= num_kv_tokens


class PeakAdmission:
    """The rule for one scheduler: it hears who ended and is asked who may begin. KV that requests share is counted for each
    of them, and a page per request for what its last one does not fill: it errs to the side of waiting."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._mean = MeanDecodeLength(FIRST_GUESS_TOKENS)
        self._page_size = config.page_size
        self._num_kv_tokens = config.num_pages // config.num_kv_groups * config.page_size
        self._refused: Request | None = None  # nobody ended since then

    def hear_finished(self, request: Request) -> None:
        if request.output_token_ids:
            self._mean.hear_finished(request.num_output_tokens)
        self._refused = None

    def hear_preempted(self) -> None:
        self._refused = None

    def admits(self, request: Request, held: list[HeldTokens]) -> bool:
        """held: of who holds KV or is about to, prompts that are not done included."""
        if request is self._refused:
            return False  # as time passes the predicted peak stays or, where answers outlive the mean, rises
        if admits_by_peak(held, *self.held_by([request]), self._num_kv_tokens):
            return True
        self._refused = request
        return False

    def held_by(self, requests: Iterable[Request]) -> list[HeldTokens]:
        """What remains is the mean less what is there, within what it may generate; 1 for who has outlived the mean."""
        mean_tokens, last_page = round(self._mean.tokens), self._page_size - 1
        held = []
        for request in requests:
            num_generated = len(request.output_token_ids)
            num_tokens, max_tokens = request.num_prompt_tokens + num_generated + last_page, request.max_tokens
            num_remaining = (max_tokens if max_tokens < mean_tokens else mean_tokens) - num_generated
            held.append(make_tuple(HeldTokens, (num_tokens, num_remaining if num_remaining > 1 else 1)))
        return held
