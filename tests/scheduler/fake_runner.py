"""A runner without a model, which knows what every KV slot holds, and a driver that checks the invariants at every
event.

A slot's content is (KV group, hash of namespace and all tokens up to its position): what real KV depends on. Before a
chunk runs, every slot that its tokens can see must hold exactly that; the next token is a function of the last content,
so a request's output is known in advance, however it is batched, cached, copied, preempted or pipelined.

Plans run as late as possible, when their result is asked for: a page that was given away too early has been given away.
"""

from __future__ import annotations

import zlib
from collections import deque

from scheduler import (
    AbortRequest,
    Arrival,
    LaneFinished,
    LanePlan,
    LaneResult,
    Request,
    Scheduler,
    SchedulerConfig,
    Timer,
    TokenOutput,
)

VOCAB_SIZE = 7
STOP_TOKEN_ID = 5


def contents_of(namespace, token_ids) -> list[int]:
    """[len(token_ids)] what the KV at each position depends on."""
    # Hashes of ints only: those of strings differ from process to process.
    contents, content = [], zlib.crc32(repr(namespace).encode())
    for token_id in token_ids:
        content = hash((content, token_id))
        contents.append(content)
    return contents


def next_token(content: int) -> int:
    return (content >> 5) % VOCAB_SIZE


def reference_output(request: Request) -> tuple[list[int], str]:
    """What the request must generate, one token at a time, alone; and its finish reason."""
    tokens = list(request.prompt_token_ids)
    outputs: list[int] = []
    content = contents_of(request.namespace, tokens)[-1]
    while True:
        token_id = next_token(content)
        outputs.append(token_id)
        if token_id in request.stop_token_ids and len(outputs) > request.min_tokens:
            return outputs, "stop"
        if len(outputs) == request.max_tokens:
            return outputs, "length"
        content = hash((content, token_id))


class Row:
    def __init__(self, request: Request, token_ids) -> None:
        self.request = request
        self.tokens = list(token_ids)
        self.contents = contents_of(request.namespace, self.tokens)
        self.tables: list[list[int]] = []
        self.next_position = 0  # positions are written once per life, in order


