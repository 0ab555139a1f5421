"""Sampling against the obvious sorted reference in fp64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.ops.sampling import SamplingParams, philox4x32_10, sample_token, sampling_distribution

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test under each instruction set that the machine has."""
    before = _native.active_cpu_isa()
    if ISAS.index(request.param) > ISAS.index(_native.detected_cpu_isa()):
        pytest.skip(f"this machine has no {request.param}")
    _native.set_active_cpu_isa(request.param)
    yield request.param
    _native.set_active_cpu_isa(before)


@pytest.fixture
def rng():
    return np.random.default_rng()


def make_params(**fields) -> SamplingParams:
    params = SamplingParams()
    for name, value in fields.items():
        setattr(params, name, value)
    return params


def ids(*values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


EMPTY = np.zeros(0, dtype=np.int32)


def adjusted_reference(logits, params, token_ids, num_prompt_tokens):
    """Bias, min_tokens and penalties in fp64."""
    out = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        out[token] += bias
    generated = token_ids[num_prompt_tokens:]
    if len(generated) < params.min_tokens:
        out[params.stop_token_ids] = -np.inf
    seen = np.unique(token_ids)
    seen = seen[(seen >= 0) & (seen < len(logits))]
    out[seen] = np.where(
        out[seen] > 0, out[seen] / np.float32(params.repetition_penalty), out[seen] * params.repetition_penalty
    )
    for token, count in zip(*np.unique(generated, return_counts=True)):
        if 0 <= token < len(logits):
            out[token] -= params.presence_penalty + params.frequency_penalty * count
    return out


def distribution_reference(logits, params, token_ids=EMPTY, num_prompt_tokens=0, nudge=0.0) -> np.ndarray:
    """Probabilities [V]: sort everything, cut three times. nudge: moves the cuts of top_p and min_p by this part."""
    x = adjusted_reference(logits, params, token_ids, num_prompt_tokens)
    order = np.lexsort((np.arange(len(x)), -x))
    weights = np.exp((x[order] - x.max()) / params.temperature)
    if params.top_k:
        weights[params.top_k :] = 0
    weights /= weights.sum()
    if params.top_p < 1:
        cut = int(np.argmax(np.cumsum(weights) >= np.float32(params.top_p) * (1 + nudge)))
        weights[cut + 1 :] = 0
    weights[weights < np.float32(params.min_p) * weights[0] * (1 - nudge)] = 0
    probabilities = np.empty(len(x))
    probabilities[order] = weights / weights.sum()
    return probabilities


def native_distribution(logits, params, token_ids=EMPTY, num_prompt_tokens=0) -> np.ndarray:
    pairs = sampling_distribution(logits, params, token_ids, num_prompt_tokens)
    assert [token for token, _ in pairs] == sorted({token for token, _ in pairs})
    probabilities = np.zeros(len(logits))
    for token, probability in pairs:
        probabilities[token] = probability
    return probabilities


def assert_same_distribution(got, *inputs):
    """Equal but for tokens whose weight underflows, and for one token at a cut that rounding may move: where two tokens
    have half each, top_p 0.5 may keep one or both."""
    want = distribution_reference(*inputs)
    if ((got > 0) != (want > 0)).any():
        nudged = [distribution_reference(*inputs, nudge=nudge) for nudge in (1e-6, -1e-6)]
        want = next((each for each in nudged if ((got > 0) == (each > 0)).all()), want)
    negligible = (want < 1e-36) & (got < 1e-36)
    differs = ((got > 0) != (want > 0)) & ~negligible
    assert differs.sum() <= 1, f"support differs at {np.flatnonzero(differs)[:8]}"
    if differs.any():
        assert abs(got - want).sum() < 4e-4
    else:
        both = want > 1e-30
        np.testing.assert_allclose(got[both], want[both], rtol=3e-5)
    assert abs(got.sum() - 1) < 1e-9


def test_a_token_at_a_cut_may_move_and_no_other():
    logits, params = np.array([0.0, 0.0, -1.0], np.float32), make_params(top_k=2, top_p=0.5)
    for got in ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0]):
        assert_same_distribution(np.array(got), logits, params)
    for got in ([0.0, 1.0, 0.0], [0.4, 0.4, 0.2], [0.6, 0.4, 0.0]):
        with pytest.raises(AssertionError):
            assert_same_distribution(np.array(got), logits, params)


def peaked(rng, vocab_size):
    """Like a language model's: a few likely tokens, a long tail."""
    return (rng.standard_normal(vocab_size) * 2.5 + 8 * (rng.random(vocab_size) < 20 / vocab_size)).astype(np.float32)


