"""``python -m runtime.serve [model]``: the HTTP server.

The model is loaded on a thread while this one imports the web framework and opens the port: until the model is there,
/live answers, /ready says that it is loading, and requests get a 503 that asks to come again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from runtime.engine_args import EngineArgs, parse_or_exit

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def build_parser(prog: str = "python -m runtime.serve") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serves a model over an OpenAI-compatible HTTP API, with a web chat at /.",
        epilog=f"example: {prog} smollm2 --port 8000 --kv-dtype int8:int4",
    )
    EngineArgs.add_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=DEFAULT_HOST, help=f"address to listen on (default: {DEFAULT_HOST})")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0 picks a free one (default: {DEFAULT_PORT})")
    group.add_argument(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys that may ask (also PARTITA_API_KEY, --api-key-file)",
    )
    group.add_argument(
        "--api-key-file", metavar="FILE", help="one key a line; others cannot see it in the process list"
    )
    group.add_argument(
        "--insecure-no-auth", action="store_true", help="allow an address that others can reach without any key"
    )
    group.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME", help="Host headers to accept besides loopback names"
    )
    group.add_argument(
        "--max-queued-requests", type=int, default=256, metavar="N", help="more waiting ones get a 429 (default: 256)"
    )
    group.add_argument("--max-body-bytes", type=int, default=8 * 2**20, metavar="N", help="larger ones get a 413")
    group.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="requests in flight may go on so long (30)"
    )
    group.add_argument("--access-log", action="store_true", help="a line per HTTP request")
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)"
    )
    return parser


def read_api_keys(namespace: argparse.Namespace) -> tuple[str, ...]:
    """Keys of the flag, the file and the environment. Raises ValueError for an empty key, OSError for the file."""
    keys = list(namespace.api_key)
    if namespace.api_key_file:
        with open(namespace.api_key_file, encoding="utf-8") as file:
            keys += [line.strip() for line in file if line.strip()]
    if os.environ.get("PARTITA_API_KEY"):
        keys.append(os.environ["PARTITA_API_KEY"])
    if any(not key.strip() for key in keys):
        raise ValueError("--api-key must not be empty")
    return tuple(dict.fromkeys(keys))


class ModelLoader:
    """Loads on a thread of its own; ``on_loaded`` and ``on_failed`` are called there."""

    def __init__(self, args: EngineArgs, on_deltas: Callable, load_engine: Callable | None = None) -> None:
        self.args = args
        self.on_loaded: Callable = lambda loaded: None
        self.on_failed: Callable = lambda message: None
        self._on_deltas = on_deltas
        self._load_engine = load_engine
        self._lock = threading.Lock()
        self._outcome: tuple | None = None
        self._listening = False
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def _load(self) -> None:
        try:
            load_engine = self._load_engine
            if load_engine is None:
                from runtime.engine_loader import load_engine
            outcome = (load_engine(self.args, self._on_deltas), None)
        except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
            outcome = (None, str(error) or type(error).__name__)
        except BaseException as error:
            logging.getLogger("partita").exception("loading failed")
            outcome = (None, f"{type(error).__name__}: {error}")
        with self._lock:
            self._outcome = outcome
            if self._listening:
                self._tell(outcome)

    def listen(self, on_loaded: Callable, on_failed: Callable) -> None:
        """Calls one of the two once, now or later."""
        with self._lock:
            self.on_loaded, self.on_failed, self._listening = on_loaded, on_failed, True
            if self._outcome is not None:
                self._tell(self._outcome)

    def _tell(self, outcome: tuple) -> None:
        loaded, failure = outcome
        if failure is None:
            self.on_loaded(loaded)
        else:
            self.on_failed(failure)


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING if level != "debug" else logging.DEBUG)


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("partita")
    except metadata.PackageNotFoundError:
        return "0+source"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.serve", load_engine=None) -> int:
    """Runs until a signal; returns the exit status. ``load_engine`` replaces runtime.engine_loader's in tests."""
    started_s = time.monotonic()
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    try:
        keys = read_api_keys(namespace)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    loopback = namespace.host in ("localhost", "::1") or namespace.host.startswith("127.")
    if not loopback and not keys and not namespace.insecure_no_auth:
        parser.error(
            f"--host {namespace.host} can be reached by others, and no key is set: give --api-key (or --api-key-file), "
            "or --insecure-no-auth if that is meant"
        )
    if namespace.max_queued_requests < 0:
        parser.error(f"--max-queued-requests must be at least 0, got {namespace.max_queued_requests}")
    if not 0 <= namespace.port <= 65535:
        parser.error(f"--port must be between 0 and 65535, got {namespace.port}")
    _set_up_logging(namespace.log_level)

    from runtime.front import Front

    front = Front(max_queued_requests=namespace.max_queued_requests)
    loader = ModelLoader(args, front.on_deltas, load_engine)

    from runtime.server.app import ServerSettings
    from runtime.server.guard import LOOPBACK_HOSTS, GuardSettings
    from runtime.server.process import ServerProcess

    hosts = (*LOOPBACK_HOSTS, namespace.host, *namespace.allowed_hosts)
    settings = ServerSettings(
        model_names=tuple(dict.fromkeys((*(args.served_model_name or (args.model,)),))),
        version=version(),
        guard=GuardSettings(
            keys, hosts if loopback else (tuple(namespace.allowed_hosts) or None), namespace.max_body_bytes
        ),
    )
    return ServerProcess(front, loader, settings, namespace, started_s).run()


if __name__ == "__main__":
    sys.exit(main())
