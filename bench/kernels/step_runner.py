"""Steps of a whole model without scheduler or server: one frame, one lane, rows whose contexts are random tokens."""

from __future__ import annotations

from array import array

import numpy as np

from runtime import _native

CHUNK_TOKENS = 512


class StepRunner:
    """Owns arena, rows, frame and lane of a loaded model (runtime.engine_loader.LoadedModel)."""

    def __init__(
        self,
        loaded,
        num_rows: int,
        max_tokens: int,
        cores: list[int] | None = None,
        uses_graphs: bool = False,
        step_tokens: int = CHUNK_TOKENS,
    ):
        """``max_tokens``: of each row, and of the longest step's share of it. ``cores``: what the lane's workers are
        bound to; None: ``loaded.device.threads`` workers, bound to none. ``uses_graphs``: a GPU's lane replays graphs,
        as an engine's does. ``step_tokens``: of the largest step."""
        plan = loaded.kv_plan
        self.loaded = loaded
        self.num_rows = num_rows
        pages = -(-max_tokens // plan.page_size)
        self._arena = loaded.device.kv_arena(plan.groups, num_rows * pages * plan.num_groups)
        self._rows = loaded.device.row_store(
            num_rows, plan.max_model_len, plan.num_groups, plan.page_size, loaded.config.vocab_size
        )
        self._completions = _native.CompletionQueue()
        self._lane = (
            loaded.device.engine_lane(0, self._completions, num_rows)
            if uses_graphs
            else loaded.device.lane(0, self._completions, cores)
        )
        self._frame = _native.Frame(
            loaded.program, self._arena, self._rows, max(CHUNK_TOKENS, step_tokens, num_rows), num_rows
        )
        greedy = _native.SamplingParams()
        greedy.temperature = 0.0
        rng = np.random.default_rng(0)
        for row in range(num_rows):
            tokens = rng.integers(0, loaded.config.vocab_size, max_tokens).tolist()
            self._rows.admit(row, array("i", tokens), len(tokens), greedy)
            for group in range(plan.num_groups):
                first = (row * plan.num_groups + group) * pages
                self._rows.set_pages(row, group, 0, list(range(first, first + pages)), self._arena.num_pages)

    def set_tracing(self, is_traced: bool) -> None:
        self._lane.set_tracing(is_traced)

    def fill(self, context: int) -> None:
        """Computes the first tokens of every row, so that its pages hold what a step reads."""
        for row in range(self.num_rows):
            for start in range(0, context, CHUNK_TOKENS):
                self._run(array("i", (row, start, min(CHUNK_TOKENS, context - start), 0)))

    def step(self, context: int, num_tokens: int = 1) -> dict:
        """One step of every row: tokens [context, context + num_tokens), sampling one. Its completion."""
        return self._run(array("i", [value for row in range(self.num_rows) for value in (row, context, num_tokens, 1)]))

    def step_us(self, context: int, num_tokens: int = 1) -> float:
        done = self.step(context, num_tokens)
        return (done["end_ns"] - done["start_ns"]) / 1e3

    def _run(self, quadruples: array) -> dict:
        self._frame.prepare(quadruples)
        self._lane.submit(self._frame, 0, self.loaded.program.num_nodes)
        while not (done := self._completions.wait_any(-1.0)):
            pass
        if done[0]["error"]:
            raise RuntimeError(done[0]["error"])
        return done[0]
