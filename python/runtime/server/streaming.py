"""Server-sent events from a Generation, as raw ASGI: the hot path of the front.

At 32 streams every microsecond here is taken from the kernels, so a chunk that only carries text is two prebuilt byte
strings around one C-encoded JSON string, written to the socket within the delivery of the step; whatever arrived while
the socket was not writable goes out as one chunk.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from json.encoder import encode_basestring

from starlette.responses import Response

from runtime.front import Generation, LiveOutput
from runtime.output_assembler import OutputPiece
from runtime.server.answers import Shape, failure_of
from runtime.server.errors import ApiError
from runtime.server.http1 import CHUNK_WRITER, ChunkWriter

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def watch_disconnect(receive, generation: Generation) -> None:
    """Cancels the generation when the client goes away: within the step that runs, also while it is queued."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            generation.cancel("disconnect")
            return


class EventWriter:
    """Turns pieces into events. ``shape`` knows the API; this class knows which parts never change."""

    def __init__(self, shape: Shape, generation: Generation, *, include_usage: bool, continuous_usage: bool) -> None:
        self.shape = shape
        self.generation = generation
        self.include_usage = include_usage
        self.continuous_usage = include_usage and continuous_usage
        self._unstarted = set(range(len(generation.outputs)))
        self._unfinished = set(range(len(generation.outputs)))
        marker = "\x00text\x00"
        self._text_parts = []  # per output: bytes before and after the text
        for output in generation.outputs:
            whole = self._event(shape.text_chunk(output.index, marker))
            head, tail = whole.split(encode_basestring(marker).encode())
            self._text_parts.append((head, tail))

    def _event(self, chunk: dict) -> bytes:
        if self.include_usage:
            chunk["usage"] = self.shape.usage(self.generation) if self.continuous_usage else None
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def collect(self) -> bytes:
        """Every event that is due now."""
        events = []
        for output in self.generation.outputs:
            if output.index in self._unfinished and output.has_news:
                self._write(output, events)
        return b"".join(events)

    def _write(self, output: LiveOutput, events: list[bytes]) -> None:
        index = output.index
        piece: OutputPiece = output.take()
        if index in self._unstarted:
            self._unstarted.discard(index)
            events.extend(self._event(chunk) for chunk in self.shape.opening_chunks(output))
        is_plain = piece.logprobs is None and piece.finish_reason is None and not self.shape.with_token_ids
        if is_plain and not self.continuous_usage:
            if piece.text:
                head, tail = self._text_parts[index]
                events.append(head + encode_basestring(piece.text).encode() + tail)
            return
        if piece.finish_reason is not None:
            self._unfinished.discard(index)
        events.extend(self._event(chunk) for chunk in self.shape.chunks(output, piece))

    def epilogue(self) -> bytes:
        end = b"data: [DONE]\n\n"
        if not self.include_usage:
            return end
        chunk = self.shape.usage_chunk(self.generation)
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n" + end


class EventStream(Response):
    """Answers a streaming call. Until the first token is there, a failure is still an HTTP error with its status."""

    def __init__(self, generation: Generation, writer: EventWriter) -> None:
        self.generation = generation
        self.writer = writer
        self.background = None
        self.status_code = 200
        self.raw_headers = _HEADERS

    async def __call__(self, scope, receive, send) -> None:
        generation = self.generation
        with generation:
            watcher = generation.front.loop.create_task(watch_disconnect(receive, generation))
            try:
                await self._stream(send, scope.get(CHUNK_WRITER))
            except asyncio.CancelledError:
                if generation.cancelled != "stalled client":
                    raise
            finally:
                watcher.cancel()

    async def _stream(self, send, chunk_writer: ChunkWriter | None) -> None:
        generation, writer = self.generation, self.writer
        arrived = await generation.wait()
        failure = failure_of(generation)
        if failure is not None:
            raise failure
        if generation.cancelled == "disconnect":
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if chunk_writer is not None and len(generation.outputs) == 1:  # of several outputs a step makes one chunk
            generation.take_news = lambda: self._write_now(chunk_writer)
        while True:
            finished = generation.finished
            body = writer.collect() if arrived else b": ping\n\n"
            failure = failure_of(generation) if finished else None
            if failure is not None:
                await self._send(send, body + b"data: " + failure.body() + b"\n\ndata: [DONE]\n\n", False)
                return
            if generation.cancelled == "disconnect":
                return
            if finished:
                await self._send(send, body + writer.epilogue(), False)
                return
            if body:
                self._begin_send()
                if chunk_writer is not None:
                    await chunk_writer.write(body)
                else:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                generation.stalled_since_s = math.inf
            arrived = await generation.wait()

    def _write_now(self, chunk_writer: ChunkWriter) -> bool:
        if chunk_writer.is_paused or self.generation.cancelled is not None:
            return False
        body = self.writer.collect()
        if body:
            chunk_writer.write_now(body)
        return True

    async def _send(self, send, body: bytes, more_body: bool) -> None:
        self._begin_send()
        await send({"type": "http.response.body", "body": body, "more_body": more_body})
        self.generation.stalled_since_s = math.inf

    def _begin_send(self) -> None:
        self.generation.stalled_task = asyncio.current_task()
        self.generation.stalled_since_s = time.monotonic()


async def finish(generation: Generation, receive) -> None:
    """Waits until everything is generated; raises ApiError when it failed. A client that left gets nothing."""
    watcher = generation.front.loop.create_task(watch_disconnect(receive, generation))
    generation.take_news = lambda: True  # nothing is read before the end
    try:
        while not generation.finished:
            await generation.wait()
    finally:
        watcher.cancel()
    if generation.cancelled == "disconnect":
        raise ApiError(499, "The client closed the connection.", code="client_closed_request")
    failure = failure_of(generation)
    if failure is not None:
        raise failure
