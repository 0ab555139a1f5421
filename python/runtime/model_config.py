"""What a model is, whatever file it came from: one frozen ModelConfig from a config.json or GGUF metadata.

Every number is checked against a limit before anything is allocated by it. Both spellings of the rotary settings are
read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`, flat or per layer type (transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.loading.errors import ModelFileError

if TYPE_CHECKING:
    import numpy as np

MAX_LAYERS = 1024
MAX_DIM = 1 << 24
MAX_VOCAB_SIZE = 1 << 22
MAX_POSITIONS = 1 << 30

FAMILY_OF_MODEL_TYPE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
_LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding", "full": "full", "sliding": "sliding"}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched. `kind` says which of the other fields mean something."""

    kind: str = "none"  # "none" | "linear" | "llama3" | "yarn" | "frequency_factors"
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from factor
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    frequency_factors: tuple[float, ...] = ()  # GGUF rope_freqs.weight: inv_freq / factor, one per rotary pair


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer, as its files describe it."""

    family: str  # "llama" | "qwen2" | "qwen3" | "gemma3"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    activation: str  # "silu" | "gelu_tanh"
    rope_theta: float
    rope_scaling: RopeScaling
    rope_local_theta: float | None  # of "sliding" layers, unscaled; None: as rope_theta
    partial_rotary_factor: float
    attention_bias: bool  # q, k and v have biases
    attention_output_bias: bool  # o has one
    qk_norm: bool  # RMS norm of each head of q and k before RoPE
    sliding_window: int | None  # a query sees itself and the sliding_window - 1 tokens before it
    layer_types: tuple[str, ...]  # per layer "full" | "sliding"
    query_scale: float  # scores = query_scale * q . k
    attn_logit_softcap: float | None  # scores = cap * tanh(scores / cap)
    final_logit_softcap: float | None
    embedding_scale: float  # embeddings are multiplied by it (1.0: not)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends a request; config.json and generation_config.json together
    pad_token_id: int | None
    default_sampling: tuple[tuple[str, float], ...] = ()  # fields of SamplingParams that the model's authors recommend

    @property
    def rotary_dim(self) -> int:
        """How many of a head's first dimensions are rotated, in two halves (neox order)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def has_post_norms(self) -> bool:
        """Attention and feed-forward outputs are normalised again before they are added to the residual."""
        return self.family == "gemma3"

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, file: str = "config.json"
    ) -> ModelConfig:
        """From the parsed config.json of a Hugging Face folder (a multimodal wrapper's text_config is taken).

        Raises ModelFileError naming the field, what came and what was wanted.
        """
        return _from_hf_config(config, generation_config or {}, file)

    @classmethod
    def from_gguf_metadata(
        cls, metadata: Mapping[str, Any], tensor_names: frozenset[str] | set[str] = frozenset(), file: str = "GGUF"
    ) -> ModelConfig:
        """From a GGUF file's key-value pairs; `tensor_names` tells what only they can (tied output, biases).

        Raises ModelFileError naming the key, what came and what was wanted.
        """
        return _from_gguf_metadata(metadata, tensor_names, file)


