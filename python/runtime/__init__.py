"""Partita's Python side. ``from runtime import LLM, SamplingParams``; everything heavy is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.engine_args import EngineArgs
    from runtime.llm import LLM
    from runtime.outputs import CompletionOutput, RequestOutput
    from runtime.sampling_params import SamplingParams
    from runtime.service_level import ServiceLevel

_PLACES = {
    "CompletionOutput": "runtime.outputs",
    "EngineArgs": "runtime.engine_args",
    "LLM": "runtime.llm",
    "RequestOutput": "runtime.outputs",
    "SamplingParams": "runtime.sampling_params",
    "ServiceLevel": "runtime.service_level",
}
__all__ = ["LLM", "CompletionOutput", "EngineArgs", "RequestOutput", "SamplingParams", "ServiceLevel"]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
