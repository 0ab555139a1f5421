"""Nexus's proactive controller (arXiv 2507.06608): the border is where the cost model says, before the steps are run.

While KV use is below HIGH_WATER prompts are to be fast: the largest prefill share at which a step of decodes, slowed by
the prompts' traffic, takes at most BETA times what it takes on the whole chip. Above it decodes are to be fast, because
only they give pages back: the largest decode share at which prompts take at most ALPHA times what they take on the whole
chip. The search goes along the ladder from where the border is, so it usually asks for two to four shares. A border that
would move by less than `delta` stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.arrangement import DECODE_LANE, Arrangement
from scheduler.config import SchedulerConfig
from scheduler.controllers.rungs import cuts, nearest
from scheduler.cost_model import CostModel
from scheduler.outlook import Outlook
from scheduler.request import Request
from scheduler.step_shape import StepShape

ALPHA, BETA = 1.3, 1.1  # how much slower than on the whole chip prompts, or decodes, may get
HIGH_WATER = 0.7  # of KV
DELTA = 0.1  # of the chip; the paper names the threshold but not its value
AGEING_TOKENS_PER_S = 15.0  # the paper's gamma: so many tokens shorter per second of waiting
_MOST_PROMPTS = 32  # of a batch that is looked at
_NOTHING = StepShape(0, 0, 0)


def shortest_then_aged(request: Request, sequence: int) -> tuple:
    """Shortest prompt first, less AGEING_TOKENS_PER_S for every second it has waited. All that wait age alike, so instead of
    the age, which moves, the arrival counts, which does not: remaining - gamma * (now - arrival) orders as remaining + gamma
    * arrival."""
    length = request.num_prompt_tokens + AGEING_TOKENS_PER_S * request.arrival_s
    return (request.priority, length, sequence)


def adjust(num_places: int, place: int, keeps: Callable[[int], bool]) -> int:
    """The last place whose predecessors all keep the other side's slack (`keeps` is true up to some place and false from
    there on), searched from `place`; 0 when none does. So few places are asked as lie between start and answer, and one."""
    if keeps(place):
        while place + 1 < num_places and keeps(place + 1):
            place += 1
        return place
    while place > 0:
        place -= 1
        if keeps(place):
            break
    return place


def prefill_batch(outlook: Outlook, most: int) -> StepShape:
    """What the prefill lane would run next: pending prompts in rank order, cut to `most` tokens."""
    window = outlook.cost_model.window if outlook.cost_model is not None else 0
    shape, left = _NOTHING, most
    for request in outlook.prefills(_MOST_PROMPTS):
        count = min(request.num_expected_tokens - request.next_start, left)
        shape = shape.plus_chunk(request.next_start, count, window)
        left -= count
        if left <= 0:
            break
    return shape


class Nexus:
    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None, *, delta: float = DELTA) -> None:
        """Without a cost model the border stays in the middle. delta: shares; 0 moves at every change of mind."""
        self._config = config
        self._model = cost_model
        self._delta = delta
        self._cuts: Sequence[float] = cuts(config)
        self._granularity = config.prefill or "token"
        self._applied = nearest(self._cuts, 0.5)
        self._place = self._applied  # where the last search ended
        self._asked_for: tuple[StepShape, StepShape, bool] | None = None
        self.num_evaluations = 0  # shares that were priced, since the start
        self.num_searches = 0

    def arrange(self, outlook: Outlook) -> Arrangement:
        mode = "no model"
        if self._model is not None:
            mode = self._search(outlook)
        share = self._cuts[self._applied]
        return Arrangement(share, 1.0 - share, self._granularity, reason=f"Nexus: {mode}")

    def hear_first_token(self, request: Request, now: float) -> None:
        pass

    def hear_finished(self, request: Request, now: float) -> None:
        pass

    def _search(self, outlook: Outlook) -> str:
        decodes = outlook.decodes(DECODE_LANE).shape
        is_full = outlook.kv_usage >= HIGH_WATER
        prompts = self._prompts(outlook)
        mode = "KV is full, decode first" if is_full else "prefill first"
        if decodes.num_tokens == 0 or prompts.num_tokens == 0:
            return mode  # the lane that has something to do has the whole chip
        asked_for = (decodes, prompts, is_full)
        if asked_for != self._asked_for:
            self._asked_for = asked_for
            self._place = self.best_cut(decodes, prompts, is_full)
            if abs(self._cuts[self._place] - self._cuts[self._applied]) >= self._delta - 1e-9:
                self._applied = self._place
        return mode

    def _prompts(self, outlook: Outlook) -> StepShape:
        shape = prefill_batch(outlook, self._config.max_num_batched_tokens)
        if shape.num_tokens:
            return shape
        run = outlook.runs.in_flight() or outlook.runs.first_resting()
        return run.shape if run is not None else shape

    def best_cut(self, decodes: StepShape, prompts: StepShape, is_full: bool) -> int:
        """The place in the ladder of prefill shares."""
        self.num_searches += 1
        last = len(self._cuts) - 1
        limit_s = BETA * self._model.step_s(decodes)
        most = adjust(
            last + 1, self._place, lambda place: self.decode_s(decodes, prompts, self._cuts[place]) <= limit_s
        )
        if is_full:  # along the ladder of decode shares, which is the other way round
            slack_s = ALPHA * self.prefill_s(prompts, 1.0)
            place = adjust(
                last + 1,
                last - self._place,
                lambda place: self.prefill_s(prompts, self._cuts[last - place]) <= slack_s,
            )
            # On a machine that prompts do not saturate ALPHA leaves decodes less than BETA would: no more than that.
            return min(last - place, most)
        return most

    def prefill_s(self, prompts: StepShape, share: float) -> float:
        """As if it had the bandwidth to itself, which breaks the circle."""
        self.num_evaluations += 1
        return self._model.step_s(prompts, share)

    def decode_s(self, decodes: StepShape, prompts: StepShape, prefill_share: float) -> float:
        """Beside prompts that have prefill_share of the chip."""
        self.num_evaluations += 1
        other = self._model.step_cost(prompts, prefill_share).demand_bytes_per_s
        return self._model.step_cost(decodes, 1.0 - prefill_share).duration_s(other)
