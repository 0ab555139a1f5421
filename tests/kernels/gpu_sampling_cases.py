"""Batches to sample on a GPU, and what the CPU makes of the same rows."""

from __future__ import annotations

import numpy as np

from runtime import _native
from runtime.ops.sampling import (
    GpuSampler,
    SamplingParams,
    philox4x32_10,
    sample_token,
    sampling_distribution,
)

MAX_TOP = _native.max_top_logprobs
MAX_TOKENS = 400
UNTOUCHED = -77


def make_params(**fields) -> SamplingParams:
    params = SamplingParams()
    for name, value in fields.items():
        setattr(params, name, value)
    return params


def on_gpu(gpu, host: np.ndarray):
    array = _native.GpuArray(gpu, list(host.shape), host.dtype.name)
    array.upload(np.ascontiguousarray(host))
    return array


def on_host(array, dtype) -> np.ndarray:
    host = np.empty(array.shape, dtype)
    array.download(host)
    return host


class Batch:
    """Rows of a batch with their parameters and histories, sampled on the GPU; outputs poisoned beforehand."""

    def __init__(self, gpu, logits, params, histories=None, num_prompt_tokens=None, sampler=None, padded=()):
        num_rows, vocab_size = logits.shape
        self.logits, self.params = logits, params
        self.histories = histories or [np.zeros(0, np.int32)] * num_rows
        self.num_prompt_tokens = num_prompt_tokens or [len(history) for history in self.histories]
        sampler = sampler or GpuSampler(gpu, num_rows + 1, vocab_size, num_rows, MAX_TOKENS)
        # Logit row s belongs to row num_rows - s: the two must not be taken for each other.
        rows = num_rows - np.arange(num_rows, dtype=np.int32)
        tokens = np.full((num_rows + 1, MAX_TOKENS + 1), UNTOUCHED, np.int32)
        for s in range(num_rows):
            sampler.set_row(int(rows[s]), params[s], self.num_prompt_tokens[s])
            tokens[rows[s], : len(self.histories[s])] = self.histories[s]
        num_tokens = np.array([len(history) for history in self.histories], np.int32)
        self.is_padded = np.isin(np.arange(num_rows), padded)
        gpu_logits, gpu_tokens = on_gpu(gpu, logits), on_gpu(gpu, tokens)
        outputs = {
            "sampled": on_gpu(gpu, np.full(num_rows, UNTOUCHED, np.int32)),
            "logprobs": on_gpu(gpu, np.full(num_rows, UNTOUCHED, np.float32)),
            "ranks": on_gpu(gpu, np.full(num_rows, UNTOUCHED, np.int32)),
            "top_ids": on_gpu(gpu, np.full((num_rows, MAX_TOP), UNTOUCHED, np.int32)),
            "top_logprobs": on_gpu(gpu, np.full((num_rows, MAX_TOP), UNTOUCHED, np.float32)),
        }
        sampler.sample(
            gpu_logits,
            on_gpu(gpu, np.where(self.is_padded, -1, rows).astype(np.int32)),
            on_gpu(gpu, num_tokens),
            gpu_tokens,
            **outputs,
        )
        for name, array in outputs.items():
            setattr(self, name, on_host(array, np.float32 if "logprobs" in name else np.int32))
        expected_tokens = tokens.copy()
        for s in np.flatnonzero(~self.is_padded):
            expected_tokens[rows[s], num_tokens[s]] = self.sampled[s]
        np.testing.assert_array_equal(on_host(gpu_tokens, np.int32), expected_tokens)
        np.testing.assert_array_equal(on_host(gpu_logits, np.float32), logits, "raw logits put back")

    def on_cpu(self, s: int):
        return sample_token(self.logits[s].copy(), self.params[s], self.histories[s], self.num_prompt_tokens[s])

    def assert_equals_cpu(self) -> int:
        """Every row's token, but where the CPU's fp32 sums decide; returns how many rows that were."""
        num_decided = 0
        for s in range(len(self.params)):
            if self.is_padded[s]:
                assert self.sampled[s] == UNTOUCHED and self.ranks[s] == UNTOUCHED
                continue
            want = self.on_cpu(s)
            if self.sampled[s] != want.token:
                self.assert_decided_by_rounding(s, want.token)
                num_decided += 1
            else:
                self.assert_logprobs_equal(s, want)
        return num_decided

    def assert_decided_by_rounding(self, s: int, wanted: int) -> None:
        """The draw lies within rounding of a border between tokens, as the CPU's own distribution has it."""
        pairs = sampling_distribution(
            self.logits[s].copy(), self.params[s], self.histories[s], self.num_prompt_tokens[s]
        )
        text = f"row {s}: got {self.sampled[s]}, wanted {wanted}"
        assert pairs and self.params[s].temperature >= 1e-5, text
        seed = self.params[s].seed
        words = philox4x32_10([len(self.histories[s]), 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
        u = ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
        ids = np.array([token for token, _ in pairs])
        cumulative = np.concatenate([[0], np.cumsum([probability for _, probability in pairs])])
        at = np.searchsorted(ids, self.sampled[s])
        # A token more or less at the top_p cut moves every border by at most the lightest token's probability.
        slack = 2e-6 + (min(p for _, p in pairs) if self.params[s].top_p < 1 else 0)
        low, high = cumulative[min(at, len(ids) - 1)], cumulative[min(at + 1, len(ids))]
        assert low - slack <= u <= high + slack, text

    def assert_logprobs_equal(self, s: int, want) -> None:
        if self.params[s].num_logprobs < 0 or want.token < 0:
            assert self.logprobs[s] == UNTOUCHED and self.ranks[s] == UNTOUCHED
            assert (self.top_ids[s] == UNTOUCHED).all() and (self.top_logprobs[s] == UNTOUCHED).all()
            return
        np.testing.assert_allclose(self.logprobs[s], want.logprob, rtol=2e-6, atol=2e-6)
        assert self.ranks[s] == want.rank
        count = len(want.top)
        assert self.top_ids[s, :count].tolist() == [token for token, _ in want.top]
        np.testing.assert_allclose(self.top_logprobs[s, :count], [p for _, p in want.top], rtol=2e-6, atol=2e-6)
        assert (self.top_ids[s, count:] == UNTOUCHED).all() and (self.top_logprobs[s, count:] == UNTOUCHED).all()


def peaked(rng, vocab_size):
    """Like a language model's: a few likely tokens, a long tail."""
    return rng.standard_normal(vocab_size) * 2.5 + 8 * (rng.random(vocab_size) < 20 / vocab_size)


SHAPES = {
    "peaked": peaked,
    "flat": lambda rng, v: rng.standard_normal(v),
    "nearly uniform": lambda rng, v: rng.standard_normal(v) * 1e-3,
    "few values": lambda rng, v: rng.integers(-3, 4, v),
    "all equal": lambda rng, v: np.full(v, -1.5),
    "half masked": lambda rng, v: np.where(np.arange(v) % 2, rng.standard_normal(v), -np.inf),
    "one outlier": lambda rng, v: np.where(np.arange(v) == v // 2, 1e30, rng.standard_normal(v)),
}


def random_params(rng, vocab_size) -> SamplingParams:
    return make_params(
        temperature=float(rng.choice([0.0, 0.3, 0.8, 1.0, 1.7])),
        top_k=int(rng.choice([0, 0, 0, 1, 2, 40, 300, vocab_size // 2, vocab_size, vocab_size + 5])),
        top_p=float(rng.choice([1.0, 1.0, 0.999, 0.95, 0.5, 1e-6])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
        seed=int(rng.integers(0, 2**63)),
        num_logprobs=min(int(rng.choice([-1, -1, 0, 1, 5, 20])), vocab_size),
    )


def random_logits(rng, num_rows, vocab_size):
    return np.stack([SHAPES[rng.choice(list(SHAPES))](rng, vocab_size) for _ in range(num_rows)]).astype(np.float32)
