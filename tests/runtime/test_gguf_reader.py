"""The GGUF reader against PyPI's gguf, and against files that lie."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.loading import GgufFile, ModelFileError, open_checkpoint
from runtime.loading.gguf_formats import GGUF_FORMATS, row_bytes
from tests.kit.real_model import smollm2_path


def write_sample(path, alignment=32, seed=None) -> None:
    """A file with a value of every type and tensors of several formats and ranks."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for kind, value in {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -5,
        "uint64": 1 << 60, "int64": -(1 << 60),
        "float32": 0.1, "float64": 0.1, "bool": True, "string": "naïve 你好 🎉 \0 end",
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_string("empty.string", " ")
    writer.add_array("array.int", [1, -2, 3])
    writer.add_array("array.float", [0.5, 1.5])
    writer.add_array("array.bool", [True, False, True])
    writer.add_array("array.string", ["", "a", "žluťoučký", "🎉" * 50])
    for name, shape in (("vector", (7,)), ("matrix", (5, 96)), ("cube", (2, 3, 32)), ("deep", (2, 2, 2, 32))):
        writer.add_tensor(f"{name}.f32", rng.standard_normal(shape, dtype=np.float32))
        if len(shape) > 1:
            writer.add_tensor(f"{name}.f16", rng.standard_normal(shape).astype(np.float16))
            for name_q in ("Q4_0", "Q8_0"):
                kind = gguf.GGMLQuantizationType[name_q]
                raw = gguf.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
                writer.add_tensor(f"{name}.{name_q}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_equal_to_reference(path) -> None:
    reference = gguf.GGUFReader(path)
    file = GgufFile(path)
    keys = [key for key in reference.fields if not key.startswith("GGUF.")]
    assert list(file.metadata) == keys
    for key in keys:
        wanted, got = reference.fields[key].contents(), file.metadata[key]
        got = got.tolist() if hasattr(got, "tolist") else got
        assert type(got) is type(wanted), key
        assert got == wanted, key
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        ours = file.tensors[tensor.name]
        assert ours.format == tensor.tensor_type.name
        assert ours.shape == tuple(int(dim) for dim in tensor.shape[::-1])
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(file.data(ours), tensor.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_every_value_and_tensor_equals_the_reference_reader(tmp_path, alignment):
    write_sample(tmp_path / "sample.gguf", alignment)
    assert_equal_to_reference(tmp_path / "sample.gguf")


def test_the_real_file_equals_the_reference_reader():
    assert_equal_to_reference(smollm2_path())


def test_block_sizes_equal_the_reference():
    for kind, (block, num_bytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in GGUF_FORMATS:
            assert GGUF_FORMATS[kind.value] == (kind.name, block, num_bytes)
    with pytest.raises(ValueError, match="33"):
        row_bytes("Q4_0", 33)


def test_tensors_are_views_of_the_mapping(tmp_path):
    write_sample(tmp_path / "sample.gguf")
    file = GgufFile(tmp_path / "sample.gguf")
    data = file.data(file.tensors["matrix.Q4_0"])
    assert not data.flags.owndata
    assert not data.flags.writeable
    assert data.dtype == np.uint8


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(num_tensors=0, num_keys=0, version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys)


def tensor_info(name=b"t", dims=(32,), kind=0, offset=0, rank=None) -> bytes:
    rank = len(dims) if rank is None else rank
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


HUGE = (1 << 64) - 1
PADDING = bytes(4096)
HOSTILE = {
    "empty": (b"", "file size"),
    "three bytes": (b"GGU", "four bytes"),
    "other magic": (header(magic=b"GGML") + PADDING, "four bytes"),
    "version 1": (header(version=1) + PADDING, "version"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + PADDING, "big-endian"),
    "magic alone": (b"GGUF", "version"),
    "tensor count": (header(num_tensors=HUGE) + PADDING, "tensor count"),
    "key count": (header(num_keys=HUGE) + PADDING, "key count"),
    "more keys than bytes": (header(num_keys=1 << 19) + PADDING, "left of the file"),
    "key length": (header(num_keys=1) + struct.pack("<Q", HUGE) + PADDING, "length of name of key 0"),
    "key not UTF-8": (header(num_keys=1) + string(b"\xff\xfe") + PADDING, "UTF-8"),
    "value type": (header(num_keys=1) + string(b"k") + struct.pack("<I", 13) + PADDING, "type of key 'k'"),
    "bool of 2": (header(num_keys=1) + string(b"k") + struct.pack("<IB", 7, 2) + PADDING, "bool"),
    "string length": (header(num_keys=1) + string(b"k") + struct.pack("<IQ", 8, 1 << 62) + PADDING, "length of value"),
    "string past the end": (header(num_keys=1) + string(b"k") + struct.pack("<IQ", 8, 9999) + PADDING, "9999"),
    "string not UTF-8": (header(num_keys=1) + string(b"k") + struct.pack("<I", 8) + string(b"\x80") + PADDING, "UTF-8"),
    "array length": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + PADDING, "array length"),
    "array past the end": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 10, 9999) + PADDING, "79992"),
    "array type": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 99, 1) + PADDING, "element type"),
    "string array count": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 23) + PADDING, "strings"),
    "string in array": (
        header(num_keys=1) + string(b"k") + struct.pack("<IIQQ", 9, 8, 2, 1 << 63) + PADDING,
        r"k\[0\]",
    ),
    "string array cut": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2) + string(b"abcdefgh"), "k"),
    "deep arrays": (header(num_keys=1) + string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40, "nested"),
    "wide arrays": (header(num_keys=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1 << 20) + PADDING, "nested"),
    "key twice": (header(num_keys=2) + (string(b"k") + struct.pack("<IB", 0, 1)) * 2 + PADDING, "twice"),
    "alignment 0": (
        header(num_keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 0) + PADDING,
        "alignment",
    ),
    "alignment 48": (header(num_keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 48) + PADDING, "power"),
    "alignment text": (
        header(num_keys=1) + string(b"general.alignment") + struct.pack("<I", 8) + string(b"32") + PADDING,
        "alignment",
    ),
    "rank 0": (header(num_tensors=1) + tensor_info(dims=()) + PADDING, "rank"),
    "rank 5": (header(num_tensors=1) + tensor_info(dims=(32,) * 5) + PADDING, "rank"),
    "rank huge": (header(num_tensors=1) + tensor_info(rank=1 << 31) + PADDING, "rank"),
    "dimension 0": (header(num_tensors=1) + tensor_info(dims=(32, 0)) + PADDING, "dimensions"),
    "dimension huge": (header(num_tensors=1) + tensor_info(dims=(1 << 63,)) + PADDING, "dimensions"),
    "product overflows": (header(num_tensors=1) + tensor_info(dims=(1 << 32, 1 << 32)) + PADDING, "end of tensor"),
    "tensor type": (header(num_tensors=1) + tensor_info(kind=5) + PADDING, "type of tensor"),
    "half a block": (header(num_tensors=1) + tensor_info(dims=(33,), kind=2) + PADDING, "multiple of 32"),
    "offset past the end": (header(num_tensors=1) + tensor_info(offset=1 << 20) + PADDING, "end of tensor"),
    "offset overflows": (header(num_tensors=1) + tensor_info(offset=(1 << 64) - 32) + PADDING, "end of tensor"),
    "offset unaligned": (header(num_tensors=1) + tensor_info(offset=4) + PADDING, "offset"),
    "data cut": (header(num_tensors=1) + tensor_info(dims=(2048,)) + PADDING, "size of the file"),
    "tensor twice": (header(num_tensors=2) + tensor_info() + tensor_info(offset=128) + PADDING, "twice"),
    "tensors overlap": (header(num_tensors=2) + tensor_info() + tensor_info(b"u", offset=96) + PADDING, "of its own"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, name):
    content, match = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=match) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelFileError, match="cannot be opened"):
            GgufFile(path)


