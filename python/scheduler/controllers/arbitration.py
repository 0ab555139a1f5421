"""The rule that chooses, at every boundary, how prefill and decode share the chip.

Candidates, each with the prompt tokens per second that it sustains while decodes keep their TPOT:

    mix       one lane, prompts cut by tokens: a step of decodes and the largest chunk that the target leaves room for
    nano      the mixed step cut into nano-batches, where --nano-batches is auto and the search or the trial speaks for it
    turns     one lane, prompts cut by operators: a step of decodes, then a part of a run as long as the rest of the target
    P:D       two lanes, decodes on D of the chip beside runs on P, contention for memory included, at every rung of the chip
    100:100   two lanes without a border

The one that sustains most wins; the present one is left only for a gain of more than `hysteresis`. With nothing to decode,
or no prompt, the whole chip does what there is. Within one lane the credit of those who decode decides how long the very
next step may be (tpot_slack.py), so a burst of prompts is worked off while it hurts nobody.

FastGen (mix), Layered Prefill (turns), semi-PD and Nexus (P:D) and un-partitioned lanes (100:100) are this rule with one
kind of candidate; their own controllers are beside this one to be compared with.
"""

from __future__ import annotations

from collections import deque
from math import log2
from typing import NamedTuple

from scheduler.arrangement import DECODE_LANE, Arrangement
from scheduler.config import SchedulerConfig
from scheduler.controllers.tpot_slack import AnswerLengths, allowed_step_s
from scheduler.cost_model import CostModel, StepCost
from scheduler.nanobatch_planner import NanoPlanner
from scheduler.outlook import Decodes, Outlook
from scheduler.request import Request
from scheduler.splitfuse import TILE_TOKENS, most_tiles
from scheduler.step_shape import StepShape

HYSTERESIS = 0.05
# Of a target that plans are made for: predictions err, and a mean that is planned to be just kept is missed half of the
# time.
MARGIN = 0.95
KINDS = ("mix", "nano", "turns", "split", "overlap")
_STEPS_PER_OCTAVE = 4  # of the sizes for which candidates are predicted: neighbours differ by less than a fifth
_MOST_KNOWN = 4096
_REFRESH_EVERY = 2048  # decisions after which predictions are made anew: the cost model learns
# A mixed step cannot be paused, and the one planned behind it neither: an arrival waits for both. Of the tightest TTFT
# target that was lately met with, a step takes at most this part.
_BLOCKING_SHARE = 0.15
_NUM_TTFT_TARGETS = 64
_LOOK_AHEAD = 8  # prompts that stand for those to come


class Candidate(NamedTuple):
    kind: str  # one of KINDS
    prefill_share: float  # 0: one lane
    decode_share: float
    prompt_tokens_per_s: float  # sustained, while the decodes keep their target
    decode_step_s: float


class _Sizes(NamedTuple):
    """What predictions are made for, rounded."""

    num_decodes: int
    context: int  # tokens that a decode sees
    num_prompts: int  # that would go together
    prompt_tokens: int  # of each, pending
    prompt_start: int  # before them
    tpot_us: int
    least_tokens: int  # that an answer has, most of the time
    ttft_ms: int  # the tightest target that was lately met with; 0: none

    @property
    def run_tokens(self) -> int:
        return self.num_prompts * self.prompt_tokens


