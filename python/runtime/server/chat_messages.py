"""Chat messages on their way into a template: what a role and a content may be, and what a failing template answers."""

from __future__ import annotations

from typing import Any

from runtime.chat_template import ChatTemplateError
from runtime.request_builder import Prompt
from runtime.server.errors import ApiError
from runtime.server.protocol import MAX_MESSAGES

ROLES = ("system", "developer", "user", "assistant", "tool")
# Arguments of the render call itself: a request may not set them (CVE-2025-62426 is what happens otherwise).
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "documents", "eos_token",
        "messages", "tokenize", "tools",
    }
)  # fmt: skip
_MAX_KWARGS = 32


def _refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param} {message}.", code=code, param=param)


def _flat_content(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refuse(param, f"must be a string or a list of parts, got {type(content).__name__}", "invalid_type")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
            shown = kind if isinstance(kind, str) else type(part).__name__
            raise _refuse(f"{param}[{i}]", f"must be a part of type text, got {shown[:60]}", "unsupported_parameter")
        texts.append(part["text"])
    return "\n".join(texts)


def checked_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text contents and known roles, as templates expect them. Raises ApiError naming the message."""
    if not messages:
        raise ApiError(400, "messages is empty: at least one message is needed.", code="empty_prompt", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise _refuse("messages", f"must hold at most {MAX_MESSAGES} messages, got {len(messages)}")
    checked = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            shown = repr(role)[:60]
            raise _refuse(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}, got {shown}")
        if message.get("content") is None and role != "assistant":
            raise _refuse(f"messages[{i}].content", "is required", "missing_parameter")
        content = _flat_content(message.get("content"), f"messages[{i}].content")
        kept = {**message, "role": "system" if role == "developer" else role, "content": content}
        checked.append(kept)
    return checked


def chat_prompt(chat_template, builder, asked) -> Prompt:
    """Renders a request's messages to the prompt that the model continues.

    A special token is one only where the template wrote it: what a message spells as "<|im_end|>" stays text.
    """
    if chat_template is None:
        raise ApiError(
            400, "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
            code="no_chat_template",
        )  # fmt: skip
    kwargs = asked.chat_template_kwargs or {}
    if len(kwargs) > _MAX_KWARGS:
        raise _refuse("chat_template_kwargs", f"must hold at most {_MAX_KWARGS} values, got {len(kwargs)}")
    for name, value in kwargs.items():
        simple = (
            value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 4096)
        )
        if name in _RESERVED_KWARGS or not name.isidentifier() or not simple:
            raise _refuse(f"chat_template_kwargs.{name[:60]}", "is not a value that a request may set")
    messages = checked_messages(asked.messages)
    continue_final = bool(asked.continue_final_message)
    add_generation = asked.add_generation_prompt
    if continue_final and add_generation:
        raise _refuse("continue_final_message", "excludes add_generation_prompt")
    if continue_final and messages[-1]["role"] != "assistant":
        raise _refuse("continue_final_message", "needs a last message of the assistant")
    settings = {"add_generation_prompt": not continue_final and add_generation is not False, **kwargs}
    num_chars = sum(len(message["content"] or "") for message in messages)
    try:
        if not continue_final and not builder.is_far_too_long(num_chars):
            return Prompt(tuple(chat_template.encode(builder.tokenizer, messages, **settings)))
        text = chat_template.render(messages, **settings)
    except ChatTemplateError as error:
        raise ApiError(
            400, f"The chat template refused the messages: {error}.", code="chat_template_error", param="messages"
        ) from None
    if continue_final:
        text = _without_turn_end(text, messages[-1]["content"])
    return Prompt(builder.encode(text, add_special_tokens=False, param="messages"), text)


def _without_turn_end(text: str, final_content: str) -> str:
    """Cuts what the template wrote after the last message, so that the model goes on inside it."""
    final_content = final_content.strip()
    end = text.rfind(final_content) + len(final_content)
    if not final_content or end < len(final_content):
        raise _refuse("continue_final_message", "needs a last message that the chat template shows as it is")
    return text[:end]
