"""The GPU's row kernels: norm and conversion, gated activation, embedding, rows and pages moved. Integer results are
exact; on a machine without a GPU they run by host execution."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from runtime import _native
from runtime.ops.activation import gated_activation
from runtime.ops.attention import copy_pages, swap_pages
from runtime.ops.embedding import embedding, gather_rows, gpu_embedding_table
from runtime.ops.norm import prepare_rows, rms_norm
from tests.kernels.gemm_cases import BLOCK, FORMATS, random_weight_bytes
from tests.kit.gpu_arrays import DTYPES, download, poisoned, upload

REALS = ["float32", "float16", "bfloat16"]
# Values a thread: 8 in each of 1, 2, 4 or 8 items; past 32768 the row is read again. Odd ones go element by element.
WIDTHS = [1, 8, 77, 96, 576, 4104, 5001, 9000, 17000]


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def rows_of(rng, num_rows: int, width: int, dtype: str = "float32") -> np.ndarray:
    """Rows of very different sizes."""
    x = rng.standard_normal((num_rows, width)) * np.exp(rng.uniform(-4, 4, (num_rows, 1)))
    return x.astype(DTYPES[dtype])


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight


def coded(y: np.ndarray, dtype: str, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The contract in NumPy fp32: codes, scales, sums.  y: [T, K] float32"""
    groups = y.reshape(len(y), -1, group or y.shape[1])
    absmax = np.abs(groups).max(axis=2, keepdims=True)
    is_zero = absmax < 1e-36
    top = np.float32(127 if dtype == "int8" else 448)
    inverse = np.divide(top, absmax, where=~is_zero, out=np.zeros_like(absmax))
    scaled = groups * inverse
    if dtype == "int8":
        codes = np.rint(scaled).astype(np.int8)
    else:
        codes = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    scales = np.where(is_zero, np.float32(0), absmax / top)
    sums = codes.astype(np.int32).sum(axis=2) if dtype == "int8" else np.zeros(scales.shape[:2], np.int32)
    return codes.reshape(y.shape), scales[..., 0], sums


