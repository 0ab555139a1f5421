"""FastGen on the engine: any token budget gives the answers of any other, and a calibrated machine's budget does too."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import engine_loader
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from tests.kit.engines import load, running_engine
from tests.kit.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path, _ = write_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    loaded = load(path, max_model_len=256)
    rng = np.random.default_rng()
    prompts = [rng.integers(3, loaded.config.vocab_size, n).tolist() for n in (1, 5, 33, 64, 100, 17, 80)]
    with running_engine(path, loaded=loaded, max_model_len=256, max_num_seqs=1, max_num_batched_tokens=256) as engine:
        alone = [engine.run([prompt], max_tokens=12)[0] for prompt in prompts]
    return path, loaded, prompts, alone


@pytest.mark.parametrize("budget", [1, 7, 16, 64, 4096])
def test_any_budget_gives_the_same_answers(tiny, budget):
    path, loaded, prompts, alone = tiny
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": budget}
    with running_engine(path, loaded=loaded, policy="fastgen", **limits) as engine:
        assert engine.run(prompts, max_tokens=12) == alone


def test_a_budget_that_follows_a_target_gives_the_same_answers_and_the_model_learns(tiny, monkeypatch):
    path, loaded, prompts, alone = tiny
    models = []

    def slow_machine(loaded, args):
        from runtime.describe_model import spec_of

        machine = Machine("slow", "test", 1e9, {"default": ClassRates(((1, 1e8),), 1e9)})
        models.append(CostModel(spec_of(loaded, args.kv_codecs), machine))
        return models[-1]

    monkeypatch.setattr(engine_loader, "calibrated_model", slow_machine)
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    with running_engine(path, loaded=loaded, policy="fastgen", **limits) as engine:
        assert engine.run(prompts, max_tokens=12, tpot_ms=20.0) == alone
    assert models[0].corrections


def test_a_calibrated_machines_file_is_found_and_a_broken_one_is_told(tiny, monkeypatch, tmp_path, caplog):
    from runtime.calibrate import machine_file
    from runtime.engine_args import EngineArgs

    path, loaded, _, _ = tiny
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    args = EngineArgs(model=str(path)).check()
    assert engine_loader.calibrated_model(loaded, args) is None
    file = machine_file(loaded, args.kv_dtype)
    Machine("here", "test", 1e9, {"default": ClassRates(((1, 1e8),), 1e9)}).save(file)
    assert engine_loader.calibrated_model(loaded, args).machine.name == "here"
    file.write_text("{}")
    assert engine_loader.calibrated_model(loaded, args) is None and "partita calibrate" in caplog.text
