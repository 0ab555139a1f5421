"""Layered Prefill (arXiv 2510.08055): a prompt crosses the layers in groups, one group beside each step of decodes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from scheduler.cost_model import CostModel
from scheduler.outlook import Decodes
from scheduler.step_shape import StepShape

# Prefill tokens up to which so many groups do, by the authors' rule: a group's work stays near that of 512 tokens in all
# layers.
_TOKENS_OF_GROUPS = ((512, 1), (1024, 2), (2048, 4), (4096, 8))
MOST_GROUPS = 16


def num_groups_by_tokens(num_tokens: int, num_layers: int) -> int:
    """The authors' rule."""
    place = bisect_left(_TOKENS_OF_GROUPS, (num_tokens, 0))
    num_groups = _TOKENS_OF_GROUPS[place][1] if place < len(_TOKENS_OF_GROUPS) else MOST_GROUPS
    return max(1, min(num_groups, num_layers))


def num_layer_groups(num_tokens: int, num_layers: int, cost_model: CostModel | None, decodes: Decodes) -> int:
    """The fewest groups whose work beside a step of decodes keeps the tightest TPOT among them; by tokens alone where nobody
    carries one or the machine was never calibrated."""
    if cost_model is None or decodes.tightest_tpot_s is None:
        return num_groups_by_tokens(num_tokens, num_layers)
    room_s = decodes.tightest_tpot_s - cost_model.guarded_step_s(decodes.shape)
    prefill_s = cost_model.guarded_step_s(StepShape(0, 0, 0).plus_chunk(0, num_tokens, cost_model.window))
    if room_s * num_layers <= prefill_s:
        return num_layers
    return max(1, min(num_layers, -int(-prefill_s // room_s)))


def group_bounds(layer_starts: Sequence[int], num_nodes: int, num_groups: int) -> tuple[int, ...]:
    """The node at which each group ends: near-equal runs of layers; what comes before the layers goes with the first group,
    what comes after them with the last."""
    num_layers = len(layer_starts)
    num_groups = max(1, min(num_groups, num_layers))
    firsts = [layer_starts[group * num_layers // num_groups] for group in range(1, num_groups)]
    return (*firsts, num_nodes)
