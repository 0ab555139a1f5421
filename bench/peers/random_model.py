"""GGUF files of a published model's shape with random weights: what a format costs, without gigabytes to fetch.

Blocks are drawn as codes and scales, not quantised from floats, so a file of a billion weights takes seconds. Codes are
symmetric about zero and scales such that each matrix keeps the variance of its input, as a trained model's roughly do:
logits of such a model differ enough that two engines can be compared by them. The tokenizer is that of another GGUF
file, its vocabulary padded with unused tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama model's dimensions, embedding tied to the output."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rope_theta: float
    rope_factor: float  # Llama 3's frequency scaling; 1: none
    original_context: int


LLAMA_3_2_1B = ModelShape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, 32.0, 8192)
# As llama.cpp's quantiser mixes them: (embedding and output, other matrices); Q4_K_M lifts some layers' to Q6_K.
MIXES = {"Q4_0": ("Q6_K", "Q4_0"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_K_M": ("Q6_K", "Q4_K"), "BF16": ("BF16", "BF16")}
BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}  # (elements, bytes)
_EMBEDDING_DEVIATION = 0.08  # logits then differ by some units: 0.08 * sqrt(2048) = 3.6


def _scales(rng: np.random.Generator, num_blocks: int, deviation: float) -> np.ndarray:
    """fp16 scales as bytes [num_blocks, 2], spread about the one that gives the deviation."""
    scales = rng.uniform(0.7, 1.3, num_blocks) * deviation
    return scales.astype(np.float16).view(np.uint8).reshape(num_blocks, 2)


def _nibbles(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Pairs of codes 1 to 15, whose mean is 8."""
    low, high = (rng.integers(1, 16, shape, dtype=np.uint8) for _ in range(2))
    return low | high << 4


def _draw_q4_0(rng: np.random.Generator, num_blocks: int, deviation: float) -> np.ndarray:
    return np.hstack([_scales(rng, num_blocks, deviation / 4.3), _nibbles(rng, (num_blocks, 16))])


def _draw_q8_0(rng: np.random.Generator, num_blocks: int, deviation: float) -> np.ndarray:
    codes = rng.integers(-127, 128, (num_blocks, 32), dtype=np.int8).view(np.uint8)
    return np.hstack([_scales(rng, num_blocks, deviation / 73), codes])


def _draw_q4_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> np.ndarray:
    """Each of the eight runs has its minimum's code equal to its scale's, and dmin = 8 d: values symmetric about 0."""
    scale = rng.uniform(0.7, 1.3, num_blocks) * deviation / (4.3 * 37)
    ends = np.stack([scale, 8 * scale], axis=1).astype(np.float16).view(np.uint8)
    first = rng.integers(0, 256, (num_blocks, 4), dtype=np.uint8)  # 6 bits of runs 0-3, upper 2 bits of runs 4-7
    rest = rng.integers(0, 16, (num_blocks, 4), dtype=np.uint8) * np.uint8(17)  # lower 4 bits: scale | minimum
    return np.hstack([ends, first, first, rest, _nibbles(rng, (num_blocks, 128))])


def _draw_q6_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> np.ndarray:
    codes = rng.integers(0, 256, (num_blocks, 192), dtype=np.uint8)
    scales = rng.integers(-127, 128, (num_blocks, 16), dtype=np.int8).view(np.uint8)
    return np.hstack([codes, scales, _scales(rng, num_blocks, deviation / (18.5 * 73))])


_DRAW: dict[str, Callable[[np.random.Generator, int, float], np.ndarray]] = {
    "Q4_0": _draw_q4_0, "Q8_0": _draw_q8_0, "Q4_K": _draw_q4_k, "Q6_K": _draw_q6_k,
}  # fmt: skip


def random_matrix(rng: np.random.Generator, format_name: str, rows: int, columns: int, deviation: float) -> np.ndarray:
    """The bytes of a matrix, [rows, bytes of a row], of elements about 0 with about this deviation."""
    if format_name == "BF16":
        table = (rng.standard_normal(1 << 16, dtype=np.float32) * deviation).view(np.uint32) >> 16
        return table.astype(np.uint16)[rng.integers(0, 1 << 16, (rows, columns), dtype=np.uint16)].view(np.uint8)
    elements, _ = BLOCKS[format_name]
    return _DRAW[format_name](rng, rows * columns // elements, deviation).reshape(rows, -1)


def _lifts_to_q6_k(layer: int, num_layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third layer between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def write_random_model(path: Path, shape: ModelShape, mix: str, tokenizer_file: Path, seed: int = 0) -> None:
    """Writes a GGUF file of this shape in one of MIXES; `tokenizer_file` is a GGUF file with a smaller vocabulary."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, shape, tokenizer_file)
    outer, inner = MIXES[mix]

    def matrix(name: str, format_name: str, rows: int, columns: int, deviation: float) -> None:
        values = random_matrix(rng, format_name, rows, columns, deviation)
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[format_name])

    def norm(name: str) -> None:
        writer.add_tensor(name, rng.uniform(0.8, 1.2, shape.hidden).astype(np.float32))

    matrix("token_embd.weight", outer, shape.vocab_size, shape.hidden, _EMBEDDING_DEVIATION)
    norm("output_norm.weight")
    if shape.rope_factor != 1:
        writer.add_tensor("rope_freqs.weight", llama3_frequency_factors(shape))
    q_rows, kv_rows = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer in range(shape.num_layers):
        lifted = "Q6_K" if mix == "Q4_K_M" and _lifts_to_q6_k(layer, shape.num_layers) else inner
        for name, format_name, rows, columns in (
            ("attn_q", inner, q_rows, shape.hidden),
            ("attn_k", inner, kv_rows, shape.hidden),
            ("attn_v", lifted, kv_rows, shape.hidden),
            ("attn_output", inner, shape.hidden, q_rows),
            ("ffn_gate", inner, shape.intermediate, shape.hidden),
            ("ffn_up", inner, shape.intermediate, shape.hidden),
            ("ffn_down", lifted, shape.hidden, shape.intermediate),
        ):
            matrix(f"blk.{layer}.{name}.weight", format_name, rows, columns, columns**-0.5)
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_frequency_factors(shape: ModelShape) -> np.ndarray:
    """What llama.cpp's converter files for Llama 3 (low and high frequency factors 1 and 4): one per rotary pair."""
    inv_freq = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = shape.original_context * inv_freq / (2 * np.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / shape.rope_factor + smooth)).astype(np.float32)


def _write_metadata(writer, shape: ModelShape, tokenizer_file: Path) -> None:
    from runtime.loading.gguf_reader import GgufFile

    known = GgufFile(tokenizer_file).metadata
    writer.add_name(f"{shape.name} shape, random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_q_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    tokens = known["tokenizer.ggml.tokens"].tolist()
    num_unused = shape.vocab_size - len(tokens)
    if num_unused < 0:
        raise ValueError(f"tokenizer_file: got {len(tokens)} tokens, wanted at most {shape.vocab_size}")
    unused_type = 5
    writer.add_tokenizer_model(known["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(known["tokenizer.ggml.pre"])
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in range(num_unused)])
    writer.add_token_types(known["tokenizer.ggml.token_type"].tolist() + [unused_type] * num_unused)
    writer.add_token_merges(known["tokenizer.ggml.merges"].tolist())
    writer.add_bos_token_id(int(known["tokenizer.ggml.bos_token_id"]))
    writer.add_eos_token_id(int(known["tokenizer.ggml.eos_token_id"]))
    writer.add_add_bos_token(False)
