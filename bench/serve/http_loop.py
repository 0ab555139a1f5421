"""The open-loop load of open_loop.py over HTTP: a server of its own for one load, a streaming client beside it.

Every configuration gets a new `python -m runtime.serve` in a child process. What a request felt is counted from when it
should have come to when its bytes were read here, so HTTP, text and the client's own share of the cores are in it. How steps
were composed is the server's own affair: only counters that /metrics has are reported.
"""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from bench.serve.open_loop import Felt, LoadRequest, LoadResult, draw_prompt
from bench.serve.server_process import ServerProcess, partita_command
from runtime.bench.http_client import HttpClient, HttpFailure
from runtime.engine_args import EngineArgs

LOG = Path(__file__).resolve().parents[2] / "build" / "serve.log"
# Open loop: nobody is sent away. The engine in this process has no limit either.
MOST_QUEUED = 100_000
_COUNTERS = {
    "num_moves": "partita:border_moves_total", "num_pauses": "partita:prefill_pauses_total",
    "num_preemptions": "vllm:num_preemptions_total",
}  # fmt: skip


def server_flags(args: EngineArgs) -> list[str]:
    """The flags of `runtime.serve` that make it these arguments; the model is no flag and not among them."""
    flags: list[str] = []
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name == "model" or value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *([str(each) for each in value] if isinstance(value, tuple) else [str(value)])]
    return flags


def read_counters(text: str) -> SimpleNamespace:
    """Of what /metrics answers; 0 where the server does not have one."""
    sums = dict.fromkeys(_COUNTERS, 0.0)
    for line in text.splitlines():
        for name, counter in _COUNTERS.items():
            if line.startswith((f"{counter}{{", f"{counter} ")):
                sums[name] += float(line.rsplit(" ", 1)[1])
    return SimpleNamespace(**sums)


class HttpLoop:
    """One server, started for one load and stopped behind it. Raises RuntimeError when it does not start."""

    def __init__(self, vocab_size: int, args: EngineArgs) -> None:
        self._vocab_size = vocab_size
        flags = [*server_flags(args), "--max-queued-requests", str(MOST_QUEUED)]
        self._server = ServerProcess(partita_command(args.model, shlex.join(flags)), LOG)
        try:
            self._server.first_token_s()
        except BaseException:  # an interrupt too: a server left behind would be part of everybody's other load
            self._server.stop()
            raise

    def run(self, requests: Sequence[LoadRequest], *, limit_s: float, warm_up: LoadRequest | None = None) -> LoadResult:
        """As OpenLoop.run. Raises RuntimeError when the server refuses a request or loses it."""
        try:
            return asyncio.run(load_server(self._server.base_url, self._vocab_size, requests, limit_s, warm_up))
        finally:
            self._server.stop()


async def load_server(
    base_url: str, vocab_size: int, requests: Sequence[LoadRequest], limit_s: float, warm_up: LoadRequest | None = None
) -> LoadResult:
    """limit_s: from the first arrival; what has no answer then counts as one that never comes. Raises RuntimeError when the
    server refuses a request or loses it."""
    rng, client = random.Random(1), HttpClient(base_url)
    model = (await client.get_json("/v1/models"))["data"][0]["id"]
    if warm_up is not None:
        await _ask(client, _body(model, warm_up, rng, vocab_size), Felt(warm_up, time.monotonic()))
    bodies = [_body(model, request, rng, vocab_size) for request in requests]  # drawn before the clock starts
    started_s = time.monotonic()
    felt = [Felt(request, started_s + request.arrival_s) for request in requests]

    async def one(place: int) -> None:
        await asyncio.sleep(max(0.0, felt[place].submitted_s - time.monotonic()))
        await _ask(client, bodies[place], felt[place])

    tasks = [asyncio.create_task(one(place)) for place in range(len(requests))]
    try:
        done, late = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        duration_s = time.monotonic() - started_s
        for task in done:
            task.result()  # raises what went wrong
        stats = read_counters(await client.get_text("/metrics")) if not late else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
    return LoadResult(felt, duration_s, {}, {}, stats, is_complete=not late)


def _body(model: str, request: LoadRequest, rng: random.Random, vocab_size: int) -> dict:
    """Targets go as a client of the OpenAI library sends them in extra_body: as fields of the body."""
    kind = request.kind
    body = {
        "model": model, "prompt": draw_prompt(request, rng, vocab_size), "max_tokens": request.num_output_tokens,
        "temperature": 0.0, "ignore_eos": True, "stream": True, "return_token_ids": True, "user": kind.name,
    }  # fmt: skip
    targets = (("ttft_ms", kind.ttft_s), ("tpot_ms", kind.tpot_s))
    return body | {name: seconds * 1e3 for name, seconds in targets if seconds is not None}


async def _ask(client: HttpClient, body: dict, felt: Felt) -> None:
    try:
        async for event in client.stream_events("/v1/completions", body):
            if event == "[DONE]":
                break
            since_s = time.monotonic() - felt.submitted_s
            chunk = json.loads(event)
            if "error" in chunk:
                raise RuntimeError(f"the server ended a request: {chunk['error']}")
            for choice in chunk["choices"]:
                felt.token_s.extend([since_s] * len(choice.get("token_ids") or ()))
                if choice["finish_reason"] is not None:
                    felt.end_s, felt.finish_reason = since_s, choice["finish_reason"]
    except (HttpFailure, OSError) as error:
        raise RuntimeError(f"a request failed: {error}") from error
