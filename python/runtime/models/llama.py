"""Llama and what follows its plan: SmolLM2, Llama 3, Mistral; Qwen2 (QKV bias); Qwen3 (q and k normed per head)."""

from __future__ import annotations


def record_llama(recorder, config, model):
    """T tokens, S of them with logits; H hidden, Hq and Hkv heads of D, F feed-forward, V vocabulary."""
    recorder.copy_pages()
    hidden = recorder.embedding(model.embedding)  # [T, H]
    for index, layer in enumerate(model.layers):
        with recorder.layer(index):
            qkv = recorder.linear(
                "qkv", hidden, layer.qkv, norm=layer.attn_norm, norm_eps=config.norm_eps, bias=layer.qkv_bias
            )  # [T, (Hq + 2 Hkv) D]
            attended = recorder.attention(
                "attention", qkv, layer.kv, num_q_heads=config.num_q_heads, rope=layer.rope, scale=config.query_scale,
                q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=config.norm_eps,
            )  # [T, Hq D]  # fmt: skip
            recorder.linear_add("o", attended, layer.o, hidden, bias=layer.o_bias)  # [T, H]
            gated = recorder.linear(
                "gate_up", hidden, layer.gate_up, norm=layer.ffn_norm, norm_eps=config.norm_eps, gate=config.activation
            )  # [T, F]
            recorder.linear_add("down", gated, layer.down, hidden)  # [T, H]
    last = recorder.gather_logit_rows(hidden)  # [S, H]
    logits = recorder.linear("logits", last, model.output, norm=model.output_norm, norm_eps=config.norm_eps)  # [S, V]
    recorder.sampling(logits)
    return recorder.seal()
