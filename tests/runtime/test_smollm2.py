"""The real default model: exact mode against Hugging Face transformers on the same dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.tokenizer import Tokenizer
from tests.kit.engines import load, running_engine
from tests.kit.prompts import PROMPTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NUM_TOKENS = 64
TIE = 1e-4  # logits this near (relative to the largest) may go either way


@pytest.fixture(scope="module")
def exact():
    return load("smollm2", activations="fp32", kv_dtype="fp32", max_model_len=1024)


@pytest.fixture(scope="module")
def hf_model(exact):
    """transformers' Llama with the very weights that the GGUF file holds, dequantised to fp32."""
    config, tensors = exact.config, exact.checkpoint.tensors

    def matrix(name: str):
        tensor = tensors[name]
        out = np.empty(tensor.shape, dtype=np.float32)
        _native.Weight(tensor.data, tensor.format, *tensor.shape, tensor.row_order).dequantize(out)
        return torch.from_numpy(out)

    def vector(name: str):
        return torch.from_numpy(np.array(exact.checkpoint.vector(name), dtype=np.float32))

    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_q_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta, max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(hf_config).eval()
    state = {"model.embed_tokens.weight": matrix("embedding"), "model.norm.weight": vector("output_norm")}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(config.num_layers):
        hf, ours = f"model.layers.{i}.", f"layers.{i}."
        for theirs, name in (
            ("self_attn.q_proj", "q"), ("self_attn.k_proj", "k"), ("self_attn.v_proj", "v"), ("self_attn.o_proj", "o"),
            ("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down"),
        ):  # fmt: skip
            state[f"{hf}{theirs}.weight"] = matrix(ours + name)
        state[f"{hf}input_layernorm.weight"] = vector(ours + "attn_norm")
        state[f"{hf}post_attention_layernorm.weight"] = vector(ours + "ffn_norm")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    return model


def test_greedy_tokens_equal_transformers(exact, hf_model):
    """20 prompts x 64 tokens. Each of our tokens must be transformers' most likely one after the same prefix, which is
    the same as generating side by side, and goes on behind a tie."""
    tokenizer = Tokenizer.from_checkpoint(exact.checkpoint)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    with running_engine("smollm2", loaded=exact, activations="fp32", kv_dtype="fp32", max_model_len=1024) as engine:
        answers = engine.run(prompts, max_tokens=NUM_TOKENS)
    num_ties = 0
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == NUM_TOKENS
        with torch.no_grad():
            logits = hf_model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        best = logits.max(dim=-1)
        for position, token in enumerate(tokens):
            if int(best.indices[position]) != token:
                gap = float(best.values[position] - logits[position, token]) / float(best.values[position].abs())
                assert gap < TIE, (
                    f"token {position}: {token} is {gap:.1e} below transformers' {int(best.indices[position])}"
                )
                num_ties += 1
    print(f"{num_ties} ties within {TIE} among {len(PROMPTS) * NUM_TOKENS} tokens")
    assert num_ties <= len(PROMPTS)
