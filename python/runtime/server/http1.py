"""HTTP/1.1 below the app: uvicorn's h11 protocol, with our error object where no app is reached."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.errors import ApiError


class HttpProtocol(H11Protocol):
    """What is no HTTP gets a 400, a head that is too large a 431; then the connection ends."""

    def send_400_response(self, msg: str) -> None:
        head_is_large = len(self.conn.trailing_data[0]) >= 64 * 1024
        if head_is_large:
            error = ApiError(431, "The request's headers are larger than 64 KiB.")
        else:
            error = ApiError(400, "The request is not valid HTTP/1.1.", code="invalid_http")
        body = error.body()
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            self.transport.close()  # an answer is on its way already
            return
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[error.status]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()
