"""Dynamic SplitFuse's token budget, chosen step by step (DeepSpeed-FastGen, arXiv 2401.08671).

Throughput over the tokens of a step rises and then saturates, and a step's time depends on its tokens and their context,
hardly on how many requests they belong to. So every step should have the same number of tokens, as few as saturate the
machine while time per token matters: the largest budget whose step still keeps the tightest running request's TPOT. The
context counts, because attention's cost grows with it: the budget shrinks as histories grow.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.outlook import Outlook

# Predictions cost some 20 microseconds each, and time is nearly straight in tokens: a guess on the line between two known
# points is near. Where it is not, halving ends the search.
_MAX_GUESSES = 2
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
    share = 1.0 if config.has_roles else config.lane_shares[lane]  # with roles, only a step of all the chip is mixed
    shape, start = decodes.shape, prefill.next_start
    # A prompt goes on from where it stands; one that waits, from its beginning (a cached prefix makes it cheaper).
    least_chunk = max(TILE_TOKENS, model.saturating_tokens(most, share) // 2)
    num_tiles = most_tiles(
        lambda tiles: model.guarded_step_s(shape.plus_chunk(start, tiles * TILE_TOKENS, model.window), share),
        max(0, most - shape.num_tokens) // TILE_TOKENS, decodes.tightest_tpot_s,
    )  # fmt: skip
    # Below half of what saturates the machine nobody gains: prompts would take longer than decodes would be spared.
    return min(most, shape.num_tokens + max(num_tiles * TILE_TOKENS, least_chunk))


def most_tiles(step_s: Callable[[int], float], most: int, limit_s: float) -> int:
    """The largest number of tiles, 0 to most, whose step keeps the limit; step_s rises."""
    if most < 1:
        return 0
    high, high_s = most, step_s(most)
    if high_s <= limit_s:
        return most
    low, low_s = 1, step_s(1)
    if low_s > limit_s:
        return 0
    num_guesses = 0  # low keeps the limit, high breaks it
    while high - low > 1:
        if num_guesses < _MAX_GUESSES:
            guess = low + int((limit_s - low_s) / (high_s - low_s) * (high - low))
            middle = min(max(guess, low + 1), high - 1)
        else:
            middle = (low + high) // 2
        num_guesses += 1
        middle_s = step_s(middle)
        if middle_s <= limit_s:
            low, low_s = middle, middle_s
            if num_guesses <= _MAX_GUESSES and high - low > 1:  # usually the very next one is too much
                next_s = step_s(low + 1)
                if next_s > limit_s:
                    return low
                low, low_s = low + 1, next_s
        else:
            high, high_s = middle, middle_s
    return low
