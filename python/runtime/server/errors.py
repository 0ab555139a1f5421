"""The one error object that every refused or failed request gets, in OpenAI's shape."""

from __future__ import annotations

import json

from runtime.request_builder import RequestError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "bad_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    413: "request_too_large", 415: "unsupported_media_type", 429: "queue_full", 431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}  # fmt: skip


class ApiError(Exception):
    """Becomes an HTTP answer. ``code`` is stable: clients may switch on it; ``message`` is for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status, "error")
        self.param = param
        self.headers = headers or {}

    @classmethod
    def from_refusal(cls, refusal: RequestError) -> ApiError:
        headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
        return cls(refusal.status, refusal.message, code=refusal.code, param=refusal.param, headers=headers)

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        # ensure_ascii: the message may quote a lone surrogate that UTF-8 cannot carry
        return json.dumps({"error": error}).encode()

    async def send(self, send) -> None:
        """Answers on a raw ASGI channel whose response has not started."""
        body = self.body()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
