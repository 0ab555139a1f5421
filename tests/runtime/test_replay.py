"""A real run's step durations, replayed through the simulator, lead the scheduler to the same decisions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from runtime.describe_model import spec_of
from runtime.measured_engine import StepTimes
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator.recording import RecordedRun, RecordingScheduler
from tests.kit.engines import load, running_engine
from tests.kit.tiny_models import write_tiny_model


class Run(NamedTuple):
    flags: dict
    shows: Callable[[RecordingScheduler, RecordedRun], bool]  # what such a run has when it went as meant
    longest: int = 256  # prompt and answer
    kv_memory: str = "100KiB"  # so few pages that requests are preempted
    is_rising: bool = False  # whoever comes ranks before all who are there


def _is_short_of_pages_and_shares_prefixes(recorder: RecordingScheduler, run: RecordedRun) -> bool:
    stats = recorder.stats()
    return stats.num_preemptions > 0 and stats.num_prefix_hit_tokens > 0 and len(run.observations) > 0


RUNS = {
    "one lane": Run({}, _is_short_of_pages_and_shares_prefixes),
    "two lanes": Run({"lanes": "50:50"}, lambda recorder, run: {plan.lane for plan in recorder.plans} == {0, 1}),
    # Prompts so long that others arrive while they are computed.
    "pauses": Run(
        {"lanes": "100:100", "prefill": "operator", "max_num_batched_tokens": 2048, "max_num_seqs": 60},
        lambda recorder, run: len(run.cursors) > 0, 2000, "16MiB", True,
    ),
    "layers": Run({"prefill": "layer"}, lambda recorder, run: any(plan.continues for plan in recorder.plans)),
    "nano-batches": Run({"nano_batches": "2"}, lambda recorder, run: any(plan.nano for plan in recorder.plans)),
}  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def recorded(request, tmp_path_factory):
    """An engine under a random load: chunks, prefix hits, preemptions, stop tokens, urgent requests; (its scheduler, spans
    of its plans, a cost model as it began with, what such a run shows)."""
    kind = RUNS[request.param]
    flags = {"max_num_batched_tokens": 48, "max_num_seqs": 6, **kind.flags}
    path, _ = write_tiny_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)
    loaded = load(path, max_model_len=kind.longest, page_size=16, kv_memory=kind.kv_memory, **flags)
    for _ in range(4):  # the load is random and so is its timing: nearly every run shows what it should
        run = _record(kind, path, loaded, flags)
        if kind.shows(run[0], run[0].recorded_run(run[1])):
            break
    return run


def _record(kind: Run, path, loaded, flags):
    times, kept = StepTimes(), []

    def cost_model(*_arguments) -> CostModel:
        return CostModel(spec_of(loaded, ("bf16", "bf16")), Machine.load("cpu-2-cores"))

    def make(config, cost_model, spec):
        kept.append(RecordingScheduler(config, cost_model, spec))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.scheduler.Scheduler", make)
        patch.setattr("runtime.engine_loader.calibrated_model", cost_model)
        with running_engine(
            path, loaded=loaded, trace=times, max_model_len=kind.longest, page_size=16, **flags,
        ) as engine:  # fmt: skip
            rng = random.Random()
            vocab_size, longest_stem = loaded.config.vocab_size, kind.longest - 196
            stems = [np.random.default_rng().integers(3, vocab_size, longest_stem).tolist() for _ in range(2)]
            for index in range(60):
                stem = rng.choice(stems)[: rng.randint(1, longest_stem)]
                engine.submit(
                    stem + [rng.randint(3, 300) for _ in range(rng.randint(1, 40))],
                    priority=-index if kind.is_rising else rng.choice([0, 0, 1]),
                    max_tokens=rng.randint(1, 60), temperature=1.0, tpot_ms=rng.choice([0.1, 1000.0]),
                    stop_token_ids=[rng.randint(3, 300) for _ in range(8)],
                )  # fmt: skip
                time.sleep(rng.choice([0.0, 0.0, 0.0, 0.004]))
            engine.wait_until(lambda: len(engine.finished) == 60)
    spans = {plan.plan_id: (start_ns, end_ns) for plan, start_ns, end_ns, _ in times.steps}
    return kept[0], spans, cost_model(), kind.shows


def test_a_real_runs_durations_give_identical_decisions(recorded):
    recorder, spans, cost_model, shows = recorded
    assert len(recorder.plans) > 50
    assert sum(len(plan.admissions) for plan in recorder.plans) >= 60
    run = recorder.recorded_run(spans)
    assert shows(recorder, run)
    result = run.replay(cost_model)
    for ours, real in zip(result.plans, recorder.plans, strict=True):
        assert ours == real
    assert result.stats._replace(goodput=None) == recorder.stats()._replace(goodput=None)


def test_other_durations_give_other_decisions(recorded):
    """What the test above compares depends on the durations: with them all alike, plans differ."""
    recorder, spans, _, _ = recorded
    run = recorder.recorded_run(spans)
    alike = replace(run, durations_ns=dict.fromkeys(run.durations_ns, 50_000))
    try:
        differs = alike.replay().plans != recorder.plans
    except (KeyError, RuntimeError, ValueError):  # a plan, a token or a resting run that the recorded run never had
        differs = True
    assert differs
