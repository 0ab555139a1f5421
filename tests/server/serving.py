"""The real server over a scripted engine, in a thread of the test process."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace

import uvicorn

from runtime.front import Front
from runtime.server.app import ServerSettings, create_app
from runtime.server.guard import GuardSettings
from runtime.server.http1 import HttpProtocol
from runtime.server.metrics import Metrics
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tiny_tokenizer import tiny_template, tiny_tokenizer

MODEL = "tiny"


class ServerUnderTest:
    def __init__(self, front: Front, engine: ScriptedEngine | None, port: int) -> None:
        self.front, self.engine, self.port = front, engine, port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, body=None, headers: dict | None = None) -> SimpleNamespace:
        """One request on a connection of its own. ``body``: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {"Content-Type": "application/json"} if body is not None else {}
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, payload, {**given, **(headers or {})})
            response = connection.getresponse()
            raw = response.read()
        return SimpleNamespace(status=response.status, headers=response.headers, raw=raw, json=lambda: json.loads(raw))

    def post(self, path: str, body, headers: dict | None = None) -> SimpleNamespace:
        return self.request("POST", path, body, headers)

    def complete(self, **fields) -> SimpleNamespace:
        return self.post("/v1/completions", {"model": MODEL, "temperature": 0, **fields})

    def chat(self, **fields) -> SimpleNamespace:
        fields.setdefault("messages", [{"role": "user", "content": "hello world"}])
        return self.post("/v1/chat/completions", {"model": MODEL, "temperature": 0, **fields})

    def events(self, path: str, body: dict) -> list[dict]:
        """The chunks of a stream, which must end with [DONE]."""
        answer = self.post(path, {"model": MODEL, "temperature": 0, "stream": True, **body})
        assert answer.status == 200, answer.raw
        events = answer.raw.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]

    def send_and_leave(self, path: str, body: dict, after_s: float = 0.05, read: bool = False) -> None:
        """A client that goes away without waiting for the end."""
        payload = json.dumps({"model": MODEL, **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
            if read:
                client.recv(4096)
            time.sleep(after_s)

    def wait_until(self, condition, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true"
            time.sleep(0.002)

    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return not self.front.num_in_flight and not stats["num_requests_running"] + stats["num_requests_waiting"]


@contextlib.contextmanager
def serve(*, attached: bool = True, max_queued_requests: int = 256, guard: GuardSettings | None = None, **engine_args):
    """A server on a free port; ``attached=False`` leaves it without a model."""
    front = Front(max_queued_requests=max_queued_requests)
    metrics = Metrics(front)
    front.observer = metrics
    settings = ServerSettings((MODEL, "alias"), "1.2.3", guard or GuardSettings())
    engine = None
    if attached:
        engine = ScriptedEngine(tiny_tokenizer(), front.on_deltas, **engine_args)
        front.attach(engine, tiny_tokenizer(), tiny_template(), max_num_seqs=engine.max_num_seqs)
        metrics.bind_model(MODEL, engine.config.max_model_len)
    config = uvicorn.Config(
        create_app(front, settings, metrics), http=HttpProtocol, ws="none", lifespan="on", log_config=None,
        h11_max_incomplete_event_size=64 * 1024, timeout_graceful_shutdown=1,
    )  # fmt: skip
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    under_test = ServerUnderTest(front, engine, listener.getsockname()[1])
    under_test.wait_until(lambda: server.started)
    try:
        yield under_test
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        if engine is not None:
            engine.shutdown()