def test_strings_that_are_not_utf8_are_refused_when_asked_for(tmp_path):
    path = tmp_path / "strings.gguf"
    array = struct.pack("<IIQ", 9, 8, 2) + string(b"fine") + string(b"\xc3")
    path.write_bytes(header(num_keys=1) + string(b"k") + array)
    strings = GgufFile(path).metadata["k"]
    assert len(strings) == 2
    with pytest.raises(ModelFileError, match=r"k\[1\]"):
        strings.tolist()


def test_every_truncation_is_refused(tmp_path):
    write_sample(tmp_path / "whole.gguf", seed=1)
    content = (tmp_path / "whole.gguf").read_bytes()
    last = max(tensor.offset + tensor.num_bytes for tensor in GgufFile(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 2500, 3), *range(2500, last, 97), last - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            GgufFile(path)


def read_everything(path) -> None:
    file = GgufFile(path)
    for value in file.metadata.values():
        if hasattr(value, "tolist"):
            value.tolist()
    for tensor in file.tensors.values():
        assert file.data(tensor).size == tensor.num_bytes


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder / "sample.gguf", seed=2)
    return (folder / "sample.gguf").read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_load_or_raise_the_one_error(tmp_path, sample, data):
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(damaged) - 9, 3000)))
        width = data.draw(st.sampled_from([1, 1, 4, 8]))
        special = [0, 1, 2, (1 << 63) - 1, 1 << 63, HUGE, 1 << 32, 0xFF]
        value = data.draw(st.one_of(st.sampled_from(special), st.integers(0, HUGE)))
        damaged[position : position + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        read_everything(path)
        open_checkpoint(path)
    except ModelFileError:
        pass
