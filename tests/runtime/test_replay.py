"""A real run's step durations, replayed through the simulator, lead the scheduler to the same decisions."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from scheduler.simulator.recording import RecordingScheduler
from scheduler.step_trace import StepTrace
from tests.kit.engines import load, running_engine
from tests.kit.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An engine under a random load: chunks, prefix hits, preemptions, stop tokens; (its scheduler, spans of its steps)."""
    path, _ = write_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    loaded = load(path, max_model_len=256, page_size=16, kv_memory="100KiB")
    assert loaded.kv_plan.num_pages < 60
    trace, kept = StepTrace(loaded.program.node_names), []

    def make(config, cost_model, spec):
        kept.append(RecordingScheduler(config, cost_model, spec))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.scheduler.Scheduler", make)
        with running_engine(
            path, loaded=loaded, trace=trace, max_model_len=256, page_size=16, max_num_seqs=6, max_num_batched_tokens=48
        ) as engine:
            rng = random.Random()
            stems = [np.random.default_rng().integers(3, loaded.config.vocab_size, 60).tolist() for _ in range(2)]
            for _ in range(60):
                prompt = rng.choice(stems)[: rng.randint(1, 60)] + [
                    rng.randint(3, 300) for _ in range(rng.randint(1, 40))
                ]
                engine.submit(
                    prompt, max_tokens=rng.randint(1, 60), priority=rng.choice([0, 0, 1]), temperature=1.0,
                    stop_token_ids=[rng.randint(3, 300) for _ in range(8)],
                )  # fmt: skip
                time.sleep(rng.choice([0.0, 0.0, 0.002, 0.01]))
            engine.wait_until(lambda: len(engine.finished) == 60)
    spans = {
        event["args"]["plan"]: (round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3))
        for event in trace.events()
        if event["cat"] == "step"
    }
    return kept[0], spans


def test_a_real_runs_durations_give_identical_decisions(recorded):
    scheduler, spans = recorded
    assert len(scheduler.plans) > 50
    assert sum(len(plan.admissions) for plan in scheduler.plans) >= 60
    assert scheduler.stats().num_preemptions > 0 and scheduler.stats().num_prefix_hit_tokens > 0
    result = scheduler.recorded_run(spans).replay()
    for ours, real in zip(result.plans, scheduler.plans, strict=True):
        assert ours == real
    assert result.stats._replace(goodput=None) == scheduler.stats()._replace(goodput=None)


def test_other_durations_give_other_decisions(recorded):
    """What the test above compares depends on the durations: with them all alike, plans differ."""
    scheduler, spans = recorded
    run = scheduler.recorded_run(spans)
    alike = replace(run, durations_ns=dict.fromkeys(run.durations_ns, 50_000))
    try:
        differs = alike.replay().plans != scheduler.plans
    except KeyError:  # a plan, or a token, that the recorded run never had
        differs = True
    assert differs
