"""ModelConfig against transformers' own configs, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime.loading import ModelFileError
from runtime.model_config import ModelConfig, RopeScaling, rope_inv_freq
from tests.kit.tiny_models import FAMILIES, hf_config


def parsed(variant: str, **overrides) -> tuple[dict, object]:
    """The JSON that transformers writes for a variant, and the config it wrote it from."""
    config = hf_config(variant, **overrides)
    return json.loads(config.to_json_string(use_diff=False)), config


def reference_inv_freq(config, layer_type: str | None = None):
    """transformers' frequencies and attention factor of one layer type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if layer_type:
        return getattr(Gemma3RotaryEmbedding(config), f"{layer_type}_inv_freq"), 1.0
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    return LlamaRotaryEmbedding(config).inv_freq, 1.0


@pytest.mark.parametrize("variant", FAMILIES)
def test_rotary_frequencies_equal_transformers(variant):
    values, config = parsed(variant)
    ours = ModelConfig.from_hf_config(values)
    is_gemma = variant.startswith("gemma3")
    for local, layer_type in ((False, "full_attention"), (True, "sliding_attention")) if is_gemma else ((False, None),):
        reference, factor = reference_inv_freq(config, layer_type)
        inv_freq, attention_factor = rope_inv_freq(ours, local=local)
        assert inv_freq.dtype == np.float32
        assert inv_freq.shape == (ours.rotary_dim // 2,)
        np.testing.assert_allclose(inv_freq, reference.numpy(), rtol=3e-7)
        assert attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_rotary_frequencies_of_random_settings_equal_transformers(kind, seed):
    rng = np.random.default_rng(seed)
    rope = {"rope_type": kind, "rope_theta": float(10 ** rng.uniform(3, 7)), "factor": float(rng.uniform(1.5, 40))}
    if kind != "linear":
        rope["original_max_position_embeddings"] = int(rng.integers(64, 8192))
    if kind == "llama3":
        rope["low_freq_factor"] = float(rng.uniform(0.5, 2))
        rope["high_freq_factor"] = rope["low_freq_factor"] + float(rng.uniform(0.5, 4))
    if kind == "yarn" and seed % 2:
        rope.update(beta_fast=float(rng.uniform(16, 64)), mscale=1.0, mscale_all_dim=0.8, truncate=bool(seed % 4 == 1))
    values, config = parsed("llama", rope_parameters=rope, head_dim=64, max_position_embeddings=4096)
    reference, factor = reference_inv_freq(config)
    inv_freq, attention_factor = rope_inv_freq(ModelConfig.from_hf_config(values))
    np.testing.assert_allclose(inv_freq, reference.numpy(), rtol=2e-6)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_field_equals_transformers(variant):
    values, config = parsed(variant)
    ours = ModelConfig.from_hf_config(values)
    assert (ours.hidden_size, ours.num_layers, ours.vocab_size) == (64, config.num_hidden_layers, config.vocab_size)
    assert (ours.num_q_heads, ours.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert ours.head_dim == getattr(config, "head_dim", None) or 16
    assert ours.intermediate_size == config.intermediate_size
    assert ours.norm_eps == config.rms_norm_eps
    assert ours.tie_word_embeddings == config.tie_word_embeddings
    assert ours.family == {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    assert ours.activation == ("gelu_tanh" if ours.family == "gemma3" else "silu")
    assert ours.attention_bias == (variant in ("llama-bias", "qwen2", "qwen2-window"))
    assert ours.attention_output_bias == (variant == "llama-bias")
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id) == (1, (2,), 0)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if variant == "mistral" else "full_attention"] * config.num_hidden_layers
    assert [f"{name}_attention" for name in ours.layer_types] == list(types)
    assert ours.sliding_window == (config.sliding_window if "sliding_attention" in types else None)
    scalar = getattr(config, "query_pre_attn_scalar", ours.head_dim)
    assert ours.query_scale == pytest.approx(scalar**-0.5, rel=1e-12)
    assert ours.final_logit_softcap == getattr(config, "final_logit_softcapping", None)


def test_spelling_of_transformers_4_reads_the_same():
    values, _ = parsed("llama3-rope")
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    old["rope_scaling"] = {k: v for k, v in values["rope_parameters"].items() if k != "rope_theta"}
    old["rope_theta"] = values["rope_parameters"]["rope_theta"]
    assert ModelConfig.from_hf_config(old) == ModelConfig.from_hf_config(values)

    values, _ = parsed("gemma3-scaled")
    dropped = ("rope_parameters", "layer_types")
    old = {key: value for key, value in values.items() if key not in dropped}
    old.update(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    old.update(num_hidden_layers=12, sliding_window_pattern=6)
    ours = ModelConfig.from_hf_config(old)
    assert ours.layer_types == (("sliding",) * 5 + ("full",)) * 2
    assert (ours.rope_theta, ours.rope_local_theta, ours.rope_scaling.factor) == (1e6, 1e4, 8.0)


def test_multimodal_wrapper_is_read_for_its_text_model():
    values, _ = parsed("gemma3")
    wrapped = {"model_type": "gemma3", "text_config": values, "vision_config": {}, "eos_token_id": [2, 5]}
    ours = ModelConfig.from_hf_config(wrapped)
    assert ours.family == "gemma3"
    assert ours.eos_token_ids == (2, 5)


def test_end_tokens_of_both_files_are_joined():
    values, _ = parsed("llama", eos_token_id=2)
    assert ModelConfig.from_hf_config(values, {"eos_token_id": [7, 2, 9]}).eos_token_ids == (7, 2, 9)
    values["eos_token_id"] = None
    assert ModelConfig.from_hf_config(values).eos_token_ids == ()


def test_embedding_scale_is_rounded_as_the_embedding_is():
    values, _ = parsed("gemma3", hidden_size=96)
    values["dtype"] = "float32"
    assert ModelConfig.from_hf_config(values).embedding_scale == float(np.float32(96**0.5))
    values["dtype"] = "bfloat16"
    assert ModelConfig.from_hf_config(values).embedding_scale == 9.8125  # the bfloat16 nearest to 9.79796


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 1 << 25}, "hidden_size"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 15}, "rotary"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": float("inf"), "factor": 2}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_scaling"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "factor",
        ),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": {}}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"text_config": [1]}, "text_config"),
    ],
)
def test_bad_fields_are_named(change, named):
    values, _ = parsed("llama")
    with pytest.raises(ModelFileError, match=named):
        ModelConfig.from_hf_config({**values, **change})


