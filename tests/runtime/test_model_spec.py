"""The scheduler's node list is the recorded Program's: every name, class, operation and byte."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime import _native
from runtime.describe_model import spec_of
from runtime.devices import open_device
from runtime.engine_args import KV_CODECS, EngineArgs
from scheduler.byte_sizes import gpu_packed_bytes, kv_layer_page_bytes, packed_bytes, stored_row_bytes
from scheduler.model_spec import ModelSpec
from scheduler.step import ScheduledRequest
from scheduler.step_shape import StepShape, shape_of
from tests.kit.engines import load
from tests.kit.real_model import smollm2_path
from tests.kit.tiny_models import write_tiny_gguf, write_tiny_model

# (start, tokens, samples) per request. program.describe() counts a step's average KV per request, so steps of equal
# requests are where the two must agree to the bit.
STEPS = {
    "decode": [(99, 1, True)] * 7,
    "prefill": [(0, 48, False)] * 3,
    "chunk with history": [(64, 37, True)],
    "no logits": [(128, 16, False)],
}


def shape_from(step, window: int = 0) -> StepShape:
    return shape_of([ScheduledRequest(str(i), i, *part[:2], ((),), part[2]) for i, part in enumerate(step)], window)


def assert_equal_lists(program, spec: ModelSpec) -> None:
    for label, step in STEPS.items():
        shape = shape_from(step)
        # describe() takes one number for all layers: what a window hides is not in it.
        described = program.describe(
            num_tokens=shape.num_tokens, num_requests=shape.num_requests, num_logit_rows=shape.num_logit_rows,
            score_pairs=shape.score_pairs,
        )  # fmt: skip
        nodes = spec.nodes()
        assert [node.name for node in nodes] == [entry["name"] for entry in described], label
        for node, entry in zip(nodes, described, strict=True):
            assert (node.kind, node.layer) == (entry["kind"], entry["layer"]), entry["name"]
            assert node.operations(shape) == pytest.approx(entry["operations"], rel=1e-12), (label, entry["name"])
            if node.kind == "attention" and label != "decode":
                # describe() counts the average row's KV, the spec what the last row sees: between half and all of it.
                start, tokens, _ = step[0]
                seen, average = shape.num_requests * (start + tokens), shape.num_requests * (start + (tokens + 1) / 2)
                rows = node.bytes_per_row * shape.num_tokens
                assert node.bytes(shape) - rows == pytest.approx((entry["bytes"] - rows) * seen / average)
            else:
                assert node.bytes(shape) == pytest.approx(entry["bytes"], rel=1e-12), (label, entry["name"])
                assert node.resource_class(shape) == entry["class"], (label, entry["name"])


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("activations", ["fp32", "bf16"])
def test_nodes_equal_the_recorded_program_of_tiny_models(variant, activations, tmp_path):
    path, _ = write_tiny_model(variant, tmp_path)
    loaded = load(path, activations=activations, kv_dtype="int8:int4", max_model_len=256)
    assert_equal_lists(loaded.program, spec_of(loaded, ("int8", "int4")))


def test_nodes_equal_the_recorded_program_of_a_quantised_file(tmp_path):
    path, _ = write_tiny_gguf("Q8_0", tmp_path)
    loaded = load(path, max_model_len=256)
    assert_equal_lists(loaded.program, spec_of(loaded, ("bf16", "bf16")))


@pytest.mark.parametrize("weight_format", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F32", "F16", "BF16"])
@pytest.mark.parametrize("out_features", [16, 50])
def test_every_weight_format_has_its_packed_size(weight_format, out_features):
    in_features = 768  # three blocks of 256: the second-level parameters do not fill a tile's last line
    data = np.zeros(int(stored_row_bytes(weight_format, in_features)) * out_features, dtype=np.uint8)
    packed = _native.pack_linear([_native.Weight(data, weight_format, out_features, in_features)], "fp32", 1)
    assert packed.packed_bytes == packed_bytes(weight_format, out_features, in_features)


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
@pytest.mark.parametrize("activations", ["bf16", "fp16", "fp32"])
def test_nodes_equal_the_recorded_program_on_a_gpu(variant, activations, tmp_path):
    path, _ = write_tiny_model(variant, tmp_path)
    loaded = load(path, device="simt", activations=activations, kv_dtype="bf16", max_model_len=256)
    assert_equal_lists(loaded.program, spec_of(loaded, ("bf16", "bf16")))


@pytest.mark.parametrize("weight_format", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F32", "F16", "BF16"])
def test_every_weight_format_has_its_packed_size_on_a_gpu(weight_format):
    device = open_device(EngineArgs(device="simt").check())
    for out_features, in_features in ((256, 768), (50, 1536)):
        data = np.zeros(int(stored_row_bytes(weight_format, in_features)) * out_features, dtype=np.uint8)
        packed = device.pack([_native.Weight(data, weight_format, out_features, in_features)], "bf16", False)
        assert packed.packed_bytes == gpu_packed_bytes(weight_format, out_features, in_features)


@pytest.mark.parametrize("codec", KV_CODECS)
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "page_size"), [(3, 64, 64), (1, 256, 16), (5, 72, 32)])
def test_every_kv_codec_has_its_page_size(codec, num_kv_heads, head_dim, page_size):
    for codecs in ((codec, codec), (codec, "int4"), ("fp32", codec)):
        layout = _native.KvGroupLayout(
            num_layers=2, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size,
            kv_dtype=":".join(codecs), window=0,
        )  # fmt: skip
        assert 2 * kv_layer_page_bytes(codecs, num_kv_heads, head_dim, page_size) == layout.page_bytes()


def test_nodes_equal_the_recorded_program_of_smollm2():
    loaded = load(smollm2_path(), max_model_len=1024)
    spec = spec_of(loaded, ("bf16", "bf16"))
    assert_equal_lists(loaded.program, spec)
    assert spec.weight_bytes == loaded.packed.packed_bytes
    assert spec.kv_token_bytes * loaded.kv_plan.page_size == loaded.kv_plan.page_bytes


def test_a_config_json_describes_the_same_model_as_its_checkpoint(tmp_path):
    for variant in ("llama", "gemma3"):
        path, _ = write_tiny_model(variant, tmp_path / variant)
        loaded = load(path, activations="bf16", max_model_len=256)
        config = json.loads((path / "config.json").read_text())
        described = ModelSpec.from_config(config, embedding_format=loaded.checkpoint.tensors["embedding"].format)
        assert described.nodes() == spec_of(loaded, ("bf16", "bf16")).nodes()
