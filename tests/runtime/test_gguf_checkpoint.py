"""Whole GGUF models: every tensor under its canonical name, in the model's row order, with its exact values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.chat_template import ChatTemplate
from runtime.loading import ModelFileError, open_checkpoint
from runtime.loading.tensor_names import expected_shapes
from runtime.model_config import rope_inv_freq
from runtime.tokenizer import Tokenizer
from tests.kit.real_model import smollm2_path
from tests.kit.tiny_models import write_tiny_gguf

HF_NAMES = {
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight", "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "o_bias": "self_attn.o_proj.bias", "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight", "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight", "attn_norm": "input_layernorm.weight",
}  # fmt: skip
NORMS = {"ffn_norm": "post_attention_layernorm.weight"}
NORMS_GEMMA3 = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}


def hf_name(canonical: str, family: str) -> str:
    top = {"embedding": "model.embed_tokens.weight", "output": "lm_head.weight", "output_norm": "model.norm.weight"}
    if canonical in top:
        return top[canonical]
    _, layer, short = canonical.split(".")
    names = {**HF_NAMES, **(NORMS_GEMMA3 if family == "gemma3" else NORMS)}
    return f"model.layers.{layer}.{names[short]}"


def matrix(tensor) -> np.ndarray:
    """The dequantised matrix, fp32, rows in the model's order."""
    kind = gguf.GGMLQuantizationType[tensor.format]
    values = gguf.dequantize(tensor.data.reshape(tensor.shape[0], -1), kind).reshape(tensor.shape)
    return values if tensor.row_order is None else values[tensor.row_order]