def prepared(gpu, x, out_type: str, group: int = 0, **arguments):
    """(out, scales, sums) of prepare_rows, the last two None where there are none."""
    num_rows, width = x.shape[0], arguments.get("width") or x.shape[1]
    out = poisoned(gpu, (num_rows, x.shape[1]), out_type)
    shape = (num_rows, width // group if group else 1)
    scale = poisoned(gpu, shape, "float32") if out_type in ("int8", "float8_e4m3fn") else None
    code_sum = poisoned(gpu, shape, "int32") if out_type == "int8" else None
    prepare_rows(upload(gpu, x), out, scale=scale, code_sum=code_sum, group=group, **arguments)
    return download(out), scale and download(scale), code_sum and download(code_sum)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_the_formula_and_codes_are_of_the_normed_row(gpu, rng, width):
    """fp32 first, against float64; then every coded type from the very values that fp32 gave."""
    x, weight = rows_of(rng, 2, width), rng.standard_normal(width).astype(np.float32)
    device_weight = upload(gpu, weight)
    y = prepared(gpu, x, "float32", norm_weight=device_weight, eps=1e-5)[0]
    want = normed(x, weight, 1e-5)
    assert np.linalg.norm(y - want) < 3e-7 * np.linalg.norm(want)
    for out_type in ("int8", "float8_e4m3fn", "bfloat16"):
        codes, scales, sums = prepared(gpu, x, out_type, norm_weight=device_weight, eps=1e-5)
        if out_type == "bfloat16":
            np.testing.assert_array_equal(codes.view(np.uint16), y.astype(ml_dtypes.bfloat16).view(np.uint16))
            continue
        want_codes, want_scales, want_sums = coded(y, out_type, 0)
        np.testing.assert_array_equal(codes.view(np.uint8), want_codes.view(np.uint8))
        np.testing.assert_array_equal(scales, want_scales)
        if sums is not None:
            np.testing.assert_array_equal(sums, want_sums)


@pytest.mark.parametrize("in_type", REALS)
@pytest.mark.parametrize("out_type", list(DTYPES)[:5])
def test_every_pair_of_types(gpu, rng, in_type, out_type):
    for width in (96, 77):
        x = rows_of(rng, 3, width, in_type)
        weight = rng.standard_normal(width).astype(np.float32)
        for norm_weight in (None, weight):
            device_weight = None if norm_weight is None else upload(gpu, norm_weight)
            y = prepared(gpu, x, "float32", norm_weight=device_weight)[0]
            if norm_weight is None:
                np.testing.assert_array_equal(y, x.astype(np.float32))
            out, scales, _ = prepared(gpu, x, out_type, norm_weight=device_weight)
            want = y.astype(DTYPES[out_type]) if scales is None else coded(y, out_type, 0)[0]
            np.testing.assert_array_equal(out.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("out_type", ["int8", "float8_e4m3fn"])
def test_a_scale_for_each_group(gpu, rng, out_type, group):
    for width in (group, 3 * group, 4224):
        x = rows_of(rng, 2, width)
        x *= np.exp(rng.uniform(-3, 3, (1, width // group)).repeat(group, axis=1)).astype(np.float32)
        codes, scales, sums = prepared(gpu, x, out_type, group=group)
        want_codes, want_scales, want_sums = coded(x, out_type, group)
        np.testing.assert_array_equal(codes.view(np.uint8), want_codes.view(np.uint8))
        np.testing.assert_array_equal(scales, want_scales)
        if sums is not None:
            np.testing.assert_array_equal(sums, want_sums)


def test_rows_wider_than_the_registers(gpu, rng):
    """Read again for each pass; in vectors and element by element."""
    for width in (33024, 32801):
        x, weight = rows_of(rng, 1, width), rng.standard_normal(width).astype(np.float32)
        device_weight = upload(gpu, weight)
        y = prepared(gpu, x, "float32", norm_weight=device_weight)[0]
        want = normed(x, weight, 1e-6)
        assert np.linalg.norm(y - want) < 3e-7 * np.linalg.norm(want)
        codes, scales, sums = prepared(gpu, x, "int8", norm_weight=device_weight)
        want_codes, want_scales, want_sums = coded(y, "int8", 0)
        np.testing.assert_array_equal(codes, want_codes)
        np.testing.assert_array_equal(scales, want_scales)
        np.testing.assert_array_equal(sums, want_sums)


def test_a_row_does_not_depend_on_its_neighbours(gpu, rng):
    x, weight = rows_of(rng, 5, 1000), rng.standard_normal(1000).astype(np.float32)
    whole = prepared(gpu, x, "float32", norm_weight=upload(gpu, weight))[0]
    for i in range(5):
        alone = prepared(gpu, x[i : i + 1], "float32", norm_weight=upload(gpu, weight))[0]
        np.testing.assert_array_equal(alone[0].view(np.uint32), whole[i].view(np.uint32))


def test_rows_inside_wider_ones(gpu, rng):
    """width < stride: nothing outside is read into the sums or written; a stride of 79 forbids vectors."""
    for stride in (104, 79):
        x = rows_of(rng, 3, stride)
        x[:, 72:] = np.nan
        out, scales, sums = prepared(gpu, x, "int8", width=72)
        want = coded(x[:, :72].copy(), "int8", 0)
        np.testing.assert_array_equal(out[:, :72], want[0])
        np.testing.assert_array_equal(scales, want[1])
        np.testing.assert_array_equal(sums, want[2])
        assert (out[:, 72:].view(np.uint8) == 0xFF).all()


def test_rows_without_size_and_with_nan(gpu):
    x = np.ones((6, 77), np.float32)
    x[0] = 0
    x[1] = np.linspace(-9e-37, 9e-37, 77)
    x[2, 5] = np.nan
    x[3, 6] = -np.inf
    x[4] = 1e-35
    codes, scales, sums = prepared(gpu, x, "int8")
    assert (codes[:2] == 0).all()
    assert (scales[:2] == 0).all()
    assert np.isnan(scales[2])
    assert (codes[2] == -128).all()
    assert np.isinf(scales[3])
    assert codes[3, 6] == -128
    assert (np.delete(codes[3], 6) == 0).all()
    assert (codes[4:] == 127).all()
    np.testing.assert_array_equal(sums[:, 0], codes.astype(np.int32).sum(axis=1))
    codes, scales, _ = prepared(gpu, x, "float8_e4m3fn")
    assert (codes[:2].astype(np.float32) == 0).all()
    assert np.isnan(codes[2].astype(np.float32)).all()
    assert (codes[4:].astype(np.float32) == 448).all()


@pytest.mark.parametrize("out_type", ["int8", "float8_e4m3fn"])
def test_a_scale_known_beforehand(gpu, rng, out_type):
    """Of rows, with and without a norm, and of the activation; the ends of the type hold what is beyond them."""
    x, weight = rows_of(rng, 3, 200), rng.standard_normal(200).astype(np.float32)
    gates = rows_of(rng, 3, 400)
    activated = poisoned(gpu, (3, 200), "float32")
    gated_activation(upload(gpu, gates), activated)
    device_weight = upload(gpu, weight)
    normed_rows = prepared(gpu, x, "float32", norm_weight=device_weight)[0]
    scale = np.float32(0.01)
    for y, run in (
        (x, lambda out, **codes: prepare_rows(upload(gpu, x), out, **codes)),
        (normed_rows, lambda out, **codes: prepare_rows(upload(gpu, x), out, norm_weight=device_weight, **codes)),
        (download(activated), lambda out, **codes: gated_activation(upload(gpu, gates), out, **codes)),
    ):
        out, scales = poisoned(gpu, (3, 200), out_type), poisoned(gpu, (3, 1), "float32")
        sums = poisoned(gpu, (3, 1), "int32") if out_type == "int8" else None
        run(out, scale=scales, code_sum=sums, code_scale=float(scale))
        scaled = y * (np.float32(1) / scale)
        if out_type == "int8":
            wanted = np.clip(np.rint(scaled), -128, 127)
            near = np.abs(download(out).astype(np.float32) - wanted) <= (
                1 if y is not x and y is not normed_rows else 0
            )
            assert near.all()  # the activation's own rounding differs between types
            np.testing.assert_array_equal(download(sums)[:, 0], download(out).astype(np.int32).sum(1))
        else:
            wanted = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            np.testing.assert_allclose(download(out).astype(np.float32), wanted, rtol=0.13, atol=2**-9)
        np.testing.assert_array_equal(download(scales), np.full((3, 1), scale))
        run(out, code_scale=float(scale))  # scales and sums may be left out
    with pytest.raises(ValueError, match="code_scale"):
        prepare_rows(upload(gpu, x), poisoned(gpu, (3, 200), "float32"), code_scale=0.5)
    with pytest.raises(ValueError, match="code_scale"):
        prepare_rows(upload(gpu, x), poisoned(gpu, (3, 200), out_type), code_scale=-1.0)


def test_norm_in_place_and_added_to_the_residual(gpu, rng):
    for width in (576, 77):
        branch, residual = rows_of(rng, 3, width), rows_of(rng, 3, width)
        weight = rng.standard_normal(width).astype(np.float32)
        device_branch, device_weight = upload(gpu, branch), upload(gpu, weight)
        device_residual = upload(gpu, residual)
        rms_norm(device_branch, device_weight, device_residual, add_to_out=True)
        rms_norm(device_branch, device_weight, device_branch)
        y = download(device_branch)
        np.testing.assert_allclose(y, normed(branch, weight, 1e-6), rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(download(device_residual), residual + y)
        on_cpu = np.empty_like(branch)
        rms_norm(branch, weight, on_cpu)
        np.testing.assert_allclose(y, on_cpu, rtol=1e-6)


def test_schedules_are_printed(gpu):
    def schedule(width: int) -> str:
        x = _native.GpuArray(gpu, [1, width], "float32")
        return _native.describe_prepare_rows(x, x)

    assert schedule(4096) == "512 threads a row, 1 x 8 values each in registers, vectors of 16 bytes"
    assert "element by element" in schedule(577)
    assert "8 x 8 values" in schedule(32768)
    assert "read again" in schedule(32776)


def test_bad_rows(gpu):
    x, out = poisoned(gpu, (2, 64), "float32"), poisoned(gpu, (2, 64), "int8")
    scale = poisoned(gpu, (2, 1), "float32")
    prepare_rows(poisoned(gpu, (0, 64), "float32"), poisoned(gpu, (0, 64), "int8"))
    with pytest.raises(ValueError, match="out_scale"):
        prepare_rows(x, out)
    with pytest.raises(ValueError, match="out_scale"):
        prepare_rows(x, x, scale=scale)
    with pytest.raises(ValueError, match="out_sum"):
        prepare_rows(x, x, code_sum=poisoned(gpu, (2, 1), "int32"))
    with pytest.raises(ValueError, match="group"):
        prepare_rows(x, out, scale=poisoned(gpu, (2, 4), "float32"), group=16)
    with pytest.raises(ValueError, match="width"):
        prepare_rows(x, out, scale=poisoned(gpu, (2, 1), "float32"), group=32, width=48)
    with pytest.raises(ValueError, match="scale"):
        prepare_rows(x, out, scale=poisoned(gpu, (2, 3), "float32"), group=32)
    with pytest.raises(TypeError, match="scale"):
        prepare_rows(x, out, scale=poisoned(gpu, (2, 1), "int32"))
    with pytest.raises(ValueError, match="norm_weight"):
        prepare_rows(x, x, norm_weight=poisoned(gpu, (63,), "float32"))
    with pytest.raises(ValueError, match="in: got dtype int8"):
        prepare_rows(out, x)
    with pytest.raises(ValueError, match="eps"):
        prepare_rows(x, x, eps=-1.0)
    with pytest.raises(ValueError, match="out"):
        prepare_rows(x, poisoned(gpu, (3, 64), "float32"))
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, poisoned(gpu, (64,), "float32"), x, add_to_out=True)
    with pytest.raises(TypeError):
        prepare_rows(np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float32))
    if gpu.world == "simt":
        with pytest.raises(ValueError, match="out"):
            prepare_rows(x, np.zeros((2, 64), np.float32))


def test_a_missing_barrier_shows():
    """A test of these tests: each barrier of a kernel that reduces over its block, switched off in turn."""
    gpu = _native.open_gpu("simt")
    x = rows_of(np.random.default_rng(21), 2, 4096)
    weight = upload(gpu, np.ones(4096, np.float32))
    _native.simt_take_visited_sites()
    right = prepared(gpu, x, "int8", norm_weight=weight)
    sites = [site for site in _native.simt_take_visited_sites() if "row_values.cuh" in site]
    assert sites
    try:
        for site in sites:
            _native.simt_set_disabled_site(site)
            noticed = False
            for seed in range(4):
                _native.simt_set_seed(seed)
                try:
                    wrong = prepared(gpu, x, "int8", norm_weight=weight)
                except RuntimeError:
                    noticed = True
                    break
                noticed |= any((a != b).any() for a, b in zip(right, wrong, strict=True))
            assert noticed, site
    finally:
        _native.simt_set_disabled_site("")
        _native.simt_set_seed(0)


# ---- gated activation


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation_in_fp32_has_the_cpus_bits(gpu, rng, activation):
    for width in (96, 77, 4104):
        x = (rng.standard_normal((2, 2 * width)) * np.exp(rng.uniform(-3, 4, (2, 2 * width)))).astype(np.float32)
        x[0, :8] = [0, -0.0, 100, -100, 88, -88, 1e30, -1e30]
        want = np.empty((2, width), np.float32)
        gated_activation(x, want, activation=activation)
        out = poisoned(gpu, (2, width), "float32")
        gated_activation(upload(gpu, x), out, activation=activation)
        np.testing.assert_array_equal(download(out).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("in_type", REALS)
@pytest.mark.parametrize("out_type", ["float16", "bfloat16"])
def test_activation_of_16_bits_is_within_an_ulp(gpu, rng, in_type, out_type):
    for activation in ("silu", "gelu_tanh"):
        x = (2 * rng.standard_normal((3, 2 * 152))).astype(DTYPES[in_type])
        exact = np.empty((3, 152), np.float32)
        gated_activation(x.astype(np.float32), exact, activation=activation)
        out = poisoned(gpu, (3, 152), out_type)
        gated_activation(upload(gpu, x), out, activation=activation)
        bits = 8 if out_type == "bfloat16" else 11
        np.testing.assert_allclose(download(out).astype(np.float32), exact, rtol=1.01 * 2.0**-bits, atol=1e-7)


@pytest.mark.parametrize("group", [0, 32])
def test_activation_to_codes(gpu, rng, group):
    for width in (96, 4128):
        x = rng.standard_normal((2, 2 * width)).astype(ml_dtypes.bfloat16)
        exact = np.empty((2, width), np.float32)
        gated_activation(x.astype(np.float32), exact)
        for out_type in ("int8", "float8_e4m3fn"):
            out = poisoned(gpu, (2, width), out_type)
            shape = (2, width // group if group else 1)
            scale = poisoned(gpu, shape, "float32")
            code_sum = poisoned(gpu, shape, "int32") if out_type == "int8" else None
            gated_activation(upload(gpu, x), out, scale=scale, code_sum=code_sum, group=group)
            codes, scales = download(out), download(scale)
            want_codes, want_scales, _ = coded(exact, out_type, group)
            np.testing.assert_allclose(scales, want_scales, rtol=1e-6)
            if out_type == "int8":
                difference = codes.astype(int) - want_codes
                assert np.abs(difference).max() <= 1
                assert (difference != 0).mean() < 1e-3
                sums = codes.astype(np.int32).reshape(*shape, -1).sum(axis=2)
                np.testing.assert_array_equal(download(code_sum), sums)
            else:
                assert (codes.view(np.uint8) != want_codes.view(np.uint8)).mean() < 1e-3


def test_bad_activation(gpu):
    x, out = poisoned(gpu, (2, 64), "float32"), poisoned(gpu, (2, 32), "float32")
    with pytest.raises(ValueError, match="relu"):
        gated_activation(x, out, activation="relu")
    with pytest.raises(ValueError, match="x"):
        gated_activation(poisoned(gpu, (2, 63), "float32"), out)
    with pytest.raises(ValueError, match="out"):
        gated_activation(x, poisoned(gpu, (2, 31), "float32"))
    with pytest.raises(ValueError, match="scale"):
        gated_activation(x, poisoned(gpu, (2, 32), "int8"))


# ---- embedding and moved rows


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("is_permuted", [False, True])
def test_embedding_has_the_bits_of_dequantize_row(gpu, rng, weight_format, is_permuted):
    for hidden in (512, 77) if weight_format not in BLOCK else (768,):
        vocab_size = 40
        order = rng.permutation(vocab_size).astype(np.int32).tolist() if is_permuted else None
        data = random_weight_bytes(rng, weight_format, vocab_size, hidden)
        weight = _native.Weight(data, weight_format, vocab_size, hidden, order)
        table = gpu_embedding_table(gpu, weight)
        assert (table.vocab_size, table.hidden) == (vocab_size, hidden)
        ids = np.array([39, 0, -1, 17, 40, 17], np.int32)
        out = poisoned(gpu, (len(ids), hidden), "float32")
        embedding(table, upload(gpu, ids), out, scale=1.7)
        got = download(out)
        want = np.zeros((len(ids), hidden), np.float32)
        for row, token in enumerate(ids):
            if 0 <= token < vocab_size:
                weight.dequantize_row(int(token), want[row])
        want *= np.float32(1.7)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_gather_rows(gpu, rng):
    for width in (576, 77, 2052):
        x = rng.standard_normal((9, width)).astype(np.float32)
        idxs = np.array([8, -1, 0, 8, 9, 3], np.int32)
        out = poisoned(gpu, (6, width), "float32")
        gather_rows(upload(gpu, x), upload(gpu, idxs), out)
        want = np.where(((idxs >= 0) & (idxs < 9))[:, None], x[idxs.clip(0, 8)], 0)
        np.testing.assert_array_equal(download(out), want)
    x = poisoned(gpu, (2, 8), "float32")
    with pytest.raises(ValueError, match="out"):
        gather_rows(x, upload(gpu, np.zeros(2, np.int32)), x)
    with pytest.raises(TypeError, match="row_idxs"):
        gather_rows(x, upload(gpu, np.zeros(2, np.float32)), poisoned(gpu, (2, 8), "float32"))


def test_bad_embedding(gpu, rng):
    weight = _native.Weight(random_weight_bytes(rng, "F32", 4, 8), "F32", 4, 8)
    table, ids = gpu_embedding_table(gpu, weight), upload(gpu, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="out"):
        embedding(table, ids, poisoned(gpu, (2, 9), "float32"))
    with pytest.raises(ValueError, match="scale"):
        embedding(table, ids, poisoned(gpu, (2, 8), "float32"), scale=float("inf"))


# ---- pages


@pytest.mark.parametrize("page_bytes", [16, 4112, 3 * 16384 + 48])
def test_copy_pages(gpu, rng, page_bytes):
    pages = rng.integers(0, 256, (9, page_bytes), dtype=np.uint8)
    pairs = np.array([[0, 5], [-1, 6], [3, 1], [2, -1], [0, 7], [4, 8]], np.int32)
    for count in (None, 5, 0):
        arena = upload(gpu, pages)
        num_pairs = None if count is None else upload(gpu, np.array([count], np.int32))
        copy_pages(arena, upload(gpu, pairs), num_pairs=num_pairs)
        want = pages.copy()
        for source, target in pairs[:count]:
            if source >= 0 and target >= 0:
                want[target] = pages[source]
        np.testing.assert_array_equal(download(arena), want)
    with pytest.raises(ValueError, match="page_bytes"):
        copy_pages(poisoned(gpu, (2, 24), "uint8"), upload(gpu, pairs))
    with pytest.raises(ValueError, match="pairs"):
        copy_pages(upload(gpu, pages), upload(gpu, pairs[:, :1].copy()))


def test_swap_pages(gpu, rng):
    pages = rng.integers(0, 256, (8, 640), dtype=np.uint8)
    arena, host = upload(gpu, pages), np.full((6, 640), 0xAA, np.uint8)
    assert swap_pages(arena, host, [2, 3, 4, 7, 6], [0, 1, 2, 3, 5], is_out=True) == 3
    np.testing.assert_array_equal(host[[0, 1, 2, 3, 5]], pages[[2, 3, 4, 7, 6]])
    assert (host[4] == 0xAA).all()
    assert swap_pages(arena, host, [0, 5], [3, 0], is_out=False) == 2
    want = pages.copy()
    want[[0, 5]] = pages[[7, 2]]
    np.testing.assert_array_equal(download(arena), want)
    assert swap_pages(arena, host, [], [], is_out=True) == 0
    assert swap_pages(arena, host, [1, 6], [4, 4], is_out=True) == 2  # one target twice: the later stays
    np.testing.assert_array_equal(host[4], want[6])
    with pytest.raises(ValueError, match="host_arena"):
        swap_pages(arena, host[:, :320].copy(), [1], [0], is_out=True)
    host.flags.writeable = False
    with pytest.raises(ValueError, match="host_arena"):
        swap_pages(arena, host, [1], [0], is_out=True)
    assert swap_pages(arena, host, [1], [4], is_out=False) == 1
    want[1] = want[6]
    np.testing.assert_array_equal(download(arena), want)
    host.flags.writeable = True
    with pytest.raises(ValueError, match="device_page_ids"):
        swap_pages(arena, host, [8], [0], is_out=True)
    with pytest.raises(ValueError, match="host_page_ids"):
        swap_pages(arena, host, [1], [-1], is_out=True)
    with pytest.raises(ValueError, match="host_page_ids"):
        swap_pages(arena, host, [1, 2], [0], is_out=True)
