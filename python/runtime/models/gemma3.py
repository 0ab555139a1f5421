"""Gemma 3 (text): scaled embedding, q/k norms, norms before and after each block, sliding layers between full ones."""

from __future__ import annotations


def record_gemma3(recorder, config, model):
    """T tokens, S of them with logits; H hidden, Hq and Hkv heads of D, F feed-forward, V vocabulary."""
    eps = config.norm_eps
    recorder.copy_pages()
    hidden = recorder.embedding(model.embedding, scale=config.embedding_scale)  # [T, H]
    for index, layer in enumerate(model.layers):
        with recorder.layer(index):
            qkv = recorder.linear("qkv", hidden, layer.qkv, norm=layer.attn_norm, norm_eps=eps, bias=layer.qkv_bias)
            attended = recorder.attention(
                "attention", qkv, layer.kv, num_q_heads=config.num_q_heads, rope=layer.rope, scale=config.query_scale,
                soft_cap=config.attn_logit_softcap or 0.0, q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=eps,
            )  # [T, Hq D]  # fmt: skip
            branch = recorder.linear(
                "o", attended, layer.o, bias=layer.o_bias, out=recorder.buffer("branch", hidden.width)
            )
            recorder.norm_add("post_attention", branch, hidden, layer.post_attn_norm, eps)  # [T, H]
            gated = recorder.linear(
                "gate_up", hidden, layer.gate_up, norm=layer.ffn_norm, norm_eps=eps, gate=config.activation
            )  # [T, F]
            branch = recorder.linear("down", gated, layer.down, out=branch)
            recorder.norm_add("post_ffn", branch, hidden, layer.post_ffn_norm, eps)  # [T, H]
    last = recorder.gather_logit_rows(hidden)  # [S, H]
    logits = recorder.linear("logits", last, model.output, norm=model.output_norm, norm_eps=eps)  # [S, V]
    recorder.soft_cap(logits, config.final_logit_softcap)
    recorder.sampling(logits)
    return recorder.seal()
