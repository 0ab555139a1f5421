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

from scheduler.arrangement import DECODE_LANE, Arrangement
from scheduler.config import SchedulerConfig
from scheduler.controllers.candidates import (
    BLOCKING_SHARE,
    COARSE,
    KINDS,
    MARGIN,
    Candidate,
    Candidates,
    Prediction,
    Sizes,
    rounded,
)
from scheduler.controllers.tpot_slack import AnswerLengths, allowed_step_s
from scheduler.cost_model import CostModel
from scheduler.outlook import Decodes, Outlook
from scheduler.request import Request
from scheduler.splitfuse import TILE_TOKENS, most_tiles

HYSTERESIS = 0.05
_NUM_TTFT_TARGETS = 64
# Then a chunk goes in whatever the credit is: decodes that hardly keep their target would keep prompts out for ever.
MOST_STEPS_HELD = 64
_LOOK_AHEAD = 8  # prompts that stand for those to come


class Arbitration:
    """kinds: the candidates that may be chosen."""

    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel | None, *, kinds: tuple[str, ...] = KINDS,
        hysteresis: float = HYSTERESIS, uses_slack: bool = True,
    ) -> None:  # fmt: skip
        self._config = config
        self._model = cost_model
        # A granularity that was asked for leaves those that cut prompts so; splits go with any.
        beside = {"": (), "token": ("turns",)}.get(config.prefill, ("mix", "nano"))
        kinds = tuple(kind for kind in kinds if kind not in beside)
        self._candidates = Candidates(config, cost_model, kinds, uses_slack) if cost_model is not None else None
        self._hysteresis = hysteresis
        self._uses_slack = uses_slack
        self._ttft_targets: deque[float] = deque(maxlen=_NUM_TTFT_TARGETS)
        self._lengths = AnswerLengths()
        self._busy_until_s = 0.0  # when the last step that was decided on ends, as predicted
        self._latest_step_s = 0.0  # what it takes
        self._present: Candidate | None = None
        self._num_steps_held = 0  # in which credit let no chunk in

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
        self._candidates.nano = outlook.nano
        prediction = self._candidates.predict(self._sizes(outlook, decodes))
        candidate = self._choose(prediction)
        rate, num = candidate.prompt_tokens_per_s, decodes.shape.num_tokens
        text = f"{candidate.name}: {rate:.0f} prompt tokens/s beside {num} decodes"
        if candidate.prefill_share:
            return Arrangement(candidate.prefill_share, candidate.decode_share, "operator", reason=text)
        decode_s = model.guarded_step_s(decodes.shape)
        allowed_s = self._allowed_s(outlook, decodes, decode_s)
        # A run that has begun goes on in turns: mixed steps would have it end before any other prompt begins, one in a hurry
        # too. (Found by a real run: of short prompts beside long ones 27 % were in time instead of all.)
        if candidate.kind == "turns" or outlook.runs:
            room_s = prediction.part_s if allowed_s is None else max(allowed_s - decode_s, 0.0)
            return Arrangement(granularity="operator", segment_s=max(room_s, 1e-6), reason=text)
        num_nano_batches = 0 if candidate.kind == "nano" else 1
        blocking_s = BLOCKING_SHARE * min(self._ttft_targets) if self._ttft_targets and self._uses_slack else None
        budget = self._budget(outlook, decodes, allowed_s, blocking_s)
        return Arrangement(token_budget=budget, num_nano_batches=num_nano_batches, reason=text)

    def _choose(self, prediction: Prediction) -> Candidate:
        candidates = prediction.candidates
        best = max(candidates, key=lambda candidate: candidate.prompt_tokens_per_s)
        present = self._present
        if present is not None:
            same = next((each for each in candidates if each[:3] == present[:3]), None)
            if same is not None and best.prompt_tokens_per_s <= same.prompt_tokens_per_s * (1.0 + self._hysteresis):
                best = same
        self._present = best
        return best

    def _sizes(self, outlook: Outlook, decodes: Decodes) -> Sizes:
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
        return Sizes(
            rounded(shape.num_tokens), rounded(shape.decode_kv_tokens / shape.num_tokens, COARSE), num_prompts,
            rounded(max(min(num_tokens, most) / num_prompts, 1)), rounded(starts / num_prompts, COARSE),
            round(tpot_s * 1e6) if tpot_s else 0, rounded(self._lengths.least, COARSE),
            round(1e3 * min(self._ttft_targets, default=0.0)),
        )  # fmt: skip

    def _allowed_s(self, outlook: Outlook, decodes: Decodes, decode_s: float) -> float | None:
        if decodes.tightest_tpot_s is None:
            return None
        if not self._uses_slack:
            return MARGIN * decodes.tightest_tpot_s
        # A step that was planned ahead is still running: the next one begins behind it, but never more than one step.
        self._busy_until_s = min(self._busy_until_s, outlook.now + self._latest_step_s)
        begin_s = max(outlook.now, self._busy_until_s)
        if outlook.runs:
            begin_s = max(begin_s, outlook.now + decode_s)  # in turns: a step of decodes comes first
        return allowed_step_s(outlook.running, begin_s, decode_s, self._lengths, MARGIN)

    def _budget(self, outlook: Outlook, decodes: Decodes, allowed_s: float | None, blocking_s: float | None) -> int:
        """Tokens of the next step: a chunk as large as the credit allows, none where that is not worth a step, and smaller
        where it would keep arrivals waiting."""
        model, shape, most = self._model, decodes.shape, self._config.max_num_batched_tokens
        prefill = outlook.first_prefill(DECODE_LANE)
        if (allowed_s is None and blocking_s is None) or prefill is None:
            return most
        start, window, guard = prefill.next_start, model.window, max(1.0, model.guard_ratio)

        known: dict[int, float] = {}  # predictions are what a decision's time goes into

        def step_s(num_tokens: int) -> float:
            seconds = known.get(num_tokens)
            if seconds is None:
                seconds = known[num_tokens] = model.step_s(shape.plus_chunk(start, num_tokens, window)) * guard
            return seconds

        room = max(0, most - shape.num_tokens) // TILE_TOKENS
        limit_s = min(limit for limit in (allowed_s, blocking_s) if limit is not None)
        num_tokens = TILE_TOKENS * most_tiles(lambda tiles: step_s(tiles * TILE_TOKENS), room, limit_s)
        least = min(self._candidates.least_tokens, room * TILE_TOKENS)
        if num_tokens < min(least, prefill.num_expected_tokens - start) and self._uses_slack:
            # Where credit allows it, what is worth a step goes though it keeps arrivals waiting; else credit grows.
            is_paid = limit_s != allowed_s and (allowed_s is None or step_s(least) <= allowed_s)
            self._num_steps_held += 1
            is_paid = is_paid or self._num_steps_held > MOST_STEPS_HELD
            num_tokens = least if is_paid else 0
        if num_tokens:
            self._num_steps_held = 0
            shape = shape.plus_chunk(start, num_tokens, window)
        begin_s = max(outlook.now, self._busy_until_s)
        self._latest_step_s = known[num_tokens] / guard if num_tokens in known else model.step_s(shape)
        self._busy_until_s = begin_s + self._latest_step_s
        return shape.num_tokens
