"""The sm_90a matmuls on a Hopper GPU: every CUTLASS kernel against the dequantised weight.

What can be shown without one is in test_packed_layouts_sm90.py (where each weight lies) and test_sass.py (that the
tensor-core instructions are there). These kernels run nowhere but on compute capability 9.0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from runtime import _native as native

pytestmark = pytest.mark.gpu

HOST_TYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
ACTIVATION_TYPES = {"bf16": "bfloat16", "f16": "float16", "int8": "int8", "e4m3": "float8_e4m3fn"}
CHANNELS, INPUTS = 392, 512  # four tiles of 128 channels, the last one with 8; eight K tiles of 64


@pytest.fixture(scope="module")
def hopper():
    gpu = native.open_gpu("cuda")
    if gpu.compute_capability != 90:
        pytest.skip(f"{gpu.name} has compute capability {gpu.compute_capability / 10}, these kernels are for 9.0 alone")
    return gpu


def on_device(gpu, host: np.ndarray):
    array = native.GpuArray(gpu, list(host.shape), host.dtype.name)
    array.upload(np.ascontiguousarray(host))
    return array


class Case:
    """A random weight of one kind, its exact values, inputs for it and the sums that they give."""

    def __init__(self, kind: str, activations: str, tokens: int, channels: int = CHANNELS, inputs: int = INPUTS):
        rng = np.random.default_rng(channels + inputs + tokens)
        self.kind, self.activations, self.tokens = kind, activations, tokens
        self.channels, self.inputs = channels, inputs
        host_type = HOST_TYPES[ACTIVATION_TYPES[activations]]
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        self.x_scale = None
        if kind.startswith("w4"):
            group = {"w4g64": 64, "w4g128": 128, "w4row": -1}[kind]
            groups = 1 if group < 0 else inputs // group
            codes = rng.integers(0, 16, (channels, inputs), dtype=np.uint8)
            scales = (rng.uniform(0.5, 1.5, (channels, groups)) * 0.01).astype(np.float32)
            zeros = rng.integers(0, 16, (channels, groups), dtype=np.uint8)
            self.weight = native.CanonicalWeight("u4", codes, channels, inputs, group, scales, zeros)
        elif kind == "half":
            codes = (rng.standard_normal((channels, inputs)) * 0.05).astype(host_type)
            self.weight = native.CanonicalWeight(activations, codes.view(np.uint8), channels, inputs)
        elif kind == "int8":
            codes = rng.integers(-128, 128, (channels, inputs), dtype=np.int8)
            scales = rng.uniform(0.001, 0.01, (channels, 1)).astype(np.float32)
            self.weight = native.CanonicalWeight("s8", codes, channels, inputs, -1, scales)
            x = rng.integers(-128, 128, (tokens, inputs)).astype(np.float32)
            self.x_scale = rng.uniform(0.001, 0.01, tokens).astype(np.float32)
        else:
            codes = (rng.standard_normal((channels, inputs)) * 20).astype(host_type)
            blocks = kind == "fp8block"
            rows = -(-channels // 128) if blocks else channels
            scales = rng.uniform(0.001, 0.01, (rows, inputs // 128 if blocks else 1)).astype(np.float32)
            self.weight = native.CanonicalWeight(
                "e4m3",
                codes.view(np.uint8),
                channels,
                inputs,
                128 if blocks else -1,
                scales,
                group_rows=128 if blocks else 1,
            )
            x *= 20
            shape = (tokens, inputs // 128) if blocks else (tokens,)
            self.x_scale = rng.uniform(0.001, 0.01, shape).astype(np.float32)
        self.x = x.astype(host_type)
        self.values = np.empty((channels, inputs), np.float32)
        self.weight.dequantize(self.values)
        self.bias = rng.standard_normal(channels).astype(np.float32)

    def sums(self) -> np.ndarray:
        """x W^T with the scales, in fp64."""
        x = self.x.astype(np.float64)
        if self.x_scale is not None:
            x = x * np.repeat(self.x_scale.reshape(self.tokens, -1), self.inputs // self.x_scale[0].size, axis=1)
        return x @ self.values.T.astype(np.float64)

    def tolerance(self) -> float:
        """Twice the relative error of the same sums with weights rounded to the activation type."""
        if self.kind == "int8":
            return 3e-7  # the sums are exact
        if self.kind.startswith("fp8"):
            return 1e-3  # fp8 products are exact, but the tensor cores keep some 14 bits of 128 of them
        rounded = self.values.astype(HOST_TYPES[ACTIVATION_TYPES[self.activations]]).astype(np.float64)
        exact = self.x.astype(np.float64) @ self.values.T.astype(np.float64)
        plain = relative_error(self.x.astype(np.float64) @ rounded.T, exact)
        return 2 * max(plain, 2.0 ** (-9 if self.activations == "bf16" else -12))

    def pack(self, gpu, kernel: str, splits: int = 1, **options):
        table = f"{self.channels} {self.inputs} 1000000 {kernel} {splits}"
        linear = native.pack_linear_gpu(gpu, [self.weight], self.activations, selection_table=table, **options)
        assert f"table: {kernel}, {splits} splits" in linear.describe_choice(self.tokens), linear.reason
        return linear

    def run(self, gpu, linear, out_type: str = "float32", **arguments) -> np.ndarray:
        outputs = self.channels // 2 if arguments.get("gate") else self.channels
        out = np.full((self.tokens, outputs), np.nan, HOST_TYPES[out_type])
        if arguments.get("add_to_out"):
            out = np.ones_like(out)
        workspace = np.zeros(linear.workspace_bytes(self.tokens), np.uint8)
        device_out, device_workspace = on_device(gpu, out), on_device(gpu, workspace)
        linear.run(
            on_device(gpu, self.x),
            device_out,
            device_workspace,
            x_scale=None if self.x_scale is None else on_device(gpu, self.x_scale),
            x_sum=on_device(gpu, self.x.astype(np.int32).sum(1, dtype=np.int32)) if self.kind == "int8" else None,
            **arguments,
        )
        device_out.download(out)
        return out


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value.astype(np.float64) - reference) / np.linalg.norm(reference))


# kernel, kind of weight, activations, token tile
KERNELS = [
    *[
        (f"cutlass_w4a16_{activations}_{tile}_sm90", kind, activations, tile)
        for activations in ("bf16", "f16")
        for tile, kind in ((16, "w4g128"), (64, "w4g64"), (128, "w4row"), (256, "w4g128"))
        if (activations, tile) != ("f16", 256)
    ],
    *[
        (f"cutlass_{activations}_{tile}_sm90", "half", activations, tile)
        for activations in ("bf16", "f16")
        for tile in (128, 256)
    ],
    *[(f"cutlass_fp8_{tile}_sm90", "fp8", "e4m3", tile) for tile in (16, 64, 128)],
    *[(f"cutlass_fp8_block_{tile}_sm90", "fp8block", "e4m3", tile) for tile in (64, 128)],
    ("cutlass_int8_256_sm90", "int8", "int8", 256),
]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("kernel", "kind", "activations", "tile"), KERNELS, ids=[entry[0] for entry in KERNELS])
def test_sums(hopper, kernel: str, kind: str, activations: str, tile: int, splits: int) -> None:
    for tokens in (1, tile - 3, tile, tile + 5):
        case = Case(kind, activations, tokens)
        linear = case.pack(hopper, kernel, splits)
        first = case.run(hopper, linear)
        assert relative_error(first, case.sums()) <= case.tolerance(), tokens
        np.testing.assert_array_equal(case.run(hopper, linear), first, err_msg="splits add in a fixed order")
        np.testing.assert_array_equal(case.run(hopper, linear, num_ctas=3), first, err_msg="soft partition")


@pytest.mark.parametrize("out_type", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["cutlass_w4a16_bf16_16_sm90", "cutlass_w4a16_bf16_128_sm90"])
def test_epilogues(hopper, kernel: str, out_type: str) -> None:
    case = Case("w4g128", "bf16", 21)
    linear = case.pack(hopper, kernel)
    tolerance = case.tolerance() + {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[out_type]
    biased = case.run(hopper, linear, out_type, bias=on_device(hopper, case.bias))
    assert relative_error(biased, case.sums() + case.bias) <= tolerance
    if out_type == "float32":
        assert relative_error(case.run(hopper, linear, add_to_out=True), case.sums() + 1) <= tolerance


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("kernel", "kind", "activations"), [entry[:3] for entry in KERNELS if entry[1] != "fp8block"])
def test_gated(hopper, kernel: str, kind: str, activations: str, gate: str) -> None:
    case = Case(kind, activations, 19, channels=412)
    linear = case.pack(hopper, kernel, interleaves_gate=True)
    out = case.run(hopper, linear, gate=gate, bias=on_device(hopper, np.resize(case.bias, 412).astype(np.float32)))
    sums = case.sums() + np.resize(case.bias, 412)
    left, up = sums[:, :206], sums[:, 206:]
    if gate == "silu":
        left = left / (1 + np.exp(-left))
    else:
        left = 0.5 * left * (1 + np.tanh(np.sqrt(2 / np.pi) * (left + 0.044715 * left**3)))
    assert relative_error(out, left * up) <= 3 * case.tolerance() + 1e-5


@pytest.mark.parametrize("kind", ["w4g128", "half", "fp8", "fp8block", "int8"])
def test_token_tiles_give_the_same_bits(hopper, kind: str) -> None:
    """What GemmKernel::kAscendingWgmma says, and with it --batch-invariant."""
    same = {"w4row": "w4g128", "w4g64": "w4g128"}
    for activations in ("bf16", "f16", "e4m3", "int8"):
        kernels = [entry[0] for entry in KERNELS if same.get(entry[1], entry[1]) == kind and entry[2] == activations]
        if not kernels:
            continue
        case = Case(kind, activations, 40)
        results = [case.run(hopper, case.pack(hopper, kernel)) for kernel in kernels]
        for kernel, result in zip(kernels[1:], results[1:], strict=True):
            np.testing.assert_array_equal(result, results[0], err_msg=kernel)


def test_inputs_that_are_no_multiple_of_a_tile(hopper) -> None:
    """K of 200: the last K tile is filled with zeros by TMA, for x and weight apart."""
    case = Case("w4row", "bf16", 33, channels=130, inputs=200)
    assert (
        relative_error(case.run(hopper, case.pack(hopper, "cutlass_w4a16_bf16_64_sm90")), case.sums())
        <= case.tolerance()
    )
    case = Case("half", "f16", 33, channels=130, inputs=200)
    assert relative_error(case.run(hopper, case.pack(hopper, "cutlass_f16_128_sm90")), case.sums()) <= case.tolerance()