class Arbitration:
    """kinds: the candidates that may be chosen."""

    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None, *, kinds: tuple[str, ...] = KINDS,
        hysteresis: float = HYSTERESIS, uses_slack: bool = True,
    ) -> None:  # fmt: skip
        self._config = config
        self._model = cost_model
        self._kinds = kinds
        self._hysteresis = hysteresis
        self._uses_slack = uses_slack
        self._nano: NanoPlanner | None = None
        self._ttft_targets: deque[float] = deque(maxlen=_NUM_TTFT_TARGETS)
        self._lengths = AnswerLengths()
        self._busy_until_s = 0.0  # when the last step that was decided on ends, as predicted
        self._latest_step_s = 0.0  # what it takes
        self._present: Candidate | None = None
        self._known: dict[_Sizes, tuple[Candidate, ...]] = {}
        self._costs: dict[tuple[StepShape, float], StepCost] = {}  # of lanes
        self._num_decisions = 0
        has_lanes = config.lanes == "auto"
        self._splits = [(rung, 1.0 - rung) for rung in config.rungs] if has_lanes and "split" in kinds else []
        if has_lanes and "overlap" in kinds:
            self._splits.append((1.0, 1.0))
        self._least_tokens = 0
        if cost_model is not None:
            self._least_tokens = max(TILE_TOKENS, cost_model.saturating_tokens(config.max_num_batched_tokens) // 2)

    # What it hears

    def hear_first_token(self, request: Request, now: float) -> None:
        if request.ttft_s is not None:
            self._ttft_targets.append(request.ttft_s)

    def hear_finished(self, request: Request, now: float) -> None:
        if request.finish_reason in ("stop", "length"):
            self._lengths.add(request.num_output_tokens)

    # What it decides

    def arrange(self, outlook: Outlook) -> Arrangement:
        model = self._model
        if model is None:
            return Arrangement(reason="no calibrated machine: one lane, the policy's budget")
        if not outlook.has_prefill():
            return Arrangement(reason="no prompt: the whole chip decodes")
        decodes = outlook.decodes(DECODE_LANE)
        if decodes.shape.num_tokens == 0:
            # Whole runs, which an arrival that ranks before them can pause.
            return Arrangement(granularity="operator", token_budget=self._config.max_num_batched_tokens,
                               reason="no decode: the whole chip takes prompts")  # fmt: skip
        self._nano = outlook.nano
        candidate = self._choose(outlook, decodes)
        rate, num = candidate.prompt_tokens_per_s, decodes.shape.num_tokens
        text = f"{_name(candidate)}: {rate:.0f} prompt tokens/s beside {num} decodes"
        if candidate.prefill_share:
            return Arrangement(candidate.prefill_share, candidate.decode_share, "operator", reason=text)
        decode_s = model.guarded_step_s(decodes.shape)
        allowed_s = self._allowed_s(outlook, decodes, decode_s)
        # A run that has begun goes on in turns: mixed steps would have it end before any other prompt begins, one in a hurry
        # too. (Found by a real run: of short prompts beside long ones 27 % were in time instead of all.)
        if candidate.kind == "turns" or outlook.runs:
            room_s = 1e9 if allowed_s is None else max(allowed_s - decode_s, 0.0)
            return Arrangement(granularity="operator", segment_s=max(room_s, 1e-6), reason=text)
        num_nano_batches = 0 if candidate.kind == "nano" else 1
        blocking_s = _BLOCKING_SHARE * min(self._ttft_targets) if self._ttft_targets and self._uses_slack else None
        budget = self._budget(outlook, decodes, allowed_s, blocking_s)
        return Arrangement(token_budget=budget, num_nano_batches=num_nano_batches, reason=text)

    def _choose(self, outlook: Outlook, decodes: Decodes) -> Candidate:
        candidates = self._predict(self._sizes(outlook, decodes))
        best = max(candidates, key=lambda candidate: candidate.prompt_tokens_per_s)
        present = self._present
        if present is not None:
            same = next((each for each in candidates if each[:3] == present[:3]), None)
            if same is not None and best.prompt_tokens_per_s <= same.prompt_tokens_per_s * (1.0 + self._hysteresis):
                best = same
        self._present = best
        return best

    def _sizes(self, outlook: Outlook, decodes: Decodes) -> _Sizes:
        shape = decodes.shape
        most, num_tokens, num_prompts, starts = self._config.max_num_batched_tokens, 0, 0, 0
        for run in outlook.runs:
            num_tokens, num_prompts = num_tokens + run.num_tokens, num_prompts + len(run.requests)
        for request in outlook.prefills(_LOOK_AHEAD):
            num_pending = request.num_expected_tokens - request.next_start
            if num_prompts and num_tokens + num_pending > most:
                break
            num_tokens, num_prompts, starts = num_tokens + num_pending, num_prompts + 1, starts + request.next_start
        tpot_s, num_prompts = decodes.tightest_tpot_s, max(num_prompts, 1)
        return _Sizes(
            _rounded(shape.num_tokens), _rounded(shape.decode_kv_tokens / shape.num_tokens), num_prompts,
            _rounded(max(min(num_tokens, most) / num_prompts, 1)), _rounded(starts / num_prompts),
            round(tpot_s * 1e6) if tpot_s else 0, _rounded(self._lengths.least),
            round(1e3 * min(self._ttft_targets, default=0.0)),
        )  # fmt: skip

    def _predict(self, sizes: _Sizes) -> tuple[Candidate, ...]:
        self._num_decisions += 1
        if self._num_decisions % _REFRESH_EVERY == 0 or len(self._known) >= _MOST_KNOWN:
            self._known.clear()
            self._costs.clear()
        known = self._known.get(sizes)
        if known is None:
            known = self._known[sizes] = tuple(self._candidates(sizes))
        return known

    def _candidates(self, sizes: _Sizes) -> list[Candidate]:
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
        found = []
        if "mix" in self._kinds:
            found.append(self._mix(sizes, decode, decode_s, target_s, guard))
        if "turns" in self._kinds or not found:
            # In turns prompts have what decode steps leave of every target.
            free = 0.5 if target_s is None else max(0.0, 1.0 - decode_s / target_s)
            found.append(Candidate("turns", 0.0, 1.0, free * sizes.run_tokens / run_s, decode_s))
        for prefill_share, decode_share in self._splits:
            found.append(self._split(sizes, decode, run, prefill_share, decode_share, target_s, guard))
        return found

    def _mix(
        self, sizes: _Sizes, decode: StepShape, decode_s: float, target_s: float | None, guard: float
    ) -> Candidate:
        """The rate of the largest chunk that fits; where even the least that is worth its step does not, it goes once in
        so many steps of decodes as pay for it."""
        model, window = self._model, self._model.window
        most = max(TILE_TOKENS, self._config.max_num_batched_tokens - decode.num_tokens)

        # Chunks of a prompt see what came before them: half of it on average.
        first, whole_prompt = sizes.prompt_start, sizes.prompt_tokens

        def step_s(num_tokens: int) -> float:
            shape = decode
            for _ in range(num_tokens // whole_prompt):
                shape = shape.plus_chunk(first, whole_prompt, window)
            part = num_tokens % whole_prompt
            if part:
                shape = shape.plus_chunk(first + (whole_prompt - part) // 2, part, window)
            return model.step_s(shape) * guard

        blocking_s = _BLOCKING_SHARE * sizes.ttft_ms / 1e3 if sizes.ttft_ms else None
        if target_s is None:
            whole = min(most, sizes.run_tokens)
            if blocking_s is not None:
                num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), -(-whole // TILE_TOKENS), blocking_s)
                whole = min(whole, num_tiles * TILE_TOKENS)
            if not whole:  # even a tile keeps arrivals waiting: in turns they need not wait
                return Candidate("mix", 0.0, 1.0, 0.0, decode_s)
            return self._cut(Candidate("mix", 0.0, 1.0, whole / step_s(whole), step_s(whole)), decode, first, whole)
        burst_rate = burst_tokens = 0.0
        if self._uses_slack:
            # Bursts: a large chunk now and then, as large as the credit that the shortest answers gather pays for, and
            # decodes alone between them.
            credit_s = target_s + (target_s - decode_s) * (sizes.least_tokens - 1)
            if blocking_s is not None:
                credit_s = min(credit_s, max(blocking_s, decode_s))
            num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), most // TILE_TOKENS, credit_s)
            num_tokens = min(num_tiles * TILE_TOKENS, max(sizes.run_tokens, self._least_tokens))
            if num_tokens:
                burst_s = step_s(num_tokens)
                bursts = min(1.0, max(0.0, target_s - decode_s) / max(burst_s - decode_s, 1e-9))  # a token
                burst_rate = bursts * num_tokens / (bursts * burst_s + (1.0 - bursts) * decode_s)
                burst_tokens = num_tokens
        num_tiles = most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), most // TILE_TOKENS, target_s)
        num_tokens = num_tiles * TILE_TOKENS
        steady_rate = num_tokens / step_s(num_tokens) if num_tokens else 0.0
        mixed = Candidate("mix", 0.0, 1.0, max(steady_rate, burst_rate), decode_s)
        return self._cut(mixed, decode, first, num_tokens if steady_rate >= burst_rate else burst_tokens)

    def _cut(self, mixed: Candidate, decode: StepShape, start: int, num_tokens: int) -> Candidate:
        """The mixed step in nano-batches, where the search found that they save time and no trial has said otherwise."""
        if self._nano is None or "nano" not in self._kinds or not num_tokens:
            return mixed
        gain = self._nano.predicted_gain(decode.plus_chunk(start, num_tokens, self._model.window))
        if gain <= 0.0:
            return mixed
        return mixed._replace(kind="nano", prompt_tokens_per_s=mixed.prompt_tokens_per_s / (1.0 - gain))

    def _split(
        self, sizes: _Sizes, decode: StepShape, run: StepShape, prefill_share: float, decode_share: float,
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
            # Only part of the time, the rest of which the whole chip decodes.
            alone_s = model.step_s(decode) * guard
            rate *= max(0.0, target_s - alone_s) / max(decode_s - alone_s, 1e-9) if alone_s < decode_s else 0.0
        return Candidate("overlap" if is_overlap else "split", prefill_share, decode_share, rate, decode_s)

    def _cost(self, shape: StepShape, share: float) -> StepCost:
        """Kept: sizes come in new combinations far more often than anew."""
        cost = self._costs.get((shape, share))
        if cost is None:
            cost = self._costs[shape, share] = self._model.step_cost(shape, share)
        return cost

    def _allowed_s(self, outlook: Outlook, decodes: Decodes, decode_s: float) -> float | None:
        if decodes.tightest_tpot_s is None:
            return None
        if not self._uses_slack:
            return MARGIN * decodes.tightest_tpot_s
        who = (request for request in outlook.running if request.run is None)
        # A step that was planned ahead is still running: the next one begins behind it, but never more than one step.
        self._busy_until_s = min(self._busy_until_s, outlook.now + self._latest_step_s)
        begin_s = max(outlook.now, self._busy_until_s)
        return allowed_step_s(who, begin_s, decode_s, self._lengths, MARGIN)

    def _budget(self, outlook: Outlook, decodes: Decodes, allowed_s: float | None, blocking_s: float | None) -> int:
        """Tokens of the next step: a chunk as large as the credit allows, none where that is not worth a step, and smaller
        where it would keep arrivals waiting."""
        model, shape, most = self._model, decodes.shape, self._config.max_num_batched_tokens
        prefill = outlook.first_prefill(DECODE_LANE)
        if (allowed_s is None and blocking_s is None) or prefill is None:
            return most
        start, window, guard = prefill.next_start, model.window, max(1.0, model.guard_ratio)

        def tokens_within(limit_s: float | None) -> int:
            room = max(0, most - shape.num_tokens) // TILE_TOKENS
            if limit_s is None:
                return room * TILE_TOKENS
            return TILE_TOKENS * most_tiles(
                lambda tiles: model.step_s(shape.plus_chunk(start, tiles * TILE_TOKENS, window)) * guard, room, limit_s
            )

        num_tokens, least = tokens_within(allowed_s), self._least_tokens
        if num_tokens < min(least, prefill.num_expected_tokens - start) and self._uses_slack:
            num_tokens = 0  # credit grows until a chunk is worth it
        elif blocking_s is not None and num_tokens > least:
            num_tokens = min(num_tokens, max(tokens_within(blocking_s), least))
        if num_tokens:
            shape = shape.plus_chunk(start, num_tokens, window)
        begin_s = max(outlook.now, self._busy_until_s)
        self._latest_step_s = model.step_s(shape)
        self._busy_until_s = begin_s + self._latest_step_s
        return shape.num_tokens


def _rounded(value: float) -> int:
    """To the nearest of a few sizes an octave; 0 stays 0."""
    if value < 1:
        return 0
    return round(2.0 ** (round(log2(value) * _STEPS_PER_OCTAVE) / _STEPS_PER_OCTAVE))


def _name(candidate: Candidate) -> str:
    if candidate.prefill_share:
        return f"{candidate.prefill_share * 100:.0f}:{candidate.decode_share * 100:.0f}"
    return candidate.kind
