"""Chat templates: jinja2 as Hugging Face renders it, in a sandbox with limits.

A template comes with the model file and is not trusted; messages come from clients and are not either. The sandbox has
no attributes that lead anywhere, no loader (so no files and no import) and only the filters that templates use. Work
is bounded three ways: operations that make large strings or numbers in one go are checked before they run, the output
is counted as it is written, and rendering happens in a thread of its own that is stopped when its time is over.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.loading.checkpoint import Checkpoint
    from runtime.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 4 << 20
MAX_TIME_S = 1.0
MAX_RANGE = 100_000

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "documents", "raise_exception", "strftime_now"})
# For models whose vocabulary has the tokens of ChatML but whose files have no template.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplateError(ValueError):
    """Messages that a template refuses, or a template that fails or exceeds its limits. A bad request (400)."""


class _OutOfTime(BaseException):
    """Raised into the rendering thread; no template construct and no filter catches it."""


class ChatTemplate:
    """One compiled template with the tokens it may name. Thread-safe."""

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None) -> None:
        """text: jinja2. tokens: variables such as bos_token. Raises ChatTemplateError if it does not compile."""
        if len(text) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(f"chat template: got {len(text)} characters, wanted at most {MAX_TEMPLATE_CHARS}")
        self.text = text
        self._tokens = dict(tokens or {})
        environment = _environment()  # here, as its import is not the template's time
        self._template = _bounded(lambda: environment.from_string(text), "chat template does not compile")

    @classmethod
    def for_tokenizer(cls, text: str, tokenizer: Tokenizer) -> ChatTemplate:
        """The template with the tokenizer's bos_token, eos_token, ... as its variables."""
        return cls(text, tokenizer.named_tokens)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The model's own template, plain ChatML where its vocabulary has the tokens of it, else None: no chat."""
        text = checkpoint.chat_template
        if text is None:
            if tokenizer.token_id("<|im_start|>") is None or tokenizer.token_id("<|im_end|>") is None:
                return None
            text = CHATML_TEMPLATE
        return cls.for_tokenizer(text, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text, special tokens included: encode it with add_special_tokens=False.

        messages: objects with "role" and "content" (text, null, or a list of {"type": "text", "text": ...} parts).
        kwargs: further variables of the template, plain JSON values. Raises ChatTemplateError (a 400).
        """
        plain_messages = _checked_messages(messages)
        reserved = sorted(_RESERVED.intersection(kwargs))
        if reserved:
            raise ChatTemplateError(f"chat_template_kwargs: got {reserved[0]!r}, wanted no reserved name")
        variables = {
            **self._tokens,
            **{name: _plain(value, name) for name, value in kwargs.items()},
            "messages": plain_messages,
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
        }

        def write() -> str:
            written, num_chars = [], 0
            for piece in self._template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise ChatTemplateError(f"chat template: wrote more than {MAX_OUTPUT_CHARS} characters")
                written.append(piece)
            return "".join(written)

        return _bounded(write, "chat template failed")

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of the rendered prompt, in which a special token is one only where the template wrote it.

        What messages and tools spell as "<|im_end|>" stays text: nobody ends his turn and begins another's by typing
        it. Arguments and errors as in `render`.
        """
        pattern = _special_pattern(tokenizer)
        plain_messages = _marked(_checked_messages(messages), pattern)
        plain_tools = None if tools is None else _marked(_plain(list(tools), "tools"), pattern)
        text = self.render(plain_messages, add_generation_prompt, plain_tools, **kwargs)
        if _MARK_BEGIN not in text and _MARK_END not in text:
            return tokenizer.encode(text, add_special_tokens=False)
        # Even pieces are the prompt as it is, odd ones marked tokens (None for a mark that the template tore off).
        ids: list[int] = []
        whole = f"{_MARK_BEGIN}(.{_MARK_BEGIN}[^{_MARK_BEGIN}{_MARK_END}]*){_MARK_END}"
        pieces = re.split(f"{whole}|[{_MARK_BEGIN}{_MARK_END}]", text, flags=re.DOTALL)
        for index, piece in enumerate(pieces):
            if piece:
                piece = piece.replace(_MARK_BEGIN, "")
                ids += tokenizer.encode(piece, add_special_tokens=False, parse_special_tokens=index % 2 == 0)
        return ids


_MARK_BEGIN, _MARK_END = "\ue0f0", "\ue0f1"  # private use: of no meaning to any tokenizer


@lru_cache(maxsize=8)
def _special_pattern(tokenizer: Tokenizer) -> re.Pattern:
    """Matches the name of any special token, the longest first."""
    names = {tokenizer.token_name(token_id) or "" for token_id in tokenizer.special_ids} - {""}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _marked(value: Any, pattern: re.Pattern) -> Any:
    """`value` with every special token in its strings between marks; marks that came in are dropped.

    One more mark follows the token's first character, so that a template that cuts the string cannot set it free.
    """
    if isinstance(value, str):
        if _MARK_BEGIN in value or _MARK_END in value:
            value = value.replace(_MARK_BEGIN, "").replace(_MARK_END, "")
        return pattern.sub(lambda match: f"{_MARK_BEGIN}{match[0][0]}{_MARK_BEGIN}{match[0][1:]}{_MARK_END}", value)
    if isinstance(value, dict):
        return {name: _marked(item, pattern) for name, item in value.items()}
    return [_marked(item, pattern) for item in value] if isinstance(value, list) else value


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(f"messages: got {type(messages).__name__}, wanted a list of at least one message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"{where}: got {type(message).__name__}, wanted an object with role and content")
        if message.get("role") not in _ROLES:
            raise ChatTemplateError(f"{where}.role: got {message.get('role')!r:.80}, wanted one of {', '.join(_ROLES)}")
        plain = _plain(message, where)
        content = plain.get("content")
        if isinstance(content, list):
            plain["content"] = _joined_text(content, where)
        elif content is None and plain["role"] != "assistant":
            raise ChatTemplateError(f"{where}.content: got nothing, wanted text")
        elif content is not None and not isinstance(content, str):
            raise ChatTemplateError(
                f"{where}.content: got {type(content).__name__}, wanted text or a list of text parts"
            )
        _parse_tool_arguments(plain)
        checked.append(plain)
    return checked


def _parse_tool_arguments(message: dict[str, Any]) -> None:
    """OpenAI clients send tool arguments as JSON text; templates expect the object."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError, RecursionError):  # not JSON: left as text
                function["arguments"] = json.loads(function["arguments"] or "{}")


def _joined_text(parts: list[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ChatTemplateError(f"{where}.content[{index}]: got {kind!r:.80}, wanted a part of type 'text'")
        texts.append(text)
    return "\n".join(texts)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain JSON types alone: other objects have methods that the sandbox knows nothing of."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > 64:
        raise ChatTemplateError(f"{where}: got more than 64 levels, wanted fewer")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ChatTemplateError(f"{where}: got a {type(name).__name__} as a name, wanted strings")
        return {str(name): _plain(item, where, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise ChatTemplateError(f"{where}: got {type(value).__name__}, wanted JSON values")


def _bounded(work: Callable[[], Any], what: str) -> Any:
    """Runs `work` in its own thread for at most MAX_TIME_S and turns every failure into a ChatTemplateError.

    A thread of its own, because the exception that stops it would otherwise land in the caller if it came late.
    """
    outcome: dict[str, Any] = {}
    ending = threading.Lock()  # held while the thread says it is done, or while it is told to stop: never both

    def run() -> None:
        try:
            try:
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error
            with ending:
                outcome["done"] = True
        except _OutOfTime:
            pass  # it came between the end of the work and the end of the thread

    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(MAX_TIME_S)
    with ending:
        if "done" not in outcome:
            # Pure Python stops at its next instruction; single calls into C are short, as their sizes are bounded.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_OutOfTime))
            raise ChatTemplateError(f"{what}: it ran for more than {MAX_TIME_S:g} s")
    error = outcome.get("error")
    if error is None:
        return outcome["result"]
    if isinstance(error, ChatTemplateError):
        raise ChatTemplateError(str(error)) from None
    if isinstance(error, RecursionError):
        raise ChatTemplateError(f"{what}: it recurses too deeply") from None
    if not isinstance(error, Exception):
        raise error
    raise ChatTemplateError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from None


# -- the sandbox ----------------------------------------------------------------------------------------------------

_FILTERS = frozenset({
    "abs", "attr", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string",
    "striptags", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount",
})  # fmt: skip
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{5,}|\{)")
_SIZING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})


def _check_length(num_chars: int | float) -> None:
    if num_chars > MAX_OUTPUT_CHARS:
        raise ChatTemplateError(
            f"chat template: makes a value of {num_chars:.3g} elements, wanted at most {MAX_OUTPUT_CHARS}"
        )


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                _check_length(len(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() + right.bit_length())
    elif operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_length(len(left) + len(right))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_length(max(left.bit_length(), 1) * max(right, 0) if abs(left) > 1 else 0)
    elif operator == "%" and isinstance(left, str):
        _check_percent_format(left)


def _check_percent_format(pattern: str) -> None:
    if _WIDE_PERCENT.search(pattern):
        raise ChatTemplateError(f"chat template: got the % format {pattern!r:.80}, wanted fields without large widths")


def _checked_args(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call, refused where a method of str, bytes or int would make something huge of them."""
    name = getattr(function, "__name__", "")
    owner = getattr(function, "__self__", getattr(getattr(function, "__wrapped__", None), "__self__", None))
    if name == "to_bytes" and isinstance(owner, int):
        _check_length(max([arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)], default=1))
    if not isinstance(owner, (str, bytes)):
        return args
    if name in _SIZING_METHODS:
        num_places = owner.count("\t" if isinstance(owner, str) else b"\t") + 1 if name == "expandtabs" else 1
        _check_length(max([arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)], default=8) * num_places)
    elif name == "replace" and len(args) >= 2 and type(args[0]) is type(args[1]) is type(owner):
        _check_length(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        items = list(args[0])
        _check_length(sum(len(item) + len(owner) for item in items))
        return (items, *args[1:])
    elif name in ("format", "format_map") and isinstance(owner, str) and _WIDE_BRACES.search(owner):
        raise ChatTemplateError(f"chat template: got the format {owner!r:.80}, wanted fields without large widths")
    elif name == "translate" and args and isinstance(args[0], Mapping):
        _check_length(len(owner) * max((len(str(value)) for value in args[0].values()), default=1))
    return args


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class BoundedCodeGenerator(CodeGenerator):
        """`a ~ b` goes through a checked join; everything else that grows is intercepted by the sandbox."""

        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802 (jinja's name)
            self.write("environment.join_checked((")
            for item in node.nodes:
                self.visit(item, frame)
                self.write(", ")
            self.write("))")

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        code_generator_class = BoundedCodeGenerator
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_binop(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            return super().call(context, function, *_checked_args(function, args, kwargs), **kwargs)

        def join_checked(self, values: tuple[Any, ...]) -> str:
            texts = [str(value) for value in values]
            _check_length(sum(map(len, texts)))
            return "".join(texts)

    class GenerationBlock(Extension):
        """{% generation %} marks what the model wrote, for training; here its body is written as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    plain = environment.filters
    environment.filters = {name: function for name, function in plain.items() if name in _FILTERS}
    environment.filters["tojson"] = _to_json
    for name, wrap in (
        ("join", _checked_join),
        ("replace", _checked_replace),
        ("indent", _checked_indent),
        ("format", _checked_format),
    ):
        environment.filters[name] = wrap(plain[name])
    environment.globals.pop("lipsum", None)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's tojson: jinja's own escapes HTML, which no chat format wants."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise ChatTemplateError(f"chat template: tojson indent: got {indent!r:.40}, wanted 0..16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked_join(join: Callable) -> Callable:
    from jinja2 import pass_eval_context

    @pass_eval_context
    def checked(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        items = list(value)
        _check_length(sum(len(str(item)) + len(str(d)) for item in items))
        return join(context, items, d, attribute)

    return checked


def _checked_replace(replace: Callable) -> Callable:
    from jinja2 import pass_eval_context

    @pass_eval_context
    def checked(context: Any, value: Any, old: str, new: str, count: int | None = None) -> str:
        _check_length(len(str(value)) + str(value).count(str(old)) * len(str(new)))
        return replace(context, value, old, new, count)

    return checked


def _checked_format(format_filter: Callable) -> Callable:
    def checked(value: Any, *args: Any, **kwargs: Any) -> str:
        _check_percent_format(str(value))
        return format_filter(value, *args, **kwargs)

    return checked


def _checked_indent(indent: Callable) -> Callable:
    def checked(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        num_chars = width if isinstance(width, int) else len(width)
        _check_length(len(value) + (value.count("\n") + 1) * max(num_chars, 0))
        return indent(value, width, first, blank)

    return checked


def _raise_exception(message: Any) -> None:
    raise ChatTemplateError(f"chat template: {str(message)[:500]}")


def _strftime_now(pattern: str) -> str:
    if not isinstance(pattern, str) or len(pattern) > 200 or re.search(r"%[^a-zA-Z%-]|%-[^a-zA-Z]", pattern):
        raise ChatTemplateError(f"chat template: strftime_now: got {pattern!r:.80}, wanted a short strftime pattern")
    return datetime.now().strftime(pattern)
