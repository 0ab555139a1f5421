"""A small HTTP/1.1 client over asyncio streams: enough for JSON answers and server-sent events, and nothing between the
socket and the clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class HttpFailure(Exception):
    """The server answered with an error, or with no HTTP at all."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}" if status else message)
        self.status = status


class HttpClient:
    """Keeps idle connections to one server and hands each request one of them."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None, timeout_s: float = 3600.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"base-url must look like http://host:port, got {base_url!r}")
        self.host = parts.hostname
        self.port = parts.port or 80
        self.prefix = parts.path.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Host": parts.netloc, "Accept": "*/*", **(headers or {})}
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle = []

    async def get_json(self, path: str) -> Any:
        return json.loads(await self._whole("GET", path, b""))

    async def get_text(self, path: str) -> str:
        return (await self._whole("GET", path, b"")).decode("utf-8")

    async def post_json(self, path: str, body: dict[str, Any]) -> Any:
        return json.loads(await self._whole("POST", path, json.dumps(body).encode()))

    async def stream_events(self, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
        """Yields the data of each server-sent event. Raises HttpFailure for an error status."""
        pending = b""
        async for block in self._blocks("POST", path, json.dumps(body).encode()):
            pending += block
            *events, pending = pending.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:].decode("utf-8")

    async def _whole(self, method: str, path: str, body: bytes) -> bytes:
        return b"".join([block async for block in self._blocks(method, path, body)])

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self.host, self.port, limit=2**20)

    async def _blocks(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = await self._connect()
        reusable = False
        try:
            headers = {**self._headers, "Content-Length": str(len(body))}
            if body:
                headers["Content-Type"] = "application/json"
            head = f"{method} {self.prefix}{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
            writer.write(head.encode("latin-1") + b"\r\n" + body)
            status, answer_headers = await asyncio.wait_for(self._read_head(reader), self.timeout_s)
            blocks = self._read_body(reader, answer_headers)
            if status >= 400:
                text = b"".join([block async for block in blocks]).decode("utf-8", "replace")
                raise HttpFailure(status, _error_message(text))
            async for block in blocks:
                yield block
            reusable = answer_headers.get("connection", "").lower() != "close"
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError) as error:
            raise HttpFailure(0, f"connection lost: {error}") from error
        finally:
            if reusable:
                self._idle.append((reader, writer))
            else:
                writer.close()

    @staticmethod
    async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.strip().lower()] = value.strip()
        return int(lines[0].split(" ", 2)[1]), headers

    async def _read_body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                length = int((await asyncio.wait_for(reader.readline(), self.timeout_s)).split(b";")[0], 16)
                block = await reader.readexactly(length + 2)
                if length == 0:
                    return
                yield block[:-2]
        elif "content-length" in headers:
            yield await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), self.timeout_s)
        else:
            headers["connection"] = "close"
            while block := await asyncio.wait_for(reader.read(65536), self.timeout_s):
                yield block


def _error_message(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text[:300]
