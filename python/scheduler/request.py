"""A request: what was asked, and counters that say how far it is. It holds no policy and knows no other request.

Legend of lengths (positions, all in tokens; each counter is the end of a half-open interval that starts at 0):

    0 ....... num_cached ....... num_computed ....... next_start ....... num_expected ....... max_num_tokens
    |  KV found in  |  KV final:      |  in flight: in a   |  to schedule:     |  not sampled yet      |
    |  the cache at |  the plan's     |  plan whose result |  known, or        |                       |
    |  admission    |  result is here |  is not here       |  sampled in flight|                       |

    num_known_tokens     prompt + generated tokens whose values are here
    num_expected_tokens  num_known + one per plan in flight that samples: these positions exist, values may not be here
    max_num_tokens       prompt + max_tokens; the last of them never needs KV

Computed tokens catch up with known tokens: a plan takes [next_start, next_start + n), n <= num_expected -
next_start, and samples when it reaches num_expected. Prefill, decode, chunk and resume are this one rule at
different gaps.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.prefill_run import PrefillRun
    from scheduler.prefix_cache import PrefixNode


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # in the queue, holds nothing
    RUNNING = "running"  # holds a row and pages
    PREEMPTED = "preempted"  # gives row and pages back when nothing in flight names it, then waits to be recomputed
    FINISHED = "finished"  # answered; row and pages go back when nothing in flight names it


class Request:
    """One request.

    prompt_token_ids  at least one id; a tuple, list or range (a list is copied)
    max_tokens        generated tokens at most, at least 1
    stop_token_ids    ids that end it, end-of-sequence included (the caller leaves that one out for ignore_eos)
    min_tokens        stop ids do not end it before that many; the sampler makes them impossible until then
    priority          lower runs first
    arrival_s         the order among equals of priority, on the clock of `now`
    namespace         prefix-cache namespace (adapter, salt, media): only equal ones share pages
    page_keys         supplied keys of the prompt's full pages, one per page of page_size tokens (from a trace's hash
                      ids, whose token values nobody knows); None: the tokens are the key
    ttft_s, tpot_s, deadline_s    service levels (goodput.py), in seconds: to the first token, per token after it, to the
                      end; the first and the last count from arrival_s. Policies read them; the default one does not
    user              whose request it is, for fair shares and reports

    Raises ValueError for a value out of range, TypeError for a prompt that is not a sequence.
    """

    __slots__ = (
        "request_id", "prompt_token_ids", "max_tokens", "stop_token_ids", "min_tokens", "priority", "arrival_s",
        "namespace", "page_keys", "ttft_s", "tpot_s", "deadline_s", "user",
        "num_prompt_tokens", "max_num_tokens",
        # progress; written by scheduler.py
        "status", "output_token_ids", "num_computed_tokens", "next_start", "num_expected_tokens", "num_cached_tokens",
        "num_plans_in_flight", "num_preemptions", "first_scheduled_s", "first_token_s", "finish_reason", "rank", "row",
        "lane", "admission_threshold", "run",
        # pages; written by request_pages.py
        "pages", "page_capacity", "cache_node", "num_published_pages", "publish_at", "num_window_released",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        *,
        min_tokens: int = 0,
        priority: int = 0,
        arrival_s: float = 0.0,
        namespace: Hashable = "",
        page_keys: Sequence[Hashable] | None = None,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        deadline_s: float | None = None,
        user: str = "",
    ) -> None:
        if not isinstance(prompt_token_ids, (tuple, list, range)):
            got = type(prompt_token_ids).__name__
            raise TypeError(f"Request.prompt_token_ids: got {got}, wanted a tuple, list or range of token ids")
        if len(prompt_token_ids) == 0:
            raise ValueError("Request.prompt_token_ids: got an empty prompt, wanted at least one token id")
        if max_tokens < 1:
            raise ValueError(f"Request.max_tokens: got {max_tokens}, wanted at least 1")
        if min_tokens < 0:
            raise ValueError(f"Request.min_tokens: got {min_tokens}, wanted 0 or more")
        for name, seconds in (("ttft_s", ttft_s), ("tpot_s", tpot_s), ("deadline_s", deadline_s)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"Request.{name}: got {seconds}, wanted more than 0 seconds or None")

        self.request_id = request_id
        self.prompt_token_ids = tuple(prompt_token_ids) if isinstance(prompt_token_ids, list) else prompt_token_ids
        self.max_tokens = max_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.min_tokens = min_tokens
        self.priority = priority
        self.arrival_s = arrival_s
        self.namespace = namespace
        self.page_keys = page_keys
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s
        self.deadline_s = deadline_s
        self.user = user
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max_tokens

        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.next_start = 0
        self.num_expected_tokens = self.num_prompt_tokens
        self.num_cached_tokens = 0  # of the prompt, at the first admission
        self.num_plans_in_flight = 0
        self.num_preemptions = 0
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None  # the clock at its first token
        self.finish_reason: str | None = None
        self.rank: tuple = ()  # the policy's order, smaller first; set at arrival
        self.row: int | None = None
        self.lane = 0  # of its plans in flight; without any it may go to another
        self.run: PrefillRun | None = None  # that holds it: nothing of it may be scheduled before the run's end
        self.admission_threshold = 0  # pages that must be available before admission is worth trying again

        self.pages: list[list[int]] = []  # per KV group: the row's page table
        self.page_capacity = 0  # tokens that the page table holds
        self.cache_node: PrefixNode | None = None  # where its published pages end in the prefix tree
        self.num_published_pages = 0  # leading pages that lie on its path in the prefix tree
        self.publish_at = 0  # num_computed_tokens at which the next page is full and final
        self.num_window_released: list[int] = []  # per KV group: leading pages given back early

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_known_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_in_flight_tokens(self) -> int:
        """Scheduled tokens whose plan has not come back."""
        return self.next_start - self.num_computed_tokens

    def known_token_ids(self) -> Sequence[int]:
        """Prompt and generated ids; the prompt object itself while nothing is generated."""
        if not self.output_token_ids:
            return self.prompt_token_ids
        return (*self.prompt_token_ids, *self.output_token_ids)

    def token_slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Known token ids at positions [start, stop)."""
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return tuple(self.prompt_token_ids[start:stop])
        outputs = self.output_token_ids
        if start >= num_prompt:
            return tuple(outputs[start - num_prompt : stop - num_prompt])
        return (*self.prompt_token_ids[start:], *outputs[: stop - num_prompt])

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, row={self.row}, prompt={self.num_prompt_tokens}, "
            f"computed={self.num_computed_tokens}, next_start={self.next_start}, expected={self.num_expected_tokens}, "
            f"in_flight={self.num_plans_in_flight})"
        )
