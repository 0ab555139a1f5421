"""Groups of layers: the authors' rule, its generalisation, and where groups end."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.controllers.layered import group_bounds, num_groups_by_tokens, num_layer_groups
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.outlook import Decodes
from scheduler.simulator.setup import load_model
from scheduler.step_shape import StepShape

MACHINE = Machine.load("h100-sxm")
MODEL = CostModel(load_model("llama-3-8b", MACHINE), MACHINE)
NUM_LAYERS = 32
NOTHING = StepShape(0, 0, 0)


@pytest.mark.parametrize(
    ("num_tokens", "wanted"),
    [(1, 1), (512, 1), (513, 2), (1024, 2), (1025, 4), (2048, 4), (2049, 8), (4096, 8), (4097, 16), (90000, 16)],
)
def test_the_authors_rule(num_tokens, wanted):
    assert num_groups_by_tokens(num_tokens, NUM_LAYERS) == wanted
    assert num_groups_by_tokens(num_tokens, 3) == min(wanted, 3)


@given(st.integers(1, 8192), st.integers(1, 128), st.floats(0.008, 0.5))
def test_the_fewest_groups_that_keep_the_tightest_target(num_tokens, num_decodes, tpot_s):
    shape = StepShape(num_decodes, num_decodes, num_decodes, num_decodes, num_decodes * 1000)
    num_groups = num_layer_groups(num_tokens, NUM_LAYERS, MODEL, Decodes(shape, tpot_s))
    decode_s, prefill_s = MODEL.guarded_step_s(shape), MODEL.guarded_step_s(NOTHING.plus_chunk(0, num_tokens))

    def keeps(groups: int) -> bool:
        return decode_s + prefill_s / groups <= tpot_s * (1 + 1e-9)

    wanted = next((groups for groups in range(1, NUM_LAYERS + 1) if keeps(groups)), NUM_LAYERS)
    assert num_groups == wanted


def test_without_a_target_or_a_model_tokens_decide():
    decodes = Decodes(StepShape(4, 4, 4, 4, 4000), None)
    assert num_layer_groups(1500, NUM_LAYERS, MODEL, decodes) == 4
    assert num_layer_groups(1500, NUM_LAYERS, None, decodes._replace(tightest_tpot_s=0.01)) == 4


@given(st.integers(1, 40), st.integers(1, 60))
def test_groups_cover_the_program_once_and_are_near_equal(num_layers, num_groups):
    starts = [2 + 5 * layer for layer in range(num_layers)]
    num_nodes = starts[-1] + 5 + 3
    bounds = group_bounds(starts, num_nodes, num_groups)
    assert bounds[-1] == num_nodes and list(bounds) == sorted(set(bounds)) and bounds[0] > 0
    assert len(bounds) == min(num_groups, num_layers)
    assert all(bound in starts for bound in bounds[:-1])
    edges = [0, *(starts.index(bound) for bound in bounds[:-1]), num_layers]
    sizes = [high - low for low, high in pairwise(edges)]
    assert max(sizes) - min(sizes) <= 1
