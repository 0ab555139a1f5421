"""What clients may send: request bodies, checked strictly, turned into SamplingParams. Unknown fields are ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.sampling_params import SamplingParams
from runtime.server.errors import ApiError
from runtime.service_level import ServiceLevel

MAX_JSON_DEPTH = 64
MAX_PROMPTS = 64
MAX_MESSAGES = 4096

# Fields that would change the answer if they were ignored: refused unless they hold one of these values.
_HARMLESS: dict[str, tuple] = {
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
_SERVICE_FIELDS = {"ttft_ms", "tpot_ms", "deadline_ms", "priority", "user"}
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> dict[str, Any]:
    """Reads a request body. Raises ApiError (400) for invalid UTF-8, JSON, nesting, NaN or a body that is no object."""

    def refuse_constant(name: str):
        raise ValueError(f"{name} is not a JSON number")

    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid UTF-8 at byte {error.start}.", code="invalid_utf8") from None
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and _nesting_depth(text) > MAX_JSON_DEPTH:
        raise ApiError(400, f"The body is nested more than {MAX_JSON_DEPTH} levels deep.", code="invalid_json")
    try:
        parsed = json.loads(text, parse_constant=refuse_constant)
        if _LONE_SURROGATE.search(body):
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The body holds half of a UTF-16 surrogate pair.", code="invalid_utf8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, f"The body must be a JSON object, got {type(parsed).__name__}.", code="invalid_json")
    return parsed


def _nesting_depth(text: str) -> int:
    depth = deepest = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        character = token[0]
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(BaseModel):
    """The fields that both generating APIs share."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str | None = Field(None, description="One of /v1/models; the served model when left out.")
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, description="Lower runs first.")
    ttft_ms: float | None = Field(None, description="Target: milliseconds to the first token.")
    tpot_ms: float | None = Field(None, description="Target: mean milliseconds per token after the first.")
    deadline_ms: float | None = Field(None, description="Target: milliseconds to the end of the answer.")
    user: str | None = Field(None, description="Whose request it is.")
    cache_salt: str | None = Field(None, description="Namespace of the prefix cache.")
    return_token_ids: bool | None = None
    request_id: str | None = None

    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token; None: no logprobs at all."""
        return None

    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """Raises ApiError (400) naming the field."""
        names = (
            "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty",
            "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "logit_bias", "skip_special_tokens",
            "include_stop_str_in_output",
        )  # fmt: skip
        values = {**defaults, **{name: value for name in names if (value := getattr(self, name)) is not None}}
        values["max_tokens"] = self.wanted_max_tokens()
        values["logprobs"] = self.num_logprobs()
        try:
            return SamplingParams(**values)
        except (ValueError, TypeError) as error:
            param = re.split(r"[ \[]", str(error), maxsplit=1)[0]
            raise ApiError(400, f"{error}.", code="invalid_value", param=param) from None

    def service_level(self, headers: Mapping[str, str]) -> ServiceLevel:
        """Raises ApiError (400) naming the field."""
        try:
            return ServiceLevel.from_request(self.model_dump(include=_SERVICE_FIELDS), headers)
        except (ValueError, TypeError) as error:
            raise ApiError(400, f"{error}.", code="invalid_value", param=str(error).split(" ", 1)[0]) from None

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is only allowed with stream: true.", code="invalid_value", param="stream_options"
            )
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= 1024:
            raise ApiError(400, "cache_salt must have 1 to 1024 characters.", code="invalid_value", param="cache_salt")


class CompletionRequest(SamplingRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def wanted_max_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids. Raises ApiError for none or too many."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt or any(len(one) == 0 for one in prompt):
            raise ApiError(400, "prompt is empty: at least one token is needed.", code="empty_prompt", param="prompt")
        if len(prompt) > MAX_PROMPTS:
            raise ApiError(
                400,
                f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.",
                code="invalid_value",
                param="prompt",
            )
        return prompt


class ChatCompletionRequest(SamplingRequest):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", code="invalid_value", param="top_logprobs")
        if not self.logprobs:
            return None
        top = self.top_logprobs or 0
        if not 0 <= top <= 20:
            raise ApiError(
                400, f"top_logprobs must be between 0 and 20, got {top}.", code="invalid_value", param="top_logprobs"
            )
        return top

    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())
    model: str | None = None
    tokens: list[int]


def read_request(kind: type[BaseModel], fields: dict[str, Any]):
    """Checks a parsed body against a request type; raises ApiError (400) naming the first wrong field."""
    for name, harmless in _HARMLESS.items():
        if name in fields and fields[name] not in harmless:
            raise ApiError(400, f"{name} is not supported.", code="unsupported_parameter", param=name)
    if fields.get("tools") and fields.get("tool_choice") != "none":
        raise ApiError(
            400,
            "tools are not supported; leave them out or send tool_choice: none.",
            code="unsupported_parameter",
            param="tools",
        )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    field = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        return ApiError(400, f"{field} is required.", code="missing_parameter", param=field)
    # A field of several forms has complaints of each: the form that comes closest has the fewest, and deep ones.
    forms: dict[object, list] = {}
    for detail in details:
        if detail["loc"][:1] == first["loc"][:1]:
            forms.setdefault(detail["loc"][1:2], []).append(detail)
    closest = min(forms.values(), key=lambda form: (len(form), -len(form[0]["loc"])))[0]
    place = [str(part) for part in closest["loc"][1:] if isinstance(part, int) or len(forms) == 1]
    same_depth = [form[0] for form in forms.values() if len(form[0]["loc"]) == len(closest["loc"]) <= 2] or [closest]
    complaints = dict.fromkeys(_lowered(detail["msg"]) for detail in same_depth)
    param = ".".join([field, *place])
    shown = repr(closest["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ApiError(400, f"{param}: {' or '.join(complaints)}, got {shown}.", code="invalid_type", param=param)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
