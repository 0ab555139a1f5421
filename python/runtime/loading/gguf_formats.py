"""The number formats a GGUF tensor can have, by GGUF type id. Only those in SUPPORTED_FORMATS can be computed with."""

from __future__ import annotations

# type id -> (name, elements per block, bytes per block)
GGUF_FORMATS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}

SUPPORTED_FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
FORMAT_SIZES = {name: (block, num_bytes) for name, block, num_bytes in GGUF_FORMATS.values()}


def row_bytes(format_name: str, num_elements: int) -> int:
    """Bytes of `num_elements` in whole blocks of the format. ValueError if they do not fill whole blocks."""
    block, num_bytes = FORMAT_SIZES[format_name]
    if num_elements % block:
        raise ValueError(f"{num_elements} elements do not fill whole {format_name} blocks of {block}")
    return num_elements // block * num_bytes
