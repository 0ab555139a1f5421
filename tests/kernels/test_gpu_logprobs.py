"""What a GPU says of logits: log probabilities beside sampling, scores of given tokens, soft caps."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.ops.sampling import (
    score_gpu,
    soft_cap_gpu,
)
from tests.kernels.gpu_sampling_cases import (
    MAX_TOP,
    UNTOUCHED,
    Batch,
    make_params,
    on_gpu,
    on_host,
)


@pytest.fixture
def rng():
    return np.random.default_rng()


class TestLogprobs:
    def test_all_of_a_row_with_masked_logits(self, gpu):
        logits = np.array([[0, -np.inf, 1, -np.inf]], np.float32)
        batch = Batch(gpu, logits, [make_params(temperature=0, num_logprobs=4)])
        assert batch.top_ids[0, :4].tolist() == [2, 0, 1, 3]
        assert batch.top_logprobs[0, 2] == -np.inf
        assert batch.assert_equals_cpu() == 0

    def test_are_of_the_raw_logits(self, gpu, rng):
        logits = (rng.standard_normal((3, 4300)) * 4).astype(np.float32)
        params = [
            make_params(seed=s, num_logprobs=MAX_TOP, logit_bias=[(7, 30.0)], repetition_penalty=1.4) for s in range(3)
        ]
        batch = Batch(gpu, logits, params, [np.array([7, 8], np.int32)] * 3)
        assert batch.assert_equals_cpu() == 0
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(batch.logprobs, exact[range(3), batch.sampled], rtol=2e-6, atol=2e-6)


class TestScore:
    @pytest.mark.parametrize("vocab_size", [1, 997, 4099, 20000])
    def test_equals_the_log_softmax(self, gpu, rng, vocab_size):
        num_rows, max_tokens = 6, 11
        logits = (rng.standard_normal((num_rows, vocab_size)) * 4).astype(np.float32)
        tokens = rng.integers(0, vocab_size, (num_rows, max_tokens)).astype(np.int32)
        tokens[2, 4] = vocab_size
        num_tokens = np.array([0, 3, 4, 10, 11, 5], np.int32)  # row 4: past the end of the row
        rows = np.array([5, 0, 2, 3, 1, -1], np.int32)
        scores = on_gpu(gpu, np.full(num_rows, UNTOUCHED, np.float32))
        logits[3, rng.integers(0, vocab_size)] = np.nan if vocab_size > 1 else 0
        score_gpu(on_gpu(gpu, logits), on_gpu(gpu, rows), on_gpu(gpu, num_tokens), on_gpu(gpu, tokens), scores)
        got = on_host(scores, np.float32)
        exact = logits.astype(np.float64)
        exact -= exact.max(axis=1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        for s in (0, 1):
            assert abs(got[s] - exact[s, tokens[rows[s], num_tokens[s]]]) < 4e-6 * max(1, abs(got[s]))
        assert np.isnan(got[2]) and np.isnan(got[4])
        assert np.isnan(got[3]) or vocab_size == 1
        assert got[5] == UNTOUCHED

    def test_extreme_logits(self, gpu):
        logits = np.full((3, 300), -np.inf, np.float32)
        logits[0, 5] = -3e38
        logits[1] = np.linspace(-1e4, 1e4, 300)
        logits[2] = 80
        tokens = np.array([[5], [299], [0]], np.int32)
        scores = on_gpu(gpu, np.zeros(3, np.float32))
        zero = np.zeros(3, np.int32)
        rows = np.arange(3, dtype=np.int32)
        score_gpu(on_gpu(gpu, logits), on_gpu(gpu, rows), on_gpu(gpu, zero), on_gpu(gpu, tokens), scores)
        np.testing.assert_allclose(on_host(scores, np.float32), [0, 0, -np.log(300)], rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 997, 2048, 5000])
def test_soft_cap(gpu, rng, vocab_size):
    logits = (rng.standard_normal((3, vocab_size)) * 40).astype(np.float32)
    array = on_gpu(gpu, logits)
    soft_cap_gpu(array, 30.0)
    np.testing.assert_allclose(
        on_host(array, np.float32), 30 * np.tanh(logits.astype(np.float64) / 30), rtol=1e-6, atol=1e-6
    )