class FakeRunner:
    """Runs plans on rows and an arena of slots."""

    def __init__(self, config: SchedulerConfig, requests: dict[str, Request]) -> None:
        self.config = config
        self.requests = requests
        self.rows: dict[int, Row] = {}
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) -> (group, content)
        self.num_copies = 0

    def run(self, plan: LanePlan) -> LaneResult:
        page_size = self.config.page_size
        for admission, reset in zip(plan.admissions, plan.resets, strict=True):
            assert admission.row == reset.row
            row = self.rows[admission.row] = Row(self.requests[admission.request_id], admission.token_ids)
            assert admission.num_prompt_tokens == row.request.num_prompt_tokens
            row.tables = [list(table) for table in reset.pages]
            row.next_position = admission.num_computed_tokens
        for scheduled in plan.requests:
            row = self.rows[scheduled.row]
            assert row.request.request_id == scheduled.request_id, "the row belongs to another request"
            for table, new_pages in zip(row.tables, scheduled.new_pages, strict=True):
                table.extend(new_pages)
        for copy in plan.copies:
            self.num_copies += 1
            for offset in range(page_size):
                self.slots[copy.target_page, offset] = self.slots.get((copy.source_page, offset), (-1, 0))

        sampled = []
        for scheduled in plan.requests:
            row = self.rows[scheduled.row]
            stop = scheduled.start + scheduled.num_tokens
            assert scheduled.num_tokens >= 1
            assert scheduled.start == row.next_position, "positions are written once, in order"
            assert stop <= len(row.tokens), "a plan reached for a token that no plan before it samples"
            assert stop <= min(len(table) for table in row.tables) * page_size, "the page table is too short"
            for group, window in enumerate(self.config.kv_group_windows):
                first_seen = max(0, scheduled.start - window + 1) if window else 0
                for position in range(first_seen, scheduled.start):
                    slot = (row.tables[group][position // page_size], position % page_size)
                    assert self.slots.get(slot) == (group, row.contents[position]), (
                        f"{scheduled.request_id} at {scheduled.start} sees wrong KV at {position} (page {slot[0]})"
                    )
                for position in range(scheduled.start, stop):
                    page_id = row.tables[group][position // page_size]
                    self.slots[page_id, position % page_size] = (group, row.contents[position])
            row.next_position = stop
            assert scheduled.samples == (stop == len(row.tokens)), "samples if and only if it caught up"
            if scheduled.samples:
                token_id = next_token(row.contents[-1])
                row.tokens.append(token_id)
                row.contents.append(hash((row.contents[-1], token_id)))
                sampled.append((scheduled.request_id, token_id))
        return LaneResult(plan.plan_id, plan.lane, tuple(sampled))


class CheckedScheduler:
    """A scheduler, its runner, and every invariant after every event."""

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler | None = None) -> None:
        self.config = config
        self.scheduler = scheduler or Scheduler(config)
        self.requests: dict[str, Request] = {}
        self.runner = FakeRunner(config, self.requests)
        self.lanes: list[deque[LanePlan]] = [deque() for _ in config.lane_shares]
        self.tables: dict[int, list[list[int]]] = {}  # row -> page tables as plans have announced them
        self.named_pages: dict[int, dict[int, str]] = {}  # plan in flight -> page -> request that names it
        self.outputs: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, str] = {}
        self.errors: dict[str, str | None] = {}
        self.num_outputs: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.plans: list[LanePlan] = []
        self.now = 0.0

    # Events

    def arrive(self, request: Request) -> list[LanePlan]:
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        return self.send(Arrival(request))

    def abort(self, request_id: str, reason: str = "abort") -> list[LanePlan]:
        if request_id not in self.finish_reasons:
            self.aborted.add(request_id)
        return self.send(AbortRequest(request_id, reason))

    def land(self, lane: int = 0) -> list[LanePlan]:
        """The oldest plan in flight on the lane runs and reports."""
        plan = self.lanes[lane][0]
        result = self.runner.run(plan)
        self.lanes[lane].popleft()
        del self.named_pages[plan.plan_id]
        return self.send(LaneFinished(result))

    def run_until_idle(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            busy = [lane for lane, plans in enumerate(self.lanes) if plans]
            if not busy:
                assert self.scheduler.num_unfinished == 0, f"stuck with {self.scheduler.num_unfinished} requests"
                return
            self.land(busy[0])
        raise AssertionError(f"not idle after {max_steps} steps")

    def send(self, event) -> list[LanePlan]:
        self.now += 1.0
        plans = self.scheduler.on_event(event, self.now)
        for plan in plans:
            self._check_plan(plan)
        for output in self.scheduler.take_outputs():
            self._check_output(output)
        self.check()
        return plans

    # Invariants

    def check(self) -> None:
        self.scheduler.check_integrity()
        pool = self.scheduler._pages._pool
        for plan_id, named in self.named_pages.items():
            for page_id, request_id in named.items():
                assert not pool.is_free(page_id), f"page {page_id} is free while plan {plan_id} names it ({request_id})"
        for plans in self.lanes:
            assert len(plans) <= self.config.max_plans_in_flight
        lanes_of: dict[str, set[int]] = {}
        for lane, plans in enumerate(self.lanes):
            for plan in plans:
                for scheduled in plan.requests:
                    lanes_of.setdefault(scheduled.request_id, set()).add(lane)
        assert all(len(lanes) == 1 for lanes in lanes_of.values()), "a request is in flight on two lanes"

    def _check_plan(self, plan: LanePlan) -> None:
        self.plans.append(plan)
        assert 1 <= plan.num_tokens <= self.config.max_num_batched_tokens, "the token budget"
        rows = [scheduled.row for scheduled in plan.requests]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < self.config.max_num_seqs for row in rows)
        assert {admission.row for admission in plan.admissions} <= set(rows)
        rows_in_flight = {scheduled.row for plans in self.lanes for other in plans for scheduled in other.requests}
        assert not rows_in_flight.intersection(admission.row for admission in plan.admissions), "row reused in flight"
        if self.config.max_prefill_chunk:
            assert all(scheduled.num_tokens <= self.config.max_prefill_chunk for scheduled in plan.requests)

        for reset in plan.resets:
            self.tables[reset.row] = [list(table) for table in reset.pages]
        written = [copy.target_page for copy in plan.copies]
        named: dict[int, str] = {copy.source_page: "copy" for copy in plan.copies}
        for scheduled in plan.requests:
            for table, new_pages in zip(self.tables[scheduled.row], scheduled.new_pages, strict=True):
                table.extend(new_pages)
                written.extend(new_pages)
            for table, window in zip(self.tables[scheduled.row], self.config.kv_group_windows, strict=True):
                first_seen = max(0, scheduled.start - window + 1) if window else 0
                for page_id in table[first_seen // self.config.page_size :]:
                    named[page_id] = scheduled.request_id
        assert len(set(written)) == len(written), "a page was handed out twice in one plan"
        for other_id, other in self.named_pages.items():
            taken = set(other).intersection(written)
            assert not taken, f"pages {taken} were handed out by plan {plan.plan_id} while plan {other_id} names them"
        self.named_pages[plan.plan_id] = named
        self.lanes[plan.lane].append(plan)

    def _check_output(self, output: TokenOutput) -> None:
        assert output.request_id not in self.finish_reasons, "an output after the last one"
        self.outputs[output.request_id].extend(output.token_ids)
        count = self.num_outputs[output.request_id] = self.num_outputs.get(output.request_id, 0) + 1
        assert count == 1 or output.first_scheduled is None
        if output.finish_reason is not None:
            self.finish_reasons[output.request_id] = output.finish_reason
            self.errors[output.request_id] = output.error
            assert (output.finish_reason == "error") == (output.error is not None)
        if output.finish_reason == "stop":
            assert output.stop_token_id == output.token_ids[-1]

    def check_answers(self) -> None:
        """When idle: everybody was answered, with the tokens of the reference or a reason."""
        for request_id, request in self.requests.items():
            assert request_id in self.finish_reasons, f"{request!r} was never answered"
            wanted, reason = reference_output(request)
            got = self.outputs[request_id]
            if request_id in self.aborted or self.finish_reasons[request_id] == "error":
                assert got == wanted[: len(got)], request_id
            else:
                assert (got, self.finish_reasons[request_id]) == (wanted, reason), request_id

    def wake(self) -> list[LanePlan]:
        return self.send(Timer())
