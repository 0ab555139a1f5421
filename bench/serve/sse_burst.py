"""Does streaming lengthen a step? The same requests over HTTP to another process, and inside the engine's own.

    python -m bench.serve.sse_burst [--model smollm2] [--requests 32] [--output-len 64] [--repeats 9] [--json FILE]

Both sides are one process each with the same flags, stopped (SIGSTOP) while the other one runs, and take turns. "alone"
submits token ids to the engine and drops its deltas; "streamed" is the server, with real clients of another process on
raw sockets that parse nothing. A step is counted from its start to the start of the next, so what the engine's thread
loses between two steps counts too; only steps in which every request decodes one token are taken. Printed are the
medians of --repeats runs, the median of the ratios of neighbouring runs, and the CPU of the clients, which on a machine
without spare cores is taken from the engine too. The exit status is 1 when a step is longer by more than --allow.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

from bench.serve.server_process import free_port

PROMPT_TOKENS = 16
FIRST_TOKEN_ID = 1000  # above the control tokens of every vocabulary


def prompt_of(index: int) -> list[int]:
    """Distinct prompts, so that no prefix is shared."""
    return [FIRST_TOKEN_ID + (index * PROMPT_TOKENS + place) % 10_000 for place in range(PROMPT_TOKENS)]


class StepClock:
    """Stands where the engine's trace stands: keeps (decoding requests, start in nanoseconds) of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def add(self, completion: dict, plan) -> None:
        is_decode = all(scheduled.num_tokens == 1 for scheduled in plan.requests)
        self.steps.append((len(plan.requests) if is_decode else 0, completion["start_ns"]))

    def close(self) -> None: ...

    def take(self, num_requests: int) -> list[float]:
        """Microseconds of the steps in which that many requests decoded, since the last call."""
        steps, self.steps = self.steps, []
        return [
            (next_ns - start_ns) / 1e3
            for (num_decoding, start_ns), (num_next, next_ns) in pairwise(steps)
            if num_decoding == num_next == num_requests
        ]


def run_side(arguments: argparse.Namespace) -> None:
    """The process of one side: a run for each line on stdin, its steps as one JSON line."""
    from runtime.engine_args import EngineArgs
    from runtime.engine_loader import load_engine

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    deltas: queue.SimpleQueue = queue.SimpleQueue()
    args = EngineArgs(
        model=arguments.model, threads=arguments.threads, max_num_seqs=arguments.requests, enable_prefix_caching=False
    ).check()
    front = _serve(arguments.port) if arguments.side == "streamed" else None
    engine, tokenizer, template, _ = load_engine(args, deltas.put if front is None else front.on_deltas)
    clock = StepClock()
    engine._trace = clock  # the engine's own hook; --trace-steps would time every node too
    if front is not None:
        front.loop.call_soon_threadsafe(
            lambda: front.attach(engine, tokenizer, template, max_num_seqs=arguments.requests)
        )
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        clock.steps.clear()
        if front is None:
            _submit_all(engine, arguments, deltas)
        else:  # the clients are at work: answer when theirs is done
            while front.num_in_flight == 0:
                time.sleep(0.005)
            engine.wait_idle(300)
        print(json.dumps(clock.take(arguments.requests)), file=answers, flush=True)


def _serve(port: int):
    """A front with its HTTP server on a thread of its own; an engine is attached later."""
    import uvicorn

    from runtime.front import Front
    from runtime.server.app import ServerSettings, create_app
    from runtime.server.http1 import HttpProtocol
    from runtime.server.metrics import Metrics

    front = Front()
    front.observer = metrics = Metrics(front)
    metrics.bind_model("bench", 8192)
    app = create_app(front, ServerSettings(("bench",)), metrics)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, http=HttpProtocol, log_config=None, backlog=1024)
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    while front.loop is None:
        time.sleep(0.01)
    return front