SHAPES = {
    "peaked": peaked,
    "flat": lambda rng, v: rng.standard_normal(v).astype(np.float32),
    "nearly uniform": lambda rng, v: (rng.standard_normal(v) * 1e-3).astype(np.float32),
    "few values": lambda rng, v: rng.integers(-3, 4, v).astype(np.float32),
    "half masked": lambda rng, v: np.where(np.arange(v) % 2, rng.standard_normal(v), -np.inf).astype(np.float32),
    "one outlier": lambda rng, v: np.where(np.arange(v) == v // 2, 1e30, rng.standard_normal(v)).astype(np.float32),
}

# Random123's published known answers (kat_vectors, philox4x32 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, words):
    assert tuple(philox4x32_10(counter, key)) == words


class TestGreedy:
    @pytest.mark.parametrize("vocab_size", [1, 7, 16, 1023, 1024, 1025, 49152, 262144])
    def test_is_the_first_largest_logit(self, isa, rng, vocab_size):
        for _ in range(4):
            logits = rng.standard_normal(vocab_size).astype(np.float32)
            assert sample_token(logits, make_params(temperature=0), EMPTY, 0).token == int(np.argmax(logits))

    def test_lowest_id_wins_a_tie(self, isa, rng):
        for _ in range(20):
            logits = rng.integers(0, 3, 5000).astype(np.float32)
            logits[rng.integers(0, 5000)] = -0.0
            assert sample_token(logits, make_params(temperature=0), EMPTY, 0).token == int(np.argmax(logits))
        assert sample_token(np.array([-0.0, 0.0], np.float32), make_params(temperature=0), EMPTY, 0).token == 0

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
    def test_a_nan_or_infinity_anywhere_fails_the_row(self, isa, rng, poison, temperature):
        for position in (0, 15, 16, 1023, 1024, 2998, 2999):
            logits = rng.standard_normal(3000).astype(np.float32)
            logits[position] = poison
            assert sample_token(logits, make_params(temperature=temperature), EMPTY, 0).token == -1
            assert sampling_distribution(logits, make_params(temperature=temperature), EMPTY, 0) == []

    def test_nothing_finite_fails_and_one_finite_wins(self, isa):
        logits = np.full(3000, -np.inf, np.float32)
        assert sample_token(logits, make_params(temperature=0), EMPTY, 0).token == -1
        logits[2047] = -3e38
        assert sample_token(logits, make_params(temperature=0), EMPTY, 0).token == 2047
        assert sample_token(logits, make_params(temperature=1, top_k=5, top_p=0.5), EMPTY, 0).token == 2047

    def test_a_tiny_temperature_is_greedy(self, isa, rng):
        logits = rng.standard_normal(1000).astype(np.float32)
        for temperature in (1e-30, 1e-6, 2e-5):
            assert sample_token(logits, make_params(temperature=temperature), EMPTY, 0).token == int(logits.argmax())


class TestDistribution:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("vocab_size", [5, 1000, 3001, 20000])
    def test_equals_the_sorted_reference(self, isa, rng, shape, vocab_size):
        for _ in range(12):
            params = make_params(
                temperature=float(rng.choice([0.3, 0.8, 1.0, 1.7])),
                top_k=int(rng.choice([0, 0, 1, 2, 40, vocab_size // 2, vocab_size, vocab_size + 5])),
                top_p=float(rng.choice([1.0, 0.999, 0.95, 0.5, 1e-6])),
                min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
            )
            logits = SHAPES[shape](rng, vocab_size)
            assert_same_distribution(native_distribution(logits, params), logits, params)

    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_large_vocabulary(self, rng, top_p):
        logits = peaked(rng, 262144)
        params = make_params(top_p=top_p)
        assert_same_distribution(native_distribution(logits, params), logits, params)

    def test_top_k_keeps_exactly_k_of_equal_logits(self, isa):
        logits = np.zeros(4096, np.float32)
        assert [t for t, _ in sampling_distribution(logits, make_params(top_k=3), EMPTY, 0)] == [0, 1, 2]
        assert [t for t, _ in sampling_distribution(logits, make_params(top_p=2**-10), EMPTY, 0)] == [0, 1, 2, 3]

    def test_is_the_same_to_the_bit_on_every_instruction_set(self, rng):
        before = _native.active_cpu_isa()
        logits = peaked(rng, 5003)
        for params in (make_params(), make_params(top_p=0.97, temperature=1.3), make_params(top_k=77, min_p=0.01)):
            results = set()
            for name in ISAS[: ISAS.index(_native.detected_cpu_isa()) + 1]:
                _native.set_active_cpu_isa(name)
                results.add(tuple(sampling_distribution(logits, params, EMPTY, 0)))
            _native.set_active_cpu_isa(before)
            assert len(results) == 1


class TestDraw:
    @pytest.mark.parametrize(
        "fields", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.9, "temperature": 2.0}]
    )
    def test_frequencies_follow_the_distribution(self, isa, rng, fields):
        vocab_size, num_draws = 3000, 4000
        logits = (rng.standard_normal(vocab_size) - 12 * (np.arange(vocab_size) % 97 > 0)).astype(np.float32)
        params = make_params(seed=int(rng.integers(2**63)), **fields)
        expected = distribution_reference(logits, params) * num_draws
        counts = np.zeros(vocab_size)
        history = np.zeros(num_draws, np.int32)
        for position in range(num_draws):
            counts[sample_token(logits, params, history[:position], 0).token] += 1
        assert counts[expected == 0].sum() == 0
        often = expected > 5
        chi_squared = ((counts - expected)[often] ** 2 / expected[often]).sum()
        degrees = max(1, often.sum() - 1)
        assert chi_squared < degrees + 6 * np.sqrt(2 * degrees) + 10

    def test_inverts_the_cumulative_sum_in_id_order_at_the_philox_draw(self, rng):
        logits = peaked(rng, 2500)
        for fields in ({}, {"top_p": 0.9}, {"top_k": 40}):
            params = make_params(seed=0x0123456789ABCDEF, **fields)
            cumulative = np.cumsum(distribution_reference(logits, params))
            for position in range(50):
                words = philox4x32_10([position, 0, 0, 0], [0x89ABCDEF, 0x01234567])
                u = ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
                token = sample_token(logits, params, np.zeros(position, np.int32), 0).token
                low, high = (cumulative[token - 1] if token else 0), cumulative[token]
                assert low - 1e-5 <= u <= high + 1e-5

    def test_depends_on_seed_and_position_alone(self, rng):
        logits = rng.standard_normal(4000).astype(np.float32)
        params = make_params(seed=7)
        first = [sample_token(logits, params, np.zeros(n, np.int32), 0).token for n in range(40)]
        other = rng.standard_normal(9000).astype(np.float32)
        second = []
        for n in reversed(range(40)):
            sample_token(other, make_params(seed=n, top_p=0.9, num_logprobs=3), np.zeros(n, np.int32), 0)
            second.insert(0, sample_token(logits, params, rng.integers(0, 4000, n).astype(np.int32), 0).token)
        assert first == second
        assert len(set(first)) > 20
        third = [sample_token(logits, make_params(seed=8), np.zeros(n, np.int32), 0).token for n in range(40)]
        assert third != first


class TestAdjustments:
    def test_penalties_equal_the_reference(self, isa, rng):
        for _ in range(20):
            vocab_size = int(rng.integers(50, 3000))
            logits = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
            history = rng.integers(-2, vocab_size + 2, int(rng.integers(0, 400))).astype(np.int32)
            num_prompt_tokens = int(rng.integers(0, len(history) + 1))
            params = make_params(
                repetition_penalty=float(rng.choice([1.0, 1.3, 0.7])),
                presence_penalty=float(rng.choice([0.0, 0.8, -0.5])),
                frequency_penalty=float(rng.choice([0.0, 0.3])),
                logit_bias=[(int(t), float(b)) for t, b in zip(rng.integers(0, vocab_size, 5), rng.normal(0, 4, 5))],
                min_tokens=int(rng.choice([0, 1000])),
                stop_token_ids=[int(t) for t in rng.choice(vocab_size, 3, replace=False)],
            )
            got = native_distribution(logits, params, history, num_prompt_tokens)
            assert_same_distribution(got, logits, params, history, num_prompt_tokens)
            if params.min_tokens:
                assert (got[params.stop_token_ids] == 0).all()

    def test_logits_are_put_back(self, isa, rng):
        logits = rng.standard_normal(2000).astype(np.float32)
        before = logits.copy()
        params = make_params(
            repetition_penalty=1.5,
            frequency_penalty=0.5,
            min_tokens=5,
            stop_token_ids=[3, 4],
            logit_bias=[(3, 1.0), (3, 2.0), (9, -100.0)],
            num_logprobs=2,
        )
        sample_token(logits, params, ids(3, 4, 5, 5, 5), 2)
        assert (logits == before).all()

    def test_stop_ids_are_impossible_until_min_tokens(self, isa):
        logits = np.zeros(100, np.float32)
        logits[42] = 50
        params = make_params(temperature=0, min_tokens=2, stop_token_ids=[42])
        assert sample_token(logits, params, ids(1, 1, 1), 3).token == 0
        assert sample_token(logits, params, ids(1, 1, 1, 0), 3).token == 0
        assert sample_token(logits, params, ids(1, 1, 1, 0, 0), 3).token == 42

    def test_everything_masked_fails(self):
        logits = np.zeros(3, np.float32)
        params = make_params(min_tokens=1, stop_token_ids=[0, 1, 2])
        assert sample_token(logits, params, EMPTY, 0).token == -1

    def test_a_nan_under_a_mask_is_still_seen(self):
        logits = np.array([0, np.nan, 1], np.float32)
        assert sample_token(logits, make_params(min_tokens=1, stop_token_ids=[1]), EMPTY, 0).token == -1


class TestLogprobs:
    @pytest.mark.parametrize("vocab_size", [1, 40, 3001, 49152])
    @pytest.mark.parametrize("num_top", [0, 1, 20, 3000])
    def test_equal_the_log_softmax_of_the_raw_logits(self, isa, rng, vocab_size, num_top):
        num_top = min(num_top, vocab_size)
        logits = (rng.standard_normal(vocab_size) * 4).astype(np.float32)
        exact = logits.astype(np.float64)
        exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
        params = make_params(num_logprobs=num_top, temperature=1.5, logit_bias=[(0, 3.0)], repetition_penalty=1.4)
        sampled = sample_token(logits, params, ids(0), 1)
        assert abs(sampled.logprob - exact[sampled.token]) < 2e-6 * max(1, abs(exact[sampled.token]))
        assert sampled.rank == 1 + (logits > logits[sampled.token]).sum()
        order = np.lexsort((np.arange(vocab_size), -logits))[:num_top]
        assert [token for token, _ in sampled.top] == order.tolist()
        np.testing.assert_allclose([logprob for _, logprob in sampled.top], exact[order], rtol=2e-6, atol=2e-6)

    def test_all_of_a_row_with_masked_logits(self):
        logits = np.array([0, -np.inf, 1, -np.inf], np.float32)
        sampled = sample_token(logits, make_params(temperature=0, num_logprobs=4), EMPTY, 0)
        assert [token for token, _ in sampled.top] == [2, 0, 1, 3]
        assert sampled.top[2][1] == -np.inf

    def test_none_unless_asked_for(self, rng):
        sampled = sample_token(rng.standard_normal(50).astype(np.float32), make_params(), EMPTY, 0)
        assert (sampled.logprob, sampled.rank, sampled.top) == (0, 0, [])


BAD_PARAMS = [
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", -0.1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.01),
    ("min_p", float("nan")),
    ("top_k", -1),
    ("presence_penalty", float("inf")),
    ("frequency_penalty", float("nan")),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", float("nan")),
    ("num_logprobs", -2),
    ("num_logprobs", 101),
    ("min_tokens", -1),
    ("stop_token_ids", [5, 100]),
    ("stop_token_ids", [-1]),
    ("logit_bias", [(100, 1.0)]),
    ("logit_bias", [(5, float("nan"))]),
]


class TestBadInput:
    @pytest.mark.parametrize(("field", "value"), BAD_PARAMS)
    def test_a_bad_parameter_is_named(self, field, value):
        with pytest.raises(ValueError, match=field):
            sample_token(np.zeros(100, np.float32), make_params(**{field: value}), EMPTY, 0)

    def test_wrong_arrays(self):
        params = make_params()
        with pytest.raises(TypeError, match=r"logits.*float64.*float32"):
            sample_token(np.zeros(10), params, EMPTY, 0)
        with pytest.raises(ValueError, match=r"logits.*shape"):
            sample_token(np.zeros((2, 10), np.float32), params, EMPTY, 0)
        with pytest.raises(ValueError, match=r"logits.*strided"):
            sample_token(np.zeros(20, np.float32)[::2], params, EMPTY, 0)
        with pytest.raises(TypeError, match=r"token_ids.*int64.*int32"):
            sample_token(np.zeros(10, np.float32), params, np.zeros(3, np.int64), 0)
        with pytest.raises(ValueError, match="num_prompt_tokens"):
            sample_token(np.zeros(10, np.float32), params, ids(1, 2), 3)
        with pytest.raises(ValueError, match="vocab_size"):
            sample_token(np.zeros(0, np.float32), params, EMPTY, 0)
        frozen = np.zeros(10, np.float32)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match=r"logits.*read-only"):
            sample_token(frozen, params, EMPTY, 0)
