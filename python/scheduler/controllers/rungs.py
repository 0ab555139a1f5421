"""The shares of the chip that a controller may give a lane."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.config import SchedulerConfig

HALF = (0.5,)  # what a machine offers that says nothing: two cores are one and one


def cuts(config: SchedulerConfig) -> tuple[float, ...]:
    """Shares of the prefill lane where the decode lane has the rest, ascending."""
    return config.rungs or HALF


def nearest(shares: Sequence[float], share: float) -> int:
    """The place of the nearest share; of two the smaller."""
    return min(range(len(shares)), key=lambda place: (abs(shares[place] - share), place))
