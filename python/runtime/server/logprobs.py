"""Log probabilities in the two shapes of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.messages import TokenLogprobs

FLOOR = -9999.0  # JSON has no -inf


def _token_text(tokenizer, token_id: int) -> tuple[str, bytes]:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", "replace"), raw


def _chat_entry(tokenizer, token_id: int, logprob: float) -> dict:
    text, raw = _token_text(tokenizer, token_id)
    return {"token": text, "logprob": max(logprob, FLOOR), "bytes": list(raw)}


def chat_logprobs(tokenizer, entries: Sequence[TokenLogprobs], num_top: int) -> dict:
    """``{"content": [{token, logprob, bytes, top_logprobs}]}``"""
    content = []
    for entry in entries:
        shown = _chat_entry(tokenizer, entry.token_id, entry.logprob)
        shown["top_logprobs"] = [_chat_entry(tokenizer, token_id, logprob) for token_id, logprob in entry.top[:num_top]]
        content.append(shown)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer, entries: Sequence[TokenLogprobs], num_top: int, text_offset: int
) -> tuple[dict, int]:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`` and the offset after them, in characters.

    ``top_logprobs`` holds the sampled token too, as OpenAI's does, whether or not it is among the most likely.
    """
    tokens, token_logprobs, top_logprobs, offsets = [], [], [], []
    for entry in entries:
        text, _ = _token_text(tokenizer, entry.token_id)
        top = {
            _token_text(tokenizer, token_id)[0]: max(logprob, FLOOR)
            for token_id, logprob in reversed(entry.top[:num_top])
        }
        top.setdefault(text, max(entry.logprob, FLOOR))
        tokens.append(text)
        token_logprobs.append(max(entry.logprob, FLOOR))
        top_logprobs.append(dict(sorted(top.items(), key=lambda pair: -pair[1])))
        offsets.append(text_offset)
        text_offset += len(text)
    shaped = {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": offsets}
    return shaped, text_offset
