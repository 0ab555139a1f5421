"""How much of the machine others used while something was measured."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


def _busy_s() -> float:
    """CPU seconds of the whole machine since its start that were not idle."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = fields
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Of this process, and of children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class OtherLoad:
    """From its making on. share() is of all cores, 0 to 1, as far as /proc/stat counts: in hundredths of a second. A child
    that starts and ends meanwhile is no other."""

    def __init__(self) -> None:
        self._started = (time.monotonic(), _busy_s(), _own_s())

    def share(self) -> float:
        started_s, busy_s, own_s = self._started
        elapsed_s = max(time.monotonic() - started_s, 1e-9)
        others_s = (_busy_s() - busy_s) - (_own_s() - own_s)
        return min(max(others_s / (elapsed_s * (os.cpu_count() or 1)), 0.0), 1.0)


def wait_until_quiet(limit_s: float, most: float = 0.05, window_s: float = 1.0) -> float:
    """Sleeps until others used at most that share of the machine for window_s, or limit_s have passed; the share of the last
    window."""
    deadline_s = time.monotonic() + limit_s
    while True:
        load = OtherLoad()
        time.sleep(window_s)
        share = load.share()
        if share <= most or time.monotonic() + window_s > deadline_s:
            return share
