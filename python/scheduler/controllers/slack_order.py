"""S-EDF: of the prompts that can still be in time the earliest deadline first, then those that cannot (FlowPrefill, arXiv
2602.16603).

slack = (deadline - now) - max(predicted - executed, 0). While a prompt waits its slack falls as fast as the clock, so the
moment at which it becomes hopeless is known in advance: deadline - remaining. Moments are kept in a heap and nothing is
scanned; a moment that has come is checked again, because work may have been done meanwhile.

The deadline is that of the first token: arrival + ttft_s, or else arrival + deadline_s, by which the first token is due at
the latest. A request with neither is ranked as if it had PATIENCE_S, but never becomes hopeless: it gives way to those that
are in a hurry, goes in order of arrival among its kind, and comes first when it has waited longest. Hopeless ones are served
when nobody else has a prompt pending, later deadlines first as the authors have it. Priority comes before all of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf

from scheduler.config import SchedulerConfig
from scheduler.controllers.hopeless_line import HopelessLine
from scheduler.controllers.ttft_prediction import TtftPredictor
from scheduler.cost_model import CostModel
from scheduler.request import Request

# Prompts take longer than alone on the whole chip, because decodes want their part: by how much is learned from those that
# ended. Without it the earliest deadlines were taken on that could just not be kept, while others waited.
_LEARNING_RATE = 0.05
_MOST_STRETCH = 4.0
PATIENCE_S = 30.0  # how long a request without a target lets others go first


def first_token_deadline_s(request: Request) -> float | None:
    """On the clock of arrivals."""
    if request.ttft_s is not None:
        return request.arrival_s + request.ttft_s
    if request.deadline_s is not None:
        return request.arrival_s + request.deadline_s
    return None


class _Entry:
    __slots__ = ("deadline_s", "executed_s", "executing_since_s", "predicted_s", "request", "sequence", "was_paused")

    def __init__(self, request: Request, sequence: int, deadline_s: float, predicted_s: float) -> None:
        self.request = request
        self.sequence = sequence
        self.deadline_s = deadline_s
        self.predicted_s = predicted_s
        self.executed_s = 0.0
        self.executing_since_s: float | None = None
        self.was_paused = False

    def remaining_s(self, now: float) -> float:
        executed_s = self.executed_s
        if self.executing_since_s is not None:
            executed_s += now - self.executing_since_s
        return max(self.predicted_s - executed_s, 0.0)


class SlackOrder:
    """A PrefillOrder. Deterministic: equal moments are taken in order of arrival."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel | None) -> None:
        self._predictor = TtftPredictor(cost_model, config.max_num_batched_tokens)
        self._entries: dict[str, _Entry] = {}
        self._moments: list[tuple[float, int, _Entry]] = []
        self._lines: dict[int, HopelessLine] = {}  # by priority
        self.stretch = 1.0  # time that prompts take, over what they would alone

    def rank(self, request: Request, sequence: int, now: float) -> tuple:
        deadline_s = first_token_deadline_s(request)
        if deadline_s is None:
            return (request.priority, 0, request.arrival_s + PATIENCE_S, sequence)
        entry = _Entry(request, sequence, deadline_s, self._prompt_s(request.num_prompt_tokens))
        self._entries[request.request_id] = entry
        if self.slack_s(request, now) <= 0.0:
            return self._give_up(entry)
        self._watch(entry, now)
        return (request.priority, 0, deadline_s, sequence)

    def slack_s(self, request: Request, now: float) -> float:
        """Seconds it could wait and still be in time. Raises KeyError for one without a deadline or whose prompt is done."""
        entry = self._entries[request.request_id]
        return entry.deadline_s - now - entry.remaining_s(now)

    def due(self, now: float) -> Iterator[tuple[Request, tuple]]:
        moments = self._moments
        while moments and moments[0][0] <= now:
            _, _, entry = heappop(moments)
            request = entry.request
            if self._entries.get(request.request_id) is not entry:
                continue
            if request.first_token_s is not None:
                del self._entries[request.request_id]
                continue
            self._learn_progress(entry)
            # As a moment, not as slack: rounding may leave slack where the moment is not later than now, and it would come
            # due again for ever.
            if self._moment_s(entry, now) > now:
                self._watch(entry, now)
            elif request.rank[2] != -inf:  # else it leads a run that was brought to the front with one of its own
                yield request, self._give_up(entry)
        for priority, line in list(self._lines.items()):
            yield from line.turns(now)
            if line.is_over(now):
                del self._lines[priority]

    def started(self, request: Request, now: float) -> None:
        entry = self._entries.get(request.request_id)
        if entry is None:
            return
        if entry.executed_s == 0.0 and request.num_cached_tokens:
            num_tokens = request.num_prompt_tokens - request.num_cached_tokens
            entry.predicted_s = self._prompt_s(num_tokens, request.num_cached_tokens)
        entry.executing_since_s = now

    def paused(self, request: Request, executed_s: float, now: float) -> None:
        entry = self._entries.get(request.request_id)
        if entry is not None:
            entry.executed_s, entry.executing_since_s, entry.was_paused = executed_s, None, True

    def ended(self, request: Request) -> None:
        entry = self._entries.pop(request.request_id, None)
        if entry is not None and request.first_token_s is not None and not entry.was_paused:
            self._learn_stretch(request)
        if request.finish_reason is not None and request.priority in self._lines:
            self._lines[request.priority].discard(request)
        if len(self._moments) > 2 * len(self._entries) + 64:  # those that left are dropped when they are the most
            self._moments = [item for item in self._moments if self._entries.get(item[2].request.request_id) is item[2]]
            heapify(self._moments)

    def _prompt_s(self, num_tokens: int, start: int = 0) -> float:
        return self.stretch * self._predictor.prompt_s(num_tokens, start)

    def _learn_stretch(self, request: Request) -> None:
        alone_s = self._predictor.prompt_s(
            request.num_prompt_tokens - request.num_cached_tokens, request.num_cached_tokens
        )
        if alone_s > 0.0 and request.num_preemptions == 0:
            ratio = (request.first_token_s - request.first_scheduled_s) / alone_s
            ratio = min(max(ratio, 1.0), _MOST_STRETCH)
            self.stretch += _LEARNING_RATE * (ratio - self.stretch)

    def _watch(self, entry: _Entry, now: float) -> None:
        """While it executes its moment moves on with the clock; it is looked at again when it would have come by now."""
        heappush(self._moments, (self._moment_s(entry, now), entry.sequence, entry))

    @staticmethod
    def _moment_s(entry: _Entry, now: float) -> float:
        """When it becomes hopeless unless something is done."""
        return entry.deadline_s - entry.remaining_s(now)

    def _learn_progress(self, entry: _Entry) -> None:
        """Prompts that are cut by tokens tell nobody when they execute: what they still have to do says how far they are."""
        request = entry.request
        num_done = request.next_start
        if request.run is None and num_done > 0 and entry.executing_since_s is None:
            entry.predicted_s = self._prompt_s(max(request.num_known_tokens - num_done, 0), num_done)
            entry.executed_s = 0.0

    def _give_up(self, entry: _Entry) -> tuple:
        """The rank of who has become hopeless."""
        request = entry.request
        line = self._lines.setdefault(request.priority, HopelessLine())
        line.add(request, entry.sequence, entry.deadline_s - request.arrival_s)
        return (request.priority, 1, -entry.deadline_s, entry.sequence)
