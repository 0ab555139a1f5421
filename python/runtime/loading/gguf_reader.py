"""A GGUF file, mapped into memory and read without trusting it.

Layout (all little-endian): magic "GGUF", u32 version, u64 tensor count, u64 key count; the key-value pairs; the tensor
infos; padding to `general.alignment`; tensor data. Every count, length and offset is checked against what is left of
the file and against the limits below before it is used, so a hostile file costs time in proportion to its header at
most. Tensor data and arrays are views of the mapping: nothing is copied, strings are decoded when asked for.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.loading.errors import ModelFileError
from runtime.loading.gguf_formats import GGUF_FORMATS

MAX_KEYS = 1 << 20
MAX_TENSORS = 1 << 20
MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_LEN = 1 << 24
MAX_STRINGS = 1 << 23  # in all arrays of one file: each costs 8 bytes and 0.2 us at opening
MAX_RANK = 4
MAX_HEADER_BYTES = 100_000_000
MAX_NESTED_ARRAYS = 1 << 12  # arrays of arrays in one file; legal, and used by nobody known
MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {  # value type -> (struct code, numpy dtype)
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<B", "u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_UNPACK = {code: struct.Struct(code).unpack_from for code, _ in _SCALARS.values()}
_UNPACK_U64 = struct.Struct("<Q").unpack_from


class GgufStrings(Sequence):
    """An array of strings as it lies in the file; `tolist()` decodes all of them once and keeps them."""

    def __init__(self, file: GgufFile, key: str, ends: array, start: int) -> None:
        self._file, self._key, self._ends, self._start = file, key, ends, start
        self._decoded: list[str] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """The strings. Raises ModelFileError if one is not UTF-8."""
        if self._decoded is None:
            region = self._file.buffer[self._start : self._ends[-1]] if self._ends else b""
            decoded, begin, base = [], 8, self._start
            append = decoded.append
            try:
                for end in self._ends:
                    append(region[begin : end - base].decode())
                    begin = end - base + 8
            except UnicodeDecodeError as error:
                what = f"{self._key}[{len(decoded)}]"
                raise ModelFileError(self._file.path, what, bytes(error.object[:40]), "a UTF-8 string") from None
            self._decoded = decoded
        return self._decoded


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is outermost first (rows, columns), the reverse of the file's order."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class GgufFile:
    """An open GGUF file: `metadata` (key -> value) and `tensors` (name -> GgufTensor), both in file order.

    Metadata values are int, float, bool, str, numpy arrays (views of the mapping) or GgufStrings.
    Raises ModelFileError for anything that is not a sound GGUF file of version 2 or 3.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            raise ModelFileError(self.path, "file size", 0, "a GGUF file") from None
        except OSError as error:
            raise ModelFileError(self.path, f"cannot be opened: {error.strerror or error}") from None
        self.num_bytes = min(self.num_bytes, len(self.buffer))
        self._position = 0
        self._limit = min(self.num_bytes, MAX_HEADER_BYTES)
        self._num_nested = self._num_strings = 0
        self._read()

    def data(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's bytes: a read-only 1-D uint8 view of the mapping."""
        return np.frombuffer(self.buffer, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)

    # -- reading ------------------------------------------------------------------------------------------------

    def _error(self, what: str, got: object, wanted: str) -> ModelFileError:
        return ModelFileError(self.path, what, got, wanted)

    def _need(self, num_bytes: int, what: str) -> None:
        left = self._limit - self._position
        if num_bytes > left:
            if self._limit < self.num_bytes:
                raise self._error("header size", f"more than {self._limit} bytes", f"at most {MAX_HEADER_BYTES}")
            raise self._error(f"{what} at byte {self._position}", f"{left} bytes left of the file", f"{num_bytes}")

    def _scalar(self, code: str, num_bytes: int, what: str) -> Any:
        self._need(num_bytes, what)
        (value,) = _UNPACK[code](self.buffer, self._position)
        self._position += num_bytes
        return value

    def _u32(self, what: str) -> int:
        return self._scalar("<I", 4, what)

    def _u64(self, what: str) -> int:
        return self._scalar("<Q", 8, what)

    def _count(self, what: str, high: int) -> int:
        count = self._u64(what)
        if count > high:
            raise self._error(what, count, f"at most {high}")
        return count

    def _string(self, what: str, high: int = MAX_STRING_BYTES) -> str:
        length = self._u64(f"length of {what}")
        if length > high:
            raise self._error(f"length of {what}", length, f"at most {high}")
        self._need(length, what)
        raw = self.buffer[self._position : self._position + length]
        self._position += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error(what, raw[:40], "a UTF-8 string") from None

    def _read(self) -> None:
        if self.buffer[:4] != b"GGUF":
            raise self._error("first four bytes", self.buffer[:4], "b'GGUF'")
        self._position = 4
        version = self._u32("version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            wanted = "2 or 3 (this is a big-endian file)" if swapped in (2, 3) else "2 or 3"
            raise self._error("version", version, wanted)
        self.version = version
        num_tensors = self._count("tensor count", MAX_TENSORS)
        num_keys = self._count("key count", MAX_KEYS)
        # A key-value pair takes at least 13 bytes, a tensor info at least 32.
        self._need(num_keys * 13 + num_tensors * 32, f"{num_keys} keys and {num_tensors} tensors")
        self.metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self._read_key_value(index)
        self.alignment = self._read_alignment()
        infos = self._read_tensor_infos(num_tensors)
        self.data_offset = -(-self._position // self.alignment) * self.alignment
        self.tensors = self._place(infos)

    def _read_key_value(self, index: int) -> None:
        key = self._string(f"name of key {index}", high=65535)
        if not key:
            raise self._error(f"name of key {index}", key, "a name")
        if key in self.metadata:
            raise self._error(f"key {key!r}", "it twice", "each key once")
        self.metadata[key] = self._value(self._u32(f"type of key {key!r}"), key)

    def _value(self, value_type: int, key: str) -> Any:
        if value_type == _STRING:
            return self._string(f"value of key {key!r}")
        if value_type == _ARRAY:
            return self._array(key)
        if value_type not in _SCALARS:
            raise self._error(f"type of key {key!r}", value_type, "a GGUF value type, 0..12")
        code, dtype = _SCALARS[value_type]
        value = self._scalar(code, int(dtype[-1]), f"value of key {key!r}")
        if value_type == _BOOL:
            if value > 1:
                raise self._error(f"value of key {key!r}", value, "0 or 1 (a bool)")
            return bool(value)
        return value

    def _array(self, key: str, depth: int = 1) -> Any:
        element_type = self._u32(f"element type of key {key!r}")
        count = self._count(f"array length of key {key!r}", MAX_ARRAY_LEN)
        if element_type == _STRING:
            return self._strings(key, count)
        if element_type == _ARRAY:
            self._num_nested += count
            if depth >= MAX_RANK or self._num_nested > MAX_NESTED_ARRAYS:
                raise self._error(
                    f"nested arrays in key {key!r}", count, f"at most {MAX_NESTED_ARRAYS}, {MAX_RANK} deep"
                )
            return [self._array(key, depth + 1) for _ in range(count)]
        if element_type not in _SCALARS:
            raise self._error(f"element type of key {key!r}", element_type, "a GGUF value type, 0..12")
        dtype = np.dtype(_SCALARS[element_type][1])
        self._need(count * dtype.itemsize, f"array of key {key!r}")
        values = np.frombuffer(self.buffer, dtype=dtype, count=count, offset=self._position)
        self._position += count * dtype.itemsize
        if element_type == _BOOL:
            if count and values.max() > 1:
                raise self._error(f"array of key {key!r}", int(values.max()), "0 or 1 (bools)")
            return values.view(np.bool_)
        return values

    def _strings(self, key: str, count: int) -> GgufStrings:
        self._need(count * 8, f"array of {count} strings of key {key!r}")
        self._num_strings += count
        if self._num_strings > MAX_STRINGS:
            raise self._error(f"strings in arrays up to key {key!r}", self._num_strings, f"at most {MAX_STRINGS}")
        # The one hot loop of opening a file: where a string begins is known only from the length of the one before.
        start = position = self._position
        limit, buffer, unpack = self._limit, self.buffer, _UNPACK_U64
        ends = array("Q")
        append = ends.append
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
                if position > limit:
                    break
                append(position)
        except struct.error:
            pass  # fewer than eight bytes left: reported below
        if len(ends) < count:
            self._position = ends[-1] if ends else start
            self._need(8, f"{key}[{len(ends)}]")
            self._string(f"{key}[{len(ends)}]")
            raise self._error(f"array of key {key!r}", "strings past the end of the file", f"{count} strings")
        self._position = position
        return GgufStrings(self, key, ends, start)

    def _read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        is_power = isinstance(alignment, int) and not isinstance(alignment, bool) and alignment > 0
        if not is_power or alignment & (alignment - 1) or alignment > MAX_ALIGNMENT:
            raise self._error("key 'general.alignment'", alignment, f"a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _read_tensor_infos(self, num_tensors: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """(name, format, shape, offset in the data section, bytes) of each tensor."""
        infos = []
        for index in range(num_tensors):
            name = self._string(f"name of tensor {index}", high=65535)
            rank = self._u32(f"rank of tensor {name!r}")
            if not 1 <= rank <= MAX_RANK:
                raise self._error(f"rank of tensor {name!r}", rank, f"1..{MAX_RANK}")
            dims = tuple(self._u64(f"dimension {axis} of tensor {name!r}") for axis in range(rank))
            num_elements = 1
            for dim in dims:
                if not 1 <= dim < 1 << 40:
                    raise self._error(f"dimensions of tensor {name!r}", dims, "each in 1..2^40")
                num_elements *= dim
            type_id = self._u32(f"type of tensor {name!r}")
            if type_id not in GGUF_FORMATS:
                raise self._error(f"type of tensor {name!r}", type_id, "a GGUF tensor type")
            format_name, block, block_bytes = GGUF_FORMATS[type_id]
            if dims[0] % block:
                raise self._error(f"row length of tensor {name!r}", dims[0], f"a multiple of {block} ({format_name})")
            offset = self._u64(f"offset of tensor {name!r}")
            infos.append((name, format_name, dims[::-1], offset, num_elements // block * block_bytes))
        return infos

    def _place(self, infos: list[tuple[str, str, tuple[int, ...], int, int]]) -> dict[str, GgufTensor]:
        """Checks that names are distinct and that the tensors lie inside the file, aligned, side by side."""
        tensors: dict[str, GgufTensor] = {}
        for name, format_name, shape, offset, num_bytes in infos:
            if name in tensors:
                raise self._error(f"tensor {name!r}", "it twice", "each tensor once")
            if offset % self.alignment:
                raise self._error(f"offset of tensor {name!r}", offset, f"a multiple of {self.alignment}")
            end = self.data_offset + offset + num_bytes
            if end > self.num_bytes:
                raise self._error(f"end of tensor {name!r}", end, f"at most {self.num_bytes}, the size of the file")
            tensors[name] = GgufTensor(name, format_name, shape, self.data_offset + offset, num_bytes)
        last_end, last_name = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < last_end:
                raise self._error(f"tensor {tensor.name!r}", f"bytes shared with {last_name!r}", "bytes of its own")
            last_end, last_name = tensor.offset + tensor.num_bytes, tensor.name
        return tensors
