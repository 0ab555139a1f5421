"""A runner without a model, which knows what every KV slot of every layer holds.

A slot's content is a hash of namespace and all tokens up to its position: what real KV depends on. Before a layer runs,
every slot that its tokens can see must hold exactly that; the next token is a function of the last content, so a request's
output is known in advance, however it is batched, cached, copied, cut in parts, paused, preempted or pipelined.

The program is the configuration's: page copies at node 0, a layer's KV at its first node, sampling at the end. Layer l
belongs to KV group l % groups.
"""

from __future__ import annotations

import zlib

from scheduler import LanePlan, LaneResult, Request, SchedulerConfig

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
        self.has_failed = False  # its KV and tokens mean nothing until the next admission


class Frame:
    """A run between its first node and its last."""

    def __init__(self, plan: LanePlan) -> None:
        self.plan = plan
        self.cursor = 0


class FakeRunner:
    """Runs plans on rows and an arena of slots."""

    def __init__(self, config: SchedulerConfig, requests: dict[str, Request]) -> None:
        self.config = config
        self.requests = requests
        self.num_nodes = config.num_nodes or 1
        self.layer_nodes = config.layer_starts or (0,) * config.num_kv_groups
        assert len(self.layer_nodes) >= config.num_kv_groups, "a KV group without a layer"
        self.rows: dict[int, Row] = {}
        self.kv: dict[tuple[int, int], list[int | None]] = {}  # (layer, page) -> content per offset
        self.frames: dict[int, Frame] = {}  # runs that rest
        self.num_copies = 0

    def run(self, plan: LanePlan, stop_node: int | None = None, error: str | None = None) -> LaneResult:
        """stop_node: the plan was paused and stops there, within its range. error: the plan fails."""
        first, last = plan.node_range or (0, self.num_nodes)
        assert 0 <= first < last <= self.num_nodes
        if plan.continues:
            frame = self.frames.pop(plan.continues)
            no_pages = ((),) * self.config.num_kv_groups
            assert plan.requests == tuple(part._replace(new_pages=no_pages) for part in frame.plan.requests)
            assert not (plan.admissions or plan.resets or plan.copies), "what the first part brought"
        else:
            frame = Frame(plan)
            self._prepare(plan)
        assert first == frame.cursor, f"a part begins at node {first}, its run rests at {frame.cursor}"
        if error is not None:
            for scheduled in plan.requests:
                self.rows[scheduled.row].has_failed = True
            failed = tuple((scheduled.request_id, error) for scheduled in plan.requests)
            return LaneResult(plan.plan_id, plan.lane, (), failed)

        if stop_node is not None:
            assert first <= stop_node < last
            last = stop_node
        if first == 0 < last:
            self._copy(frame.plan)
        for layer, node in enumerate(self.layer_nodes):
            if first <= node < last:
                for scheduled in plan.requests:
                    self._run_layer(layer, scheduled)
        if last < self.num_nodes:
            frame.cursor = last
            self.frames[plan.run_id] = frame
            return LaneResult(plan.plan_id, plan.lane, cursor=stop_node)
        return LaneResult(plan.plan_id, plan.lane, tuple(self._sample(plan)))

    def drop(self, run_id: int) -> None:
        del self.frames[run_id]

    def _prepare(self, plan: LanePlan) -> None:
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
            stop = scheduled.start + scheduled.num_tokens
            assert scheduled.num_tokens >= 1
            assert row.has_failed or scheduled.start == row.next_position, "positions are written once, in order"
            assert row.has_failed or stop <= len(row.tokens), (
                "a plan reached for a token that no plan before it samples"
            )
            assert stop <= min(len(table) for table in row.tables) * self.config.page_size, (
                "the page table is too short"
            )

    def _copy(self, plan: LanePlan) -> None:
        for copy in plan.copies:
            self.num_copies += 1
            for layer in range(len(self.layer_nodes)):
                self.kv[layer, copy.target_page] = list(self._page(layer, copy.source_page))

    def _page(self, layer: int, page_id: int) -> list[int | None]:
        return self.kv.setdefault((layer, page_id), [None] * self.config.page_size)

    def _run_layer(self, layer: int, scheduled) -> None:
        row, page_size, start = self.rows[scheduled.row], self.config.page_size, scheduled.start
        if row.has_failed:
            return
        group = layer % self.config.num_kv_groups
        table, window = row.tables[group], self.config.kv_group_windows[group]
        first_seen = max(0, start - window + 1) if window else 0
        stop = start + scheduled.num_tokens
        for page_idx in range(first_seen // page_size, (stop - 1) // page_size + 1):
            begin = page_idx * page_size
            page = self._page(layer, table[page_idx])
            seen_from, seen_to = max(first_seen, begin), min(start, begin + page_size)
            assert page[seen_from - begin : max(seen_from, seen_to) - begin] == row.contents[seen_from:seen_to], (
                f"{scheduled.request_id} at {start} sees wrong KV in [{seen_from}, {seen_to}) (page {table[page_idx]})"
            )
            write_from, write_to = max(start, begin), min(stop, begin + page_size)
            if write_from < write_to:
                page[write_from - begin : write_to - begin] = row.contents[write_from:write_to]

    def _sample(self, plan: LanePlan):
        for scheduled in plan.requests:
            row = self.rows[scheduled.row]
            if row.has_failed:
                if scheduled.samples:
                    yield scheduled.request_id, 0
                continue
            stop = row.next_position = scheduled.start + scheduled.num_tokens
            assert scheduled.samples == (stop == len(row.tokens)), "samples if and only if it caught up"
            if scheduled.samples:
                token_id = next_token(row.contents[-1])
                row.tokens.append(token_id)
                row.contents.append(hash((row.contents[-1], token_id)))
                yield scheduled.request_id, token_id
