"""Which arrays ops accept, through rms_norm (fp32 in and out) and embedding (any float table)."""

from __future__ import annotations

import array
import ctypes
import sys

import ml_dtypes
import numpy as np
import pytest

from runtime import _native
from runtime.ops.embedding import embedding
from runtime.ops.norm import rms_norm

torch = pytest.importorskip("torch")

ONES = np.ones(8, np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng()


class Speaks:
    """An array that speaks only the given protocol of the one it wraps."""

    def __init__(self, inner, **methods):
        self.inner = inner
        for name, method in methods.items():
            setattr(type(self), name, method)


def only(inner, **methods):
    return type("OneProtocol", (Speaks,), {})(inner, **methods)


def normed(x) -> np.ndarray:
    out = np.full((2, 8), np.nan, np.float32)
    rms_norm(x, ONES, out)
    return out


class TestAccepted:
    def test_every_way_to_hand_over_the_same_floats(self, rng):
        x = rng.standard_normal((2, 8)).astype(np.float32)
        want = normed(x)
        assert np.isfinite(want).all()
        buffer = memoryview(x.tobytes()).cast("f", (2, 8))
        c_array = ((ctypes.c_float * 8) * 2).from_buffer_copy(x.tobytes())
        ways = {
            "torch": torch.from_numpy(x),
            "read-only": np.frombuffer(x.tobytes(), np.float32).reshape(2, 8),
            "memoryview": buffer,
            "ctypes": c_array,
            "unversioned DLPack": only(
                x, __dlpack__=lambda self: self.inner.__dlpack__(), __dlpack_device__=lambda self: (1, 0)
            ),
            "versioned DLPack": only(
                x,
                __dlpack__=lambda self, **_: self.inner.__dlpack__(max_version=(1, 0)),
                __dlpack_device__=lambda self: (1, 0),
            ),
            "DLPack without a device method": only(x, __dlpack__=lambda self: self.inner.__dlpack__()),
            "array interface": only(x, __array_interface__=property(lambda self: self.inner.__array_interface__)),
        }
        for name, way in ways.items():
            assert (normed(way) == want).all(), name

    def test_array_module_is_flat(self):
        out = np.full((1, 8), np.nan, np.float32)
        rms_norm(np.ones((1, 8), np.float32), array.array("f", [2.0] * 8), out)
        np.testing.assert_allclose(out, 2.0, rtol=1e-6)

    def test_torch_output_is_written_in_place(self, rng):
        x = torch.from_numpy(rng.standard_normal((2, 8)).astype(np.float32))
        out = torch.full((2, 8), float("nan"))
        rms_norm(x, torch.ones(8), out)
        assert (out.numpy() == normed(x)).all()

    def test_torch_views_with_an_offset_or_unit_dimensions(self, rng):
        x = torch.from_numpy(rng.standard_normal((5, 8)).astype(np.float32))
        assert (normed(x[2:4]) == normed(x.numpy()[2:4])).all()
        out = np.full((1, 8), np.nan, np.float32)
        rms_norm(x[::3][:1], ONES, out)  # the stride of a dimension of length 1 means nothing
        assert (out == normed(x[:2])[:1]).all()

    @pytest.mark.parametrize("of", ["numpy", "torch"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_float_tables(self, rng, dtype, of):
        table = torch.from_numpy(rng.standard_normal((6, 8)).astype(np.float32)).to(getattr(torch, dtype))
        want = table.float().numpy()[::-1]
        if of == "numpy":
            numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            table = table.float().numpy().astype(numpy_dtype)
        out = np.full((6, 8), np.nan, np.float32)
        embedding(table, np.arange(6, dtype=np.int32)[::-1].copy(), out)
        assert (out == want).all()

    def test_empty_arrays(self):
        for x in (np.zeros((0, 8), np.float32), torch.zeros(0, 8)):
            rms_norm(x, ONES, np.zeros((0, 8), np.float32))

    def test_the_memory_lives_as_long_as_the_call_only(self):
        owner = bytearray(2 * 8 * 4)
        view = memoryview(owner).cast("f", (2, 8))
        normed(view)
        view.release()
        owner.append(0)  # BufferError if the op still held the buffer
        x = torch.zeros(2, 8)
        for _ in range(2000):
            normed(x)
        assert sys.getrefcount(x) < 5


class TestRefused:
    @pytest.mark.parametrize("x", [None, 1.0, [[1.0]], "text", {"a": 1}, object()])
    def test_things_that_are_no_array(self, x):
        with pytest.raises(TypeError, match=r"x: got .*wanted an array"):
            normed(x)

    @pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy])
    def test_wrong_types_are_named(self, make):
        for dtype in ("float64", "float16", "int8", "uint8", "int32", "int64"):
            with pytest.raises(TypeError, match=f"x: got dtype {dtype}, wanted float32"):
                normed(make(np.zeros((2, 8), dtype)))

    def test_types_that_no_op_takes(self):
        for x in (
            np.zeros((2, 8), bool),
            np.zeros((2, 8), np.complex64),
            np.zeros((2, 8), "M8[s]"),
            np.zeros((2, 8), "S4"),
            np.zeros((2, 8), object),
            np.zeros((2, 8), [("a", "f4")]),
            np.zeros((2, 8), np.longdouble),
            np.zeros((2, 8), ml_dtypes.float8_e4m3fn),
            np.zeros((2, 8), ml_dtypes.int4),
            torch.zeros(2, 8, dtype=torch.bool),
            torch.zeros(2, 8, dtype=torch.complex64),
            torch.zeros(2, 8, dtype=torch.float8_e4m3fn),
            memoryview(b"\0" * 16).cast("?", (2, 8)),
        ):
            with pytest.raises(TypeError, match="x: got"):
                normed(x)

    def test_big_endian(self):
        for x in (np.zeros((2, 8), ">f4"), memoryview(np.zeros((2, 8), ">f4"))):
            with pytest.raises(ValueError, match="x: got big-endian data, wanted the machine's byte order"):
                normed(x)

    def test_strided(self):
        wide = np.zeros((4, 16), np.float32)
        for x in (
            wide[:2, ::2],
            wide[:2, :8],
            wide[:2, 7::-1],
            wide[::2, :8],
            np.zeros((8, 2), np.float32).T,
            torch.zeros(8, 2).T,
            torch.zeros(1, 8).expand(2, 8),
            memoryview(wide)[::2],
        ):
            with pytest.raises(ValueError, match=r"x: got a strided array|x: got shape"):
                normed(x)

    def test_wrong_number_of_dimensions(self):
        for x in (np.float32(1), np.zeros((), np.float32), torch.tensor(1.0), np.zeros((1, 2, 8), np.float32)):
            with pytest.raises(ValueError, match="x: got shape"):
                normed(x)
        with pytest.raises(ValueError, match="x: got 7 dimensions, wanted at most 6"):
            normed(np.zeros((1,) * 7, np.float32))
        with pytest.raises(ValueError, match="x: got 7 dimensions, wanted at most 6"):
            normed(torch.zeros((1,) * 7))

    def test_strides_that_are_no_whole_elements(self):
        records = np.zeros((2, 8), np.dtype([("tag", "u1"), ("value", "f4")]))
        with pytest.raises(ValueError, match="x: got strides that are no multiple of its elements' 4 bytes"):
            normed(records["value"])

    def test_misaligned(self):
        x = np.frombuffer(b"\0" * 65, np.uint8)[1:].view(np.float32).reshape(2, 8)
        with pytest.raises(ValueError, match="x: got an address that is no multiple of its elements' 4 bytes"):
            normed(x)

    def test_read_only_outputs(self):
        frozen = np.zeros((2, 8), np.float32)
        frozen.flags.writeable = False
        outs = [
            frozen,
            memoryview(bytes(64)).cast("f", (2, 8)),
            only(frozen, __dlpack__=lambda self, **_: self.inner.__dlpack__(max_version=(1, 0))),
        ]
        for out in outs:
            with pytest.raises(ValueError, match="out: got a read-only array, wanted a writable one"):
                rms_norm(np.zeros((2, 8), np.float32), ONES, out)

    def test_a_tensor_that_is_not_in_cpu_memory(self):
        def elsewhere(device_type):
            return only(
                None,
                __dlpack__=lambda self: pytest.fail("not to be asked"),
                __dlpack_device__=lambda self: (device_type, 0),
            )

        with pytest.raises(ValueError, match=r"x: got an array on DLPack device type 10 \(ROCm\), wanted one in CPU"):
            normed(elsewhere(10))
        # runtime.ops sends what lies on a CUDA device to the GPU's half of an op; the CPU's half refuses it.
        x = np.ones((2, 8), np.float32)
        with pytest.raises(ValueError, match=r"x: got an array on DLPack device type 2 \(CUDA\), wanted one in CPU"):
            _native.rms_norm(elsewhere(2), x[0].copy(), x, 1e-6, False, 1)

    def test_a_tensor_that_refuses_to_be_exported(self):
        with pytest.raises(ValueError, match=r"x: .*grad"):
            normed(torch.zeros(2, 8, requires_grad=True))

    def test_a_capsule_that_is_none(self):
        for wrong in (None, 5):
            with pytest.raises(TypeError, match=r"x: got .*__dlpack__"):
                normed(only(None, __dlpack__=lambda self, wrong=wrong: wrong))

    def test_a_lying_array_interface(self):
        for interface in ({}, {"typestr": "<f4"}, {"typestr": "<f4", "shape": (2, 8), "data": None}, 5):
            with pytest.raises(TypeError, match="x: got a malformed __array_interface__"):
                normed(only(None, __array_interface__=property(lambda self, value=interface: value)))
