"""Requests that end early: clients that leave, queues that are full, servers that stop; nothing may stay behind."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time

import pytest

from tests.server.serving import MODEL, serve
from tests.server.test_errors import check

ROUTES = {
    "/v1/completions": {"prompt": "hello world", "ignore_eos": True, "max_tokens": 400},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "max_tokens": 400},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_is_cancelled_long_before_its_last_token(route, stream, n):
    step_s = 0.05  # 400 tokens: 20 s unless it is cancelled
    with serve(step_s=step_s) as server:
        server.send_and_leave(route, {**ROUTES[route], "stream": stream, "n": n}, after_s=0.2)
        left_s = time.monotonic()
        server.wait_until(lambda: len(server.engine.aborts) == n)
        assert time.monotonic() - left_s < 5.0  # the machine that runs the test may be busy
        server.wait_until(server.is_idle)
        assert {abort.reason for abort in server.engine.aborts} == {"disconnect"}
        assert len(server.engine.submits) == n


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_the_queue_is_cancelled(stream):
    with serve() as server:
        server.engine.paused.set()  # nothing is scheduled
        server.send_and_leave("/v1/completions", {**ROUTES["/v1/completions"], "stream": stream}, after_s=0.1)
        server.wait_until(lambda: server.engine.aborts)
        server.wait_until(server.is_idle)
        server.engine.paused.clear()
        assert server.complete(prompt="hello").status == 200


def test_a_full_queue_answers_429_and_empties_again():
    with serve(max_num_seqs=2, max_queued_requests=3) as server:
        server.engine.paused.set()
        body = {"prompt": "hello", "max_tokens": 2}
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(server.complete(**body))) for _ in range(5)]
        for thread in threads:
            thread.start()
        server.wait_until(lambda: server.front.num_in_flight == 5)
        refused = server.complete(**body)
        check(refused, 429, "queue_full", None, ("5", "3 queued"))
        assert int(refused.headers["retry-after"]) >= 1
        check(server.request("GET", "/ready"), 503, "queue_full")
        assert server.request("GET", "/health").status == 200
        server.engine.paused.clear()
        for thread in threads:
            thread.join(timeout=10)
        assert [answer.status for answer in answers] == [200] * 5
        check(server.complete(prompt=["a"] * 6), 429, "queue_full")  # more than can ever wait
        assert server.complete(**body).status == 200


def test_a_draining_server_ends_what_it_has_and_takes_nothing_new():
    with serve(step_s=0.01) as server:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(server.complete(prompt="abc", ignore_eos=True, max_tokens=40))
        )
        thread.start()
        server.wait_until(lambda: server.front.num_in_flight == 1)
        server.front.start_draining()
        check(server.complete(prompt="a"), 503, "shutting_down")
        check(server.request("GET", "/ready"), 503, "shutting_down")
        assert server.request("GET", "/live").status == 200
        thread.join(timeout=10)
        assert answers[0].json()["usage"]["completion_tokens"] == 40


def test_a_client_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr("runtime.front.STALL_LIMIT_S", 0.2)
    monkeypatch.setattr("runtime.front.TICK_PERIOD_S", 0.05)
    with serve(step_s=0.0, max_model_len=400_000) as server:
        payload = json.dumps({
            "model": MODEL, "prompt": "x" * 50, "stream": True, "ignore_eos": True, "max_tokens": 300_000,
            "logprobs": 20,
        }).encode()  # fmt: skip
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", server.port))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(payload) + payload
            )
            server.wait_until(lambda: server.engine.aborts, timeout_s=30)
            assert server.engine.aborts[0].reason == "stalled client"
            server.wait_until(server.is_idle)
            assert server.complete(prompt="hello").status == 200


def test_a_stream_is_pinged_while_nothing_comes(monkeypatch):
    monkeypatch.setattr("runtime.front.PING_PERIOD_S", 0.05)
    monkeypatch.setattr("runtime.front.TICK_PERIOD_S", 0.02)
    with serve() as server:
        server.engine.paused.set()
        threading.Timer(0.3, server.engine.paused.clear).start()
        answer = server.post("/v1/completions", {"prompt": "hello", "stream": True})
        assert answer.raw.count(b": ping\n\n") >= 2
        assert answer.raw.endswith(b"data: [DONE]\n\n")


def test_a_thousand_requests_a_third_of_them_left_leave_nothing_behind():
    generator = random.Random(5)
    num_clients, num_each = 20, 50
    with serve(step_s=0.001, max_num_seqs=8) as server:
        failures = []

        def run(seed: int) -> None:
            mine = random.Random(seed)
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            for _ in range(num_each):
                stream = mine.random() < 0.5
                body = {
                    "prompt": "hello world " * mine.randint(1, 12),
                    "max_tokens": mine.randint(1, 30),
                    "stream": stream,
                }
                body |= {"ignore_eos": True, "n": mine.choice([1, 1, 2])}
                if mine.random() < 1 / 3:
                    server.send_and_leave(
                        "/v1/completions", body, after_s=mine.random() * 0.03, read=mine.random() < 0.3
                    )
                    continue
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                raw = response.read()
                complete = raw.endswith(b"data: [DONE]\n\n") if stream else b'"finish_reason":"length"' in raw
                if response.status != 200 or not complete:
                    failures.append((response.status, raw[-200:]))
            connection.close()

        threads = [threading.Thread(target=run, args=(generator.getrandbits(30),)) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not failures, failures[:3]
        server.wait_until(server.is_idle)
        assert len(server.engine.submits) >= 1000
        assert len(server.engine.aborts) > 100
        server.wait_until(lambda: not server.front._generations)  # a handler may end after its request did
        assert server.complete(prompt="hello").status == 200


def test_a_client_that_reads_late_gets_every_token_in_order():
    """Its socket fills up, so the text goes from the delivery's own write to the waiting task and back."""
    body = {"prompt": "hello world again", "max_tokens": 20_000, "ignore_eos": True}
    with serve(max_model_len=40_000) as server:
        payload = json.dumps({"model": MODEL, "temperature": 0, "stream": True, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(head.encode() + payload)
            server.wait_until(
                lambda: any(time.monotonic() - g.stalled_since_s > 0.3 for g in server.front._generations), 30
            )
            raw = b"".join(iter(lambda: client.recv(1 << 16), b""))
        lines = raw.partition(b"\r\n\r\n")[2].split(b"\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        streamed = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        assert streamed == server.complete(**body).json()["choices"][0]["text"]
        assert len(chunks) < 20_000  # what came while it did not read was written together
