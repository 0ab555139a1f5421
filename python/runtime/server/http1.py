"""HTTP/1.1 below the app: uvicorn's h11 protocol, with our error object where no app is reached."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.errors import ApiError

CHUNK_WRITER = "partita.chunk_writer"  # key in the ASGI scope


class ChunkWriter:
    """Writes a chunk of a streaming answer straight to the socket: between the head and the end of a chunked body h11's
    state machine has nothing to decide, and leaving it out saves a third of a token's way through Python."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: H11Protocol) -> None:
        self._protocol = protocol

    @property
    def is_paused(self) -> bool:
        """The client takes its bytes too slowly: ``write`` would wait."""
        return self._protocol.flow.write_paused

    async def write(self, body: bytes) -> None:
        """Only for HTTP/1.1, after http.response.start without a content-length, before the last body message."""
        if self.is_paused:
            await self._protocol.flow.drain()
        self.write_now(body)

    def write_now(self, body: bytes) -> None:
        """``write`` where ``is_paused`` is false."""
        transport = self._protocol.transport
        if not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class LingeringTransport:
    """A transport whose close() lets the answer arrive where the client is still sending.

    Closing a socket with unread data resets the connection, and a reset may overtake the answer: a client whose body
    was refused would see no 413. So the sending side is closed first, what still comes is read and dropped, for a
    second and a mebibyte at most, and then the connection ends (RFC 9112, section 9.6).
    """

    LINGER_S = 1.0
    MAX_DROPPED_BYTES = 1 << 20

    def __init__(self, transport: asyncio.Transport, protocol: HttpProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._num_dropped_bytes = 0
        self.is_lingering = False

    def __getattr__(self, name: str):
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        is_client_sending = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not is_client_sending or not self._transport.can_write_eof() or self._transport.is_closing():
            self._transport.close()
        elif not self.is_lingering:
            self.is_lingering = True
            self._transport.write_eof()
            self._transport.resume_reading()
            self._protocol.loop.call_later(self.LINGER_S, self._transport.close)

    def drop(self, data: bytes) -> None:
        """What the client sends after the answer."""
        self._num_dropped_bytes += len(data)
        if self._num_dropped_bytes > self.MAX_DROPPED_BYTES:
            self._transport.close()


class HttpProtocol(H11Protocol):
    """What is no HTTP gets a 400, a head that is too large a 431; then the connection ends."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        app = self.app

        async def app_with_writer(scope, receive, send):
            if scope["http_version"] == "1.1":
                scope[CHUNK_WRITER] = ChunkWriter(self)
            await app(scope, receive, send)

        self.app = app_with_writer

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(LingeringTransport(transport, self))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_lingering:
            self.transport.drop(data)
        else:
            super().data_received(data)

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
