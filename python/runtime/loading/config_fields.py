"""Checked reading of one configuration dictionary, and the words in which files name activations and layer kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.loading.errors import ModelFileError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding", "full": "full", "sliding": "sliding"}


class Fields:
    """Checked reading of one dictionary: every error names file, field, value and what was wanted."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ModelFileError(file, prefix or "top level", values, "a JSON object")
        self.values, self.file, self.prefix = values, file, prefix

    def error(self, name: str, got: object, wanted: str) -> ModelFileError:
        return ModelFileError(self.file, self.prefix + name, got, wanted)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, value, f"an integer in {low}..{high}")
        return int(value)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, value, f"a number in {low:g}..{high:g}")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.error(name, value, f"a number in {low:g}..{high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self.values.get(name) is None else self.number(name, low, high)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise self.error(name, value, f"token ids in 0..{vocab_size - 1}")
        # Some published configs use -1, or an id past the vocabulary, for "none".
        return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
