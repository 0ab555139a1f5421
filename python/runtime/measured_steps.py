"""Steps of chosen shapes on the real engine's Program, node by node timed: what `partita calibrate` fits to."""

from __future__ import annotations

import math
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from runtime import _native
from scheduler.step import ScheduledRequest
from scheduler.step_shape import StepShape, shape_of

# Steps of decodes follow steps of decodes, mostly. For some 30 ms after a large step a small one takes up to 1.5 times as
# long, as the large one has pushed weights and KV out of the caches.
SETTLE_S = 0.03


@dataclass(frozen=True, slots=True)
class StepKind:
    """Requests of one step: `num_decodes` of one token each behind `decode_context` tokens, and `num_chunks` of
    `chunk_tokens` behind `chunk_start`."""

    num_decodes: int = 0
    decode_context: int = 0
    num_chunks: int = 0
    chunk_tokens: int = 0
    chunk_start: int = 0

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(start, tokens) of each request."""
        decodes = [(self.decode_context, 1)] * self.num_decodes
        return decodes + [(self.chunk_start, self.chunk_tokens)] * self.num_chunks

    def shape(self, window: int) -> StepShape:
        return shape_of(
            [ScheduledRequest("", row, start, n, (), True) for row, (start, n) in enumerate(self.parts)], window
        )

    def num_pages(self, page_size: int) -> int:
        return sum(-(-(start + n) // page_size) for start, n in self.parts)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    kind: StepKind
    shape: StepShape
    step_s: float  # of the median run
    node_s: tuple[float, ...]  # of that run, per node of the program; 0 where nothing ran


class StepBench:
    """Rows, pages and lanes of its own over a loaded model. One lane per core list."""

    def __init__(self, loaded, lane_cores: Sequence[Sequence[int]], max_tokens: int, max_requests: int) -> None:
        plan = loaded.kv_plan
        self.program, self.plan = loaded.program, plan
        self.window = max((group.window for group in plan.groups), default=0)
        self.max_tokens = max_tokens
        device = loaded.device
        self.arena = device.kv_arena(plan.groups, plan.num_pages)
        self.rows = device.row_store(
            max_requests, plan.max_model_len, plan.num_groups, plan.page_size, loaded.config.vocab_size
        )
        self.completions = _native.CompletionQueue()
        self.lanes = [device.lane(index, self.completions, list(cores)) for index, cores in enumerate(lane_cores)]
        for lane in self.lanes:
            lane.set_tracing(True)
        self._sampling = _native.SamplingParams()
        self._sampling.temperature = 0.0
        self._max_requests = max_requests
        self._token_ids = array("i", (7 * i % loaded.config.vocab_size for i in range(plan.max_model_len)))

    def fits(self, kind: StepKind) -> bool:
        longest = max(start + n for start, n in kind.parts)
        return (
            kind.num_pages(self.plan.page_size) * self.plan.num_groups <= self.plan.num_pages
            and longest < self.plan.max_model_len
            and sum(n for _, n in kind.parts) <= self.max_tokens
            and len(kind.parts) <= self._max_requests
        )

    def fits_twice(self, kind: StepKind) -> bool:
        """Beside another step that is no larger."""
        num_pages = kind.num_pages(self.plan.page_size) * self.plan.num_groups
        return 2 * num_pages <= self.plan.num_pages and 2 * len(kind.parts) <= self._max_requests

    def new_frame(self):
        return _native.Frame(self.program, self.arena, self.rows, self.max_tokens, self._max_requests)

    def prepare(self, frame, kind: StepKind, first_row: int = 0, first_page: int = 0):
        """Makes the frame ready for one run. Pages hold whatever they hold: time does not depend on it."""
        quadruples = array("i")
        page = first_page
        for row, (start, num_tokens) in enumerate(kind.parts, first_row):
            length = start + num_tokens
            self.rows.admit(row, self._token_ids[:length], length, self._sampling)
            num_pages = -(-length // self.plan.page_size)
            for group in range(self.plan.num_groups):
                self.rows.set_pages(row, group, 0, list(range(page, page + num_pages)), self.plan.num_pages)
                page += num_pages
            quadruples.extend((row, start, num_tokens, 1))
        frame.prepare(quadruples)
        return frame

    def measure(self, kind: StepKind, num_runs: int, lane: int = 0) -> MeasuredStep:
        return self.measure_all([kind], num_runs, lane=lane)[0]

    def measure_all(
        self, kinds: Sequence[StepKind], num_rounds: int, until_s: float = math.inf, lane: int = 0
    ) -> list[MeasuredStep]:
        """Every kind once a round, in another order each round, so that a busy second spoils one run of many kinds and
        not all runs of one. In a round a kind is run until SETTLE_S have passed, and its last run counts; of the rounds the
        median does: the fastest, which was taken before, is 6 to 8 % short of what the same steps take in a run of minutes.
        Ends after a round that passed `until_s` on the monotonic clock; the first round always ends."""
        frame, order = self.new_frame(), list(range(len(kinds)))
        runs: list[list[dict]] = [[] for _ in kinds]
        for round_idx in range(num_rounds):
            random.Random(round_idx).shuffle(order)
            for index in order:
                kind = kinds[index]
                settled_s = time.monotonic() + SETTLE_S
                completion = self.run(self.prepare(frame, kind), lane)
                while time.monotonic() < settled_s:
                    completion = self.run(self.prepare(frame, kind), lane)
                runs[index].append(completion)
            if time.monotonic() > until_s:
                break
        for each in runs:
            each.sort(key=lambda completion: completion["end_ns"] - completion["start_ns"])
        return [self._measured(kind, each[len(each) // 2]) for kind, each in zip(kinds, runs, strict=True)]

    def _measured(self, kind: StepKind, completion: dict) -> MeasuredStep:
        node_s = [0.0] * self.program.num_nodes
        for node, start_ns, end_ns in completion["spans"]:
            node_s[node] += (end_ns - start_ns) / 1e9
        step_s = (completion["end_ns"] - completion["start_ns"]) / 1e9
        return MeasuredStep(kind, kind.shape(self.window), step_s, tuple(node_s))

    def run_times_s(self, kind: StepKind, num_runs: int, lane: int = 0) -> list[float]:
        """Of runs in a row, the first of which have passed."""
        return [(run["end_ns"] - run["start_ns"]) / 1e9 for run in self.runs(kind, num_runs, lane)]

    def runs(self, kind: StepKind, num_runs: int, lane: int = 0, seconds: float = 0.0) -> list[dict]:
        """Completions of runs in a row, the first of which have passed; at least so many, for at least so many seconds."""
        frame, ran = self.new_frame(), []
        settled_s = time.monotonic() + SETTLE_S
        while len(ran) < num_runs or time.monotonic() < settled_s + seconds:
            completion = self.run(self.prepare(frame, kind), lane)
            if time.monotonic() >= settled_s:
                ran.append(completion)
        return ran

    def run(self, frame, lane: int = 0) -> dict:
        self.lanes[lane].submit(frame, 0, self.program.num_nodes)
        (completion,) = self.wait(1)
        return completion

    def wait(self, num: int) -> list[dict]:
        done: list[dict] = []
        while len(done) < num:
            done += self.completions.wait_any(30.0)
        for completion in done:
            if completion["error"]:
                raise RuntimeError(f"calibration step failed: {completion['error']}")
        return done

    def beside(
        self, kind: StepKind, other: StepKind, num_runs: int, seconds: float = 0.0
    ) -> tuple[list[dict], list[dict]]:
        """Completions of the runs of `kind` on lane 0 while lane 1 runs `other` without pause, and of those; for at least
        num_runs runs and so many seconds."""
        num_rows, num_pages = len(kind.parts), kind.num_pages(self.plan.page_size) * self.plan.num_groups
        watched, frames = self.new_frame(), [self.new_frame(), self.new_frame()]
        num_others, in_flight, until_s = 0, 0, time.monotonic() + seconds
        ran: tuple[list[dict], list[dict]] = ([], [])

        def submit_other() -> None:
            nonlocal num_others, in_flight
            frame = self.prepare(frames[num_others % 2], other, num_rows, num_pages)
            self.lanes[1].submit(frame, 0, self.program.num_nodes)
            num_others += 1
            in_flight += 1

        submit_other()
        submit_other()
        while len(ran[0]) < num_runs or time.monotonic() < until_s:
            self.lanes[0].submit(self.prepare(watched, kind), 0, self.program.num_nodes)
            is_running = True
            while is_running:
                for completion in self.wait(1):
                    ran[completion["lane"]].append(completion)
                    if completion["lane"] == 0:
                        is_running = False
                    else:
                        in_flight -= 1
                        submit_other()
        if in_flight:
            self.wait(in_flight)
        return ran

    def slow_down(self, kind: StepKind, other: StepKind, num_runs: int) -> float:
        """How much longer `kind` takes on lane 0 while lane 1 runs `other` without pause, as a ratio of fastest runs."""
        fastest_ns = min(run["end_ns"] - run["start_ns"] for run in self.beside(kind, other, num_runs)[0])
        return fastest_ns / 1e9 / self.measure(kind, num_runs).step_s

    def overlap_gain(self, kind: StepKind, other: StepKind, seconds: float) -> float:
        """What two lanes that have all cores each yield at once, above one after the other, 0 to 1: the seconds that their
        steps would take alone, over the time in which both were there. Of the other's step that the end cuts, the part
        before the end counts."""
        alone_ns = [statistics.median(self.run_times_s(one, 9)) * 1e9 for one in (kind, other)]
        ours, others = self.beside(kind, other, 1, seconds)
        start_ns, end_ns = ours[0]["start_ns"], ours[-1]["end_ns"]
        done_ns = len(ours) * alone_ns[0]
        for run in others:
            inside_ns = min(run["end_ns"], end_ns) - max(run["start_ns"], start_ns)
            if inside_ns > 0:
                done_ns += alone_ns[1] * inside_ns / (run["end_ns"] - run["start_ns"])
        return min(max(done_ns / (end_ns - start_ns) - 1.0, 0.0), 1.0)
