"""What a model is, whatever file it came from: one frozen ModelConfig, and the rotary frequencies it asks for."""

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
        from runtime.loading.hf_config import read_hf_config

        return read_hf_config(config, generation_config or {}, file)

    @classmethod
    def from_gguf_metadata(
        cls, metadata: Mapping[str, Any], tensor_names: frozenset[str] | set[str] = frozenset(), file: str = "GGUF"
    ) -> ModelConfig:
        """From a GGUF file's key-value pairs; `tensor_names` tells what only they can (tied output, biases).

        Raises ModelFileError naming the key, what came and what was wanted.
        """
        from runtime.loading.gguf_config import read_gguf_config

        return read_gguf_config(metadata, tensor_names, file)


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


def check_rotary(config: ModelConfig, file: str) -> ModelConfig:
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
