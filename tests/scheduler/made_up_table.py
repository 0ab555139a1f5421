"""A table for the search that a test makes up: seconds per operator and rows, speeds per share, no contention."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from scheduler.nanobatch import COMPUTE_LANE, MEMORY_LANE
from scheduler.nanobatch_contention import Contention, Operator
from scheduler.nanobatch_timeline import NanoWork


class MadeUpTable:
    """
    classes     [node] "compute" or "memory"; attention is where `is_attention` says
    durations   (node, rows) -> seconds on the whole chip
    achieved    per class: (share, fraction of the solo speed) by rising share, straight between; NanoFlow's R -> P
    contention  None: the speeds were achieved beside the other class and hold it
    """

    contention: Contention | None = None

    def __init__(
        self, num_tokens: int, classes: Sequence[str], durations, achieved: Mapping[str, Sequence[tuple[float, float]]],
        share_pairs: Sequence[tuple[float, float]], is_attention: Sequence[bool] = (), *, has_chunk: bool = True,
    ) -> None:  # fmt: skip
        """has_chunk: all rows are one request's, so that every boundary cuts it."""
        self.num_tokens = num_tokens
        self.share_pairs = share_pairs
        self._lanes = [COMPUTE_LANE if name == "compute" else MEMORY_LANE for name in classes]
        self._durations = durations
        self._achieved = achieved
        self._is_attention = tuple(is_attention) or (False,) * len(classes)
        self._has_chunk = has_chunk

    def sequential_s(self) -> float:
        return sum(self._durations(node, self.num_tokens) for node in range(len(self._lanes)))

    def work(self, token_counts: Sequence[int], shares: tuple[float, float]) -> NanoWork:
        speeds = (self._speed("compute", shares[0]), self._speed("memory", shares[1]))
        chains = tuple(
            tuple(
                Operator(lane, self._durations(node, num_rows) / speeds[lane])
                for node, lane in enumerate(self._lanes)
            )
            for num_rows in token_counts
        )  # fmt: skip
        return NanoWork(chains, (self._has_chunk,) * (len(token_counts) - 1), self._is_attention, self.contention)

    def _speed(self, name: str, share: float) -> float:
        if share == 1.0:
            return 1.0
        knots = ((0.0, 0.0), *self._achieved.get(name, ()), (1.0, 1.0))
        i = max(1, bisect_left(knots, (share, 0.0)))
        (low, low_speed), (high, high_speed) = knots[i - 1], knots[i]
        return low_speed + (high_speed - low_speed) * (share - low) / (high - low) if high > low else high_speed
