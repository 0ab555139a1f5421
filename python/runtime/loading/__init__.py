"""From a model's name to its config and tensors, borrowed from the files and never copied.

`resolve_model(name)` finds the files, `open_checkpoint(path)` reads them. Both are imported on first use, so that
`import runtime` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.loading.errors import ModelFileError

if TYPE_CHECKING:
    from runtime.loading.checkpoint import Checkpoint, RawTensor, TokenizerSource, open_checkpoint
    from runtime.loading.gguf_reader import GgufFile
    from runtime.loading.model_source import resolve_model

_HOMES = {  # name -> the module it lives in
    "Checkpoint": "checkpoint",
    "RawTensor": "checkpoint",
    "TokenizerSource": "checkpoint",
    "open_checkpoint": "checkpoint",
    "GgufFile": "gguf_reader",
    "resolve_model": "model_source",
}

__all__ = [
    "Checkpoint",
    "GgufFile",
    "ModelFileError",
    "RawTensor",
    "TokenizerSource",
    "open_checkpoint",
    "resolve_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
