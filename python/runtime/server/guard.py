"""The outermost ASGI layer: who may ask, how much may be sent, which id a request has, and what is counted."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from runtime.request_builder import RequestError
from runtime.server.errors import ApiError

logger = logging.getLogger("partita.server")

OPEN_PATHS = frozenset({"/", "/favicon.ico", "/health", "/live", "/ready"})  # answer without a key: they hold nothing
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")
MAX_BODY_BYTES = 8 * 2**20
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class GuardSettings:
    api_keys: tuple[str, ...] = ()  # none: no key is asked for
    allowed_hosts: tuple[str, ...] | None = None  # None: any Host header (not on loopback)
    max_body_bytes: int = MAX_BODY_BYTES


def is_loopback(host: str) -> bool:
    return host in LOOPBACK_HOSTS or re.fullmatch(r"127\.\d+\.\d+\.\d+", host) is not None


class Guard:
    """Wraps the app. Every refusal and every exception that reaches it becomes the one error object."""

    def __init__(self, app, settings: GuardSettings, metrics=None) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._key_digests = tuple(hashlib.sha256(key.encode()).digest() for key in settings.api_keys)
        hosts = settings.allowed_hosts
        self._allowed_hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
                return
            await self.app(scope, receive, send)
            return
        started_s = time.perf_counter()
        headers = dict(scope["headers"])
        inbound_id = headers.get(b"x-request-id", b"")
        request_id = inbound_id.decode() if _REQUEST_ID.fullmatch(inbound_id) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, self._limited(receive, headers), send_with_id)
        except ApiError as error:
            if status == 0:
                await error.send(send_with_id)
        except RequestError as refusal:
            if status == 0:
                await ApiError.from_refusal(refusal).send(send_with_id)
        except ClientDisconnect:
            status = status or 499
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if status == 0:
                await ApiError(500, "The server failed to answer this request; its log says more.").send(send_with_id)
        finally:
            if self.metrics is not None:
                route = scope.get("route")
                handler = getattr(route, "path", None) or "unmatched"
                self.metrics.http_request(handler, scope["method"], status, time.perf_counter() - started_s)

    def _check(self, scope, headers: dict[bytes, bytes]) -> None:
        if self._allowed_hosts is not None:  # a page that rebinds its DNS name to 127.0.0.1 still says its own name
            host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())
            if host not in self._allowed_hosts and not is_loopback(host):
                raise ApiError(
                    403,
                    f"The Host header {host[:200]!r} is not served here; see --allowed-hosts.",
                    code="host_not_allowed",
                )
        if self._key_digests and scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if content_type != b"application/json":  # what a page of another origin cannot send without asking first
                shown = content_type.decode("latin-1")[:100] or "nothing"
                raise ApiError(415, f"Content-Type must be application/json, got {shown}.")
            length = headers.get(b"content-length", b"")
            if length.isdigit() and (len(length) > 18 or int(length) > self.settings.max_body_bytes):
                raise self._too_large()

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]  # no early exit
        if not any(matches):
            what = "Incorrect API key provided." if given else "No API key provided: send it as a Bearer token."
            raise ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The request body is larger than {self.settings.max_body_bytes} bytes; see --max-body-bytes.",
            headers={"connection": "close"},
        )  # fmt: skip

    def _limited(self, receive, headers: dict[bytes, bytes]):
        if b"transfer-encoding" not in headers:
            return receive  # the length was checked and the server enforces it
        num_bytes = 0

        async def limited():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited
