"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime import _native

#: The native sampling parameters of one request: temperature, top_p, min_p, top_k, presence_penalty,
#: frequency_penalty, repetition_penalty, seed, num_logprobs, min_tokens, stop_token_ids [ids],
#: logit_bias [(id, bias)]; ``check(vocab_size)`` raises ValueError for a bad one. See csrc/sampling/sampling.h.
SamplingParams = _native.SamplingParams

#: What sample_token returns: token, and with num_logprobs >= 0 also logprob, rank and top [(id, logprob)].
SampledToken = _native.SampledToken


def sample_token(logits: Any, params: SamplingParams, token_ids: Any, num_prompt_tokens: int) -> SampledToken:
    """Samples the token that follows ``token_ids``.

    The random number is Philox4x32-10 of (params.seed, len(token_ids)): the same arguments always give the same token,
    on every CPU, whatever else is sampled beside them. A temperature below 1e-5 is greedy; among equal logits the lower
    id counts as the more likely.

    Args:
        logits: [V] float32, writable; changed during the call and put back.
        params: checked against V here.
        token_ids: [num_tokens] int32, prompt then generated.
        num_prompt_tokens: how many of them are the prompt.

    Returns:
        A SampledToken; its token is -1 where the logits hold a NaN or +infinity, or no finite value.

    Raises:
        TypeError: an array of another dtype, or no array.
        ValueError: a wrong shape, a read-only array, a parameter out of its range.
    """
    return _native.sample_token(logits, params, token_ids, num_prompt_tokens)


def sampling_distribution(
    logits: Any, params: SamplingParams, token_ids: Any, num_prompt_tokens: int
) -> list[tuple[int, float]]:
    """What sample_token would draw from: (token id, probability), ascending ids, zero probabilities left out.

    Arguments and errors are sample_token's. Empty where sample_token returns -1.
    """
    return _native.sampling_distribution(logits, params, token_ids, num_prompt_tokens)


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Four 32-bit random words of a counter of four words under a key of two, least significant word first.

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; ten rounds.
    """
    return _native.philox4x32_10(counter, key)


#: Sampling parameters of many rows on a GPU and the workspace of one lane. ``GpuSampler(gpu, num_rows, vocab_size,
#: max_logit_rows, max_tokens, max_stop_token_ids=64, max_logit_biases=512)``; ``set_row(row, params,
#: num_prompt_tokens)`` uploads one row's parameters and raises ValueError where they do not fit;
#: ``sample(logits [S, V], logit_rows [S], num_tokens [S], tokens [num_rows, max], sampled [S], logprobs=None, ...)``
#: samples every logit row whose row is not -1, as ``sample_token`` would, and writes the token into ``sampled`` and
#: ``tokens``. All arrays lie on the GPU. See csrc/sampling/sampling_gpu.h.
GpuSampler = _native.GpuSampler


def score_gpu(
    logits: Any, logit_rows: Any, num_tokens: Any, tokens: Any, scores: Any, stream: int | None = None
) -> None:
    """scores[s] = log softmax(logits[s])[tokens[logit_rows[s], num_tokens[s]]], on the GPU that holds the arrays.

    Args:
        logits: [S, V] float32.
        logit_rows: [S] int32, the row of each; -1: its score stays as it is.
        num_tokens: [S] int32, where in the row the scored token lies.
        tokens: [num_rows, max_tokens] int32. NaN is the score where there is no id of the vocabulary.
        scores: [S] float32, written.
        stream: a stream's address; None is the GPU's default stream.

    Raises:
        TypeError, ValueError: an array of another dtype, shape or device.
    """
    _native.score_gpu(logits, logit_rows, num_tokens, tokens, scores, stream)


def soft_cap_gpu(logits: Any, cap: float, stream: int | None = None) -> None:
    """logits = cap * tanh(logits / cap) in place; logits: [S, V] float32 on a GPU, cap: positive."""
    _native.soft_cap_gpu(logits, cap, stream)
