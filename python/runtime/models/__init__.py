"""One file per architecture: the forward pass, readable top to bottom."""

from __future__ import annotations


def record_model(recorder, config, model):
    """Records the family's forward pass; returns the sealed Program. Raises ValueError for an unknown family."""
    if config.family in ("llama", "qwen2", "qwen3"):
        from runtime.models.llama import record_llama

        return record_llama(recorder, config, model)
    if config.family == "gemma3":
        from runtime.models.gemma3 import record_gemma3

        return record_gemma3(recorder, config, model)
    raise ValueError(f"family: got {config.family!r}, wanted llama, qwen2, qwen3 or gemma3")
