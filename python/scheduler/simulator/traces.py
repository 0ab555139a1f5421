"""Requests from a file: Azure 2023, Mooncake, BurstGPT; and slices and rates of any trace.

The kind is told by the first line. A file may be gzipped. Lengths are in tokens, times in seconds from the trace's start.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    # Equal leading ids of two requests mean equal prompt blocks of block_tokens tokens; empty: nothing is shared.
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = 512
    user: str = ""


# Header fields by which a CSV file is known -> (time, prompt tokens, generated tokens, user or "")
_CSV_KINDS: dict[tuple[str, ...], tuple[str, str, str, str]] = {
    ("timestamp_s", "context_tokens", "generated_tokens"): (
        "timestamp_s", "context_tokens", "generated_tokens", "",
    ),
    ("Timestamp", "Request tokens", "Response tokens"): (
        "Timestamp", "Request tokens", "Response tokens", "Session ID",
    ),
}  # fmt: skip
_MOONCAKE_BLOCK_TOKENS = 512


def open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests, by arrival. Requests without a prompt or an answer (failures) are left out. Raises ValueError for a
    file of no known kind, naming its first line."""
    with open_text(path) as file:
        first = file.readline()
        if first.lstrip().startswith("{"):
            requests = _read_mooncake([first, *file])
        else:
            header = [field.strip() for field in first.rstrip("\n").split(",")]
            fields = next((names for known, names in _CSV_KINDS.items() if set(known) <= set(header)), None)
            if fields is None:
                known = "; ".join(",".join(names) for names in _CSV_KINDS)
                raise ValueError(
                    f"{path}: the first line is {first[:80]!r}, wanted JSON objects or a header with {known}"
                )
            requests = _read_csv(csv.DictReader(file, header), fields)
    if not requests:
        raise ValueError(f"{path}: holds no request")
    requests.sort(key=lambda request: request.arrival_s)
    return requests


def _read_csv(rows: Iterable[dict[str, str]], fields: tuple[str, str, str, str]) -> list[TraceRequest]:
    time_field, prompt_field, output_field, user_field = fields
    requests = []
    for row in rows:
        num_prompt, num_output = int(float(row[prompt_field])), int(float(row[output_field]))
        if num_prompt > 0 and num_output > 0:
            user = (row.get(user_field) or "") if user_field else ""
            requests.append(TraceRequest(float(row[time_field]), num_prompt, num_output, user=user))
    return requests


def _read_mooncake(lines: Iterable[str]) -> list[TraceRequest]:
    requests = []
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        if row["input_length"] > 0 and row["output_length"] > 0:
            requests.append(
                TraceRequest(
                    row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]),
                    _MOONCAKE_BLOCK_TOKENS,
                )
            )  # fmt: skip
    return requests


def page_keys(request: TraceRequest, page_size: int) -> tuple[tuple[int, int], ...] | None:
    """Keys of the prompt's full pages: (block id, page within the block). A page that reaches over two blocks (page size
    does not divide the block) is keyed by the last block it touches, which implies all before. None: nothing shared."""
    if not request.hash_ids:
        return None
    block_tokens, ids = request.block_tokens, request.hash_ids
    keys = []
    for page in range(request.num_prompt_tokens // page_size):
        last = (page + 1) * page_size - 1
        block = last // block_tokens
        if block >= len(ids):
            break
        keys.append((ids[block], last - block * block_tokens))
    return tuple(keys)


def mean_rate(requests: Sequence[TraceRequest]) -> float:
    """Requests per second over the trace's own length."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    return (len(requests) - 1) / span_s if span_s > 0 else float(len(requests))


def cut(
    requests: Sequence[TraceRequest], *, start_s: float = 0.0, duration_s: float | None = None, num: int | None = None
) -> list[TraceRequest]:
    """Those that arrive in a slice, its beginning as time 0."""
    end_s = float("inf") if duration_s is None else start_s + duration_s
    kept = [request for request in requests if start_s <= request.arrival_s < end_s][:num]
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in kept]


def at_rate(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests in the same order, time stretched so that `rate` arrive per second on average."""
    if rate <= 0:
        raise ValueError(f"rate: got {rate}, wanted more than 0 requests per second")
    factor, first_s = mean_rate(requests) / rate, requests[0].arrival_s
    return [replace(request, arrival_s=(request.arrival_s - first_s) * factor) for request in requests]
