"""The ways to share the chip that arbitration chooses among, each with what the cost model says of it.

    mix       one lane, prompts cut by tokens: a step of decodes and the largest chunk that the target leaves room for
    nano      the mixed step cut into nano-batches, where --nano-batches is auto and the search or the trial speaks for it
    turns     one lane, prompts cut by operators: a step of decodes, then a part of a run as long as the rest of the target
    split     two lanes, decodes on D of the chip beside runs on P, contention for memory included, at every rung
    overlap   two lanes without a border

Predictions are made for rounded sizes and kept. Making one takes a good part of the millisecond that a decision may take, so
it is made in pieces, one a decision, while decisions go on with the latest that is whole.
"""

from __future__ import annotations

from collections.abc import Generator
from math import log2
from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.controllers.layered import num_groups_by_tokens
from scheduler.cost_model import CostModel, StepCost
from scheduler.nanobatch_planner import NanoPlanner
from scheduler.splitfuse import TILE_TOKENS, most_tiles
from scheduler.step_shape import StepShape

KINDS = ("mix", "nano", "turns", "split", "overlap")
# Of a target that plans are made for: predictions err, and a mean that is planned to be just kept is missed half of the
# time.
MARGIN = 0.95
# A mixed step cannot be paused, and the one planned behind it neither: an arrival waits for both. Of the tightest TTFT
# target that was lately met with, a step takes at most this part.
BLOCKING_SHARE = 0.15
# Sizes an octave for which candidates are predicted: neighbours differ by less than a fifth, or by two fifths where it
# matters less.
FINE, COARSE = 4, 2
_MOST_KNOWN = 4096
_REFRESH_EVERY = 2048  # predictions after which all are made anew: the cost model learns


class Candidate(NamedTuple):
    kind: str  # one of KINDS
    prefill_share: float  # 0: one lane
    decode_share: float
    prompt_tokens_per_s: float  # sustained, while the decodes keep their target

    @property
    def name(self) -> str:
        if self.prefill_share:
            return f"{self.prefill_share * 100:.0f}:{self.decode_share * 100:.0f}"
        return self.kind


class Prediction(NamedTuple):
    candidates: tuple[Candidate, ...]
    part_s: float  # of a run in turns where no target says how long decodes may wait: one group of layers


class Sizes(NamedTuple):
    """What predictions are made for; rounded by `rounded`."""

    num_decodes: int
    context: int  # tokens that a decode sees
    num_prompts: int  # that would go together
    prompt_tokens: int  # of each, pending
    prompt_start: int  # before them
    tpot_us: int  # the tightest target; 0: none
    least_tokens: int  # that an answer has, most of the time
    ttft_ms: int  # the tightest target that was lately met with; 0: none

    @property
    def run_tokens(self) -> int:
        return self.num_prompts * self.prompt_tokens


