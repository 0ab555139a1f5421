"""Random models of bench/peers/shapes.py: files that load, whose values are what their writer promises."""

from __future__ import annotations

import numpy as np
import pytest

from bench.peers.random_model import MIXES, ModelShape, llama3_frequency_factors, random_matrix, write_random_model
from runtime.loading.checkpoint import open_checkpoint
from tests.kit.engines import running_engine
from tests.kit.tiny_models import write_tiny_gguf

TINY = ModelShape("tiny", 8, 256, 512, 4, 2, 64, 400, 4096, 500000.0, 32.0, 1024)


@pytest.mark.parametrize("format_name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16"])
def test_a_drawn_matrix_is_centred_and_has_the_deviation_that_was_asked_for(format_name):
    import gguf

    raw = random_matrix(np.random.default_rng(0), format_name, 256, 512, 0.05)
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType[format_name])
    assert values.shape == (256, 512)
    assert abs(values.mean()) < 0.05 * 0.05
    assert 0.8 * 0.05 < values.std() < 1.25 * 0.05


def test_frequency_factors_leave_quick_turns_alone_and_stretch_slow_ones_by_the_factor():
    factors = llama3_frequency_factors(TINY)
    assert factors[0] == 1 and factors[-1] == pytest.approx(32)
    assert (np.diff(factors) >= 0).all()


@pytest.mark.parametrize("mix", MIXES)
def test_a_random_model_opens_and_answers(mix, tmp_path):
    tokenizer_file, _ = write_tiny_gguf("Q8_0", tmp_path / "tokenizer")
    path = tmp_path / "random.gguf"
    write_random_model(path, TINY, mix, tokenizer_file)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.vocab_size == 400 and checkpoint.config.tie_word_embeddings
    formats = {tensor.format for tensor in checkpoint.tensors.values()}
    assert formats == {"F32", *MIXES[mix]}
    prompts = [list(range(10, 30)), list(range(50, 57))]
    with running_engine(path, activations="fp32", kv_dtype="fp32") as under_test:
        exact = under_test.run(prompts, max_tokens=4)
    assert all(len(tokens) == 4 and len(set(map(tuple, exact))) == 2 for tokens in exact)
