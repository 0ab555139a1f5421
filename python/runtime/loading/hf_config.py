"""ModelConfig from a Hugging Face config.json.

Every number is checked against a limit before anything is allocated by it. Both spellings of the rotary settings are
read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`, flat or per layer type (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.loading.config_fields import ACTIVATIONS, LAYER_TYPES, Fields
from runtime.model_config import (
    MAX_DIM,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    ModelConfig,
    RopeScaling,
    check_rotary,
)

FAMILY_OF_MODEL_TYPE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}


def read_rope_scaling(fields: Fields, max_position_embeddings: int) -> RopeScaling:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if not isinstance(kind, str):
        raise fields.error("rope_type", kind, "a string")
    if kind in ("default", "mrope"):  # mrope on text alone is plain RoPE
        return RopeScaling()
    if kind == "dynamic":  # stretches only past max_position_embeddings, where no request is let
        return RopeScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise fields.error("rope_type", kind, "one of default, linear, llama3, yarn, dynamic")
    factor = fields.optional_number("factor", 1e-6, 1e6)
    if kind == "linear":
        if factor is None:
            raise fields.error("factor", None, "a number in 1e-06..1e+06")
        return RopeScaling(kind="linear", factor=factor)
    original = fields.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_position_embeddings)
    if kind == "llama3":
        low = fields.number("low_freq_factor", 1e-6, 1e6)
        high = fields.number("high_freq_factor", 1e-6, 1e6)
        if factor is None or high <= low:
            raise fields.error("factor, high_freq_factor", (factor, high), f"a factor, and more than {low:g}")
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeScaling(
        kind="yarn",
        factor=max_position_embeddings / original if factor is None else factor,
        original_max_position_embeddings=original,
        attention_factor=fields.optional_number("attention_factor", 0, 1e6),
        beta_fast=fields.optional_number("beta_fast", 1e-6, 1e6) or 32.0,
        beta_slow=fields.optional_number("beta_slow", 1e-6, 1e6) or 1.0,
        mscale=fields.optional_number("mscale", 0, 1e6),
        mscale_all_dim=fields.optional_number("mscale_all_dim", 0, 1e6),
        truncate=fields.boolean("truncate", True),
    )


def read_hf_config(config: Mapping[str, Any], generation_config: Mapping[str, Any], file: str) -> ModelConfig:
    outer = Fields(config, file)
    fields = outer
    if config.get("text_config") is not None:
        fields = Fields(config["text_config"], file, "text_config.")
    model_type = fields.get("model_type") or config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILY_OF_MODEL_TYPE:
        raise fields.error("model_type", model_type, f"one of {', '.join(FAMILY_OF_MODEL_TYPE)}")
    if config.get("quantization_config") is not None or fields.get("quantization_config") is not None:
        quantization = config.get("quantization_config") or fields.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise outer.error("quantization_config", method, "none: a folder of bf16, fp16 or fp32 weights, or a GGUF file")
    family = FAMILY_OF_MODEL_TYPE[model_type]
    is_gemma = family == "gemma3"
    defaults = _GEMMA3_DEFAULTS if is_gemma else {}

    hidden_size = fields.integer("hidden_size", 1, MAX_DIM, defaults.get("hidden_size"))
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS, defaults.get("num_hidden_layers"))
    num_q_heads = fields.integer("num_attention_heads", 1, MAX_DIM, defaults.get("num_attention_heads"))
    kv_default = 8 if model_type == "mistral" and "num_key_value_heads" not in fields.values else num_q_heads
    num_kv_heads = fields.integer(
        "num_key_value_heads", 1, num_q_heads, defaults.get("num_key_value_heads", kv_default)
    )
    if num_q_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads {num_q_heads}")
    if fields.get("head_dim") is None and family not in ("qwen3", "gemma3") and hidden_size % num_q_heads:
        raise fields.error(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads {num_q_heads}, or a head_dim"
        )
    head_default = {"qwen3": 128, "gemma3": 256}.get(family, hidden_size // num_q_heads)
    head_dim = fields.integer("head_dim", 2, MAX_DIM, head_default)
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE, defaults.get("vocab_size"))
    max_positions = fields.integer(
        "max_position_embeddings", 1, MAX_POSITIONS, defaults.get("max_position_embeddings", _MAX_POSITIONS[model_type])
    )
    if fields.boolean("mlp_bias", False):
        raise fields.error("mlp_bias", True, "false (biases in the feed-forward layers are not supported)")
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", True, "false (only causal attention is supported)")
    if family in ("qwen2", "qwen3"):
        # transformers drops the window unless use_sliding_window is set
        window = fields.get("sliding_window") if fields.boolean("use_sliding_window", False) else None
    elif model_type == "mistral":
        window = fields.values.get("sliding_window", 4096)
    else:
        window = fields.values.get("sliding_window", 4096) if is_gemma else None
    if window is not None:
        window = Fields({"sliding_window": window}, file, fields.prefix).integer("sliding_window", 1, MAX_POSITIONS)
    layer_types = _hf_layer_types(fields, family, model_type, num_layers, window)

    rope_theta, rope_local_theta, scaling, partial = _hf_rope(fields, is_gemma, max_positions)
    query_pre_attn_scalar = fields.number("query_pre_attn_scalar", 1e-6, 1e9, 256) if is_gemma else head_dim
    has_bias = fields.boolean("attention_bias", False)
    activation_field = "hidden_activation" if is_gemma and fields.get("hidden_activation") else "hidden_act"
    activation = fields.get(activation_field, "gelu_pytorch_tanh" if is_gemma else "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fields.error(activation_field, activation, f"one of {', '.join(ACTIVATIONS)}")
    tied = fields if fields.get("tie_word_embeddings") is not None else outer
    generation = Fields(generation_config, "generation_config.json")

    def ids_of(name: str) -> tuple[int, ...]:
        found: list[int] = []
        for source in (generation, fields, outer):
            found += source.token_ids(name, vocab_size)
        return tuple(dict.fromkeys(found))

    result = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_DIM, defaults.get("intermediate_size")),
        norm_eps=fields.number("rms_norm_eps", 0, 1, 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied.boolean("tie_word_embeddings", is_gemma),
        activation=ACTIVATIONS[activation],
        rope_theta=rope_theta,
        rope_scaling=scaling,
        rope_local_theta=rope_local_theta,
        partial_rotary_factor=partial,
        attention_bias=True if family == "qwen2" else has_bias and model_type != "mistral",
        attention_output_bias=has_bias and family != "qwen2" and model_type != "mistral",
        qk_norm=family in ("qwen3", "gemma3"),
        sliding_window=window if "sliding" in layer_types else None,
        layer_types=layer_types,
        query_scale=query_pre_attn_scalar**-0.5,
        attn_logit_softcap=fields.optional_number("attn_logit_softcapping", 1e-6, 1e9),
        final_logit_softcap=fields.optional_number("final_logit_softcapping", 1e-6, 1e9),
        embedding_scale=sqrt_embedding_scale(hidden_size, _hf_dtype(config, fields.values)) if is_gemma else 1.0,
        bos_token_id=next(iter(ids_of("bos_token_id")), None),
        eos_token_ids=ids_of("eos_token_id"),
        pad_token_id=next(iter(ids_of("pad_token_id")), None),
    )
    return check_rotary(result, file)


_MAX_POSITIONS = {
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "gemma3_text": 131072,
    "gemma3": 131072,
}
# A multimodal Gemma 3 wrapper leaves out of text_config what equals the class's defaults.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def _hf_layer_types(
    fields: Fields, family: str, model_type: str, num_layers: int, window: int | None
) -> tuple[str, ...]:
    given = fields.get("layer_types")
    if given is not None and family != "llama":
        if not isinstance(given, list) or len(given) != num_layers:
            raise fields.error("layer_types", given, f"a list of {num_layers} layer types")
        for layer_type in given:
            if not isinstance(layer_type, str) or layer_type not in LAYER_TYPES:
                raise fields.error("layer_types", layer_type, "full_attention or sliding_attention")
        types = tuple(LAYER_TYPES[layer_type] for layer_type in given)
        if "sliding" in types and window is None:
            raise fields.error("sliding_window", None, "a window, as layer_types names sliding_attention")
        return types
    if family == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6)
        return gemma3_layer_types(num_layers, pattern if window is not None else 1)
    if window is None:
        return ("full",) * num_layers
    if model_type == "mistral":
        return ("sliding",) * num_layers
    first_sliding = fields.integer("max_window_layers", 0, MAX_DIM, 28)
    return tuple("sliding" if layer >= first_sliding else "full" for layer in range(num_layers))


def gemma3_layer_types(num_layers: int, pattern: int) -> tuple[str, ...]:
    """Every `pattern`-th layer sees everything, the others a window."""
    return tuple("sliding" if (layer + 1) % pattern else "full" for layer in range(num_layers))


def _hf_rope(fields: Fields, is_gemma: bool, max_positions: int) -> tuple[float, float | None, RopeScaling, float]:
    """(theta, theta of sliding layers or None, scaling, partial rotary factor)."""
    parameters = fields.get("rope_parameters")
    if parameters is None:
        parameters = fields.get("rope_scaling")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise fields.error("rope_scaling", parameters, "a JSON object")
    local: Mapping[str, Any] = {}
    if any(name in parameters for name in LAYER_TYPES):
        local = parameters.get("sliding_attention") or {}
        parameters = parameters.get("full_attention") or local
    rope = Fields(parameters, fields.file, fields.prefix + "rope_parameters.")
    local_rope = Fields(local, fields.file, fields.prefix + "rope_parameters.sliding_attention.")

    default_theta = fields.number("rope_theta", 1, 1e12, 1e6 if is_gemma else 1e4)
    theta = rope.number("rope_theta", 1, 1e12, default_theta)
    local_theta = None
    if is_gemma:
        local_theta = local_rope.number("rope_theta", 1, 1e12, fields.number("rope_local_base_freq", 1, 1e12, 1e4))
    elif local:
        local_theta = local_rope.number("rope_theta", 1, 1e12, theta)
    local_kind = local_rope.get("rope_type", "default")
    if local and not is_gemma and dict(local) == dict(parameters):
        local_theta = None  # the same for both layer types
    elif local_kind != "default":
        raise local_rope.error("rope_type", local_kind, "default (sliding layers are not scaled)")
    partial = rope.number("partial_rotary_factor", 1e-3, 1, fields.number("partial_rotary_factor", 1e-3, 1, 1.0))
    return theta, local_theta, read_rope_scaling(rope, max_positions), partial


def _hf_dtype(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> str:
    for name in ("dtype", "torch_dtype"):
        for values in (text_config, config):
            if isinstance(values.get(name), str):
                return values[name]
    return "float32"


def sqrt_embedding_scale(hidden_size: int, dtype: str) -> float:
    """sqrt(hidden_size) as the model was trained with it: rounded to the dtype of the embedding table."""
    import numpy as np

    scale = np.float32(hidden_size**0.5)
    if dtype == "bfloat16":
        import ml_dtypes

        return float(scale.astype(ml_dtypes.bfloat16))
    return float(np.float16(scale)) if dtype == "float16" else float(scale)
