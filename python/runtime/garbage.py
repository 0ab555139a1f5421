"""When Python looks for garbage in a process that steps an engine.

A step makes some thousand small tuples, none of which can be part of a cycle, so reference counts free all of them. By
default every 700 of them the collector walks what is young, every 7,000 what is older: with 256 requests running that was
more than the decision itself in the slowest of a hundred (docs/log.md, decision time).
"""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 100)


def settle() -> None:
    """To be called once when everything is loaded: what is alive now is never walked again, and the rest seldom. Thresholds
    that somebody has set higher, or a collector that is off, stay as they are."""
    gc.collect()
    gc.freeze()
    present = gc.get_threshold()
    if present[0]:  # 0: off
        gc.set_threshold(*map(max, _THRESHOLDS, present))
