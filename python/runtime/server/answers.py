"""How the outputs of a Generation look in each API: whole answers and the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from runtime.front import Generation, LiveOutput
from runtime.output_assembler import OutputPiece
from runtime.server.errors import ApiError
from runtime.server.logprobs import chat_logprobs, completion_logprobs


def failure_of(generation: Generation) -> ApiError | None:
    """The error that a finished or failed call answers with; None while all is well."""
    if generation.cancelled == "shutdown":
        return ApiError(503, "The server shut down before this request ended.", code="shutting_down")
    for output in generation.outputs:
        if output.finish_reason == "error":
            return ApiError(500, f"Generation failed: {output.error or 'unknown error'}.", code="generation_failed")
        if output.finish_reason == "abort" and generation.cancelled is None:
            return ApiError(503, f"The request was aborted: {output.error or 'by the engine'}.", code="aborted")
    return None


def usage_of(generation: Generation) -> dict[str, Any]:
    num_prompt, num_output = generation.num_prompt_tokens, generation.num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def timings_of(output: LiveOutput) -> dict[str, Any] | None:
    """What each part took, under llama.cpp's names; None before the first token."""
    if output.first_token_s is None:
        return None
    started_s = output.scheduled_s if output.scheduled_s is not None else output.arrival_s
    prompt_ms = max(1e-3, (output.first_token_s - started_s) * 1e3)
    decode_ms = max(1e-3, (output.last_token_s - output.first_token_s) * 1e3)
    num_computed = output.num_prompt_tokens - output.num_cached_tokens
    num_decoded = max(0, output.num_tokens - 1)
    return {
        "queue_ms": round(max(0.0, started_s - output.arrival_s) * 1e3, 3),
        "cache_n": output.num_cached_tokens,
        "prompt_n": num_computed,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_second": round(num_computed / prompt_ms * 1e3, 3),
        "predicted_n": output.num_tokens,
        "predicted_ms": round(decode_ms, 3),
        "predicted_per_second": round(num_decoded / decode_ms * 1e3, 3),
    }


class Shape:
    """What both APIs share: the outer object and usage."""

    object_name = ""
    chunk_object_name = ""

    def __init__(self, generation: Generation, model: str, fingerprint: str, *, with_token_ids: bool) -> None:
        self.generation = generation
        self.tokenizer = generation.front.tokenizer
        self.with_token_ids = with_token_ids
        self._outer = {"id": generation.request_id, "created": int(time.time()), "model": model}
        self._fingerprint = fingerprint

    def _answer(self, choices: list[dict], **more) -> dict[str, Any]:
        return {
            "id": self._outer["id"], "object": self.object_name, "created": self._outer["created"],
            "model": self._outer["model"], "system_fingerprint": self._fingerprint, "choices": choices, **more,
        }  # fmt: skip

    def _chunk(self, choices: list[dict], **more) -> dict[str, Any]:
        return {**self._answer(choices, **more), "object": self.chunk_object_name}

    def usage(self, generation: Generation) -> dict[str, Any]:
        return usage_of(generation)

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        return self._chunk([], usage=usage_of(generation))

    def whole(self) -> dict[str, Any]:
        """The answer to a call that did not stream."""
        choices = [self.choice(output, output.take()) for output in self.generation.outputs]
        answer = self._answer(choices, usage=usage_of(self.generation))
        timings = timings_of(self.generation.outputs[0]) if len(self.generation.outputs) == 1 else None
        if timings is not None:
            answer["timings"] = timings
        return answer

    def choice(self, output: LiveOutput, piece: OutputPiece) -> dict[str, Any]:
        raise TypeError("a shape without an API")

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """A chunk that carries text and nothing else."""
        raise TypeError("a shape without an API")

    def opening_chunks(self, output: LiveOutput) -> Iterator[dict[str, Any]]:
        """What goes before an output's first piece."""
        yield from ()

    def chunks(self, output: LiveOutput, piece: OutputPiece) -> Iterator[dict[str, Any]]:
        """A piece with logprobs, token ids or the end."""
        raise TypeError("a shape without an API")


class ChatShape(Shape):
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def _logprobs(self, output: LiveOutput, piece: OutputPiece) -> dict | None:
        if piece.logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, piece.logprobs, output.sampling.logprobs)

    def choice(self, output: LiveOutput, piece: OutputPiece) -> dict[str, Any]:
        choice = {
            "index": output.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(output, piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.with_token_ids:
            choice["token_ids"] = piece.token_ids
            choice["prompt_token_ids"] = list(self.generation.prompts[output.prompt_index].token_ids)
        return choice

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}])

    def opening_chunks(self, output: LiveOutput) -> Iterator[dict[str, Any]]:
        choice = {
            "index": output.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
            "finish_reason": None,
        }  # fmt: skip
        if self.with_token_ids:
            choice["prompt_token_ids"] = list(self.generation.prompts[output.prompt_index].token_ids)
        yield self._chunk([choice])

    def chunks(self, output: LiveOutput, piece: OutputPiece) -> Iterator[dict[str, Any]]:
        if piece.text or piece.logprobs or (self.with_token_ids and piece.token_ids):
            choice = {
                "index": output.index, "delta": {"content": piece.text}, "logprobs": self._logprobs(output, piece),
                "finish_reason": None,
            }  # fmt: skip
            if self.with_token_ids:
                choice["token_ids"] = piece.token_ids
            yield self._chunk([choice])
        if piece.finish_reason is not None:
            choice = {
                "index": output.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }  # fmt: skip
            timings = timings_of(output)
            yield self._chunk([choice], **({} if timings is None else {"timings": timings}))


class CompletionShape(Shape):
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self, generation: Generation, model: str, fingerprint: str, *, with_token_ids: bool, echo: bool
    ) -> None:
        super().__init__(generation, model, fingerprint, with_token_ids=with_token_ids)
        self.echo = echo
        self._text_offsets = [0] * len(generation.outputs)

    def _echoed(self, output: LiveOutput) -> str:
        prompt = self.generation.prompts[output.prompt_index]
        return prompt.text if prompt.text is not None else self.tokenizer.decode(list(prompt.token_ids))

    def _choice(self, output: LiveOutput, piece: OutputPiece, text: str) -> dict[str, Any]:
        logprobs = None
        if piece.logprobs is not None:
            logprobs, self._text_offsets[output.index] = completion_logprobs(
                self.tokenizer, piece.logprobs, output.sampling.logprobs, self._text_offsets[output.index]
            )
        choice = {
            "index": output.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }  # fmt: skip
        if self.with_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def choice(self, output: LiveOutput, piece: OutputPiece) -> dict[str, Any]:
        choice = self._choice(output, piece, (self._echoed(output) if self.echo else "") + piece.text)
        if self.with_token_ids:
            choice["prompt_token_ids"] = list(self.generation.prompts[output.prompt_index].token_ids)
        return choice

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(
            [{"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}]
        )

    def opening_chunks(self, output: LiveOutput) -> Iterator[dict[str, Any]]:
        if self.echo or self.with_token_ids:
            chunk = self.text_chunk(output.index, self._echoed(output) if self.echo else "")
            if self.with_token_ids:
                prompt = self.generation.prompts[output.prompt_index]
                chunk["choices"][0]["prompt_token_ids"] = list(prompt.token_ids)
            yield chunk

    def chunks(self, output: LiveOutput, piece: OutputPiece) -> Iterator[dict[str, Any]]:
        timings = timings_of(output) if piece.finish_reason is not None else None
        yield self._chunk(
            [self._choice(output, piece, piece.text)], **({} if timings is None else {"timings": timings})
        )
