"""What two lanes were measured to do to each other: NanoFlow's table of shares to achieved speeds (R -> P,
arXiv 2408.12757, section 4.2), by pairs of operator classes and by where the machine is cut.

`partita calibrate` measures it (runtime/measured_lanes.py) and writes it to the machine file as `lane_speeds`. A machine
that nobody measured has no such field, and the cost model's shares and contention stand in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By lane: what goes by the linear's speed (all that is not attention), and what by attention's. A linear of the memory
# lane has few rows and waits for its weights; one of the compute lane has many.
COMPUTE_CLASSES = ("linear", "attention_chunk")
MEMORY_CLASSES = ("linear", "attention_decode")
LANE_CLASSES = (COMPUTE_CLASSES, MEMORY_CLASSES)
LANE_NAMES = ("compute", "memory")


@dataclass(frozen=True, slots=True)
class PairSpeed:
    """Operators of two classes at once, one after another of its class on each lane."""

    compute: str  # of COMPUTE_CLASSES
    memory: str  # of MEMORY_CLASSES
    compute_speed: float
    memory_speed: float


@dataclass(frozen=True, slots=True)
class LaneSpeeds:
    """At one cut of the machine. Every speed is a part of what the same operator achieves alone on the whole machine.
    Raises ValueError for a class or pair that is missing, a share out of (0, 1), a speed that is not above 0."""

    shares: tuple[float, float]  # of the compute and the memory lane
    alone: Mapping[str, Mapping[str, float]]  # "compute" and "memory" -> class -> speed with nothing beside
    beside: tuple[PairSpeed, ...]  # of every pair

    def __post_init__(self) -> None:
        if len(self.shares) != 2 or min(self.shares) <= 0.0 or sum(self.shares) > 1.0 + 1e-9:
            raise ValueError(f"LaneSpeeds.shares: got {self.shares}, wanted two above 0, together at most the machine")
        for name, classes in zip(LANE_NAMES, LANE_CLASSES, strict=True):
            speeds = self.alone.get(name, {})
            if set(speeds) != set(classes) or min(speeds.values()) <= 0.0:
                raise ValueError(
                    f"LaneSpeeds.alone: {name}: got {dict(speeds)}, wanted a speed of {', '.join(classes)}"
                )
        pairs = sorted((pair.compute, pair.memory) for pair in self.beside)
        if pairs != sorted((one, other) for one in COMPUTE_CLASSES for other in MEMORY_CLASSES):
            raise ValueError(f"LaneSpeeds.beside: got {pairs}, wanted every compute class with every memory class once")
        if min(min(pair.compute_speed, pair.memory_speed) for pair in self.beside) <= 0.0:
            raise ValueError("LaneSpeeds.beside: got a speed that is not above 0")

    def alone_speed(self, lane: int, is_attention: bool) -> float:
        """lane: COMPUTE_LANE or MEMORY_LANE."""
        return self.alone[LANE_NAMES[lane]][LANE_CLASSES[lane][is_attention]]

    def pair_stretches(self, compute_is_attention: bool, memory_is_attention: bool) -> tuple[float, float]:
        """How many times longer than alone on its lane each takes beside the other, at least 1: compute, memory."""
        wanted = COMPUTE_CLASSES[compute_is_attention], MEMORY_CLASSES[memory_is_attention]
        pair = next(pair for pair in self.beside if (pair.compute, pair.memory) == wanted)
        return (
            max(1.0, self.alone_speed(0, compute_is_attention) / pair.compute_speed),
            max(1.0, self.alone_speed(1, memory_is_attention) / pair.memory_speed),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LaneSpeeds:
        """Raises ValueError, KeyError or TypeError for what is none."""
        values = dict(fields)
        values["shares"] = tuple(values["shares"])
        values["alone"] = {name: dict(speeds) for name, speeds in values["alone"].items()}
        values["beside"] = tuple(PairSpeed(**pair) for pair in values["beside"])
        return cls(**values)
