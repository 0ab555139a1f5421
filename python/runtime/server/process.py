"""The server as a process: port, signals, banner, drain."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time

import uvicorn

from runtime.front import Front
from runtime.server.app import ServerSettings, create_app
from runtime.server.http1 import HttpProtocol
from runtime.server.metrics import Metrics

logger = logging.getLogger("partita.server")


class _Server(uvicorn.Server):
    """uvicorn with our signals: the first drains, a second one aborts, and the process ends with status 0."""

    def __init__(self, config: uvicorn.Config, front: Front) -> None:
        super().__init__(config)
        self.front = front

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        if self.front.num_in_flight:
            print(
                f"draining {self.front.num_in_flight} requests; a second signal aborts them",
                file=sys.stderr,
                flush=True,
            )
        self.front.start_draining()
        self.should_exit = True


class ServerProcess:
    """Binds a front, a model that is being loaded and a port together for as long as the process lives."""

    def __init__(self, front: Front, loader, settings: ServerSettings, namespace: argparse.Namespace, started_s: float):
        self.front = front
        self.loader = loader
        self.settings = settings
        self.namespace = namespace
        self.started_s = started_s
        self.metrics = Metrics(front)
        self.exit_status = 0
        front.observer = self.metrics
        self._server: _Server | None = None

    def run(self) -> int:
        try:
            listener = self._listen()
        except OSError as error:
            where = f"{self.namespace.host}:{self.namespace.port}"
            hint = "; another server runs there, choose one with --port" if error.errno == errno.EADDRINUSE else ""
            print(f"error: cannot listen on {where}: {error.strerror or error}{hint}", file=sys.stderr)
            return 2
        config = uvicorn.Config(
            create_app(self.front, self.settings, self.metrics, on_start=self._on_start),
            http=HttpProtocol, ws="none", lifespan="on", log_config=None, access_log=self.namespace.access_log,
            timeout_graceful_shutdown=max(1, round(self.namespace.shutdown_timeout)), timeout_keep_alive=15,
            server_header=False, date_header=True, h11_max_incomplete_event_size=64 * 1024, backlog=1024,
        )  # fmt: skip
        self._server = _Server(config, self.front)
        self.port = listener.getsockname()[1]
        with contextlib.suppress(KeyboardInterrupt):
            self._server.run(sockets=[listener])
        if self.front.engine is not None:
            self.front.engine.shutdown(0.0)
        return self.exit_status

    def _listen(self) -> socket.socket:
        host = self.namespace.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), self.namespace.port))
        listener.listen(1024)  # connections wait here from now on, even while the framework starts
        return listener

    def _on_start(self) -> None:
        loop = asyncio.get_running_loop()

        def later(callback):
            def call(value):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(callback, value)

            return call

        self.loader.listen(later(self._loaded), later(self._failed))

    @property
    def url(self) -> str:
        host = self.namespace.host
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"

    def _loaded(self, loaded: tuple) -> None:
        engine, tokenizer, chat_template, model_config = loaded
        args = self.loader.args
        defaults = dict(getattr(model_config, "default_sampling", ()))
        self.front.attach(engine, tokenizer, chat_template, max_num_seqs=args.max_num_seqs, default_sampling=defaults)
        self.metrics.bind_model(self.settings.model_names[0], engine.config.max_model_len)
        self._print_banner(engine)

    def _print_banner(self, engine) -> None:
        name = self.settings.model_names[0]
        seconds = time.monotonic() - self.started_s
        describe = getattr(engine, "describe", None)
        lines = [f"Partita {self.settings.version} serves {name}, ready {seconds:.2f} s after its start"]
        lines.append(
            f"  context   {engine.config.max_model_len} tokens, {self.loader.args.max_num_seqs} requests at once"
        )
        if describe is not None:
            lines += [f"  {line}" for line in describe()]
        lines.append(f"  web chat  {self.url}/")
        lines.append(f"  API       {self.url}/v1    metrics {self.url}/metrics")
        key = ' -H "Authorization: Bearer $PARTITA_API_KEY"' if self.settings.guard.api_keys else ""
        body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
        lines.append(
            f"  try       curl {self.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
        )
        print("\n".join(lines), flush=True)

    def _failed(self, message: str) -> None:
        self.front.load_error = message
        self.exit_status = 2
        print(f"error: {self.settings.model_names[0]} cannot be served: {message}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
