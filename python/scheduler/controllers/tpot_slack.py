"""How long the next step may take so that those who decode still keep their mean time per token.

TPOT is a mean over a request's life, so tokens that came early are a credit, and a step that takes long is a debt that later
steps can pay. A request that has n tokens since its first and expects at least h more is in time if

    elapsed + step + (h - 1) * decode step <= target * (n + h)

so the step may take target * (n + h) - elapsed - (h - 1) * decode step. Nobody knows h: it is what all but a quarter of the
requests that got as far turned out to say more (an empirical bound; lengths of requests that ended, the latest count).
A request that could not be in time even if every step to come were a decode step alone constrains nothing any more.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

from scheduler.request import Request

_NUM_LENGTHS = 256  # finished requests that are remembered
_FIRST_GUESS_TOKENS = 16  # to come, before anybody has ended
_LEAST_HORIZON_TOKENS = 4
_MOST_HORIZON_TOKENS = 128  # debts that take longer to pay are not made


class RemainingTokens:
    """At least so many tokens will follow, for three quarters of the requests that got as far."""

    def __init__(self, quantile: float = 0.25) -> None:
        self._quantile = quantile
        self._lengths: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, num_tokens: int) -> None:
        """A request has ended after so many."""
        if len(self._lengths) == _NUM_LENGTHS:
            oldest = self._lengths.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._lengths.append(num_tokens)
        insort(self._sorted, num_tokens)

    def after(self, num_tokens: int) -> int:
        if not self._sorted:
            return _FIRST_GUESS_TOKENS
        longer = bisect_right(self._sorted, num_tokens)
        num_longer = len(self._sorted) - longer
        if num_longer == 0:
            return _LEAST_HORIZON_TOKENS
        bound = self._sorted[longer + int(self._quantile * num_longer)] - num_tokens
        return min(max(bound, _LEAST_HORIZON_TOKENS), _MOST_HORIZON_TOKENS)


def allowed_step_s(
    decodes: Iterable[Request], now: float, decode_step_s: float, remaining: RemainingTokens
) -> tuple[float | None, int]:
    """(the longest that the next step may take, requests that are too late). None: nobody who can be in time has a target.

    now: when the step begins. decode_step_s: of the same requests without a prompt beside them.
    """
    allowed, num_late = None, 0
    horizons: dict[int, int] = {}
    for request in decodes:
        target = request.tpot_s
        if target is None or request.first_token_s is None:
            continue
        num_tokens = len(request.output_token_ids) - 1  # after the first
        horizon = horizons.get(num_tokens)
        if horizon is None:
            horizon = horizons[num_tokens] = remaining.after(num_tokens + 1)
        left = request.max_tokens - num_tokens - 1
        if left < horizon:
            horizon = max(left, 1)
        elapsed = now - request.first_token_s
        # With a horizon of its own each request would promise the same steps to come to nobody else: the credit of all
        # is spent on the one step that is decided now, and next time counted anew.
        most = target * (num_tokens + horizon) - elapsed - (horizon - 1) * decode_step_s
        if most < decode_step_s:
            num_late += 1
            continue
        if allowed is None or most < allowed:
            allowed = most
    return allowed, num_late
