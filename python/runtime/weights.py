"""From a checkpoint's tensors to packed weights, once per start."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from runtime import _native


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norms and biases are fp32 vectors or None; matrices _native.PackedLinear or GpuPackedLinear."""

    qkv: Any  # q|k|v rows, [(Hq + 2 Hkv) D, H]
    o: Any  # [H, Hq D]
    gate_up: Any  # gate|up rows, [2 F, H]
    down: Any  # [H, F]
    attn_norm: Any  # [H]
    ffn_norm: Any  # [H]
    post_attn_norm: Any  # [H]
    post_ffn_norm: Any  # [H]
    qkv_bias: Any  # [(Hq + 2 Hkv) D]
    o_bias: Any  # [H]
    q_norm: Any  # [D]
    k_norm: Any  # [D]
    kv: Any  # kv_plan.KvLayer
    rope: Any  # _native rotary table of the layer's kind


@dataclass(frozen=True, slots=True)
class PackedModel:
    """Everything a model file records from."""

    embedding: Any  # _native.Weight [V, H]
    layers: tuple[LayerWeights, ...]
    output_norm: Any  # [H]
    output: Any  # [V, H]
    activations: str

    @property
    def matrices(self) -> list:
        """Every packed matrix, in the order of the forward pass."""
        return [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [self.output]

    @property
    def packed_bytes(self) -> int:
        return sum(matrix.packed_bytes for matrix in self.matrices)


def pack_model(checkpoint, kv_layers, activations: str, max_model_len: int, device, progress=None) -> PackedModel:
    """Packs every matrix for ``device`` (runtime.devices); ``progress(done, total)`` is called per layer."""
    import numpy as np

    from runtime.model_config import rope_inv_freq

    config = checkpoint.config

    def weight(name: str):
        tensor = checkpoint.tensors[name]
        out_features, in_features = tensor.shape
        return _native.Weight(tensor.data, tensor.format, out_features, in_features, tensor.row_order)

    def pack(*names: str, is_gated: bool = False):
        return packers.submit(device.pack, [weight(name) for name in names], activations, is_gated)

    def vector(name: str):
        return np.ascontiguousarray(checkpoint.vector(name), dtype=np.float32) if name in checkpoint.tensors else None

    def joined_bias(*names: str):
        parts = [vector(name) for name in names]
        return None if all(part is None for part in parts) else np.concatenate(parts)

    ropes: dict[bool, Any] = {}

    def rope(is_local: bool):
        if is_local not in ropes:
            inv_freq, attention_factor = rope_inv_freq(config, local=is_local)
            ropes[is_local] = device.rope_table(inv_freq, max_model_len, attention_factor)
        return ropes[is_local]

    # Matrices are packed by `packers` while the next ones are asked for; a layer is whole when its four are there.
    with ThreadPoolExecutor(device.pack_threads, "pack") as packers:
        asked = []
        for i in range(config.num_layers):
            p = f"layers.{i}."
            asked.append(
                (
                    pack(p + "q", p + "k", p + "v"),
                    pack(p + "o"),
                    pack(p + "gate", p + "up", is_gated=True),
                    pack(p + "down"),
                )
            )
        output = pack("output" if "output" in checkpoint.tensors else "embedding")
        layers = []
        for i, matrices in enumerate(asked):
            p = f"layers.{i}."
            qkv, o, gate_up, down = (matrix.result() for matrix in matrices)
            layers.append(
                LayerWeights(
                    qkv=qkv,
                    o=o,
                    gate_up=gate_up,
                    down=down,
                    attn_norm=vector(p + "attn_norm"),
                    ffn_norm=vector(p + "ffn_norm"),
                    post_attn_norm=vector(p + "post_attn_norm"),
                    post_ffn_norm=vector(p + "post_ffn_norm"),
                    qkv_bias=joined_bias(p + "q_bias", p + "k_bias", p + "v_bias"),
                    o_bias=vector(p + "o_bias"),
                    q_norm=vector(p + "q_norm"),
                    k_norm=vector(p + "k_norm"),
                    kv=kv_layers[i],
                    rope=rope(config.layer_types[i] == "sliding"),
                )
            )
            if progress is not None:
                progress(i + 1, config.num_layers)
    return PackedModel(
        embedding=weight("embedding"),
        layers=tuple(layers),
        output_norm=vector("output_norm"),
        output=output.result(),
        activations=activations,
    )
