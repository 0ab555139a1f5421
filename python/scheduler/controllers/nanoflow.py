"""NanoFlow (arXiv 2408.12757): steps of one size, cut into nano-batches where that pays, and as many requests at once as
their predicted KV allows.

Decodes come first and prompt chunks fill the step exactly, which is how steps are composed anyway; the next step is
formed while one runs; what is new is the cut (scheduler/nanobatch.py) and admission by predicted peak of KV
(scheduler/peak_admission.py).
"""

from __future__ import annotations

from scheduler.arrangement import Arrangement, FixedArrangement
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel


def steps_of_one_size(config: SchedulerConfig, cost_model: CostModel | None) -> FixedArrangement:
    """One lane, always; nano-batches as the flag has it, 0 for as many as pay."""
    num_nano = {"auto": 0, "off": 1}.get(config.nano_batches)
    num_nano = int(config.nano_batches) if num_nano is None else num_nano
    return FixedArrangement(Arrangement(num_nano_batches=num_nano, reason="nanoflow: one lane, steps of one size"))