def test_layer_types_must_fit():
    values, _ = parsed("qwen3")
    for bad in (["full_attention"], ["linear_attention"] * 3, "full", ["sliding_attention"] * 3):
        with pytest.raises(ModelFileError, match=r"layer_types|sliding_window"):
            ModelConfig.from_hf_config({**values, "layer_types": bad})


def test_gguf_metadata_errors_name_the_key():
    good = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.feed_forward_length": 128,
        "llama.context_length": 512,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 100,
    }
    config = ModelConfig.from_gguf_metadata(good)
    assert (config.num_kv_heads, config.head_dim, config.tie_word_embeddings) == (4, 16, True)
    assert config.rope_scaling == RopeScaling()
    assert not ModelConfig.from_gguf_metadata(good, {"output.weight"}).tie_word_embeddings
    per_layer = {**good, "llama.attention.head_count_kv": np.array([2, 2], dtype=np.uint32)}
    assert ModelConfig.from_gguf_metadata(per_layer).num_kv_heads == 2
    for change in (
        {"general.architecture": "mamba"},
        {"general.architecture": np.zeros(3)},
        {"llama.block_count": "two"},
        {"llama.block_count": 0},
        {"llama.attention.head_count_kv": np.array([2, 4], dtype=np.uint32)},
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        {"llama.rope.dimension_count": 17},
        {"llama.rope.scaling.type": "longrope"},
        {"llama.expert_count": 8},
        {"llama.attention.value_length": 32},
        {"llama.context_length": None},
    ):
        key = next(iter(change)).split(".", 1)[1]
        with pytest.raises(ModelFileError, match=key.split(".")[-1].replace("dimension_count", "dimension")):
            ModelConfig.from_gguf_metadata({**good, **change})
