"""A safetensors file, mapped into memory.

The `safetensors` library checks the header (size, offsets, gaps, dtype x shape); where the tensors lie is then read
from that header, because the library hands out copies and has no bfloat16 without PyTorch or ml_dtypes.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.loading.errors import ModelFileError

MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """Where one tensor lies. `format` is safetensors' own dtype name (F32, BF16, ...)."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class SafetensorsFile:
    """An open safetensors file: `tensors` by name. Raises ModelFileError for anything unsound."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelFileError(self.path, "file size", 0, "a safetensors file") from None
        except OSError as error:
            raise ModelFileError(self.path, f"cannot be opened: {error.strerror or error}") from None
        self.num_bytes = len(self.buffer)
        header_bytes = int.from_bytes(self.buffer[:8], "little")
        if self.num_bytes < 10 or header_bytes > min(MAX_HEADER_BYTES, self.num_bytes - 8):
            raise ModelFileError(
                self.path, "header size", header_bytes, f"at most {max(min(MAX_HEADER_BYTES, self.num_bytes - 8), 0)}"
            )
        self._check_with_library()
        self.data_offset = 8 + header_bytes
        self.header = self.buffer[: self.data_offset]
        self.tensors = self._read_header()

    def data(self, tensor: SafetensorsTensor) -> np.ndarray:
        """The tensor's bytes: a read-only 1-D uint8 view of the mapping."""
        return np.frombuffer(self.buffer, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)

    def _check_with_library(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ModelFileError(self.path, f"not a sound safetensors file: {str(error)[:200]}") from None

    def _read_header(self) -> dict[str, SafetensorsTensor]:
        def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            values = dict(pairs)
            if len(values) != len(pairs):
                raise ModelFileError(self.path, "header", "a name twice", "each name once")
            return values

        try:
            header = json.loads(self.header[8:].decode(), object_pairs_hook=distinct)
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(self.path, f"header is not JSON: {str(error)[:200]}") from None
        tensors = {}
        for name, entry in entries:
            try:
                begin, end = entry["data_offsets"]
                tensor = SafetensorsTensor(
                    name, entry["dtype"], tuple(entry["shape"]), self.data_offset + begin, end - begin
                )
            except (KeyError, TypeError, ValueError):
                raise ModelFileError(self.path, f"tensor {name!r}", entry, "dtype, shape and data_offsets") from None
            is_inside = 0 <= begin <= end and self.data_offset + end <= self.num_bytes
            if not is_inside or len(tensor.shape) > 4:
                raise ModelFileError(self.path, f"tensor {name!r}", entry, "rank <= 4, bytes inside the file")
            num_elements = 1
            for dim in tensor.shape:
                num_elements *= dim
            width = _DTYPE_BYTES.get(tensor.format)
            if width is not None and num_elements * width != tensor.num_bytes:
                raise ModelFileError(self.path, f"tensor {name!r} bytes", tensor.num_bytes, str(num_elements * width))
            tensors[name] = tensor
        return tensors