def _submit_all(engine, arguments: argparse.Namespace, deltas: queue.SimpleQueue) -> None:
    from runtime.messages import Submit
    from runtime.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arguments.output_len)
    for index in range(arguments.requests):
        engine.submit(Submit(f"burst-{time.monotonic_ns()}-{index}", tuple(prompt_of(index)), sampling))
    num_running = arguments.requests
    while num_running:
        num_running -= sum(delta.finish_reason is not None for delta in deltas.get(timeout=300))


def run_clients(arguments: argparse.Namespace) -> None:
    """The clients' process: a burst of requests for each line on stdin, then the CPU seconds it took."""
    for _ in sys.stdin:
        begin = time.process_time()
        selector = selectors.DefaultSelector()
        for index in range(arguments.requests):
            body = json.dumps(
                {
                    "prompt": prompt_of(index), "max_tokens": arguments.output_len, "temperature": 0, "stream": True,
                    "ignore_eos": True,
                }
            ).encode()  # fmt: skip
            connection = socket.create_connection(("127.0.0.1", arguments.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{arguments.port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            selector.register(connection, selectors.EVENT_READ)
        num_bytes = 0
        while selector.get_map():
            for key, _ in selector.select():
                block = key.fileobj.recv(1 << 16)
                num_bytes += len(block)
                if not block:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
        print(json.dumps([time.process_time() - begin, num_bytes]), flush=True)


class Child:
    """A process of this file that answers one line per line; it stands still between them."""

    def __init__(self, role: str, arguments: argparse.Namespace, port: int):
        command = [sys.executable, "-m", "bench.serve.sse_burst", "--side", role, "--port", str(port)]
        command += ["--model", arguments.model, "--requests", str(arguments.requests)]
        command += ["--output-len", str(arguments.output_len), "--threads", str(arguments.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> None:
        print("run", file=self._process.stdin, flush=True)

    def answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bench ended early; its error is above")
        return line

    def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(arguments: argparse.Namespace) -> dict:
    port = free_port()
    children = {}
    try:
        for role in ("alone", "streamed"):
            children[role] = Child(role, arguments, port)
            children[role].answer()
            children[role].pause()
        children["clients"] = clients = Child("clients", arguments, port)
        steps = {"alone": [], "streamed": []}
        client_cpu_share = []
        for repeat in range(arguments.repeats + 1):
            for role, runs in steps.items():
                child = children[role]
                child.resume()
                begin = time.perf_counter()
                child.ask()
                if role == "streamed":
                    clients.ask()
                    cpu_s, num_bytes = json.loads(clients.answer())
                    seconds = time.perf_counter() - begin
                lengths = json.loads(child.answer())
                child.pause()
                if repeat == 0:
                    continue  # the first run touches memory for the first time
                runs.append(statistics.median(lengths))
                if role == "streamed":
                    client_cpu_share.append(cpu_s / seconds)
    finally:
        for child in children.values():
            child.kill()
    ratios = [streamed / alone for alone, streamed in zip(steps["alone"], steps["streamed"], strict=True)]
    medians = {role: statistics.median(runs) for role, runs in steps.items()}
    return {
        "requests": arguments.requests, "output_len": arguments.output_len, "threads": arguments.threads,
        "runs_us": steps, "median_us": medians, "ratios": ratios,
        "ratio": statistics.median(ratios), "streamed_bytes": num_bytes,
        "client_cpu_share_of_a_core": statistics.median(client_cpu_share),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--allow", type=float, default=0.10, help="by how much a step may be longer (default: 0.10)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--side", choices=["alone", "streamed", "clients"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run_clients(arguments) if arguments.side == "clients" else run_side(arguments)
        return 0
    result = measure(arguments)
    for role, runs in result["runs_us"].items():
        shown = " ".join(f"{us:.0f}" for us in runs)
        print(
            f"{role:<9} {result['median_us'][role]:9.0f} us a step of {arguments.requests} requests   (runs: {shown})"
        )
    print(
        f"streamed / alone {result['ratio']:.3f}; {result['streamed_bytes']} bytes to the clients, which took", end=" "
    )
    print(f"{result['client_cpu_share_of_a_core']:.1%} of a core")
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ratio"] <= 1 + arguments.allow else 1


if __name__ == "__main__":
    sys.exit(main())
