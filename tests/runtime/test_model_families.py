"""Logits of a tiny random model of every family against Hugging Face transformers (exact mode)."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.scoring import Scorer
from tests.kit.engines import load, running_engine
from tests.kit.tiny_models import FAMILIES, write_tiny_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.every_isa

RELATIVE_ERROR = 1e-3  # the bar; fp32 against fp32 is far below it


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request, tmp_path_factory):
    return write_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def reference_logits(hf_model, token_ids) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor([token_ids])).logits[0].float().numpy()  # [T, V]


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_logits_equal_transformers_in_exact_mode(tiny, num_tokens):
    path, hf_model = tiny
    loaded = load(path, activations="fp32", kv_dtype="fp32", max_model_len=256)
    token_ids = np.random.default_rng().integers(0, loaded.config.vocab_size, num_tokens).tolist()
    out = Scorer(loaded, chunk_tokens=64).logits(token_ids)
    assert relative_error(out, reference_logits(hf_model, token_ids)) < RELATIVE_ERROR


def test_greedy_tokens_equal_transformers_or_tie(tiny):
    path, hf_model = tiny
    loaded = load(path, activations="fp32", kv_dtype="fp32", max_model_len=256)
    prompt = np.random.default_rng().integers(0, loaded.config.vocab_size, 40).tolist()
    with running_engine(path, loaded=loaded, activations="fp32", kv_dtype="fp32", max_model_len=256) as engine:
        (tokens,) = engine.run([prompt], max_tokens=24)
    known = list(prompt)
    for token in tokens:
        logits = reference_logits(hf_model, known)[-1]
        assert logits[token] >= logits.max() - 1e-4 * max(1.0, np.abs(logits).max()), "not the most likely token"
        known.append(token)


def test_low_precision_stays_near_the_exact_mode(tiny):
    path, hf_model = tiny
    loaded = load(path, activations="bf16", kv_dtype="bf16", max_model_len=256)
    token_ids = np.random.default_rng().integers(0, loaded.config.vocab_size, 100).tolist()
    out = Scorer(loaded).logits(token_ids)
    reference = reference_logits(hf_model, token_ids)
    with torch.no_grad():
        hf_low = hf_model.to(torch.bfloat16)
        low = hf_low(torch.tensor([token_ids])).logits[0].float().numpy()
        hf_model.to(torch.float32)
    # Casting the model down and up again leaves it with bf16 weights: both sides hold the same ones from here on.
    assert relative_error(out, reference) <= 2 * relative_error(low, reference) + 1e-3
