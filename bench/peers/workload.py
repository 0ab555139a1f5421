"""What the columns of the peer table measure, in terms that every engine can be asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` prompts of `prompt_len` random tokens, then `num_steps` decode steps of all of them together.

    With num_steps 0 the prefill is what is timed, up to and with the first token's logits; else the steps
    are, and the prefill before them is not.
    """

    name: str
    title: str
    prompt_len: int  # tokens of each prompt
    num_requests: int
    num_steps: int

    @property
    def is_prefill(self) -> bool:
        return self.num_steps == 0

    @property
    def timed_tokens(self) -> int:
        """Tokens that pass through the model while the clock runs."""
        return self.num_requests * (self.prompt_len if self.is_prefill else self.num_steps)

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Distinct random prompts, the same for every engine, so that no cache of prefixes can help."""
        draw = random.Random(f"{self.name}/{seed}")
        low = min(256, vocab_size // 2)  # below are control tokens in most vocabularies
        return [[draw.randrange(low, vocab_size) for _ in range(self.prompt_len)] for _ in range(self.num_requests)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("prefill_512", "prefill 512", 512, 1, 0),
        Workload("prefill_2048", "prefill 2048", 2048, 1, 0),
        Workload("decode_x1", "decode x1 (ctx 16)", 16, 1, 128),
        Workload("decode_x1_ctx2048", "x1 (ctx 2048)", 2048, 1, 64),
        Workload("decode_x8", "x8 (ctx 128)", 128, 8, 64),
        Workload("decode_x32", "x32 (ctx 128)", 128, 32, 32),
        # For models of a gigabyte, whose steps take longer.
        Workload("decode_x1_short", "decode x1 (ctx 16)", 16, 1, 32),
        Workload("decode_x8_short", "x8 (ctx 16)", 16, 8, 16),
        Workload("decode_x1_ctx4096", "x1 (ctx 4096)", 4096, 1, 32),
        Workload("decode_x1_ctx8192", "x1 (ctx 8192)", 8192, 1, 32),
    )
}

# The table that results are compared by; the rest are asked for with --columns.
DEFAULT_COLUMNS = ("prefill_512", "prefill_2048", "decode_x1", "decode_x1_ctx2048", "decode_x8", "decode_x32")
