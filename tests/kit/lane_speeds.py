"""Lane speeds that a test makes up."""

from __future__ import annotations

from scheduler.lane_speeds import COMPUTE_CLASSES, MEMORY_CLASSES, LaneSpeeds, PairSpeed


def lane_speeds(
    shares: tuple[float, float], alone: tuple[float, float], beside: tuple[float, float], **pairs: tuple[float, float]
) -> LaneSpeeds:
    """alone, beside: of the compute and the memory lane, for every class. pairs: "compute_class__memory_class" -> speeds
    beside each other, where they differ."""
    return LaneSpeeds(
        shares,
        {"compute": dict.fromkeys(COMPUTE_CLASSES, alone[0]), "memory": dict.fromkeys(MEMORY_CLASSES, alone[1])},
        tuple(
            PairSpeed(one, other, *pairs.get(f"{one}__{other}", beside))
            for one in COMPUTE_CLASSES
            for other in MEMORY_CLASSES
        ),
    )
