"""Percentiles and the JSON file: what every benchmark ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as NumPy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of the values themselves (not of a sample)."""
    centre = mean(values)
    return math.sqrt(mean([(value - centre) ** 2 for value in values]))


def parse_percentiles(text: str) -> list[float]:
    """``"50,99"`` -> [50.0, 99.0]. Raises ValueError."""
    percents = [float(part) for part in text.split(",") if part.strip()]
    if not percents or any(not 0 <= percent <= 100 for percent in percents):
        raise ValueError(f"percentiles must be numbers from 0 to 100 separated by commas, got {text!r}")
    return percents


def percent_key(percent: float) -> str:
    """99.0 -> "99", 99.9 -> "99.9"."""
    return str(int(percent)) if percent == int(percent) else str(percent)


def write_json(path: str, result: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
