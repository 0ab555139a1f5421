"""The size of one step, from which every node's cost follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from scheduler.step import ScheduledRequest


class StepShape(NamedTuple):
    """Sums over a step's requests. A request with `n` scheduled tokens from position `start` sees start + 1 .. start + n
    KV tokens from its token rows, and start + n of them are read at least once.

    Requests of one scheduled token (decodes) and of more (chunks) are kept apart: attention runs at different rates for
    the two, and a step that holds both is their sum.
    """

    num_tokens: int  # T
    num_requests: int  # R
    num_logit_rows: int  # S
    num_decodes: int = 0  # requests of one scheduled token
    decode_kv_tokens: float = 0  # sum over decodes of visible KV tokens, which is also their score pairs
    chunk_score_pairs: float = 0  # sum over the token rows of chunks of visible KV tokens
    chunk_kv_tokens: float = 0  # sum over chunks of the KV tokens that their last row sees
    # The same three as layers with a sliding window see them; equal to the above where no layer has one.
    window_decode_kv_tokens: float = 0
    window_chunk_score_pairs: float = 0
    window_chunk_kv_tokens: float = 0

    @property
    def score_pairs(self) -> float:
        return self.decode_kv_tokens + self.chunk_score_pairs

    @property
    def kv_tokens(self) -> float:
        return self.decode_kv_tokens + self.chunk_kv_tokens

    def plus_chunk(self, start: int, num_tokens: int, window: int = 0) -> StepShape:
        """With one more request, of num_tokens tokens from position start. It samples: the dearer case."""
        pairs, kv_tokens = num_tokens * (2 * start + num_tokens + 1) // 2, start + num_tokens
        seen_pairs = _windowed_pairs(start, start + num_tokens, window) if window else pairs
        seen_tokens = min(kv_tokens, num_tokens + window - 1) if window else kv_tokens
        return self._replace(
            num_tokens=self.num_tokens + num_tokens,
            num_requests=self.num_requests + 1,
            num_logit_rows=self.num_logit_rows + 1,
            chunk_score_pairs=self.chunk_score_pairs + pairs,
            chunk_kv_tokens=self.chunk_kv_tokens + kv_tokens,
            window_chunk_score_pairs=self.window_chunk_score_pairs + seen_pairs,
            window_chunk_kv_tokens=self.window_chunk_kv_tokens + seen_tokens,
        )

    @property
    def num_chunk_tokens(self) -> int:
        return self.num_tokens - self.num_decodes


def shape_of(requests: Iterable[ScheduledRequest], window: int = 0) -> StepShape:
    """The shape of a plan's requests. window: tokens that a query of a windowed layer sees (0: no such layers)."""
    num_tokens = num_requests = num_logit_rows = num_decodes = 0
    decode_kv = chunk_pairs = chunk_kv = 0
    decode_seen = chunk_pairs_seen = chunk_kv_seen = 0
    for _, _, start, count, _, samples in requests:
        num_requests += 1
        num_tokens += count
        num_logit_rows += samples
        stop = start + count
        if count == 1:
            num_decodes += 1
            decode_kv += stop
            if window:
                decode_seen += stop if stop < window else window
        else:
            chunk_pairs += count * (start + stop + 1) // 2
            chunk_kv += stop
            if window:
                chunk_pairs_seen += _windowed_pairs(start, stop, window)
                chunk_kv_seen += min(stop, count + window - 1)
    if not window:
        decode_seen, chunk_pairs_seen, chunk_kv_seen = decode_kv, chunk_pairs, chunk_kv
    return StepShape(
        num_tokens, num_requests, num_logit_rows, num_decodes, decode_kv, chunk_pairs, chunk_kv, decode_seen,
        chunk_pairs_seen, chunk_kv_seen,
    )  # fmt: skip


def _windowed_pairs(start: int, stop: int, window: int) -> int:
    """Sum over positions p in [start, stop) of min(p + 1, window)."""
    num_growing = max(0, min(stop, window) - start)  # rows that still see everything
    grown = num_growing * (2 * start + num_growing + 1) // 2
    return grown + (stop - start - num_growing) * window
