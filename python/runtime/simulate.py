"""``python -m runtime.simulate``: the simulator's command, which lives with the scheduler and needs no engine."""

from __future__ import annotations

import sys

from scheduler.simulator.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.simulate"))
