"""What a request asks of time: targets that the scheduler's policies read and goodput is counted against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_USER_CHARS = 256
MAX_TARGET_MS = 1e12  # some thirty years: schedulers multiply targets, and infinity has no rank
_TARGETS = ("ttft_ms", "tpot_ms", "deadline_ms")
# A gateway that knows its clients can set them without touching a body.
HEADER_PREFIX = "x-partita-"


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Raises ValueError or TypeError naming the field, what came and what was wanted."""

    ttft_ms: float | None = None  # from arrival to the first token
    tpot_ms: float | None = None  # mean per token after the first
    deadline_ms: float | None = None  # from arrival to the end
    priority: int = 0  # lower runs first
    user: str = ""  # whose request it is, for fair shares

    def __post_init__(self) -> None:
        for name in _TARGETS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of milliseconds, got {type(value).__name__} {value!r}")
            if not (math.isfinite(value) and value / 1e3 > 0 and value <= MAX_TARGET_MS):
                raise ValueError(
                    f"{name} must be more than 0 milliseconds and at most {MAX_TARGET_MS:.0e}, got {value!r}"
                )
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise TypeError(f"priority must be an integer, got {type(self.priority).__name__}")
        if not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority must be a 32-bit integer, got {self.priority}")
        if not isinstance(self.user, str):
            raise TypeError(f"user must be a string, got {type(self.user).__name__}")
        if len(self.user) > MAX_USER_CHARS:
            raise ValueError(f"user must have at most {MAX_USER_CHARS} characters, got {len(self.user)}")

    @classmethod
    def from_request(cls, fields: Mapping[str, Any], headers: Mapping[str, str]) -> ServiceLevel:
        """From a body's fields and, where those say nothing, the headers x-partita-ttft-ms, -tpot-ms, -deadline-ms,
        -priority and -user."""
        values = {name: fields[name] for name in (*_TARGETS, "priority", "user") if fields.get(name) is not None}
        for name in (*_TARGETS, "priority", "user"):
            text = headers.get(HEADER_PREFIX + name.replace("_", "-"))
            if text is not None and name not in values:
                values[name] = text if name == "user" else _number(name, text)
        return cls(**values)

    def seconds(self, name: str) -> float | None:
        value = getattr(self, name)
        return None if value is None else value / 1e3


NO_TARGETS = ServiceLevel()


def _number(name: str, text: str) -> float | int:
    try:
        return int(text) if name == "priority" else float(text)
    except ValueError:
        header = HEADER_PREFIX + name.replace("_", "-")
        raise ValueError(f"{name} must be a number, got {text[:80]!r} in the header {header}") from None
