"""What a request asks of sampling. Names follow vLLM's ``SamplingParams``; validation happens here, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python writes
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _reject(name: str, value: object, wanted: str) -> None:
    raise ValueError(f"{name} must be {wanted}, got {_shown(value)}")


def _check_number(name: str, value: object, low: float, high: float, wanted: str, *, low_open: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = (low < number if low_open else low <= number) and number <= high
    if not math.isfinite(number) or not inside:
        _reject(name, value, wanted)
    return number


def _check_integer(name: str, value: object, low: int, high: int | None, wanted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {_shown(value)}")
    if value < low or (high is not None and value > high):
        _reject(name, value, wanted)
    return value


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {type(value).__name__} {_shown(value)}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and where it ends.

    Raises ValueError or TypeError naming the field, what came and what was wanted. ``stop`` may be given as one
    string, and ``stop``, ``stop_token_ids`` and ``logit_bias`` as any iterable or mapping: they are stored as tuples.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 or -1 = all; stored as 0
    min_p: float = 0.0  # [0, 1], relative to the most likely token
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    repetition_penalty: float = 1.0  # (0, 10], 1 = none
    seed: int | None = None  # [-2**63, 2**64); None: drawn at admission
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 16  # None: the rest of the context
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the sampled token's and the n most likely ones'
    prompt_logprobs: int | None = None  # not offered: must stay None
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, [-100, 100])
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        store = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen)
        _check_integer("n", self.n, 1, MAX_N, f"between 1 and {MAX_N}")
        store("temperature", _check_number("temperature", self.temperature, 0, 10, "a finite number between 0 and 10"))
        store("top_p", _check_number("top_p", self.top_p, 0, 1, "above 0 and at most 1", low_open=True))
        _check_integer("top_k", self.top_k, -1, 2**31 - 1, "-1 or 0 (all tokens) or positive")
        store("top_k", max(self.top_k, 0))
        store("min_p", _check_number("min_p", self.min_p, 0, 1, "between 0 and 1"))
        for name in ("presence_penalty", "frequency_penalty"):
            store(name, _check_number(name, getattr(self, name), -2, 2, "between -2 and 2"))
        store(
            "repetition_penalty",
            _check_number(
                "repetition_penalty", self.repetition_penalty, 0, 10, "above 0 and at most 10", low_open=True
            ),
        )
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1, "a 64-bit integer")
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "at least 1")
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _reject("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check_flag(name, getattr(self, name))
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        if self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not supported; leave it out")
        store("stop", self._checked_stop())
        store("stop_token_ids", self._checked_stop_token_ids())
        store("logit_bias", self._checked_logit_bias())

    def _checked_stop(self) -> tuple[str, ...]:
        value = self.stop
        stop = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(stop, Iterable):
            raise TypeError(f"stop must be a string or a list of strings, got {type(value).__name__}")
        stop = tuple(stop)
        if len(stop) > MAX_STOP_STRINGS:
            _reject("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, got {type(text).__name__} {_shown(text)}")
            num_bytes = len(text.encode("utf-8", "surrogatepass"))
            if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
                _reject("stop", text, f"strings of 1 to {MAX_STOP_STRING_BYTES} bytes")
        return stop

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"stop_token_ids must be a list of integers, got {type(ids).__name__}")
        ids = tuple(ids)
        if len(ids) > MAX_STOP_TOKEN_IDS:
            _reject("stop_token_ids", f"{len(ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        for token_id in ids:
            _check_integer("stop_token_ids", token_id, 0, 2**31 - 1, "token ids of at least 0")
        return ids

    def _checked_logit_bias(self) -> tuple[tuple[int, float], ...]:
        bias = () if self.logit_bias is None else self.logit_bias
        wanted = TypeError(f"logit_bias must map token ids to numbers, got {type(bias).__name__}")
        if isinstance(bias, str) or not isinstance(bias, Iterable):
            raise wanted
        pairs = tuple(bias.items()) if isinstance(bias, Mapping) else tuple(bias)
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
            raise wanted
        if len(pairs) > MAX_LOGIT_BIAS:
            _reject("logit_bias", f"{len(pairs)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        checked = {}
        for key, value in pairs:
            token_id = key
            if isinstance(key, str):  # JSON object keys are strings
                if not (key.isascii() and key.isdigit() and len(key) <= 10):
                    _reject("logit_bias", key, "keyed by token ids")
                token_id = int(key)
            _check_integer("logit_bias", token_id, 0, 2**31 - 1, "keyed by token ids")
            checked[token_id] = _check_number(f"logit_bias[{token_id}]", value, -100, 100, "between -100 and 100")
        return tuple(checked.items())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id named here does not exist in a vocabulary of ``vocab_size``."""
        for token_id in self.stop_token_ids:
            if token_id >= vocab_size:
                _reject("stop_token_ids", token_id, f"token ids below the vocabulary size {vocab_size}")
        for token_id, _ in self.logit_bias:
            if token_id >= vocab_size:
                _reject("logit_bias", token_id, f"keyed by token ids below the vocabulary size {vocab_size}")
