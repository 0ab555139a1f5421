"""How requests arrive, give way, end, and hand back what they held.

A request that ends or is preempted keeps its row and its pages until no plan in flight names it ("draining").
"""

from __future__ import annotations

from scheduler.arrangement import Controller
from scheduler.config import SchedulerConfig
from scheduler.goodput import GoodputCounter, outcome_of
from scheduler.peak_admission import PeakAdmission
from scheduler.policy import Policy, PrefillOrder
from scheduler.queues import RunningList, WaitingQueue
from scheduler.request import Request, RequestStatus
from scheduler.request_pages import RequestPages
from scheduler.run_lives import RunLives
from scheduler.step import TokenOutput

RUNNING, PREEMPTED, FINISHED = RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.FINISHED


class RequestLives:
    """Owns the unfinished requests, the rows that are free, and what users must hear of. Whoever orders, arranges or admits
    is told of what happens to them."""

    def __init__(
        self, config: SchedulerConfig, policy: Policy, pages: RequestPages, waiting: WaitingQueue, running: RunningList, *,
        order: PrefillOrder | None, controller: Controller | None, peak: PeakAdmission | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._policy = policy
        self._pages = pages
        self._waiting = waiting
        self._running = running
        self._order = order
        self._controller = controller
        self._peak = peak
        self.run_lives: RunLives | None = None  # set once, by who makes both
        self.unfinished: dict[str, Request] = {}  # every request that has no finish reason yet
        self.draining: set[Request] = set()
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.outputs: list[TokenOutput] = []
        self.goodput = GoodputCounter()
        self.num_preemptions = 0
        self._num_arrivals = 0

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def arrive(self, request: Request, now: float) -> None:
        if request.request_id in self.unfinished:
            raise ValueError(f"Arrival: request id {request.request_id!r} is in use by an unfinished request")
        why = self._refusal(request)
        if why is not None:
            request.status = FINISHED
            request.finish_reason = "error"
            self.outputs.append(TokenOutput(request.request_id, (), "error", None, 0, why))
            return
        self._num_arrivals += 1
        if self._order is not None:
            request.rank = self._order.rank(request, self._num_arrivals, now)
        else:
            request.rank = self._policy.rank(request, self._num_arrivals)
        self.unfinished[request.request_id] = request
        self._waiting.push(request)

    def _refusal(self, request: Request) -> str | None:
        """Why the request could never end even if it ran alone, or None."""
        asked = f"{request.num_prompt_tokens} prompt tokens + up to {request.max_tokens} generated"
        if request.max_num_tokens > self._config.max_model_len:
            return f"{asked} = {request.max_num_tokens} tokens; the context holds {self._config.max_model_len}"
        num_needed = self._pages.pages_alone(request.max_num_tokens - 1)  # the last token never needs KV
        num_pages = self._pages.num_pages
        if num_needed > num_pages:
            num_per_group = num_pages // self._pages.num_kv_groups
            return (
                f"{asked} need KV for {request.max_num_tokens - 1} tokens ({num_needed} pages); "
                f"{num_per_group * self._pages.page_size} tokens are available ({num_pages} pages)"
            )
        return None

    def has_first_token(self, request: Request, now: float) -> None:
        request.first_token_s = now
        if self._controller is not None:
            self._controller.hear_first_token(request, now)
        if self._order is not None:
            self._order.ended(request)

    def finish(self, request: Request, reason: str, now: float, error: str | None = None) -> None:
        """Ends a request for a reason that is no token."""
        first_scheduled = None if request.output_token_ids else request.first_scheduled_s
        self.outputs.append(
            TokenOutput(request.request_id, (), reason, None, request.num_cached_tokens, error, first_scheduled)
        )
        self.retire(request, reason, now)

    def retire(self, request: Request, reason: str, now: float) -> None:
        was_running = request.status is RUNNING
        is_holding = was_running or request in self.draining
        request.status = FINISHED
        request.finish_reason = reason
        del self.unfinished[request.request_id]
        if reason in ("stop", "length", "error"):  # an abort says nothing of how well it was served
            self._count_goodput(request, reason, now)
            if self._controller is not None:
                self._controller.hear_finished(request, now)
        if self._order is not None:
            self._order.ended(request)
        if self._peak is not None:
            self._peak.hear_finished(request)
        if was_running:
            self._running.remove(request)
        if is_holding:
            self._drain(request)
        else:
            self._waiting.remove(request)
        run = request.run
        if run is not None and run.is_resting and all(other.status is not RUNNING for other in run.requests):
            self.run_lives.drop(run)

    def preempt(self, request: Request) -> None:
        """Preemption by recompute: known tokens are computed again, as far as the prefix cache forgot them."""
        request.status = PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        if self._peak is not None:
            self._peak.hear_preempted()
        self._running.remove(request)
        self._drain(request)
        if request.run is not None:
            self.run_lives.leave(request)

    def _count_goodput(self, request: Request, reason: str, now: float) -> None:
        arrival_s, first_token_s = request.arrival_s, request.first_token_s
        outcome = outcome_of(
            request.ttft_s, request.tpot_s, request.deadline_s,
            first_token_s=None if first_token_s is None else first_token_s - arrival_s, end_s=now - arrival_s,
            num_tokens=request.num_output_tokens,
        )  # fmt: skip
        self.goodput.add(outcome, request.num_output_tokens, has_failed=reason == "error")

    def _drain(self, request: Request) -> None:
        """Row and pages go back now, or with the last result that names the request."""
        self.draining.add(request)
        if request.num_plans_in_flight == 0:
            self.drained(request)

    def drained(self, request: Request) -> None:
        self.draining.discard(request)
        self._pages.release(request)
        self.free_rows.append(request.row)
        request.row = None
        if request.status is PREEMPTED:
            request.num_computed_tokens = request.next_start = 0
            request.num_expected_tokens = request.num_known_tokens
            request.admission_threshold = 0
            self._waiting.push(request)
