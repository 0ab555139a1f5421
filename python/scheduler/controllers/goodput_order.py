"""S-EDF in which long prompts stand back: the order of the arbitration rule.

Earliest deadline first keeps every deadline as long as all can be kept; beyond that it makes all late, one after the
other. Shortest first keeps the most, but makes long prompts late where nobody had to be. Between the two lies deadline +
WORK_WEIGHT * predicted seconds, which needs no guess of the load: while the queue is short the order hardly matters, and
when it grows a second of work has to be worth the waiting of others. Hopeless prompts come last, as in S-EDF.

Tried in simulation and lost: Moore and Hodgson's algorithm (give up the longest as soon as somebody would be late) on the
queue at its observed pace; whom it gives up it gives up late, when serving them is a waste.
"""

from __future__ import annotations

from scheduler.controllers.slack_order import SlackOrder
from scheduler.request import Request

WORK_WEIGHT = 2.0  # seconds of deadline for a second of work; 8 kept more in overload, and fewer just below it


class GoodputOrder(SlackOrder):
    """A PrefillOrder."""

    def rank(self, request: Request, sequence: int, now: float) -> tuple:
        priority, is_hopeless, place_s, number = super().rank(request, sequence, now)
        if not is_hopeless:
            place_s += WORK_WEIGHT * self._predictor.prompt_s(request.num_prompt_tokens)
        return (priority, is_hopeless, place_s, number)
