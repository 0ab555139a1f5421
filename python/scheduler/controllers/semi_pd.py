"""semi-PD's reactive controller (arXiv 2504.19867): what was observed decides how far the border moves.

Every WINDOW decisions it looks at the TTFTs and TPOTs of that window, each divided by its request's own target, at a
percentile. Both above 1: keep, there is no room. Both within: keep. Else the side that fails gets more of the chip, rung by
rung, until the fitted curve says that it will pass:

    TTFT(x) = a1 / (x - load) + b1     an M/M/1 queue whose service rate is in proportion to x
    TPOT(y) = a2 / y + b2

load is the share of the chip that prompts need, arrivals/s x seconds of one prompt on the whole chip. Requests without
targets are not looked at.

Where the chip has several cuts, as green contexts give them, the border moves along them. Where it has one, as two cores
have, the lanes overlap, as the authors' MPS processes do: x and y are then estimated by their part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from scheduler.arrangement import Arrangement
from scheduler.config import SchedulerConfig
from scheduler.controllers.rungs import cuts, nearest
from scheduler.cost_model import CostModel
from scheduler.outlook import Outlook
from scheduler.request import Request

WINDOW = 200  # decisions between two looks
PERCENTILE = 0.9
MAX_STEPS = 3  # rungs that one look moves at most
MIN_SAMPLES = 4  # of a window: fewer say nothing
FORGETTING = 0.8  # weight of the last window's points when the next one's come
START = (0.8, 1.0)  # shares of prefill and decode, the default of the authors' code
_LEAST_ROOM = 0.02  # a queue is never fuller than this leaves


class InverseCurve:
    """y = a / u + b by least squares with forgetting, a and b not negative. One abscissa alone: b = 0."""

    def __init__(self) -> None:
        self._weight = self._sum_v = self._sum_vv = self._sum_y = self._sum_vy = 0.0

    def add(self, u: float, y: float) -> None:
        v = 1.0 / u
        self._weight += 1.0
        self._sum_v += v
        self._sum_vv += v * v
        self._sum_y += y
        self._sum_vy += v * y

    def forget(self) -> None:
        self._weight *= FORGETTING
        self._sum_v *= FORGETTING
        self._sum_vv *= FORGETTING
        self._sum_y *= FORGETTING
        self._sum_vy *= FORGETTING

    def coefficients(self) -> tuple[float, float]:
        """(a, b). Raises ValueError before the first point."""
        if self._weight <= 0.0:
            raise ValueError("InverseCurve: no point was added, wanted at least one")
        spread = self._weight * self._sum_vv - self._sum_v * self._sum_v
        if spread > 1e-9 * self._weight * self._sum_vv:
            a = (self._weight * self._sum_vy - self._sum_v * self._sum_y) / spread
            b = (self._sum_y - a * self._sum_v) / self._weight
            if a > 0.0 and b >= 0.0:
                return a, b
        return self._sum_vy / self._sum_vv, 0.0

    def at(self, u: float) -> float:
        a, b = self.coefficients()
        return a / u + b


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def share_pairs(config: SchedulerConfig) -> tuple[tuple[float, float], ...]:
    """Shares of prefill and decode, from the most for decode to the most for prefill."""
    if len(cuts(config)) > 1:
        return tuple((share, 1.0 - share) for share in cuts(config))
    share = cuts(config)[0]
    return ((share, 1.0), (1.0, 1.0), (1.0, share))


class SemiPd:
    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None = None) -> None:
        """cost_model is not asked: everything is learned from what is observed."""
        self._pairs = share_pairs(config)
        self._granularity = config.prefill or "token"
        parts = [x / (x + y) for x, y in self._pairs]
        self._place = nearest(parts, START[0] / sum(START))
        self._num_decisions = 0
        self._window_start_s: float | None = None
        self._ttfts: list[float] = []  # of the window, divided by their targets
        self._tpots: list[float] = []
        self._prompt_s: list[float] = []  # seconds of a prompt times the share it had
        self._num_prompts = 0
        self._wants_tpot = False
        self._ttft_curve = InverseCurve()
        self._tpot_curve = InverseCurve()
        self._load = 0.0
        self._arrangement = self._arranged("at start")

    @property
    def shares(self) -> tuple[float, float]:
        """Of prefill and decode."""
        return self._pairs[self._place]

    def arrange(self, outlook: Outlook) -> Arrangement:
        if self._window_start_s is None:
            self._window_start_s = outlook.now
        self._num_decisions += 1
        if self._num_decisions >= WINDOW:
            self._look(outlook.now)
        return self._arrangement

    def hear_first_token(self, request: Request, now: float) -> None:
        self._num_prompts += 1
        self._wants_tpot = self._wants_tpot or request.tpot_s is not None
        if request.first_scheduled_s is not None:
            self._prompt_s.append((now - request.first_scheduled_s) * self._parts(self._place)[0])
        if request.ttft_s is not None:
            self._ttfts.append((now - request.arrival_s) / request.ttft_s)

    def hear_finished(self, request: Request, now: float) -> None:
        if request.tpot_s is not None and request.first_token_s is not None and request.num_output_tokens > 1:
            tpot_s = (now - request.first_token_s) / (request.num_output_tokens - 1)
            self._tpots.append(tpot_s / request.tpot_s)

    def _parts(self, place: int) -> tuple[float, float]:
        """What each lane really has when both are busy."""
        x, y = self._pairs[place]
        return (x / (x + y), y / (x + y)) if x + y > 1.0 else (x, y)

    def _look(self, now: float) -> None:
        num_looked_at = len(self._ttfts) + len(self._tpots)
        if num_looked_at < MIN_SAMPLES or (self._wants_tpot and len(self._tpots) < MIN_SAMPLES):
            return  # the window goes on until it says something of both
        seconds = now - self._window_start_s
        if self._prompt_s and seconds > 0.0:
            self._load = self._num_prompts / seconds * (sum(self._prompt_s) / len(self._prompt_s))
        ttft = quantile(self._ttfts, PERCENTILE) if self._ttfts else 0.0
        tpot = quantile(self._tpots, PERCENTILE) if self._tpots else 0.0
        x, y = self._parts(self._place)
        self._ttft_curve.forget()
        self._tpot_curve.forget()
        if self._ttfts:
            self._ttft_curve.add(self._room(x), ttft)
        if self._tpots:
            self._tpot_curve.add(y, tpot)
        text = f"TTFT {ttft:.2f}, TPOT {tpot:.2f} of target"
        if (ttft > 1.0) != (tpot > 1.0):
            if ttft > 1.0:
                self._place = self._moved(+1, lambda x: self._ttft_curve.at(self._room(x)), 0)
            else:
                self._place = self._moved(-1, self._tpot_curve.at, 1)
            text += ": more for prefill" if ttft > 1.0 else ": more for decode"
        else:
            text += ", both fail: keep" if ttft > 1.0 else ", both pass: keep"
        self._arrangement = self._arranged(text)
        self._ttfts, self._tpots, self._prompt_s, self._num_prompts = [], [], [], 0
        self._wants_tpot = False
        self._num_decisions, self._window_start_s = 0, now

    def _room(self, part: float) -> float:
        return max(part - self._load, _LEAST_ROOM)

    def _moved(self, step: int, estimate: Callable[[float], float], side: int) -> int:
        """The place at which the failing side's estimate passes, at most MAX_STEPS from here."""
        place = self._place
        for _ in range(MAX_STEPS):
            if not 0 <= place + step < len(self._pairs) or estimate(self._parts(place)[side]) <= 1.0:
                break
            place += step
        return place

    def _arranged(self, reason: str) -> Arrangement:
        prefill, decode = self.shares
        return Arrangement(prefill, decode, self._granularity, reason=f"semi-PD: {reason}")
