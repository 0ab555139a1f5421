"""How long the next step may take so that those who decode still keep their mean time per token.

TPOT is a mean over a request's life, so tokens that came early are a credit, and a step that takes long is a debt that later
steps can pay. A request that has n tokens since its first and will have at least L is in time if it is so at its L-th:

    elapsed + step + (L - n - 1) * decode step <= target * L

From L on it may end at any token, so there are no debts any more: the step must leave it in time at its next token. Nobody
knows L: it is what nine of ten of the requests that ended had at least. (With "at least h more from here", an end that moves
on with every token, debts were made anew before they were paid: half of the short answers of a code trace missed their
target.) A request that could not be in time even if every step to come were a decode step alone constrains nothing any more.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

from scheduler.request import Request

_NUM_LENGTHS = 256  # finished requests that are remembered
_QUANTILE = 0.1
_MOST_TOKENS = 64  # debts that take longer to pay are not made


class LeastTokens:
    """What nine of ten answers have at least, after their first token; 1 before anybody has ended."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque()
        self._sorted: list[int] = []
        self.bound = 1

    def add(self, num_tokens: int) -> None:
        """A request has ended after so many, the first among them."""
        if len(self._lengths) == _NUM_LENGTHS:
            oldest = self._lengths.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._lengths.append(num_tokens)
        insort(self._sorted, num_tokens)
        self.bound = min(max(self._sorted[int(_QUANTILE * len(self._sorted))] - 1, 1), _MOST_TOKENS)


def allowed_step_s(
    decodes: Iterable[Request], now: float, decode_step_s: float, least_tokens: int, margin: float = 1.0
) -> tuple[float | None, int]:
    """(the longest that the next step may take, requests that are too late). None: nobody who can be in time has a target.

    now: when the step begins. decode_step_s: of the same requests without a prompt beside them. margin: the part of a
    target that is planned for.
    """
    allowed, num_late = None, 0
    for request in decodes:
        target = request.tpot_s
        if target is None or request.first_token_s is None:
            continue
        num_tokens = len(request.output_token_ids) - 1  # after the first
        due = max(num_tokens + 1, min(least_tokens, request.max_tokens - 1))
        most = margin * target * due - (now - request.first_token_s) - (due - num_tokens - 1) * decode_step_s
        if most < decode_step_s:
            num_late += 1
        elif allowed is None or most < allowed:
            allowed = most
    return allowed, num_late
