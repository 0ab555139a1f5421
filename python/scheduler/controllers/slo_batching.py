"""Which prompts go through the program together without making the first of them late (FlowPrefill's SLO-aware batching,
arXiv 2602.16603)."""

from __future__ import annotations

from scheduler.controllers.slack_order import first_token_deadline_s
from scheduler.controllers.ttft_prediction import TtftPredictor
from scheduler.outlook import Outlook
from scheduler.request import Request

BATCH_TOKENS = 2048  # of a run whose lead is shorter; a longer lead runs alone
RESERVE = 0.1  # of the lead's TTFT target that must be left when the run ends


def batch_budget(lead: Request, now: float, predictor: TtftPredictor) -> int:
    """The most tokens of the run that `lead` leads, its own included; its own alone: nobody may join it."""
    num_tokens = lead.num_expected_tokens - lead.next_start
    deadline_s = first_token_deadline_s(lead)
    if num_tokens >= BATCH_TOKENS:
        return num_tokens
    if deadline_s is None:
        return BATCH_TOKENS
    left_s, reserve_s = deadline_s - now, RESERVE * (deadline_s - lead.arrival_s)
    if left_s < reserve_s:
        return num_tokens
    return max(num_tokens, predictor.most_tokens_within(left_s - reserve_s, BATCH_TOKENS))


def slo_aware_run_budget(outlook: Outlook, lead: Request) -> int:
    """A Policy.run_budget."""
    predictor = TtftPredictor(outlook.cost_model, outlook.config.max_num_batched_tokens)
    return batch_budget(lead, outlook.now, predictor)
