"""A step's sums against counting every row and every KV token it sees."""

import random

import pytest

from scheduler.step import ScheduledRequest
from scheduler.step_shape import shape_of


def counted(parts, window: int):
    def seen(position: int) -> int:
        return min(position + 1, window) if window else position + 1

    decodes = [(start, n) for start, n in parts if n == 1]
    chunks = [(start, n) for start, n in parts if n > 1]
    read = [len({k for p in range(start, start + n) for k in range(p + 1 - seen(p), p + 1)}) for start, n in chunks]
    return (
        sum(seen(start) for start, _ in decodes),
        sum(seen(p) for start, n in chunks for p in range(start, start + n)),
        sum(read),
    )


@pytest.mark.parametrize("window", [0, 1, 5, 64])
def test_sums_equal_counting(window):
    rng = random.Random(7)
    for _ in range(50):
        parts = [(rng.randrange(90), rng.choice([1, 1, rng.randint(2, 30)])) for _ in range(rng.randint(1, 6))]
        requests = [ScheduledRequest(str(i), i, start, n, ((),), i % 2 == 0) for i, (start, n) in enumerate(parts)]
        shape = shape_of(requests, window)
        assert shape.num_tokens == sum(n for _, n in parts)
        assert shape.num_logit_rows == (len(parts) + 1) // 2
        assert shape.num_decodes == sum(n == 1 for _, n in parts)
        assert (shape.decode_kv_tokens, shape.chunk_score_pairs, shape.chunk_kv_tokens) == counted(parts, 0)
        windowed = (shape.window_decode_kv_tokens, shape.window_chunk_score_pairs, shape.window_chunk_kv_tokens)
        assert windowed == counted(parts, window)


@pytest.mark.parametrize("window", [0, 7])
def test_one_more_chunk_is_added_as_if_it_had_been_there(window):
    def shape(parts):
        return shape_of([ScheduledRequest("", i, start, n, ((),), True) for i, (start, n) in enumerate(parts)], window)

    parts = [(12, 1), (30, 1), (3, 9)]
    for start, num_tokens in ((0, 2), (5, 30), (64, 16)):
        assert shape(parts).plus_chunk(start, num_tokens, window) == shape([*parts, (start, num_tokens)])
