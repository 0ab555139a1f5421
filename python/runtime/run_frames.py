"""Frames of an engine: a ring of free ones, and those of runs that rest between two of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RunFrames:
    """``new_frame``: makes one; frames are made when they are first needed, ``at_start`` of them at once."""

    def __init__(self, new_frame: Callable[[], Any], at_start: int, most: int):
        self._new_frame = new_frame
        self._most = most
        self._num_made = at_start
        self._free = [new_frame() for _ in range(at_start)]
        self._resting: dict[int, Any] = {}  # run_id ->

    @property
    def num_resting(self) -> int:
        return len(self._resting)

    def take(self) -> Any:
        """A frame for a plan that begins a run. Raises RuntimeError when all are in use."""
        if not self._free:
            if self._num_made == self._most:
                raise RuntimeError(f"frames: all {self._most} are in use, {self.num_resting} of them by runs at rest")
            self._num_made += 1
            return self._new_frame()
        return self._free.pop()

    def give_back(self, frame: Any) -> None:
        self._free.append(frame)

    def rest(self, run_id: int, frame: Any) -> None:
        self._resting[run_id] = frame

    def resume(self, run_id: int) -> Any:
        """The frame of a run at rest. Raises ValueError when there is none."""
        frame = self._resting.pop(run_id, None)
        if frame is None:
            raise ValueError(f"plan continues run {run_id}, which does not rest here")
        return frame

    def drop(self, run_id: int) -> None:
        self.give_back(self.resume(run_id))
