"""Hugging Face folders: weights, shards, templates and generation settings; and folders that lie."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.chat_template import ChatTemplate
from runtime.loading import ModelFileError, open_checkpoint
from runtime.loading.safetensors_reader import SafetensorsFile
from runtime.tokenizer import Tokenizer
from tests.kit.tiny_models import FAMILIES, write_tiny_model


def values_of(tensor) -> np.ndarray:
    if tensor.format == "BF16":
        return (tensor.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return tensor.data.view({"F32": "<f4", "F16": "<f2"}[tensor.format]).astype(np.float32).reshape(tensor.shape)


def assert_equal_weights(checkpoint, model) -> None:
    state = dict(model.state_dict().items())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    assert {tensor.name for tensor in checkpoint.tensors.values()} == set(state)
    is_gemma = checkpoint.config.family == "gemma3"
    for name, tensor in checkpoint.tensors.items():
        reference = state[tensor.name].float().numpy()
        assert tensor.row_order is None
        np.testing.assert_array_equal(values_of(tensor), reference)
        if len(tensor.shape) == 1:
            offset = np.float32(1) if is_gemma and name.endswith("_norm") else np.float32(0)
            np.testing.assert_array_equal(checkpoint.vector(name), reference + offset)


@pytest.mark.parametrize("variant", FAMILIES)
def test_weights_equal_those_the_folder_was_written_from(tmp_path, variant):
    path, model = write_tiny_model(variant, tmp_path)
    assert_equal_weights(open_checkpoint(path), model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_exact(tmp_path, dtype):
    path, model = write_tiny_model("gemma3", tmp_path, dtype=dtype)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["layers.0.q"].format == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert_equal_weights(checkpoint, model)


def test_shards_are_read_as_one(tmp_path):
    path, model = write_tiny_model("qwen3", tmp_path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    (path / "consolidated.safetensors").write_bytes(b"never opened: the index names the files")
    assert_equal_weights(open_checkpoint(path), model)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("llama"))[0]


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def test_tensors_are_views_of_the_mapping(folder):
    data = open_checkpoint(folder).tensors["layers.0.q"].data
    assert data.dtype == np.uint8
    assert not data.flags.owndata
    assert not data.flags.writeable


def test_generation_config_and_templates_are_found(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "eos_token_id": [3, 2]}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config["temperature"] == 0.3
    assert checkpoint.config.eos_token_ids == (3, 2)
    assert checkpoint.name == "model"
    assert "m.content" in checkpoint.chat_template
    (folder / "chat_template.jinja").write_text("own file wins")
    assert open_checkpoint(folder).chat_template == "own file wins"
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).chat_template == "d"


def test_multimodal_wrapper_gives_its_language_model(tmp_path):
    import safetensors.numpy

    path, model = write_tiny_model("gemma3", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    for prefix in ("language_model.model.", "model.language_model."):
        state = {
            k.replace("model.", prefix, 1): v.numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"
        }
        state["vision_tower.vision_model.embeddings.weight"] = np.zeros((2, 2), np.float32)
        state["multi_modal_projector.mm_input_projection_weight"] = np.zeros((2, 2), np.float32)
        safetensors.numpy.save_file(state, path / "model.safetensors")
        checkpoint = open_checkpoint(path)
        embedding = values_of(checkpoint.tensors["embedding"])
        np.testing.assert_array_equal(embedding, model.model.embed_tokens.weight.detach().numpy())


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100000), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "a JSON object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=2), r"model\.layers\.2"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=4), r"layers\.3"),
        (lambda f: edit_json(f / "config.json", intermediate_size=161), r"shape.*160.*161"),
        (lambda f: edit_json(f / "config.json", attention_bias=True), "q_bias"),
        (lambda f: edit_json(f / "config.json", vocab_size=10**9), "vocab_size"),
        (lambda f: (f / "generation_config.json").write_text("3"), "a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": 5}'), "chat_template"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"x" * (1 << 21)), "at most"),
        (lambda f: (f / "model.safetensors").unlink(), "weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "file size"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "header size"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{]" + bytes(8)), "safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"), "embedding"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "beside",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'), "weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "weight_map"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "missing",
        ),
    ],
)
def test_damaged_folder_is_named(folder, damage, match):
    damage(folder)
    with pytest.raises(ModelFileError, match=match):
        open_checkpoint(folder)


def write_header(path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}},
        {"a": {"dtype": "XX", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": 5},
        [],
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}' + b" " * 10,
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
    ],
)
def test_hostile_headers_are_refused(tmp_path, header):
    write_header(tmp_path / "a.safetensors", header, bytes(16))
    with pytest.raises(ModelFileError, match=r"a\.safetensors"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_unsupported_dtype_is_named(folder):
    import safetensors.numpy

    state = safetensors.numpy.load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"up_proj.*F64"):
        open_checkpoint(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_raise_the_one_error(tmp_path, written, data):
    folder = tmp_path / "damaged"
    if not folder.exists():
        shutil.copytree(written, folder)
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]))
    content = bytearray((written / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (folder / name).write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        ChatTemplate.from_checkpoint(checkpoint, tokenizer)
        tokenizer.decode(tokenizer.encode("hello 🎉"))
    except ValueError:  # ModelFileError, ChatTemplateError, or ids past the vocabulary
        pass
    finally:
        shutil.copy(written / name, folder / name)