class Candidates:
    """kinds: those that are predicted; turns stand in where nothing else is. uses_slack: mixed steps may be bursts."""

    def __init__(self, config: SchedulerConfig, model: CostModel, kinds: tuple[str, ...], uses_slack: bool) -> None:
        self._config = config
        self._model = model
        self._kinds = kinds
        self._uses_slack = uses_slack
        self._known: dict[Sizes, Prediction] = {}
        self._costs: dict[tuple[StepShape, float], StepCost] = {}  # of lanes
        self._num_asked = 0
        self._latest: Prediction | None = None
        self._making: tuple[Sizes, Generator[None, None, Prediction]] | None = None
        has_lanes = config.lanes == "auto"
        self._splits = [(rung, 1.0 - rung) for rung in config.rungs] if has_lanes and "split" in kinds else []
        if has_lanes and "overlap" in kinds:
            self._splits.append((1.0, 1.0))
        self.least_tokens = max(TILE_TOKENS, model.saturating_tokens(config.max_num_batched_tokens) // 2)
        self.nano: NanoPlanner | None = None  # None: no step is cut

    def predict(self, sizes: Sizes) -> Prediction:
        """For these sizes, or while these are new for those of a few decisions ago. It depends on what was asked before and
        on no clock, so equal runs decide equally."""
        self._num_asked += 1
        if self._num_asked % _REFRESH_EVERY == 0 or len(self._known) >= _MOST_KNOWN:
            self._known.clear()
            self._costs.clear()
        known = self._known.get(sizes)
        if known is None:
            if self._making is None:
                self._making = sizes, self._pieces(sizes)
            self._make_a_piece()
            while self._latest is None:
                self._make_a_piece()
            return self._known.get(sizes, self._latest)
        self._latest = known
        return known

    def _make_a_piece(self) -> None:
        sizes, pieces = self._making
        try:
            next(pieces)
        except StopIteration as end:
            self._latest = self._known[sizes] = end.value
            self._making = None

    def _pieces(self, sizes: Sizes) -> Generator[None, None, Prediction]:
        model, window = self._model, self._model.window
        num, context = sizes.num_decodes, sizes.context
        seen = min(context, window) if window else context
        decode = StepShape(num, num, num, num, num * context, window_decode_kv_tokens=num * seen)
        run = StepShape(0, 0, 0)
        for _ in range(sizes.num_prompts):
            run = run.plus_chunk(sizes.prompt_start, sizes.prompt_tokens, window)
        guard = max(1.0, model.guard_ratio)
        decode_s, run_s = model.step_s(decode) * guard, model.step_s(run)
        target_s = MARGIN * sizes.tpot_us / 1e6 if sizes.tpot_us else None
        num_groups = num_groups_by_tokens(sizes.run_tokens, len(self._config.layer_starts))
        part_s = run_s / num_groups
        found = []
        if "mix" in self._kinds:
            yield
            found.append((yield from self._mix(sizes, decode, decode_s, target_s, guard)))
        if "turns" in self._kinds or not found:
            if target_s is None:
                rate = sizes.run_tokens / (run_s + num_groups * decode_s)
                found.append(Candidate("turns", 0.0, 1.0, rate))
            else:  # prompts have what decode steps leave of every target
                free = max(0.0, 1.0 - decode_s / target_s)
                found.append(Candidate("turns", 0.0, 1.0, free * sizes.run_tokens / run_s))
        for prefill_share, decode_share in self._splits:
            yield
            found.append(self._split(sizes, decode, run, prefill_share, decode_share, target_s, guard))
        return Prediction(tuple(found), part_s)

    def _mix(self, sizes: Sizes, decode: StepShape, decode_s: float, target_s: float | None, guard: float) -> Candidate:
        """The rate of the largest chunk that fits; where even the least that is worth its step does not, it goes once in
        so many steps of decodes as pay for it."""
        model, window = self._model, self._model.window
        most = max(TILE_TOKENS, self._config.max_num_batched_tokens - decode.num_tokens)

        # Chunks of a prompt see what came before them: half of it on average.
        first, whole_prompt = sizes.prompt_start, sizes.prompt_tokens
        known: dict[int, float] = {}

        def step_s(num_tokens: int) -> float:
            if num_tokens in known:
                return known[num_tokens]
            shape = decode
            for _ in range(num_tokens // whole_prompt):
                shape = shape.plus_chunk(first, whole_prompt, window)
            part = num_tokens % whole_prompt
            if part:
                shape = shape.plus_chunk(first + (whole_prompt - part) // 2, part, window)
            seconds = known[num_tokens] = model.step_s(shape) * guard
            return seconds

        blocking_s = BLOCKING_SHARE * sizes.ttft_ms / 1e3 if sizes.ttft_ms else None
        if target_s is None:
            whole = min(most, sizes.run_tokens)
            if blocking_s is not None:
                num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), -(-whole // TILE_TOKENS), blocking_s)
                whole = min(whole, num_tiles * TILE_TOKENS)
            if not whole:  # even a tile keeps arrivals waiting: in turns they need not wait
                return Candidate("mix", 0.0, 1.0, 0.0)
            return self._cut(Candidate("mix", 0.0, 1.0, whole / step_s(whole)), decode, first, whole)
        burst_rate = burst_tokens = 0.0
        if self._uses_slack:
            # Bursts: a large chunk now and then, as large as the credit that the shortest answers gather pays for, and
            # decodes alone between them.
            credit_s = target_s + (target_s - decode_s) * (sizes.least_tokens - 1)
            if blocking_s is not None:
                credit_s = min(credit_s, max(blocking_s, decode_s))
            num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), most // TILE_TOKENS, credit_s)
            num_tokens = min(num_tiles * TILE_TOKENS, max(sizes.run_tokens, self.least_tokens))
            if num_tokens:
                burst_s = step_s(num_tokens)
                bursts = min(1.0, max(0.0, target_s - decode_s) / max(burst_s - decode_s, 1e-9))  # a token
                burst_rate = bursts * num_tokens / (bursts * burst_s + (1.0 - bursts) * decode_s)
                burst_tokens = num_tokens
            yield
        num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), most // TILE_TOKENS, target_s)
        num_tokens = num_tiles * TILE_TOKENS
        steady_rate = num_tokens / step_s(num_tokens) if num_tokens else 0.0
        mixed = Candidate("mix", 0.0, 1.0, max(steady_rate, burst_rate))
        return self._cut(mixed, decode, first, num_tokens if steady_rate >= burst_rate else burst_tokens)

    def _cut(self, mixed: Candidate, decode: StepShape, start: int, num_tokens: int) -> Candidate:
        """The mixed step in nano-batches, where the search found that they save time and no trial has said otherwise."""
        if self.nano is None or "nano" not in self._kinds or not num_tokens:
            return mixed
        gain = self.nano.predicted_gain(decode.plus_chunk(start, num_tokens, self._model.window))
        if gain <= 0.0:
            return mixed
        return mixed._replace(kind="nano", prompt_tokens_per_s=mixed.prompt_tokens_per_s / (1.0 - gain))

    def _split(
        self, sizes: Sizes, decode: StepShape, run: StepShape, prefill_share: float, decode_share: float,
        target_s: float | None, guard: float,
    ) -> Candidate:  # fmt: skip
        model, total = self._model, prefill_share + decode_share
        decode_cost, run_cost = self._cost(decode, decode_share), self._cost(run, prefill_share)
        decode_demand, run_demand = decode_cost.demand_bytes_per_s, run_cost.demand_bytes_per_s
        is_overlap = total > 1.0 + 1e-9
        if is_overlap:
            slow_down = model.slow_down_of_overlap(total, decode_demand + run_demand)
            decode_s, run_s = decode_cost.alone_s * slow_down * guard, run_cost.alone_s * slow_down
        else:
            decode_s, run_s = decode_cost.duration_s(run_demand) * guard, run_cost.duration_s(decode_demand)
        rate = sizes.run_tokens / run_s
        if target_s is not None and decode_s > target_s:
            rate = 0.0
        return Candidate("overlap" if is_overlap else "split", prefill_share, decode_share, rate)

    def _cost(self, shape: StepShape, share: float) -> StepCost:
        """Kept: sizes come in new combinations far more often than anew."""
        cost = self._costs.get((shape, share))
        if cost is None:
            cost = self._costs[shape, share] = self._model.step_cost(shape, share)
        return cost


def rounded(value: float, steps_per_octave: int = FINE) -> int:
    """To the nearest of so many sizes an octave; 0 stays 0."""
    if value < 1:
        return 0
    return round(2.0 ** (round(log2(value) * steps_per_octave) / steps_per_octave))
