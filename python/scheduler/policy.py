"""Policies: small pure functions, and named presets of them.

A policy decides who comes first, how many tokens a step and a chunk get, whether a request may start, and who gives
way when pages run out. It never touches state: the scheduler asks and acts. A new policy is a new preset,
registered by name; it may read anything on the request (ttft_s, tpot_s, deadline_s, user), and replaces only the
functions it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from scheduler.arrangement import Controller
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.outlook import Outlook
from scheduler.peak_admission import PeakAdmission
from scheduler.request import Request
from scheduler.splitfuse import splitfuse_token_budget


def priority_then_arrival(request: Request, sequence: int) -> tuple:
    """First come, first served within a priority. `sequence` counts arrivals, so no two ranks are equal."""
    return (request.priority, request.arrival_s, sequence)


def fixed_token_budget(outlook: Outlook, lane: int) -> int:
    """Every step may have the same number of new tokens: decodes take theirs first, prompts are cut to fill the rest
    (Dynamic SplitFuse, DeepSpeed-FastGen, arXiv 2401.08671)."""
    return outlook.config.max_num_batched_tokens


def fill_budget(num_pending: int, budget: int, config: SchedulerConfig) -> int:
    """Tokens of one prefill chunk: all that is pending, as far as budget and the chunk limit go."""
    num_tokens = num_pending if num_pending < budget else budget
    max_chunk = config.max_prefill_chunk
    return max_chunk if 0 < max_chunk < num_tokens else num_tokens


def leave_watermark(num_needed_pages: int, num_available_pages: int, is_alone: bool, config: SchedulerConfig) -> bool:
    """A request may start when its pages are there and some are left for those that run to grow into."""
    headroom = 0 if is_alone else config.watermark_pages
    return num_needed_pages + headroom <= num_available_pages


def lowest_then_latest(candidates: Sequence[Request]) -> Request | None:
    """Of those ranked below the request that needs pages: the lowest priority, then the latest arrival."""
    return candidates[-1] if candidates else None


def whole_frame(outlook: Outlook, lead: Request) -> int:
    """As many prompts go together as a frame has rows for."""
    return outlook.config.max_num_batched_tokens


class PrefillOrder(Protocol):
    """An order in which time counts. It is asked at arrivals and before plans; it scans no queue."""

    def rank(self, request: Request, sequence: int, now: float) -> tuple:
        """The request's place as of now."""
        ...

    def due(self, now: float) -> Iterable[tuple[Request, tuple]]:
        """Requests whose place has changed since the last call, with their new ranks."""
        ...

    def started(self, request: Request, now: float) -> None:
        """Its prompt is being computed (or computed further)."""
        ...

    def paused(self, request: Request, executed_s: float, now: float) -> None:
        """Its prompt rests after so many seconds of work in all."""
        ...

    def ended(self, request: Request) -> None:
        """Its prompt is computed, or it has left."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """One function per decision."""

    name: str
    rank: Callable[[Request, int], tuple] = priority_then_arrival  # (request, arrival number) -> order, smaller first
    token_budget: Callable[[Outlook, int], int] = fixed_token_budget  # (outlook, lane) -> tokens of its next step
    chunk: Callable[[int, int, SchedulerConfig], int] = fill_budget  # (pending, budget left) -> tokens, at least 1
    admits: Callable[[int, int, bool, SchedulerConfig], bool] = leave_watermark  # (needed, available pages, is alone)
    # Beside `admits`: of whoever is not alone, by what all will need later
    peak: Callable[[SchedulerConfig], PeakAdmission] | None = None
    victim: Callable[[Sequence[Request]], Request | None] = lowest_then_latest  # from running requests, by rank
    mixes: bool = True  # a step holds decodes and prompt chunks; else prompts go first and decodes wait for them
    # Of prompts that go through the program in parts: the most tokens of one run, (outlook, who leads it) -> tokens
    run_budget: Callable[[Outlook, Request], int] = whole_frame
    order: Callable[[SchedulerConfig, CostModel | None], PrefillOrder] | None = (
        None  # replaces `rank` where time counts
    )
    # What a flag that is not given means; what is given wins.
    lanes: str = "off"
    prefill: str = ""  # "token", or as the controller of lanes "auto" decides from boundary to boundary
    nano_batches: str = "off"
    controller: Callable[[SchedulerConfig, CostModel | None], Controller] | None = None  # of lanes "auto"


_presets: dict[str, Policy] = {}


def register_policy(policy: Policy) -> None:
    """Makes a preset available by its name. Raises ValueError if the name is taken."""
    if policy.name in _presets:
        raise ValueError(f"register_policy: a policy named {policy.name!r} exists already")
    _presets[policy.name] = policy


def policy_named(name: str) -> Policy:
    """Raises ValueError, listing the names that exist."""
    policy = _presets.get(name)
    if policy is None:
        raise ValueError(f"policy: got {name!r}, wanted one of {', '.join(sorted(_presets))}")
    return policy


def with_preset(config: SchedulerConfig) -> SchedulerConfig:
    """The configuration with the policy's own lanes, granularity and nano-batches where none were asked for. A granularity
    stays "" where a controller decides it. Raises ValueError where they contradict each other."""
    policy = policy_named(config.policy)
    lanes = config.lanes or policy.lanes
    return replace(
        config, lanes=lanes, prefill=config.prefill or policy.prefill or ("" if lanes == "auto" else "token"),
        nano_batches=config.nano_batches or policy.nano_batches,
    )  # fmt: skip


register_policy(Policy("default"))
register_policy(Policy("fcfs"))
# What continuous batching did before chunks were mixed in; here to be compared with.
register_policy(Policy("prefill-first", mixes=False))
register_policy(Policy("fastgen", token_budget=splitfuse_token_budget))

import scheduler.controllers.presets  # noqa: E402, F401  registers the published systems
