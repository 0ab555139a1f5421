"""Tiny random models of every family, written as Hugging Face folders (by transformers) or as GGUF files.

path, model = write_tiny_model("qwen3", folder)        # model: the transformers model in fp32, eval mode
path, model = write_tiny_gguf("Q8_0", folder)          # model holds the same dequantised weights
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 384
# Every family and every way of rotating or masking that a family can ask for.
FAMILIES = (
    "llama",
    "llama-tied",
    "llama-bias",
    "llama3-rope",
    "llama-yarn",
    "llama-linear",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma3",
    "gemma3-scaled",
)
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # of the size at which attention and activations matter
    "rms_norm_eps": 1e-5,
}


def hf_config(variant: str, **overrides: Any) -> Any:
    """The transformers config of a variant."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if variant.startswith("llama"):
        extra: dict[str, Any] = {"tie_word_embeddings": variant == "llama-tied"}
        if variant == "llama-bias":
            extra["attention_bias"] = True
        if variant == "llama3-rope":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
            rope["original_max_position_embeddings"] = 64
        if variant == "llama-yarn":
            rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
        if variant == "llama-linear":
            rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        return transformers.LlamaConfig(**{**_BASE, "rope_parameters": rope, **extra, **overrides})
    if variant == "mistral":
        values = {**_BASE, "sliding_window": 16, "head_dim": 32, "rope_parameters": rope}
        return transformers.MistralConfig(**{**values, **overrides})
    if variant.startswith("qwen2"):
        window = (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1} if variant != "qwen2" else {}
        )
        return transformers.Qwen2Config(**{**_BASE, "rope_parameters": rope, **window, **overrides})
    if variant == "qwen3":
        return transformers.Qwen3Config(**{**_BASE, "head_dim": 32, "rope_parameters": rope, **overrides})
    if variant.startswith("gemma3"):
        full: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000000.0}
        extra = {}
        if variant == "gemma3-scaled":
            full = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
            extra = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 48}
        local = {"rope_type": "default", "rope_theta": 10000.0}
        values = {
            **_BASE,
            "head_dim": 32,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": full, "sliding_attention": local},
            **extra,
        }
        return transformers.Gemma3TextConfig(**{**values, **overrides})
    raise ValueError(f"variant: got {variant!r}, wanted one of {', '.join(FAMILIES)}")


def _random_model(config: Any, seed: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    # eager: the only attention that applies soft caps
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # initialised to one (or zero): a mistake in them would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write_tiny_model(
    variant: str, folder: Path, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **overrides: Any
) -> tuple[Path, Any]:
    """Writes config.json, safetensors, tokenizer.json.

    Returns the folder and the model, in fp32 with the weights that the files hold.
    """
    import torch
    import transformers

    model = _random_model(hf_config(variant, **overrides), seed)
    target = getattr(torch, dtype)
    rounded = model.to(target)
    folder = Path(folder)
    transformers.utils.logging.disable_progress_bar()
    rounded.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder, rounded.to(torch.float32)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE tokens: three special ones, 256 bytes, some merges and a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # fewer tokens than embedding rows, as in most published models
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        show_progress=False,
    )
    text = ["the quick brown fox jumps over the lazy dog and then the other one, again and again"] * 4
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_NAMES_GEMMA3 = {
    **_GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _gguf_name(name: str, architecture: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, _, kind = rest.rpartition(".")
    names = _GGUF_NAMES_GEMMA3 if architecture == "gemma3" else _GGUF_NAMES
    return f"blk.{layer}.{names[stem]}.{kind}"


def interleave_rotary_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of q or k in the order of llama-architecture GGUF files: halves of each head, row by row, in turn."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_tiny_gguf(
    format_name: str, folder: Path, variant: str = "llama", seed: int = 0, **overrides: Any
) -> tuple[Path, Any]:
    """Writes <folder>/tiny.gguf, matrices in `format_name`. Returns it and the model of the dequantised weights."""
    import gguf
    import torch

    config = hf_config(variant, **overrides)
    model = _random_model(config, seed)
    architecture = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}.get(
        config.model_type, config.model_type
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    _write_gguf_metadata(writer, config)
    _write_gguf_vocabulary(writer, folder)
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = _llama3_factors(model)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    quantisation = gguf.GGMLQuantizationType[format_name]
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in state.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = parameter.numpy()
            if values.ndim == 2:
                raw = gguf.quantize(values, quantisation)
                parameter.copy_(torch.from_numpy(gguf.dequantize(raw, quantisation).reshape(values.shape).copy()))
                values = raw
            elif architecture == "gemma3":
                values = values + 1  # these files hold what the norm multiplies by
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                num_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = interleave_rotary_rows(values, num_heads)
            is_matrix = parameter.ndim == 2
            writer.add_tensor(
                _gguf_name(name, architecture),
                np.ascontiguousarray(values),
                raw_dtype=quantisation if is_matrix and quantisation > 1 else None,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def _llama3_factors(model: Any) -> np.ndarray:
    """What llama.cpp's converter files for Llama 3: unscaled over scaled frequencies, one per pair."""
    scaled = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    dim = 2 * scaled.size
    theta = model.config.rope_parameters["rope_theta"]
    return theta ** -(np.arange(0, dim, 2) / dim) / scaled


def _write_gguf_metadata(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if full["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    if "full_attention" in rope:
        slides = [layer_type == "sliding_attention" for layer_type in config.layer_types]
        writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", slides)
        writer.add_float32(f"{writer.arch}.attention.scale", config.query_pre_attn_scalar**-0.5)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _write_gguf_vocabulary(writer: Any, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {entry["id"] for entry in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCAB_SIZE)]
    types = [3 if index in special else 5 if index >= len(vocabulary) else 1 for index in range(len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_chat_template(config["chat_template"])
