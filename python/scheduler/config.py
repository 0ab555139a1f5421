"""What the scheduler is told once: the size of the machine's tables and the limits of a step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


def parse_lanes(text: str) -> tuple[float, float] | None:
    """``"30:70"`` -> (0.3, 0.7), shares of prefill and decode; None for what is no such pair of 1 to 100 percent."""
    prefill, colon, decode = text.partition(":")
    if not (colon and prefill.isdecimal() and decode.isdecimal()):
        return None
    shares = int(prefill) / 100, int(decode) / 100
    return shares if all(0.0 < share <= 1.0 for share in shares) else None


def is_lanes(text: str) -> bool:
    return text in ("", "off", "auto") or parse_lanes(text) is not None


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and sizes, fixed for life. Raises ValueError naming the field, what came, what was wanted."""

    num_pages: int  # of the arena, all KV groups together
    page_size: int = 64  # tokens
    max_num_seqs: int = 16  # requests that hold a row; rows are 0 .. max_num_seqs - 1
    max_num_batched_tokens: int = 2048  # a step's token budget
    max_model_len: int = 8192  # prompt + generated tokens of one request
    max_prefill_chunk: int = 0  # tokens of one request's prefill in one step; 0: only the budget limits it
    max_plans_in_flight: int = 2  # per lane; 1 plans a step only when the one before has ended
    kv_group_windows: tuple[int, ...] = (0,)  # one entry per KV group: tokens that a query sees, 0 = all
    enable_prefix_caching: bool = True
    min_copy_tokens: int = 16  # a shared part of a page is copied when it saves at least this many tokens
    watermark: float = 0.01  # share of the pages that an admission must leave available while others run
    lane_shares: tuple[float, ...] = (1.0,)  # of the chip, one entry per lane
    policy: str = "default"
    lanes: str = ""  # "off", "auto" or "P:D" in percent of the chip for prefill and decode; "": as the policy has it
    rungs: tuple[float, ...] = ()  # shares at which the chip can be cut for the prefill lane, ascending, below 1
    prefill: str = ""  # "token", "layer" or "operator": how prompts are cut; "": as policy or controller have it
    nano_batches: str = ""  # "off", "auto" or "2" to "4"; "": as the policy has it
    num_nodes: int = 0  # of the program; 0: unknown, prompts can only be cut by tokens
    layer_starts: tuple[int, ...] = ()  # the first node of every layer
    max_resting_runs: int = 3  # prefills that may rest between two of their parts at the same time

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("max_plans_in_flight", self.max_plans_in_flight >= 1, "at least 1")
        self._check("max_prefill_chunk", self.max_prefill_chunk >= 0, "0 (no limit) or more")
        self._check("min_copy_tokens", self.min_copy_tokens >= 1, "at least 1")
        self._check("watermark", 0.0 <= self.watermark < 1.0, "0 <= watermark < 1")
        groups_ok = len(self.kv_group_windows) >= 1 and all(window >= 0 for window in self.kv_group_windows)
        self._check("kv_group_windows", groups_ok, "one entry of 0 or more per KV group")
        lanes_ok = len(self.lane_shares) >= 1 and all(0.0 < share <= 1.0 for share in self.lane_shares)
        self._check("lane_shares", lanes_ok, "one share in (0, 1] per lane")
        self._check("lanes", is_lanes(self.lanes), "off, auto or two percentages such as 50:50")
        self._check(
            "lanes", self.lanes in ("", "off") or len(self.lane_shares) == 1, "off where lane_shares has several"
        )
        self._check("prefill", self.prefill in ("", "token", "layer", "operator"), "token, layer or operator")
        self._check("nano_batches", self.nano_batches in ("", "off", "auto", "2", "3", "4"), "off, auto or 2 to 4")
        is_cut = self.nano_batches in ("2", "3", "4") and parse_lanes(self.lanes) is not None
        self._check("nano_batches", not is_cut, f"off or auto with lanes {self.lanes}: only steps of one lane are cut")
        edges = (0.0, *self.rungs, 1.0)
        rungs_ok = all(low < high for low, high in pairwise(edges))
        self._check("rungs", rungs_ok, "shares between 0 and 1, ascending")
        starts_ok = all(0 <= node < self.num_nodes for node in self.layer_starts)
        self._check("layer_starts", starts_ok, f"nodes below num_nodes ({self.num_nodes})")
        self._check("max_resting_runs", self.max_resting_runs >= 1, "at least 1")
        self._check(
            "num_pages", self.num_pages >= self.num_kv_groups, f"at least one page per KV group ({self.num_kv_groups})"
        )

    def _check(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise ValueError(f"SchedulerConfig.{name}: got {getattr(self, name)!r}, wanted {wanted}")

    @property
    def num_kv_groups(self) -> int:
        return len(self.kv_group_windows)

    @property
    def has_roles(self) -> bool:
        """Lane 0 is for decodes, lane 1 for prompts; else every lane takes both."""
        return self.lanes not in ("", "off")

    @property
    def num_lanes(self) -> int:
        return 2 if self.has_roles else len(self.lane_shares)

    @property
    def watermark_pages(self) -> int:
        return int(self.num_pages * self.watermark)
