"""Dynamic SplitFuse's token budget, chosen step by step (DeepSpeed-FastGen, arXiv 2401.08671).

Throughput over the tokens of a step rises and then saturates, and a step's time depends on its tokens and their context,
hardly on how many requests they belong to. So every step should have the same number of tokens, as few as saturate the
machine while time per token matters: the largest budget whose step still keeps the tightest running request's TPOT. The
context counts, because attention's cost grows with it: the budget shrinks as histories grow.
"""

from __future__ import annotations

from scheduler.outlook import Outlook

TILE_TOKENS = 16  # budgets are whole tiles: a matrix product rounds up to them


def splitfuse_token_budget(outlook: Outlook, lane: int) -> int:
    """max_num_batched_tokens where nobody carries a TPOT target or the machine was never calibrated."""
    config, model = outlook.config, outlook.cost_model
    most = config.max_num_batched_tokens
    if model is None:
        return most
    prefill = outlook.first_prefill(lane)
    if prefill is None:  # decodes alone: there is nothing to hold back
        return most
    decodes = outlook.decodes(lane)
    if decodes.tightest_tpot_s is None:
        return most
    share, shape, start = config.lane_shares[lane], decodes.shape, prefill.next_start
    # A prompt goes on from where it stands; one that waits, from its beginning (a cached prefix makes it cheaper).
    least_chunk = max(TILE_TOKENS, model.saturating_tokens(most, share) // 2)
    low, high = 0, max(0, most - shape.num_tokens) // TILE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        with_chunk = shape.plus_chunk(start, middle * TILE_TOKENS, model.window)
        if model.guarded_step_s(with_chunk, share) <= decodes.tightest_tpot_s:
            low = middle
        else:
            high = middle - 1
    # Below half of what saturates the machine nobody gains: prompts would take longer than decodes would be spared.
    return min(most, shape.num_tokens + max(low * TILE_TOKENS, least_chunk))
