"""How long a prompt takes alone: what S-EDF subtracts from the time that is left (FlowPrefill, arXiv 2602.16603)."""

from __future__ import annotations

from scheduler.cost_model import CostModel
from scheduler.step_shape import StepShape

_NOTHING = StepShape(0, 0, 0)
_TILE_TOKENS = 16


class TtftPredictor:
    """Seconds from the first node of a prompt to its first token on the whole chip.

    The authors fit a cubic in the prompt's length; the cost model knows what the length does to every node, learns while it
    runs and answers in some 10 microseconds, once per arrival, so it is asked itself. Without a model nothing is predicted:
    0 seconds, and a request is then hopeless when its time is up.
    """

    def __init__(self, cost_model: CostModel | None, run_tokens: int) -> None:
        """run_tokens: that go through the program at once; longer prompts are full runs and a remainder."""
        if run_tokens < 1:
            raise ValueError(f"TtftPredictor.run_tokens: got {run_tokens}, wanted at least 1")
        self._model = cost_model
        self._run_tokens = run_tokens

    @property
    def predicts(self) -> bool:
        return self._model is not None

    def prompt_s(self, num_tokens: int, start: int = 0) -> float:
        """Of num_tokens tokens from position start: the KV of those before it is there."""
        model = self._model
        if model is None:
            return 0.0
        seconds, position, end = 0.0, start, start + num_tokens
        while position < end:
            count = min(end - position, self._run_tokens)
            seconds += model.step_s(_NOTHING.plus_chunk(position, count, model.window))
            position += count
        return seconds

    def most_tokens_within(self, limit_s: float, most: int) -> int:
        """The longest prompt, whole tiles of 16 tokens up to `most`, that takes at most limit_s; 0: none does."""
        if self._model is None:
            return most if limit_s >= 0.0 else 0
        if self.prompt_s(most) <= limit_s:
            return most
        low, high = 0, -(-most // _TILE_TOKENS)  # low tiles are in time, high are not
        while high - low > 1:
            middle = (low + high) // 2
            if self.prompt_s(middle * _TILE_TOKENS) <= limit_s:
                low = middle
            else:
                high = middle
        return low * _TILE_TOKENS
