"""Flags beside a policy: what is given wins, and what cannot be is refused."""

from __future__ import annotations

import pytest

from scheduler import Request, Scheduler, SchedulerConfig
from scheduler.policy import with_preset
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.fake_runner import VOCAB_SIZE
from tests.scheduler.random_walk import LAYER_STARTS, NODES, tiny_cost_model


def arrangements_of(**flags) -> list:
    """Everything that was decided while decodes and prompts of two sizes were there."""
    fields = {"num_pages": 200, "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 400}
    program = {"num_nodes": len(NODES), "layer_starts": LAYER_STARTS, "rungs": (0.5,)}
    config = SchedulerConfig(**fields, **program, **flags)
    checked = CheckedScheduler(config, Scheduler(config, tiny_cost_model()))
    decided, planner = [], checked.scheduler._planner
    arrange = planner.arrange

    def recorded():
        decided.append(arrange())
        return decided[-1]

    planner.arrange = recorded
    for index, length in enumerate((4, 5, 120, 40, 90, 6)):
        prompt = [place % VOCAB_SIZE for place in range(length)]
        checked.arrive(Request(f"r{index}", prompt, 24, tpot_s=(None, 6e-5)[index % 2], ttft_s=1.0))
        checked.land(checked.busy_lanes()[0])
    checked.run_until_idle()
    checked.check_answers()
    assert decided
    return decided


@pytest.mark.parametrize("policy", ["arbitrate", "default", "semi-pd", "nexus"])
@pytest.mark.parametrize("prefill", ["token", "layer", "operator"])
def test_a_granularity_that_is_asked_for_stands_under_every_controller(policy, prefill):
    assert {each.granularity for each in arrangements_of(policy=policy, lanes="auto", prefill=prefill)} == {prefill}


def test_a_controller_decides_the_granularity_where_none_is_asked_for():
    config = SchedulerConfig(1, policy="arbitrate")
    assert with_preset(with_preset(config)).prefill == ""
    assert "operator" in {each.granularity for each in arrangements_of(policy="arbitrate")}
    assert with_preset(SchedulerConfig(1, policy="arbitrate", lanes="off")).prefill == "token"


def test_a_number_of_nano_batches_that_is_asked_for_stands_where_there_is_one_lane():
    decided = arrangements_of(policy="arbitrate", nano_batches="3")
    assert {each.num_nano_batches for each in decided if not each.is_spatial} == {3}
    for flags in ({"lanes": "50:50"}, {"policy": "two-lanes"}):
        with pytest.raises(ValueError, match="nano_batches: got '2', wanted off or auto with lanes"):
            with_preset(SchedulerConfig(1, nano_batches="2", **flags))
