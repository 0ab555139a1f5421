"""How the chip is shared between prefill and decode at one boundary: what a controller decides.

One lane: prompts go with the decodes, cut by tokens (in the same step), or by layers or operators (a part of their run after
each step of decodes). Two lanes: decodes on lane 0, prompts on lane 1, each with its share of the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scheduler.outlook import Outlook
    from scheduler.request import Request

DECODE_LANE, PREFILL_LANE = 0, 1
GRANULARITIES = ("token", "layer", "operator")


@dataclass(frozen=True, slots=True)
class Arrangement:
    prefill_share: float = 0.0  # of the chip, for the prefill lane; 0: there is one lane only
    decode_share: float = 1.0  # of the chip, for the decode lane; the two may add up to more than 1
    granularity: str = "token"  # how prompts are cut
    token_budget: int = 0  # of a step, 0: the policy's
    segment_s: float = 0.0  # one lane, operator: a part of a prefill takes at most so long; 0: what TPOT targets leave
    num_nano_batches: int = 1  # of a mixed step
    reason: str = ""  # for people

    @property
    def is_spatial(self) -> bool:
        return self.prefill_share > 0.0


class Controller(Protocol):
    """Decides the arrangement. It may keep state, but must be a function of what it was told (determinism)."""

    def arrange(self, outlook: Outlook) -> Arrangement:
        """Asked whenever a lane has room for a plan. outlook.now is the clock."""
        ...

    def hear_first_token(self, request: Request, now: float) -> None: ...

    def hear_finished(self, request: Request, now: float) -> None: ...


class FixedArrangement:
    """Always the same."""

    def __init__(self, arrangement: Arrangement) -> None:
        self._arrangement = arrangement

    def arrange(self, outlook: Outlook) -> Arrangement:
        return self._arrangement

    def hear_first_token(self, request: Request, now: float) -> None:
        pass

    def hear_finished(self, request: Request, now: float) -> None:
        pass
