"""Requests that are drawn, not recorded: renewal arrivals of any burstiness, and ServeGen's clients. Call them simulated.

A renewal process has independent gaps; gamma distributed with shape 1 / CV^2 their coefficient of variation is CV: 1 is
Poisson, above it bursty (BurstGPT, arXiv 2401.17644).
"""

from __future__ import annotations

import csv
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from scheduler.simulator.traces import TraceRequest, open_text

WINDOW_S = 600.0  # ServeGen's rates hold for ten minutes
LENGTH_WINDOW_S = 6 * 3600.0  # and its lengths for six hours


def renewal(
    rate: float, num: int, *, cv: float = 1.0, lengths: Sequence[tuple[int, int]], seed: int = 0
) -> list[TraceRequest]:
    """num requests at `rate` per second; (prompt, output) lengths are drawn together from `lengths`."""
    if rate <= 0 or num < 1 or cv <= 0:
        raise ValueError(f"renewal: got rate {rate}, num {num}, cv {cv}, wanted all above 0")
    rng = random.Random(seed)
    shape = 1.0 / (cv * cv)
    now_s, requests = 0.0, []
    for _ in range(num):
        now_s += rng.gammavariate(shape, 1.0 / (shape * rate))
        num_prompt, num_output = rng.choice(lengths)
        requests.append(TraceRequest(now_s, num_prompt, num_output))
    return requests


def parse_renewal(text: str, seed: int = 0) -> list[TraceRequest]:
    """``poisson:rate=2,num=500,input=512,output=128,cv=1``; input and output may be ranges such as 64-1024 (log-uniform).
    Raises ValueError naming the part."""
    kind, _, rest = text.partition(":")
    fields = {"rate": "1", "num": "1000", "input": "512", "output": "128", "cv": "1"}
    for pair in filter(None, rest.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"--trace {kind}: got {pair!r}, wanted name=value of {', '.join(fields)}")
        fields[name] = value
    rng = random.Random(seed + 1)

    def draw(name: str) -> list[int]:
        low, dash, high = fields[name].partition("-")
        low_tokens, high_tokens = int(low), int(high) if dash else int(low)
        if not 1 <= low_tokens <= high_tokens:
            raise ValueError(f"--trace {kind}: {name}: got {fields[name]!r}, wanted tokens or a rising range")
        ratio = high_tokens / low_tokens
        return [round(low_tokens * ratio ** rng.random()) for _ in range(1024)]

    try:
        lengths = list(zip(draw("input"), draw("output"), strict=True))
        return renewal(
            float(fields["rate"]), int(fields["num"]), cv=float(fields["cv"]), lengths=lengths, seed=seed
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--trace {text}: {error}") from None


class ServeGenClients:
    """ServeGen's fitted clients (arXiv 2505.09999): each has a rate and a gap distribution per ten minutes, and quantiles
    of its lengths per six hours. `rates` is a *_rates.csv[.gz]; its *_lengths file must lie beside it."""

    def __init__(self, rates: Path) -> None:
        lengths = rates.with_name(rates.name.replace("_rates", "_lengths"))
        if lengths == rates or not lengths.is_file():
            raise ValueError(f"{rates}: wanted a name with _rates and the _lengths file beside it")
        self._windows: list[tuple[float, str, float, str, float]] = []  # (start, client, rate, dist, shape)
        with open_text(rates) as file:
            for row in csv.DictReader(file):
                window = (float(row["timestamp_s"]), row["client_id"], float(row["rate_rps"]), row["dist"])
                self._windows.append((*window, float(row["param1"])))
        # client -> field -> [(window start, [(probability, tokens)])]
        self._quantiles: dict[str, dict[str, list[tuple[float, list[tuple[float, float]]]]]] = defaultdict(dict)
        with open_text(lengths) as file:
            for row in csv.DictReader(file):
                points = [(float(name[1:]) / 100.0, float(row[name])) for name in row if name[0] == "p"]
                by_field = self._quantiles[row["client_id"]]
                by_field.setdefault(row["field"], []).append((float(row["window_start_s"]), points))
        for by_field in self._quantiles.values():
            for windows in by_field.values():
                windows.sort(key=lambda window: window[0])

    @staticmethod
    def is_rates_file(path: Path) -> bool:
        with open_text(path) as file:
            return file.readline().startswith("client_id,timestamp_s,rate_rps")

    def total_rate(self, start_s: float, duration_s: float) -> float:
        """Requests per second of all clients together, on average over the slice."""
        total = 0.0
        for window_s, _, rate, _, _ in self._windows:
            overlap_s = min(window_s + WINDOW_S, start_s + duration_s) - max(window_s, start_s)
            total += rate * max(0.0, overlap_s)
        return total / duration_s

    def draw(
        self, start_s: float, duration_s: float, *, rate: float | None = None, seed: int = 0
    ) -> list[TraceRequest]:
        """Requests of the slice. rate: of all clients together; every client's is scaled alike, its bursts kept."""
        scale = 1.0
        if rate is not None:
            total = self.total_rate(start_s, duration_s)
            if total <= 0:
                raise ValueError(f"ServeGen: nobody is active from {start_s:g} s for {duration_s:g} s")
            scale = rate / total
        rng, requests = random.Random(seed), []
        for window_s, client, client_rate, dist, shape in self._windows:
            if window_s + WINDOW_S <= start_s or window_s >= start_s + duration_s:
                continue
            for arrival_s in self._arrivals(rng, client_rate * scale, dist, shape):
                at_s = window_s + arrival_s
                if start_s <= at_s < start_s + duration_s:
                    num_prompt = self._length(rng, client, "input_tokens", at_s)
                    num_output = self._length(rng, client, "output_tokens", at_s)
                    requests.append(TraceRequest(at_s - start_s, num_prompt, num_output, user=f"client {client}"))
        requests.sort(key=lambda request: request.arrival_s)
        return requests

    @staticmethod
    def _arrivals(rng: random.Random, rate: float, dist: str, shape: float) -> list[float]:
        """Within a window; gaps of the client's distribution, stretched so that the window holds its rate."""
        expected = rate * WINDOW_S
        num = int(expected) + (rng.random() < expected - int(expected))
        if num == 0:
            return []
        draw = rng.gammavariate if dist == "Gamma" else lambda shape, scale: rng.weibullvariate(scale, shape)
        gaps = [draw(shape, 1.0) for _ in range(num + 1)]
        total, now, arrivals = sum(gaps) or 1.0, 0.0, []
        offset = rng.random()  # a window begins anywhere within a gap
        for gap in gaps[:num]:
            now += gap
            arrivals.append((now / total + offset) % 1.0 * WINDOW_S)
        return sorted(arrivals)

    def _length(self, rng: random.Random, client: str, field: str, at_s: float) -> int:
        windows = self._quantiles[client][field]
        index = max(0, bisect_right(windows, at_s, key=lambda window: window[0]) - 1)
        points, p = windows[index][1], rng.random()
        high = bisect_right(points, p, key=lambda point: point[0])
        if high >= len(points):
            return max(1, round(points[-1][1]))
        (p0, low_tokens), (p1, high_tokens) = points[high - 1], points[high]
        return max(1, round(low_tokens + (high_tokens - low_tokens) * (p - p0) / (p1 - p0)))
