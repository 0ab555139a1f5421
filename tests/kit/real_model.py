"""The one real model that tests use: the embedded default, fetched once and then kept in the cache folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file."""
    from runtime.loading import resolve_model

    return resolve_model("smollm2", progress=False)
