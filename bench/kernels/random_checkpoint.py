"""A model of a published shape with random weights, made in memory: what a GPU is benched with where no file is at hand.

Its layers repeat after a few, so that making it takes seconds; together those few are many times an L2, so a decode step
reads all of its weights from memory as a real one does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.peers.random_model import ModelShape, random_matrix
from runtime.loading.checkpoint import RawTensor
from runtime.model_config import ModelConfig, RopeScaling

LLAMA_3_8B = ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1.0, 8192)
TINY = ModelShape("tiny", 3, 64, 160, 4, 2, 16, 384, 512, 10000.0, 1.0, 512)


def config_of(shape: ModelShape) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=shape.vocab_size, hidden_size=shape.hidden, num_layers=shape.num_layers,
        num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.intermediate, norm_eps=1e-5, max_position_embeddings=shape.context,
        tie_word_embeddings=True, activation="silu", rope_theta=shape.rope_theta, rope_scaling=RopeScaling(),
        rope_local_theta=None, partial_rotary_factor=1.0, attention_bias=False, attention_output_bias=False,
        qk_norm=False, sliding_window=None, layer_types=("full",) * shape.num_layers,
        query_scale=shape.head_dim**-0.5, attn_logit_softcap=None, final_logit_softcap=None, embedding_scale=1.0,
        bos_token_id=None, eos_token_ids=(), pad_token_id=None,
    )  # fmt: skip


@dataclass(slots=True)
class RandomCheckpoint:
    """What runtime.weights.pack_model reads of a loading.checkpoint.Checkpoint."""

    config: ModelConfig
    tensors: dict[str, RawTensor]
    vectors: dict[str, np.ndarray]

    def vector(self, name: str) -> np.ndarray:
        return self.vectors[name]

    def release_pages(self) -> None:
        """Nothing is mapped."""


def random_checkpoint(shape: ModelShape, weight_format: str, num_layers: int, seed: int = 0) -> RandomCheckpoint:
    """``num_layers`` layers of the shape, matrices in a GGUF format (Q4_0, Q8_0, Q4_K, BF16), the output in it too."""
    rng = np.random.default_rng(seed)
    config = config_of(replace(shape, num_layers=num_layers))
    tensors: dict[str, RawTensor] = {}
    vectors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, deviation: float) -> None:
        data = random_matrix(rng, weight_format, rows, columns, deviation)
        tensors[name] = RawTensor(name, "random", data.reshape(-1), weight_format, (rows, columns))

    def norm(name: str) -> None:
        vectors[name] = rng.uniform(0.8, 1.2, shape.hidden).astype(np.float32)
        tensors[name] = RawTensor(name, "random", vectors[name].view(np.uint8), "F32", (shape.hidden,))

    matrix("embedding", shape.vocab_size, shape.hidden, 0.08)
    norm("output_norm")
    q_rows, kv_rows = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer in range(num_layers):
        for name, rows, columns in (
            ("q", q_rows, shape.hidden), ("k", kv_rows, shape.hidden), ("v", kv_rows, shape.hidden),
            ("o", shape.hidden, q_rows), ("gate", shape.intermediate, shape.hidden),
            ("up", shape.intermediate, shape.hidden), ("down", shape.hidden, shape.intermediate),
        ):  # fmt: skip
            matrix(f"layers.{layer}.{name}", rows, columns, columns**-0.5)
        norm(f"layers.{layer}.attn_norm")
        norm(f"layers.{layer}.ffn_norm")
    return RandomCheckpoint(config, tensors, vectors)
