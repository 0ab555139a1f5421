"""Sampling on a GPU against the CPU's, whose own tests hold it against a sorted reference in fp64."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.ops.sampling import (
    GpuSampler,
    soft_cap_gpu,
)
from tests.kernels.gpu_sampling_cases import (
    MAX_TOKENS,
    MAX_TOP,
    SHAPES,
    UNTOUCHED,
    Batch,
    make_params,
    on_gpu,
    on_host,
    peaked,
    random_logits,
    random_params,
)


@pytest.fixture
def rng():
    return np.random.default_rng()


class TestEqualsCpu:
    @pytest.mark.parametrize(("vocab_size", "num_rows"), [(1, 3), (5, 8), (997, 40), (4099, 24), (9001, 12)])
    def test_any_parameters(self, gpu, rng, vocab_size, num_rows):
        histories = [np.zeros(int(n), np.int32) for n in rng.integers(0, 9, num_rows)]
        batch = Batch(
            gpu,
            random_logits(rng, num_rows, vocab_size),
            [random_params(rng, vocab_size) for _ in range(num_rows)],
            histories,
        )
        assert batch.assert_equals_cpu() <= 1

    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_shape_of_logits(self, gpu, rng, shape):
        vocab_size = 5003
        fields = [
            {},
            {"top_k": 50},
            {"top_k": 4500},
            {"top_p": 0.9},
            {"min_p": 0.1},
            {"top_k": 3000, "top_p": 0.9, "min_p": 0.01},
            {"temperature": 0.0, "num_logprobs": 20},
        ]
        logits = np.stack([SHAPES[shape](rng, vocab_size) for _ in fields]).astype(np.float32)
        params = [make_params(seed=int(rng.integers(2**63)), **{"num_logprobs": 3, **each}) for each in fields]
        assert Batch(gpu, logits, params).assert_equals_cpu() <= 1

    def test_large_vocabulary(self, gpu, rng):
        vocab_size = 50257
        fields = [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05, "num_logprobs": 20}]
        logits = np.stack([peaked(rng, vocab_size) for _ in fields]).astype(np.float32)
        logits[2] = rng.standard_normal(vocab_size)
        params = [make_params(seed=int(rng.integers(2**63)), **each) for each in fields]
        assert Batch(gpu, logits, params).assert_equals_cpu() <= 1

    def test_many_draws(self, gpu, rng):
        """The same logits at many positions: draws from all over the distribution."""
        vocab_size, num_rows = 509, 120
        logits = np.repeat(SHAPES["flat"](rng, (1, vocab_size)).astype(np.float32), num_rows, axis=0)
        for fields in ({}, {"top_p": 0.7}, {"top_k": 60}):
            params = [make_params(seed=99, **fields)] * num_rows
            batch = Batch(gpu, logits, params, [np.zeros(n, np.int32) for n in range(num_rows)])
            assert batch.assert_equals_cpu() <= 1
            assert len(set(batch.sampled.tolist())) > 30

    def test_a_token_depends_on_its_row_alone(self, gpu, rng):
        """Alone a row is cut into more splits than among others; an odd vocabulary also moves its alignment."""
        vocab_size, num_rows = 20001, 5
        logits = np.stack([peaked(rng, vocab_size) for _ in range(num_rows)]).astype(np.float32)
        params = [make_params(seed=s, top_p=0.95, num_logprobs=4) for s in range(num_rows)]
        together = Batch(gpu, logits, params)
        for s in range(num_rows):
            alone = Batch(gpu, logits[s : s + 1], params[s : s + 1])
            assert alone.sampled[0] == together.sampled[s]
            assert alone.logprobs[0] == together.logprobs[s]

    def test_order_of_warps_changes_nothing(self, gpu, rng):
        if gpu.world != "simt":
            pytest.skip("a GPU orders its warps itself")
        logits = random_logits(rng, 12, 4500)
        histories = [rng.integers(0, 4500, 60).astype(np.int32) for _ in range(12)]
        params = [random_params(rng, 4500) for _ in range(12)]
        for each in params:
            each.repetition_penalty = 1.2
        results = []
        for seed in (0, 1, 2):
            _native.simt_set_seed(seed)
            batch = Batch(gpu, logits, params, histories)
            results.append([batch.sampled, batch.logprobs, batch.ranks, batch.top_ids, batch.top_logprobs])
        _native.simt_set_seed(0)
        for other in results[1:]:
            for got, want in zip(other, results[0]):
                np.testing.assert_array_equal(got, want)

    def test_a_graph_gives_the_same(self, gpu, rng):
        """Captured once, replayed: counters and tables are ready for the next replay."""
        num_rows, vocab_size = 5, 4600
        logits = random_logits(rng, num_rows, vocab_size)
        params = [
            make_params(seed=s, repetition_penalty=1.2, **({"top_p": 0.9} if s % 2 else {"top_k": 9}))
            for s in range(num_rows)
        ]
        histories = [rng.integers(0, vocab_size, 30).astype(np.int32) for _ in range(num_rows)]
        want = Batch(gpu, logits, params, histories).sampled
        sampler = GpuSampler(gpu, num_rows, vocab_size, num_rows, MAX_TOKENS)
        for s in range(num_rows):
            sampler.set_row(s, params[s], 30)
        tokens = np.full((num_rows, MAX_TOKENS), UNTOUCHED, np.int32)
        tokens[:, :30] = np.stack(histories)
        arrays = [
            on_gpu(gpu, each)
            for each in (
                logits,
                np.arange(num_rows, dtype=np.int32),
                np.full(num_rows, 30, np.int32),
                tokens,
                np.full(num_rows, UNTOUCHED, np.int32),
            )
        ]
        _native.time_gpu_launches(gpu, [lambda stream: sampler.sample(*arrays, stream=stream)], 2)
        np.testing.assert_array_equal(on_host(arrays[4], np.int32), want)


class TestGreedy:
    def test_lowest_id_wins_a_tie(self, gpu, rng):
        logits = rng.integers(0, 3, (20, 5000)).astype(np.float32)
        logits[np.arange(20), rng.integers(0, 5000, 20)] = -0.0
        logits[0] = -0.0
        logits[0, 16] = 0.0
        batch = Batch(gpu, logits, [make_params(temperature=0)] * 20)
        assert batch.sampled.tolist() == logits.argmax(axis=1).tolist()

    def test_what_cannot_be_sampled_fails(self, gpu, rng):
        rows = []
        for poison in (np.nan, -np.nan, np.inf):
            for position in (0, 127, 128, 2998, 4500):
                rows.append(rng.standard_normal(4501).astype(np.float32))
                rows[-1][position] = poison
        rows.append(np.full(4501, -np.inf, np.float32))
        for fields in ({"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.5, "num_logprobs": 2}):
            batch = Batch(gpu, np.stack(rows), [make_params(**fields)] * len(rows))
            assert (batch.sampled == -1).all()
            assert (batch.logprobs == UNTOUCHED).all() and (batch.top_ids == UNTOUCHED).all()

    def test_one_finite_logit_wins(self, gpu):
        logits = np.full((4, 4501), -np.inf, np.float32)
        logits[:, 3047] = -3e38
        fields = [{"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.5}, {"top_p": 0.5}]
        assert (Batch(gpu, logits, [make_params(**each) for each in fields]).sampled == 3047).all()


class TestCuts:
    def test_exactly_k_of_equal_logits(self, gpu):
        """Draws at many positions reach the first k ids, and only these."""
        logits = np.zeros((60, 4200), np.float32)
        logits[:, ::4] = -0.0  # equal to +0
        for fields in ({"top_k": 3}, {"top_p": 3 / 4200 - 1e-6}):
            params = [make_params(seed=5, **fields)] * 60
            batch = Batch(gpu, logits, params, [np.zeros(n, np.int32) for n in range(60)])
            assert set(batch.sampled.tolist()) == {0, 1, 2}

    def test_top_k_across_threads_and_lists(self, gpu, rng):
        """k around what the per-thread maxima can bound, and bounds that nearly everything reaches."""
        vocab_size = 6001
        logits = rng.standard_normal((8, vocab_size)).astype(np.float32)
        logits[1::2] = np.round(logits[1::2])
        params = [make_params(top_k=k, seed=k) for k in (255, 256, 257, 511, 513, 1024, 1025, 5999)]
        assert Batch(gpu, logits, params).assert_equals_cpu() <= 1


class TestAdjustments:
    def test_equal_the_cpu(self, gpu, rng):
        num_rows, vocab_size = 24, 701
        logits = (rng.standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)
        histories = [
            rng.integers(-2, vocab_size + 2, int(rng.integers(0, 380))).astype(np.int32) for _ in range(num_rows)
        ]
        params = []
        for _ in range(num_rows):
            each = random_params(rng, vocab_size)
            each.repetition_penalty = float(rng.choice([1.0, 1.3, 0.7]))
            each.presence_penalty = float(rng.choice([0.0, 0.8, -0.5]))
            each.frequency_penalty = float(rng.choice([0.0, 0.3]))
            each.logit_bias = [
                (int(t), float(b)) for t, b in zip(rng.integers(0, vocab_size, 6) // 3, rng.normal(0, 4, 6))
            ]
            each.min_tokens = int(rng.choice([0, 1000]))
            each.stop_token_ids = [int(t) for t in rng.integers(0, 9, 5)]
            params.append(each)
        num_prompt_tokens = [int(rng.integers(0, len(history) + 1)) for history in histories]
        batch = Batch(gpu, logits, params, histories, num_prompt_tokens)
        assert batch.assert_equals_cpu() <= 1

    def test_greedy_tokens_reveal_every_adjusted_logit(self, gpu, rng):
        """The best token is penalised away again and again: the order in which tokens come is that of the CPU."""
        vocab_size = 40
        logits = rng.standard_normal((1, vocab_size)).astype(np.float32) * 3
        params = [make_params(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.9, presence_penalty=0.4)]
        sampler = GpuSampler(gpu, 2, vocab_size, 1, MAX_TOKENS)
        history = rng.integers(0, vocab_size, 10).astype(np.int32)
        for _ in range(25):
            batch = Batch(gpu, logits, params, [history], [10], sampler=sampler)
            assert batch.assert_equals_cpu() == 0
            history = np.append(history, batch.sampled).astype(np.int32)
        assert len(set(history[10:].tolist())) > 5

    def test_stop_ids_are_impossible_until_min_tokens(self, gpu):
        logits = np.zeros((3, 100), np.float32)
        logits[:, 42] = 50
        params = [make_params(temperature=0, min_tokens=2, stop_token_ids=[42, 42])] * 3
        histories = [np.ones(n, np.int32) for n in (3, 4, 5)]
        assert Batch(gpu, logits, params, histories, [3, 3, 3]).sampled.tolist() == [0, 0, 42]

    def test_everything_masked_or_a_nan_under_a_mask_fails(self, gpu):
        logits = np.array([[0, 0, 0], [0, np.nan, 1]], np.float32)
        params = [make_params(min_tokens=1, stop_token_ids=[0, 1, 2]), make_params(min_tokens=1, stop_token_ids=[1])]
        assert Batch(gpu, logits, params).sampled.tolist() == [-1, -1]

    def test_one_workspace_serves_call_after_call(self, gpu, rng):
        """Counters, lists and the history table are zero again after every call, whatever the rows asked for."""
        vocab_size, num_rows = 4500, 6
        sampler = GpuSampler(gpu, num_rows + 1, vocab_size, num_rows, MAX_TOKENS)
        for _ in range(4):
            logits = random_logits(rng, num_rows, vocab_size)
            params = [random_params(rng, vocab_size) for _ in range(num_rows)]
            histories = [rng.integers(0, vocab_size, 90).astype(np.int32) for _ in range(num_rows)]
            for each in params:
                each.repetition_penalty = float(rng.choice([1.0, 1.3]))
            assert Batch(gpu, logits, params, histories, sampler=sampler).assert_equals_cpu() <= 1


class TestPaddedRows:
    def test_are_left_alone(self, gpu, rng):
        logits = random_logits(rng, 7, 999)
        logits[3] = np.nan
        params = [random_params(rng, 999) for _ in range(7)]
        assert Batch(gpu, logits, params, padded=(0, 3, 6)).assert_equals_cpu() <= 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", float("nan")),
            ("top_p", 0.0),
            ("top_k", -1),
            ("num_logprobs", MAX_TOP + 1),
            ("stop_token_ids", [1, 2, 3]),
            ("stop_token_ids", [100]),
            ("logit_bias", [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)]),
        ],
    )
    def test_a_parameter_is_named(self, gpu, field, value):
        sampler = GpuSampler(gpu, 2, 100, 1, 10, max_stop_token_ids=2, max_logit_biases=3)
        sampler.set_row(0, make_params(stop_token_ids=[1, 1, 2], logit_bias=[(1, 1.0)] * 3), 0)
        with pytest.raises(ValueError, match=field):
            sampler.set_row(0, make_params(**{field: value}), 0)

    def test_rows_and_sizes_are_named(self, gpu):
        with pytest.raises(ValueError, match="vocab_size"):
            GpuSampler(gpu, 2, 2**20 + 1, 1, 10)
        with pytest.raises(ValueError, match="num_rows"):
            GpuSampler(gpu, 0, 100, 1, 10)
        with pytest.raises(ValueError, match="max_logit_rows"):
            GpuSampler(gpu, 2, 100, 0, 10)
        with pytest.raises(ValueError, match="max_tokens"):
            GpuSampler(gpu, 2, 100, 1, 0)
        sampler = GpuSampler(gpu, 2, 100, 1, 10)
        with pytest.raises(ValueError, match="row"):
            sampler.set_row(2, make_params(), 0)
        with pytest.raises(ValueError, match="num_prompt_tokens"):
            sampler.set_row(0, make_params(), -1)

    def test_arrays_are_named(self, gpu):
        sampler = GpuSampler(gpu, 2, 100, 1, 10)

        def arrays(**changed):
            shapes = {"logits": (1, 100), "logit_rows": (1,), "num_tokens": (1,), "tokens": (2, 11), "sampled": (1,)}
            shapes.update(changed)
            return [
                _native.GpuArray(gpu, list(shape), "float32" if name == "logits" else "int32")
                for name, shape in shapes.items()
            ]

        with pytest.raises(ValueError, match="logits"):
            sampler.sample(*arrays(logits=(1, 99)))
        with pytest.raises(ValueError, match="num_logit_rows"):
            sampler.sample(*arrays(logits=(2, 100), logit_rows=(2,), num_tokens=(2,), sampled=(2,)))
        for name, shape in (("logit_rows", (2,)), ("num_tokens", (2,)), ("tokens", (3, 11)), ("sampled", (2,))):
            with pytest.raises(ValueError, match=name):
                sampler.sample(*arrays(**{name: shape}))
        with pytest.raises((TypeError, ValueError), match="logits"):  # a host array
            sampler.sample(np.zeros((1, 100), np.float32), *arrays()[1:])
        with pytest.raises(ValueError, match="soft_cap"):
            soft_cap_gpu(arrays()[0], 0.0)
