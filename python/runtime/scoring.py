"""Log probabilities of given tokens: what perplexity and evaluation need, beside the engine and without its queue."""

from __future__ import annotations

from array import array

from runtime import _native

# Every scored position makes a row of logits; 128 rows of a 50k vocabulary are 25 MB.
_CHUNK_TOKENS = 128


class Scorer:
    """Runs a loaded model's program over whole sequences, one at a time, on pages of its own."""

    def __init__(self, loaded, chunk_tokens: int = _CHUNK_TOKENS):
        kv_plan = loaded.kv_plan
        self._max_tokens = kv_plan.max_model_len
        self._page_size = kv_plan.page_size
        self._num_groups = kv_plan.num_groups
        self._pages_per_group = (self._max_tokens + self._page_size - 1) // self._page_size
        self._chunk_tokens = chunk_tokens
        self._program = loaded.program
        self._vocab_size = loaded.config.vocab_size
        self._arena = loaded.device.kv_arena(kv_plan.groups, self._pages_per_group * self._num_groups)
        self._rows = loaded.device.row_store(1, self._max_tokens, self._num_groups, self._page_size, self._vocab_size)
        self._completions = _native.CompletionQueue()
        self._lane = loaded.device.lane(0, self._completions)
        self._frame = _native.Frame(self._program, self._arena, self._rows, chunk_tokens, chunk_tokens)

    def _start(self, token_ids) -> None:
        if not 1 <= len(token_ids) <= self._max_tokens:
            raise ValueError(f"token_ids: got {len(token_ids)} of them, wanted 1 to {self._max_tokens}")
        self._rows.admit(0, array("i", token_ids), len(token_ids), _native.SamplingParams())
        num_pages = (len(token_ids) + self._page_size - 1) // self._page_size
        for group in range(self._num_groups):
            first = group * self._pages_per_group
            pages = list(range(first, first + num_pages))
            self._rows.set_pages(0, group, 0, pages, self._arena.num_pages)

    def _run_chunk(self, start: int, num_tokens: int, last_node: int) -> None:
        self._frame.prepare(array("i", (0, start, num_tokens, 0)), [], True)
        self._lane.submit(self._frame, 0, last_node)
        (completion,) = self._wait()
        if completion["error"]:
            raise RuntimeError(completion["error"])

    def _wait(self) -> list[dict]:
        while not (completions := self._completions.wait_any(-1.0)):
            pass
        return completions

    def score(self, token_ids) -> list[float]:
        """log p(token i+1 | tokens 0..i) for every i but the last.  len(token_ids) - 1 floats

        Raises ValueError for an empty or too long sequence, or an id outside the vocabulary.
        """
        self._start(token_ids)
        scores: list[float] = []
        for start in range(0, len(token_ids), self._chunk_tokens):
            self._run_chunk(start, min(self._chunk_tokens, len(token_ids) - start), self._program.num_nodes)
            scores.extend(self._frame.scores())
        return scores[: len(token_ids) - 1]

    def logits(self, token_ids):
        """Raw logits after every token.  -> np.ndarray [T, V] fp32"""
        import numpy as np

        self._start(token_ids)
        parts = []
        for start in range(0, len(token_ids), self._chunk_tokens):
            num_tokens = min(self._chunk_tokens, len(token_ids) - start)
            self._run_chunk(start, num_tokens, self._program.num_nodes - 1)  # all but sampling
            out = np.empty((num_tokens, self._vocab_size), dtype=np.float32)
            self._frame.read_buffer("logits", out)
            parts.append(out)
        return np.concatenate(parts)
