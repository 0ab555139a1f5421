"""How many bytes weights and KV take: the sizes of the packed tiles and of the pages, as csrc/gemm/packed_tile.cpp and
csrc/attention/kv_layout.cpp lay them out. tests/runtime/test_model_spec.py equates them with the extension's own.
"""

from __future__ import annotations

TILE_ROWS = 16
GROUP_VALUES = 32  # inputs per group of a quantised weight
LINE_BYTES = 64  # tiles and streams are whole cache lines

# (inputs, bytes) of one block as a file holds it
_BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210),
}  # fmt: skip
_NIBBLES = ("Q4_0", "Q4_1", "Q4_K")
_SUPER_BYTES = {"Q4_K": 64, "Q6_K": 32}  # second-level parameters of a tile, per 8 groups

# bits of a KV value, and whether each (token, head) carries a scale and a min
_KV_CODECS: dict[str, tuple[int, bool]] = {
    "fp32": (32, False), "bf16": (16, False), "fp16": (16, False), "fp8": (8, False), "int8": (8, True), "int4": (4, True),
    "int4-plain": (4, True),
}  # fmt: skip


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def check_weight_format(name: str) -> str:
    if name not in _BLOCKS:
        raise ValueError(f"weight format: got {name!r}, wanted one of {', '.join(_BLOCKS)}")
    return name


def stored_row_bytes(weight_format: str, in_features: int) -> float:
    """Bytes of one output row as the model's file holds it (what an embedding look-up reads)."""
    block_values, block_bytes = _BLOCKS[check_weight_format(weight_format)]
    return in_features / block_values * block_bytes


def packed_bytes(weight_format: str, out_features: int, in_features: int) -> int:
    """Bytes of a matrix packed into tiles of 16 rows; what one pass over it reads."""
    block_values, block_bytes = _BLOCKS[check_weight_format(weight_format)]
    num_tiles = -(-out_features // TILE_ROWS)
    if block_values == 1:
        return num_tiles * _whole_lines(in_features * TILE_ROWS * block_bytes)
    num_groups = in_features // GROUP_VALUES
    code_bytes = 256 if weight_format in _NIBBLES else 512
    parameter_bytes = 64 if weight_format == "Q4_1" else 32
    tile_bytes = _whole_lines(num_groups * (code_bytes + parameter_bytes))
    tile_bytes = _whole_lines(tile_bytes + -(-num_groups // 8) * _SUPER_BYTES.get(weight_format, 0))
    return num_tiles * tile_bytes


def gpu_packed_bytes(weight_format: str, out_features: int, in_features: int) -> int:
    """The same for a GPU's 16-bit matmuls: tiles of a CPU's size, but floats in 16 bits over whole blocks of 64 inputs, and
    the K formats with their second-level parameters multiplied out (5 and 9 bits a weight)."""
    num_groups = -(-in_features // GROUP_VALUES)
    num_tiles = -(-out_features // TILE_ROWS)
    if weight_format == "Q6_K":
        return num_tiles * _whole_lines(num_groups * (512 + 64))
    same_size = {"F32": "BF16", "F16": "BF16", "Q4_K": "Q4_1"}.get(weight_format, weight_format)
    if _BLOCKS[check_weight_format(same_size)][0] == 1:
        in_features = -(-in_features // 64) * 64
    return packed_bytes(same_size, out_features, in_features)


def kv_layer_page_bytes(codecs: tuple[str, str], num_kv_heads: int, head_dim: int, page_size: int) -> int:
    """Bytes of one layer's part of a page: the K stream, then the V stream."""
    total = 0
    for codec in codecs:
        if codec not in _KV_CODECS:
            raise ValueError(f"kv codec: got {codec!r}, wanted one of {', '.join(_KV_CODECS)}")
        bits, has_parameters = _KV_CODECS[codec]
        num_rows = num_kv_heads * page_size
        total += _whole_lines(num_rows * head_dim * bits // 8 + (num_rows * 4 if has_parameters else 0))
    return total
