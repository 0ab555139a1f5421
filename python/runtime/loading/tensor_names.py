"""Canonical tensor names, the shape each must have, and what Hugging Face and GGUF files call them.

embedding  output  output_norm
layers.{i}.{attn_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_attn_norm,
            ffn_norm, gate, up, down, post_ffn_norm}
"""

from __future__ import annotations

import re

from runtime.model_config import ModelConfig

_HF_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.o_proj.bias": "o_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
# What follows attention is the feed-forward norm in most families; Gemma 3 norms on both sides of each half.
_HF_NORMS = {"post_attention_layernorm.weight": "ffn_norm"}
_HF_NORMS_GEMMA3 = {
    "post_attention_layernorm.weight": "post_attn_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "post_feedforward_layernorm.weight": "post_ffn_norm",
}
_HF_TOP = {"embed_tokens.weight": "embedding", "norm.weight": "output_norm"}
_HF_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HF_IGNORED = re.compile(
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\."  # the other half of a multimodal wrapper
    r"|.*\.rotary_emb\.inv_freq$|.*\.self_attn\.(masked_)?bias$"  # constants that old exports carry
)

_GGUF_TOP = {"token_embd.weight": "embedding", "output.weight": "output", "output_norm.weight": "output_norm"}
_GGUF_LAYER = {
    "attn_norm.weight": "attn_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_output.weight": "o",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_output.bias": "o_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "post_attention_norm.weight": "post_attn_norm",
    "ffn_norm.weight": "ffn_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
    "post_ffw_norm.weight": "post_ffn_norm",
}
# rope_freqs becomes part of the config; attn_rot_embd is a constant that old exports carry.
_GGUF_IGNORED = re.compile(r"(blk\.\d+\.)?(rope_freqs\.weight|attn_rot_embd(\.weight)?)$")


def canonical_of_hf(name: str, config: ModelConfig) -> str | None:
    """The canonical name; "" where the tensor is rightly left out; None where it is unknown."""
    if name in ("lm_head.weight", "language_model.lm_head.weight"):
        return "" if config.tie_word_embeddings else "output"
    if _HF_IGNORED.match(name):
        return ""
    for prefix in _HF_PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    if name in _HF_TOP:
        return _HF_TOP[name]
    match = re.fullmatch(r"layers\.(\d{1,6})\.(.+)", name)
    if match is None:
        return None
    norms = _HF_NORMS_GEMMA3 if config.family == "gemma3" else _HF_NORMS
    short = _HF_LAYER.get(match[2]) or norms.get(match[2])
    return f"layers.{int(match[1])}.{short}" if short else None


def canonical_of_gguf(name: str, config: ModelConfig) -> str | None:
    """As canonical_of_hf, for the names llama.cpp's converters write."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    if _GGUF_IGNORED.match(name):
        return ""
    match = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name)
    if match is None or match[2] not in _GGUF_LAYER:
        return None
    return f"layers.{int(match[1])}.{_GGUF_LAYER[match[2]]}"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, of every tensor that the model must have and no other. Matrices are (out, in)."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_q_heads * head_dim, config.num_kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "gate": (config.intermediate_size, hidden),
        "up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }
    if config.attention_bias:
        layer.update(q_bias=(q_rows,), k_bias=(kv_rows,), v_bias=(kv_rows,))
    if config.attention_output_bias:
        layer.update(o_bias=(hidden,))
    if config.qk_norm:
        layer.update(q_norm=(head_dim,), k_norm=(head_dim,))
    if config.has_post_norms:
        layer.update(post_attn_norm=(hidden,), post_ffn_norm=(hidden,))
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, hidden), "output_norm": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["output"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
    return shapes
