"""The scheduler's ModelSpec of a model that is loaded or about to be: dimensions from its config, formats from its
tensors."""

from __future__ import annotations

from runtime.model_config import ModelConfig
from scheduler.model_spec import ModelSpec

_PARTS = ("q", "k", "v", "o", "gate", "up", "down")


def model_spec(
    name: str, config: ModelConfig, tensor_formats: dict[str, str], *, activations: str, kv_codecs: tuple[str, str],
    page_size: int, is_gpu: bool = False,
) -> ModelSpec:  # fmt: skip
    """tensor_formats: canonical tensor name -> format, as the checkpoint has them. On the CPU bf16 activations have every
    matrix packed as BF16."""

    def packed_format(tensor: str) -> str:
        return "BF16" if activations == "bf16" and not is_gpu else tensor_formats[tensor]

    layer_formats = {
        (layer, part): packed_format(f"layers.{layer}.{part}") for layer in range(config.num_layers) for part in _PARTS
    }
    windowed = frozenset(i for i, kind in enumerate(config.layer_types) if kind == "sliding")
    output = "output" if "output" in tensor_formats else "embedding"
    return ModelSpec(
        name=name,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        has_post_norms=config.has_post_norms,
        has_soft_cap=bool(config.final_logit_softcap),
        sliding_window=(config.sliding_window or 0) if windowed else 0,
        windowed_layers=windowed,
        weight_format=layer_formats[0, "q"],
        output_format=packed_format(output),
        embedding_format=tensor_formats["embedding"],
        layer_formats=layer_formats,
        kv_codecs=kv_codecs,
        page_size=page_size,
        device="gpu" if is_gpu else "cpu",
        inner_bytes=2 if is_gpu and activations != "fp32" else 4,
        max_position_embeddings=config.max_position_embeddings,
    )


def spec_of(loaded, kv_codecs: tuple[str, str]) -> ModelSpec:
    """Of an engine_loader.LoadedModel."""
    formats = {name: tensor.format for name, tensor in loaded.checkpoint.tensors.items()}
    return model_spec(
        loaded.name, loaded.config, formats, activations=loaded.packed.activations, kv_codecs=kv_codecs,
        page_size=loaded.kv_plan.page_size, is_gpu=loaded.device.gpu is not None,
    )  # fmt: skip
