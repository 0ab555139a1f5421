"""semi-PD's reactive controller (arXiv 2504.19867): what was observed decides how far the border moves.

Every WINDOW decisions it looks at the TTFTs and TPOTs of that window, each divided by its request's own target, at a
percentile. Both above 1: keep, there is no room. Both within: keep. Else the side that fails gets more of the chip, rung by
rung, until the fitted curve says that it will pass:

    TTFT(x) = a1 / (x - load) + b1     an M/M/1 queue whose service rate is in proportion to x
    TPOT(y) = a2 / y + b2

load is the share of the chip that prompts need, arrivals/s x seconds of one prompt on the whole chip. Shares may overlap: x
and y are then estimated by their part of the sum. Requests without targets are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from scheduler.arrangement import Arrangement
from scheduler.config import SchedulerConfig
from scheduler.controllers.rungs import ladder, nearest
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


class SemiPd:
    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None = None) -> None:
        """cost_model is not asked: everything is learned from what is observed."""
        self._ladder = ladder(config)
        self._granularity = config.prefill or "token"
        self._prefill_place = nearest(self._ladder, START[0])
        self._decode_place = nearest(self._ladder, START[1])
        self._num_decisions = 0
        self._window_start_s: float | None = None
        self._ttfts: list[float] = []  # of the window, divided by their targets
        self._tpots: list[float] = []
        self._prompt_s: list[float] = []  # seconds of a prompt times the share it had
        self._num_prompts = 0
        self._ttft_curve = InverseCurve()
        self._tpot_curve = InverseCurve()
        self._load = 0.0
        self._arrangement = self._arranged("at start")

    @property
    def shares(self) -> tuple[float, float]:
        return self._ladder[self._prefill_place], self._ladder[self._decode_place]

    def arrange(self, outlook: Outlook) -> Arrangement:
        if self._window_start_s is None:
            self._window_start_s = outlook.now
        self._num_decisions += 1
        if self._num_decisions >= WINDOW:
            self._look(outlook.now)
        return self._arrangement

    def hear_first_token(self, request: Request, now: float) -> None:
        self._num_prompts += 1
        if request.first_scheduled_s is not None:
            self._prompt_s.append((now - request.first_scheduled_s) * self._parts()[0])
        if request.ttft_s is not None:
            self._ttfts.append((now - request.arrival_s) / request.ttft_s)

    def hear_finished(self, request: Request, now: float) -> None:
        if request.tpot_s is not None and request.first_token_s is not None and request.num_output_tokens > 1:
            tpot_s = (now - request.first_token_s) / (request.num_output_tokens - 1)
            self._tpots.append(tpot_s / request.tpot_s)

    def _parts(self, prefill_place: int | None = None, decode_place: int | None = None) -> tuple[float, float]:
        """What each lane really has when both are busy."""
        x = self._ladder[self._prefill_place if prefill_place is None else prefill_place]
        y = self._ladder[self._decode_place if decode_place is None else decode_place]
        return (x / (x + y), y / (x + y)) if x + y > 1.0 else (x, y)

    def _look(self, now: float) -> None:
        if len(self._ttfts) + len(self._tpots) < MIN_SAMPLES:
            return  # the window goes on until it says something
        seconds = now - self._window_start_s
        if self._prompt_s and seconds > 0.0:
            self._load = self._num_prompts / seconds * (sum(self._prompt_s) / len(self._prompt_s))
        ttft = quantile(self._ttfts, PERCENTILE) if self._ttfts else 0.0
        tpot = quantile(self._tpots, PERCENTILE) if self._tpots else 0.0
        x, y = self._parts()
        self._ttft_curve.forget()
        self._tpot_curve.forget()
        if self._ttfts:
            self._ttft_curve.add(self._room(x), ttft)
        if self._tpots:
            self._tpot_curve.add(y, tpot)
        text = f"TTFT {ttft:.2f}, TPOT {tpot:.2f} of target"
        if (ttft > 1.0) != (tpot > 1.0):
            text += self._move_prefill() if ttft > 1.0 else self._move_decode()
        else:
            text += ", both fail: keep" if ttft > 1.0 else ", both pass: keep"
        self._arrangement = self._arranged(text)
        self._ttfts, self._tpots, self._prompt_s, self._num_prompts = [], [], [], 0
        self._num_decisions, self._window_start_s = 0, now

    def _room(self, x: float) -> float:
        return max(x - self._load, _LEAST_ROOM)

    def _move_prefill(self) -> str:
        places = self._moved(
            self._prefill_place, self._decode_place, lambda p, d: self._ttft_curve.at(self._room(self._parts(p, d)[0]))
        )
        self._prefill_place, self._decode_place = places
        return ", prefill gets more"

    def _move_decode(self) -> str:
        places = self._moved(
            self._decode_place, self._prefill_place, lambda d, p: self._tpot_curve.at(self._parts(p, d)[1])
        )
        self._decode_place, self._prefill_place = places
        return ", decode gets more"

    def _moved(self, own: int, other: int, estimate: Callable[[int, int], float]) -> tuple[int, int]:
        """The failing side is raised rung by rung; at the whole chip the other side is lowered instead."""
        top = len(self._ladder) - 1
        for _ in range(MAX_STEPS):
            if estimate(own, other) <= 1.0:
                break
            if own < top:
                own += 1
            elif other > 0:
                other -= 1
            else:
                break
        return own, other

    def _arranged(self, reason: str) -> Arrangement:
        prefill, decode = self.shares
        return Arrangement(prefill, decode, self._granularity, reason=f"semi-PD: {reason}")
