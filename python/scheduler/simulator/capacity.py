"""How much a machine can take: the highest rate at which enough requests keep their targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scheduler.simulator.report import Report


class Capacity(NamedTuple):
    rate: float  # requests/s, the highest tried that was kept; 0: not even the lowest
    report: Report | None  # of that rate
    tried: list[tuple[float, float]]  # (rate, attainment), in the order of the search


def find_max_rate(
    run: Callable[[float], Report], *, attainment: float = 0.9, first_rate: float = 1.0, precision: float = 0.03,
    max_rate: float = 1e6,
) -> Capacity:  # fmt: skip
    """Doubles or halves from first_rate to a bracket, then bisects to a relative precision. Attainment is taken to fall
    with the rate; where it does not strictly, the answer is one crossing."""
    tried: list[tuple[float, float]] = []
    best: Report | None = None

    def is_kept(rate: float) -> bool:
        nonlocal best
        report = run(rate)
        tried.append((rate, report.attainment))
        kept = report.attainment >= attainment
        if kept:
            best = report
        return kept

    low, high = 0.0, first_rate
    if is_kept(first_rate):
        low, high = first_rate, 2 * first_rate
        while high < max_rate and is_kept(high):
            low, high = high, 2 * high
        if high >= max_rate:
            return Capacity(low, best, tried)
    else:
        for _ in range(12):
            if is_kept(high / 2):
                low = high / 2
                break
            high /= 2
        else:
            return Capacity(0.0, None, tried)
    while high / low - 1.0 > precision:
        middle = (low * high) ** 0.5
        if is_kept(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, best, tried)
