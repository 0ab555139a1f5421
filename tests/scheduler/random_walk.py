"""A random life of a scheduler, the same for the same seed: arrivals, aborts, results in any order of lanes, failures,
pauses at any node, cache resets, arrangements that change."""

from __future__ import annotations

import random

from scheduler import Request, Scheduler, SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
from scheduler.policy import policy_named
from tests.scheduler.checked_scheduler import CheckedScheduler
from tests.scheduler.chosen_arrangement import ChosenArrangement, random_arrangement
from tests.scheduler.fake_runner import STOP_TOKEN_ID, VOCAB_SIZE

NODES = ModelSpec("tiny", 64, 2, 2, 1, 32, 128, 100).nodes()
LAYER_STARTS = tuple(next(i for i, node in enumerate(NODES) if node.layer == layer) for layer in range(2))
TPOT_TARGETS_S = (None, 1e-6, 6e-5)  # under tiny_cost_model: hopeless, and some forty tokens


def tiny_cost_model() -> CostModel:
    rates = ClassRates(((1, 1e11),), 1e11)
    machine = Machine("tiny", "test", 1e11, {"default": rates})
    return CostModel(ModelSpec("tiny", 64, 2, 2, 1, 32, 128, 100), machine)


def random_config(rng: random.Random, **overrides) -> SchedulerConfig:
    windows = overrides.pop("kv_group_windows", None) or rng.choice([(0,), (0, 6), (5,)])
    fields = {
        "num_pages": rng.randint(6, 40) * len(windows),
        "page_size": 4,
        "max_num_seqs": rng.randint(1, 5),
        "max_num_batched_tokens": rng.choice([1, 3, 7, 16, 64]),
        "max_model_len": 60,
        "max_prefill_chunk": rng.choice([0, 0, 5]),
        "max_plans_in_flight": rng.randint(1, 3),
        "kv_group_windows": windows,
        "enable_prefix_caching": rng.random() < 0.7,
        "min_copy_tokens": rng.choice([1, 2, 3]),
        "watermark": rng.choice([0.0, 0.01, 0.1]),
    }
    # Lanes without roles, roles as a flag or a controller has them, and one lane with every granularity.
    draw = rng.randrange(4)
    if "lanes" in overrides or policy_named(overrides.get("policy", "default")).lanes != "off":
        pass
    elif "policy" in overrides or draw == 0:
        fields["lane_shares"] = rng.choice([(1.0,), (0.5, 0.5)])
    elif draw == 1:
        fields["lanes"] = rng.choice(["off", "50:50", "25:75", "100:100"])
        fields["prefill"] = rng.choice(["", "token", "layer", "operator"])
    else:
        fields |= {"policy": rng.choice(["chosen-arrangement", "chosen-order"])}
    if rng.random() < 0.9:
        fields |= {"num_nodes": len(NODES), "layer_starts": LAYER_STARTS, "max_resting_runs": rng.randint(1, 3)}
    fields["rungs"] = rng.choice([(), (0.5,), (0.25, 0.5, 0.75)])
    return SchedulerConfig(**{**fields, **overrides})


def random_request(rng: random.Random, request_id: str, stems: list[list[int]], arrival_s: float) -> Request:
    shared = rng.choice(stems)[: rng.randint(0, 35)]
    return Request(
        request_id,
        shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 8))],
        max_tokens=rng.randint(1, 20),
        stop_token_ids=frozenset([STOP_TOKEN_ID]) if rng.random() < 0.7 else frozenset(),
        min_tokens=rng.choice([0, 0, 3]),
        priority=rng.choice([0, 0, 1]),
        arrival_s=arrival_s,
        namespace=rng.choice(["", "adapter"]),
        tpot_s=TPOT_TARGETS_S[len(shared) % 3],
    )


def walk(seed: int, num_events: int = 150, stop_at: float | None = None, **overrides) -> CheckedScheduler:
    """Runs to the end and checks every answer; returns what is left for a test to look at. stop_at: as in land()."""
    rng = random.Random(seed)
    config = random_config(rng, **overrides)
    checked = CheckedScheduler(config, Scheduler(config, tiny_cost_model() if rng.random() < 0.9 else None), seed)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(2)]
    failure_rate = rng.choice([0.0, 0.0, 0.02])
    for _ in range(num_events):
        draw = rng.random()
        busy = checked.busy_lanes()
        controller = checked.scheduler._controller
        if isinstance(controller, ChosenArrangement) and rng.random() < 0.3:
            controller.arrangement = random_arrangement(rng)
        if draw < 0.25:
            checked.arrive(random_request(rng, f"r{len(checked.requests)}", stems, checked.now))
        elif draw < 0.30 and checked.requests:
            checked.abort(rng.choice(list(checked.requests)))
        elif draw < 0.31:
            checked.scheduler.reset_prefix_cache()
            checked.check()
        elif busy:
            error = "the device fell over" if rng.random() < failure_rate else None
            checked.land(rng.choice(busy), stop_at, error)
    checked.run_until_idle(stop_at)
    checked.check_answers()
    stats = checked.scheduler.stats()
    assert checked.scheduler.is_idle
    assert stats.num_live_pages == 0
    assert (stats.num_running, stats.num_waiting, stats.num_draining) == (0, 0, 0)
    return checked