def rope_inv_freq(config: ModelConfig, local: bool = False) -> tuple[np.ndarray, float]:
    """Inverse rotary frequencies and the factor that cos and sin are multiplied by.

    Returns ([rotary_dim / 2] fp32, attention_factor). `local` asks for those of "sliding" layers, which differ in
    Gemma 3 only. Computed in fp32 in the order transformers computes them, so that long positions turn equally far.
    YaRN: Peng et al. 2023 (arXiv 2309.00071); llama3: the scaling published with Llama 3.1.
    """
    import numpy as np

    dim = config.rotary_dim
    scaling = config.rope_scaling
    theta = config.rope_theta
    if local and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, RopeScaling()
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wave_scale = np.power(np.float32(theta), exponents)
    inv_freq = np.float32(1.0) / wave_scale
    if scaling.kind == "none":
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / np.float32(scaling.factor), 1.0
    if scaling.kind == "frequency_factors":
        return inv_freq / np.asarray(scaling.frequency_factors, dtype=np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3_inv_freq(inv_freq, scaling), 1.0
    assert scaling.kind == "yarn", scaling.kind
    low, high = _yarn_ramp_range(theta, dim, scaling)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp  # 1: frequency kept (extrapolation), 0: divided by factor (interpolation)
    stretched = np.float32(1.0) / (np.float32(scaling.factor) * wave_scale)
    return stretched * (np.float32(1) - kept) + inv_freq * kept, _yarn_attention_factor(scaling)


def _llama3_inv_freq(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    import numpy as np

    factor, context = np.float32(scaling.factor), np.float32(scaling.original_max_position_embeddings)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelength = np.float32(2 * math.pi) / inv_freq
    is_long = wavelength > context / low
    scaled = np.where(is_long, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < context / high) & ~is_long
    return np.where(is_between, blended, scaled).astype(np.float32)


def _yarn_ramp_range(theta: float, dim: int, scaling: RopeScaling) -> tuple[float, float]:
    def dimension_turning(num_turns: float) -> float:
        return (
            dim * math.log(scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


class _Fields:
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


def _read_rope_scaling(fields: _Fields, max_position_embeddings: int) -> RopeScaling:
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


def _from_hf_config(config: Mapping[str, Any], generation_config: Mapping[str, Any], file: str) -> ModelConfig:
    outer = _Fields(config, file)
    fields = outer
    if config.get("text_config") is not None:
        fields = _Fields(config["text_config"], file, "text_config.")
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
        window = _Fields({"sliding_window": window}, file, fields.prefix).integer("sliding_window", 1, MAX_POSITIONS)
    layer_types = _hf_layer_types(fields, family, model_type, num_layers, window)

    rope_theta, rope_local_theta, scaling, partial = _hf_rope(fields, is_gemma, max_positions)
    query_pre_attn_scalar = fields.number("query_pre_attn_scalar", 1e-6, 1e9, 256) if is_gemma else head_dim
    has_bias = fields.boolean("attention_bias", False)
    activation_field = "hidden_activation" if is_gemma and fields.get("hidden_activation") else "hidden_act"
    activation = fields.get(activation_field, "gelu_pytorch_tanh" if is_gemma else "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise fields.error(activation_field, activation, f"one of {', '.join(_ACTIVATIONS)}")
    tied = fields if fields.get("tie_word_embeddings") is not None else outer
    generation = _Fields(generation_config, "generation_config.json")

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
        activation=_ACTIVATIONS[activation],
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
        embedding_scale=_embedding_scale(hidden_size, _hf_dtype(config, fields.values)) if is_gemma else 1.0,
        bos_token_id=next(iter(ids_of("bos_token_id")), None),
        eos_token_ids=ids_of("eos_token_id"),
        pad_token_id=next(iter(ids_of("pad_token_id")), None),
    )
    return _check_rotary(result, file)


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
    fields: _Fields, family: str, model_type: str, num_layers: int, window: int | None
) -> tuple[str, ...]:
    given = fields.get("layer_types")
    if given is not None and family != "llama":
        if not isinstance(given, list) or len(given) != num_layers:
            raise fields.error("layer_types", given, f"a list of {num_layers} layer types")
        for layer_type in given:
            if not isinstance(layer_type, str) or layer_type not in _LAYER_TYPES:
                raise fields.error("layer_types", layer_type, "full_attention or sliding_attention")
        types = tuple(_LAYER_TYPES[layer_type] for layer_type in given)
        if "sliding" in types and window is None:
            raise fields.error("sliding_window", None, "a window, as layer_types names sliding_attention")
        return types
    if family == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6)
        return _gemma3_layer_types(num_layers, pattern if window is not None else 1)
    if window is None:
        return ("full",) * num_layers
    if model_type == "mistral":
        return ("sliding",) * num_layers
    first_sliding = fields.integer("max_window_layers", 0, MAX_DIM, 28)
    return tuple("sliding" if layer >= first_sliding else "full" for layer in range(num_layers))


def _gemma3_layer_types(num_layers: int, pattern: int) -> tuple[str, ...]:
    """Every `pattern`-th layer sees everything, the others a window."""
    return tuple("sliding" if (layer + 1) % pattern else "full" for layer in range(num_layers))


def _hf_rope(fields: _Fields, is_gemma: bool, max_positions: int) -> tuple[float, float | None, RopeScaling, float]:
    """(theta, theta of sliding layers or None, scaling, partial rotary factor)."""
    parameters = fields.get("rope_parameters")
    if parameters is None:
        parameters = fields.get("rope_scaling")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise fields.error("rope_scaling", parameters, "a JSON object")
    local: Mapping[str, Any] = {}
    if any(name in parameters for name in _LAYER_TYPES):
        local = parameters.get("sliding_attention") or {}
        parameters = parameters.get("full_attention") or local
    rope = _Fields(parameters, fields.file, fields.prefix + "rope_parameters.")
    local_rope = _Fields(local, fields.file, fields.prefix + "rope_parameters.sliding_attention.")

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
    return theta, local_theta, _read_rope_scaling(rope, max_positions), partial


def _hf_dtype(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> str:
    for name in ("dtype", "torch_dtype"):
        for values in (text_config, config):
            if isinstance(values.get(name), str):
                return values[name]
    return "float32"


def _embedding_scale(hidden_size: int, dtype: str) -> float:
    """sqrt(hidden_size) as the model was trained with it: rounded to the dtype of the embedding table."""
    import numpy as np

    scale = np.float32(hidden_size**0.5)
    if dtype == "bfloat16":
        import ml_dtypes

        return float(scale.astype(ml_dtypes.bfloat16))
    return float(np.float16(scale)) if dtype == "float16" else float(scale)


def _from_gguf_metadata(metadata: Mapping[str, Any], tensor_names: frozenset[str] | set[str], file: str) -> ModelConfig:
    general = _Fields(metadata, file)
    architecture = general.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise general.error("general.architecture", architecture, f"one of {', '.join(GGUF_ARCHITECTURES)}")
    prefix = f"{architecture}."
    own = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    fields = _Fields({key: _one_value(value) for key, value in own.items()}, file, prefix)
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
        embedding_scale=_embedding_scale(hidden_size, "float32") if is_gemma else 1.0,
        bos_token_id=token_id("bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=token_id("padding_token_id"),
    )
    return _check_rotary(result, file)


def _gguf_layer_types(
    fields: _Fields, is_gemma: bool, num_layers: int, pattern: Any, window: int | None
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
        return _gemma3_layer_types(num_layers, period)
    return ("sliding",) * num_layers


def _one_value(value: Any) -> Any:
    """A per-layer array whose elements are all equal stands for its element."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        elements = value.tolist()
        return elements[0] if elements and all(element == elements[0] for element in elements) else elements
    return value


def _gguf_rope_scaling(fields: _Fields, max_positions: int) -> RopeScaling:
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
    return _read_rope_scaling(_Fields({**values, "rope_type": kind}, fields.file, fields.prefix), max_positions)


def _check_rotary(config: ModelConfig, file: str) -> ModelConfig:
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise ModelFileError(
            file, "rotary dimensions (head_dim x partial_rotary_factor)", config.rotary_dim, "an even number"
        )
    if config.num_q_heads * config.head_dim > MAX_DIM:
        raise ModelFileError(
            file, "num_attention_heads x head_dim", config.num_q_heads * config.head_dim, f"at most {MAX_DIM}"
        )
    if config.rope_theta <= 1 and config.rope_scaling.kind == "yarn":
        raise ModelFileError(file, "rope_theta", config.rope_theta, "more than 1 for YaRN")
    return config


def with_frequency_factors(config: ModelConfig, factors: tuple[float, ...], file: str) -> ModelConfig:
    """The config with per-pair divisors of the rotary frequencies (GGUF's rope_freqs.weight, Llama 3's scaling)."""
    if len(factors) != config.rotary_dim // 2:
        raise ModelFileError(file, "rope_freqs.weight length", len(factors), f"{config.rotary_dim // 2}")
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelFileError(file, "rope_freqs.weight", "a value that is not finite and positive", "positive factors")
    return replace(config, rope_scaling=RopeScaling(kind="frequency_factors", frequency_factors=tuple(factors)))