def assert_equal_weights(checkpoint, model) -> None:
    state = model.state_dict()
    family = checkpoint.config.family
    assert set(checkpoint.tensors) == set(expected_shapes(checkpoint.config))
    for name, tensor in checkpoint.tensors.items():
        reference = state[hf_name(name, family)].float().numpy()
        if len(tensor.shape) == 2:
            np.testing.assert_array_equal(matrix(tensor), reference, err_msg=name)
        else:
            values = checkpoint.vector(name)
            assert values.dtype == np.float32
            offset = 1 if family == "gemma3" else 0  # transformers' Gemma multiplies by 1 + weight
            np.testing.assert_allclose(values, reference + offset, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("variant", "format_name"),
    [
        ("llama", "Q4_0"),
        ("llama", "Q4_1"),
        ("llama-tied", "Q8_0"),
        ("llama-bias", "F32"),
        ("llama3-rope", "F16"),
        ("mistral", "Q5_0"),
        ("qwen2", "BF16"),
        ("qwen3", "Q8_0"),
        ("gemma3", "F32"),
        ("gemma3-scaled", "Q8_0"),
    ],
)
def test_weights_equal_those_the_file_was_written_from(tmp_path, variant, format_name):
    path, model = write_tiny_gguf(format_name, tmp_path, variant)
    checkpoint = open_checkpoint(path)
    assert_equal_weights(checkpoint, model)
    config, reference = checkpoint.config, model.config
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    is_gemma = config.family == "gemma3"
    rotary = model.model.rotary_emb
    full = rotary.full_attention_inv_freq if is_gemma else rotary.inv_freq
    np.testing.assert_allclose(rope_inv_freq(config)[0], full.numpy(), rtol=1e-6)
    if is_gemma:
        local = rope_inv_freq(config, local=True)[0]
        np.testing.assert_allclose(local, rotary.sliding_attention_inv_freq.numpy(), rtol=1e-6)
        assert [f"{kind}_attention" for kind in config.layer_types] == reference.layer_types
        assert config.query_scale == pytest.approx(reference.query_pre_attn_scalar**-0.5)
        assert config.final_logit_softcap == reference.final_logit_softcapping
        assert config.attn_logit_softcap == reference.attn_logit_softcapping
        assert config.embedding_scale == float(np.float32(reference.hidden_size**0.5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_gguf("Q8_0", tmp_path_factory.mktemp("gguf"))


def test_release_pages_leaves_the_tensors_readable(tiny):
    checkpoint = open_checkpoint(tiny[0])
    before = checkpoint.tensors["layers.0.q"].data.copy()
    checkpoint.release_pages()
    np.testing.assert_array_equal(checkpoint.tensors["layers.0.q"].data, before)


def test_key_follows_the_content(tiny, tmp_path):
    content = tiny[0].read_bytes()
    keys = set()
    for name, flipped in (("a", None), ("b", 100), ("c", len(content) - 40)):
        damaged = bytearray(content)
        if flipped is not None:
            damaged[flipped] ^= 1
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        try:
            keys.add(open_checkpoint(path).key)
        except ModelFileError:
            keys.add(name)
    assert len(keys) == 3


def rewritten(source, target, skip=(), extra=(), overrides=None, drop_keys=()):
    """Copies a GGUF file, leaving tensors or keys out, adding tensors, or changing keys."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop_keys:
            continue
        value = (overrides or {}).get(key, field.contents())
        kinds = field.types
        writer.add_key_value(key, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name not in skip:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"skip": ["blk.1.attn_k.weight"]}, r"layers\.1\.k"),
        ({"skip": ["token_embd.weight"]}, "embedding"),
        ({"skip": ["output_norm.weight"]}, "output_norm"),
        ({"extra": [("blk.0.ffn_gate_inp.weight", np.zeros((8, 64), np.float32))]}, "ffn_gate_inp"),
        ({"extra": [("blk.7.attn_q.weight", np.zeros((64, 64), np.float32))]}, r"blk\.7\.attn_q"),
        ({"extra": [("rope_freqs.weight", np.zeros(8, np.float32))]}, "rope_freqs"),
        ({"extra": [("rope_freqs.weight", np.ones(5, np.float32))]}, "rope_freqs"),
        ({"overrides": {"llama.feed_forward_length": 192}}, r"shape of tensor .*160.*192"),
        ({"overrides": {"llama.vocab_size": 300}}, "embedding"),
        ({"overrides": {"llama.attention.head_count": 8}}, r"shape of tensor"),
        ({"overrides": {"llama.block_count": 2}}, r"blk\.2"),
        ({"overrides": {"llama.block_count": 4}}, r"layers\.3"),
        ({"drop_keys": ["llama.context_length"]}, "context_length"),
        ({"drop_keys": ["llama.embedding_length"]}, "embedding_length"),
    ],
)
def test_wrong_tensors_and_keys_are_named(tiny, tmp_path, change, match):
    path = rewritten(tiny[0], tmp_path / "wrong.gguf", **change)
    with pytest.raises(ModelFileError, match=match):
        open_checkpoint(path)


def test_unsupported_format_is_named(tiny, tmp_path):
    zeros = np.zeros((64, 64 // 32 * 24), np.uint8)
    reader = gguf.GGUFReader(tiny[0])
    writer = gguf.GGUFWriter(tmp_path / "q5_1.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        is_changed = tensor.name == "blk.0.attn_q.weight"
        kind = gguf.GGMLQuantizationType.Q5_1 if is_changed else tensor.tensor_type
        writer.add_tensor(tensor.name, zeros if is_changed else tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"attn_q.*Q5_1.*Q4_0"):
        open_checkpoint(tmp_path / "q5_1.gguf")


def test_folder_with_one_gguf_opens_and_others_say_why(tiny, tmp_path):
    content = tiny[0].read_bytes()
    with pytest.raises(ModelFileError, match="nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_bytes(content)
    assert open_checkpoint(tmp_path).config.num_layers == 3
    (tmp_path / "b.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelFileError, match="no such file"):
        open_checkpoint(tmp_path / "missing")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_models_load_or_raise_the_one_error(tmp_path, tiny, data):
    damaged = bytearray(tiny[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(24, 14000))
        damaged[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
        for name, tensor in checkpoint.tensors.items():
            if len(tensor.shape) == 1:
                checkpoint.vector(name)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        ChatTemplate.from_checkpoint(checkpoint, tokenizer)
        tokenizer.decode(tokenizer.encode("hello"))
    except ValueError:  # ModelFileError, ChatTemplateError, or ids past the vocabulary
        pass


def test_smollm2_opens_as_what_it_is():
    checkpoint = open_checkpoint(smollm2_path())
    config = checkpoint.config
    assert (config.family, config.num_layers, config.hidden_size, config.head_dim) == ("llama", 30, 576, 64)
    assert (config.rope_theta, config.tie_word_embeddings, config.bos_token_id) == (100000.0, True, 1)
    assert config.eos_token_ids[0] == 2
    assert checkpoint.tensors["embedding"].format == "Q8_0"
    assert checkpoint.tensors["layers.29.down"].format == "Q4_1"
    assert checkpoint.tensors["layers.0.q"].row_order is not None
    assert checkpoint.tensors["layers.0.v"].row_order is None
    assert "output" not in checkpoint.tensors
    assert "im_start" in checkpoint.chat_template
