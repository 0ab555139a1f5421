"""Does a server give back what it takes? Many requests, a third of them abandoned at random moments.

    python -m bench.serve.soak [--model smollm2] [--requests 1000] [--clients 32]

Clients stream completions; a third of them close the connection after a random while: queued, in prefill or in decode.
At the end nothing may be running, waiting or held by a request, and resident memory must not have grown since the
first third. The last line is JSON; the exit status is 1 when something was kept.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

from bench.serve.server_process import ServerProcess, partita_command

LOG = Path(__file__).resolve().parents[2] / "build" / "serve.log"
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def stream_completion(port: int, num_words: int, max_tokens: int, leave_after_s: float | None) -> bool:
    """One request over a connection of its own; True when the whole answer was read."""
    prompt = " ".join(random.choices(("stone", "river", "light", "seven", "under", "green", "house"), k=num_words))
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        deadline = None if leave_after_s is None else time.monotonic() + leave_after_s
        tail = b""
        while True:
            if deadline is not None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                connection.settimeout(remaining)
            try:
                block = connection.recv(65536)
            except TimeoutError:
                return False
            if not block:
                return b"[DONE]" in tail
            tail = (tail + block)[-64:]


def gauges(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] in GAUGES}


def run_requests(port: int, num_requests: int, num_clients: int) -> tuple[int, int]:
    """(answers read to their end, connections left early)"""
    todo = iter(range(num_requests))
    lock = threading.Lock()
    num_complete = num_left = 0

    def client() -> None:
        nonlocal num_complete, num_left
        while True:
            with lock:
                if next(todo, None) is None:
                    return
            leave_after_s = random.uniform(0, 0.6) if random.random() < 1 / 3 else None
            is_complete = stream_completion(port, random.randint(1, 150), random.randint(1, 40), leave_after_s)
            with lock:
                num_complete += is_complete
                num_left += not is_complete

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_complete, num_left


def settled_gauges(port: int, timeout_s: float = 10.0) -> dict[str, float]:
    deadline = time.monotonic() + timeout_s
    while any((found := gauges(port)).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--flags", default="", help="more flags of runtime.serve, in one string")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    server = ServerProcess(partita_command(arguments.model, arguments.flags), LOG)
    try:
        server.first_token_s()
        resident, num_complete, num_left = [], 0, 0
        for _ in range(3):
            complete, left = run_requests(server.port, arguments.requests // 3, arguments.clients)
            num_complete, num_left = num_complete + complete, num_left + left
            held = settled_gauges(server.port)
            resident.append(server.resident_bytes())
    finally:
        server.stop()
    growth = resident[-1] / resident[0] - 1
    result = {
        "complete": num_complete, "left_early": num_left, "held": held,
        "resident_mb": [round(bytes_ / 1e6, 1) for bytes_ in resident], "growth": growth,
    }  # fmt: skip
    print(f"{num_complete} answers read, {num_left} connections left early; afterwards {held}")
    print(f"resident memory after each third: {result['resident_mb']} MB ({growth:+.1%})")
    print(json.dumps(result))
    return 1 if any(held.values()) or growth > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
