"""How long the next step may take so that those who decode still keep their mean time per token.

TPOT is a mean over a request's life, so tokens that came early are a credit, and a step that takes long is a debt that later
steps can pay. A request that has n tokens since its first and will have at least L is in time if it is so at its L-th:

    elapsed + step + (L - n - 1) * decode step <= target * L

From L on it may end at any token, so there are no debts any more: the step must leave it in time at its next token.
Nobody knows L: it is what nine of ten of the requests that ended had at least. (With "at least h more from here", an
end that moves on with every token, debts were made anew before they were paid, and short answers ended in debt.) A
request that could not be in time even if it became as long as half of those that ended, by steps of decodes alone and
without a margin, constrains nothing any more; one that could, but not with a prompt beside it, lets no prompt in.

n counts tokens that plans in flight sample, and the step begins when those plans have ended: who has just got its first
token, or is about to, has no credit yet.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

from scheduler.request import Request

_NUM_LENGTHS = 256  # finished requests that are remembered
_LEAST_QUANTILE = 0.1
_FIRST_GUESS_TOKENS = 32
_MOST_TOKENS = 64  # debts that take longer to pay are not made


class AnswerLengths:
    """Tokens of answers after their first: what nine of ten have at least, and what half of them have."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque()
        self._sorted: list[int] = []
        self.least = 1  # before anybody has ended
        self.typical = _FIRST_GUESS_TOKENS

    def add(self, num_tokens: int) -> None:
        """A request has ended after so many, the first among them."""
        if len(self._lengths) == _NUM_LENGTHS:
            oldest = self._lengths.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._lengths.append(num_tokens)
        insort(self._sorted, num_tokens)
        self.least = min(max(self._sorted[int(_LEAST_QUANTILE * len(self._sorted))] - 1, 1), _MOST_TOKENS)
        self.typical = max(self._sorted[len(self._sorted) // 2] - 1, 1)


def allowed_step_s(
    decodes: Iterable[Request], begin_s: float, decode_step_s: float, lengths: AnswerLengths, margin: float = 1.0
) -> float | None:
    """The longest that the next step may take; None: nobody who can be in time has a target.

    A request whose prompt is on its way in parts has no say. begin_s: when the step begins. decode_step_s: of the same
    requests without a prompt beside them. margin: the part of a target that is planned for.
    """
    allowed = None
    least, typical = lengths.least, max(lengths.least, lengths.typical)
    for request in decodes:
        asked_for = request.tpot_s
        if asked_for is None or request.run is not None:
            continue
        # After the first token; those in flight are there when the step begins.
        num_tokens = request.num_expected_tokens - request.num_prompt_tokens - 1
        if num_tokens < 0:
            continue  # its prompt is not done
        first_token_s = request.first_token_s
        elapsed = begin_s - first_token_s if first_token_s is not None else 0.0
        due = num_tokens + 1
        if due < least:  # and conditions for min and max: this loop is a fifth of a decision
            due = max(due, min(least, request.max_tokens - 1))
        most = asked_for * margin * due - elapsed - (due - num_tokens - 1) * decode_step_s
        if most < decode_step_s:
            due = max(num_tokens + 1, min(typical, request.max_tokens - 1))
            if asked_for * due - elapsed - (due - num_tokens - 1) * decode_step_s < decode_step_s:
                continue  # too late
            most = decode_step_s
        if allowed is None or most < allowed:
            allowed = most
    return allowed
