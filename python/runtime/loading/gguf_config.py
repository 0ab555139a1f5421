"""ModelConfig from the key-value pairs of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.loading.config_fields import Fields
from runtime.loading.hf_config import gemma3_layer_types, read_rope_scaling, sqrt_embedding_scale
from runtime.model_config import (
    MAX_DIM,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    ModelConfig,
    RopeScaling,
    check_rotary,
)

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def read_gguf_config(metadata: Mapping[str, Any], tensor_names: frozenset[str] | set[str], file: str) -> ModelConfig:
    general = Fields(metadata, file)
    architecture = general.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise general.error("general.architecture", architecture, f"one of {', '.join(GGUF_ARCHITECTURES)}")
    prefix = f"{architecture}."
    own = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields({key: _one_value(value) for key, value in own.items()}, file, prefix)
    is_gemma = architecture == "gemma3"

    hidden_size = fields.integer("embedding_length", 1, MAX_DIM)
    num_layers = fields.integer("block_count", 1, MAX_LAYERS)
    num_q_heads = fields.integer("attention.head_count", 1, MAX_DIM)
    num_kv_heads = fields.integer("attention.head_count_kv", 1, num_q_heads, num_q_heads)
    if num_q_heads % num_kv_heads:
        raise fields.error("attention.head_count_kv", num_kv_heads, f"a divisor of attention.head_count {num_q_heads}")
    if fields.get("attention.key_length") is None and hidden_size % num_q_heads:
        raise fields.error("embedding_length", hidden_size, f"a multiple of attention.head_count {num_q_heads}")
    head_dim = fields.integer("attention.key_length", 2, MAX_DIM, hidden_size // num_q_heads)
    if fields.integer("attention.value_length", 1, MAX_DIM, head_dim) != head_dim:
        raise fields.error("attention.value_length", fields.get("attention.value_length"), f"{head_dim}, as key_length")
    if fields.integer("expert_count", 0, MAX_DIM, 0):
        raise fields.error(
            "expert_count", fields.get("expert_count"), "0 (mixture-of-experts models are not supported)"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if hasattr(tokens, "__len__") and not isinstance(tokens, str) else None
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE, num_tokens)
    max_positions = fields.integer("context_length", 1, MAX_POSITIONS)
    rotary_dim = fields.integer("rope.dimension_count", 2, head_dim, head_dim)

    window = fields.get("attention.sliding_window")
    if window is not None:
        window = fields.integer("attention.sliding_window", 0, MAX_POSITIONS) or None
    layer_types = _gguf_layer_types(fields, is_gemma, num_layers, own.get("attention.sliding_window_pattern"), window)

    def token_id(name: str) -> int | None:
        return next(iter(general.token_ids(f"tokenizer.ggml.{name}", vocab_size)), None)

    ends = (token_id("eos_token_id"), token_id("eot_token_id"), token_id("eom_token_id"))
    # Gemma 3 27B alone scales queries by its hidden size per head; llama.cpp tells it by its 62 layers.
    scaled_dim = hidden_size / num_q_heads if is_gemma and num_layers == 62 else head_dim
    result = ModelConfig(
        family=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("feed_forward_length", 1, MAX_DIM),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 0, 1),
        max_position_embeddings=max_positions,
        tie_word_embeddings="output.weight" not in tensor_names,
        activation="gelu_tanh" if is_gemma else "silu",
        rope_theta=fields.number("rope.freq_base", 1, 1e12, 1e6 if is_gemma else 1e4),
        rope_scaling=_gguf_rope_scaling(fields, max_positions),
        rope_local_theta=fields.number("rope.freq_base_swa", 1, 1e12, 1e4) if is_gemma else None,
        partial_rotary_factor=rotary_dim / head_dim,
        attention_bias="blk.0.attn_q.bias" in tensor_names,
        attention_output_bias="blk.0.attn_output.bias" in tensor_names,
        qk_norm=architecture in ("qwen3", "gemma3"),
        sliding_window=window if "sliding" in layer_types else None,
        layer_types=layer_types,
        query_scale=fields.number("attention.scale", 1e-9, 1e9, scaled_dim**-0.5) or scaled_dim**-0.5,
        attn_logit_softcap=fields.optional_number("attn_logit_softcapping", 1e-6, 1e9),
        final_logit_softcap=fields.optional_number("final_logit_softcapping", 1e-6, 1e9),
        embedding_scale=sqrt_embedding_scale(hidden_size, "float32") if is_gemma else 1.0,
        bos_token_id=token_id("bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=token_id("padding_token_id"),
    )
    return check_rotary(result, file)


def _gguf_layer_types(
    fields: Fields, is_gemma: bool, num_layers: int, pattern: Any, window: int | None
) -> tuple[str, ...]:
    if window is None:
        return ("full",) * num_layers
    if hasattr(pattern, "tolist"):  # one flag per layer: whether it slides
        flags = pattern.tolist()
        if len(flags) != num_layers:
            raise fields.error("attention.sliding_window_pattern", len(flags), f"{num_layers} flags")
        return tuple("sliding" if flag else "full" for flag in flags)
    if is_gemma or pattern is not None:
        period = fields.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, 6)
        return gemma3_layer_types(num_layers, period)
    return ("sliding",) * num_layers


def _one_value(value: Any) -> Any:
    """A per-layer array whose elements are all equal stands for its element."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        elements = value.tolist()
        return elements[0] if elements and all(element == elements[0] for element in elements) else elements
    return value


def _gguf_rope_scaling(fields: Fields, max_positions: int) -> RopeScaling:
    kind = fields.get("rope.scaling.type", "none")
    names = {
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    values = {name: fields.get(key) for name, key in names.items() if fields.get(key) is not None}
    if isinstance(kind, str) and kind == "none":
        return RopeScaling()
    return read_rope_scaling(Fields({**values, "rope_type": kind}, fields.file, fields.prefix), max_positions)
