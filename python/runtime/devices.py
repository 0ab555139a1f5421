"""Where a model runs: all that differs between the CPU and a GPU when an engine is put together.

Everything above (scheduler, engine, model files) is the same; everything below is native. ``simt`` is a GPU whose
kernels are executed by the host, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime import _native
from runtime.engine_args import parse_device
from runtime.lane_bank import CorePartitions, SmPartitions

# A GPU takes whole prompts of this many tokens in less time than ten decode steps; the host execution does not.
_GPU_BATCHED_TOKENS = 2048
# On two CPU cores a chunk of 512 tokens keeps one step near a quarter of a second, and its activations in their L2.
_CPU_BATCHED_TOKENS = 512
# Of the device memory that weights and frames leave, what the KV pool takes by default. The rest is for what the
# driver allocates itself: graphs (a few hundred KB each), modules, its heap granularity.
_GPU_KV_SHARE = 0.92
_FLOAT_FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class BufferTypes:
    """Element types of a program's buffers on one device."""

    inner: str  # what nodes hand each other, but for the residual stream and the logits, which are float32
    prepared: str  # a linear's input rows as its kernel reads them
    prepared_width: int  # elements
    has_scales: bool  # prepared rows carry a scale each
    has_sums: bool  # and the sum of their codes


class CpuDevice:
    """This process's cores."""

    gpu = None
    pack_threads = 1  # one matrix at a time, on all threads
    batched_tokens = _CPU_BATCHED_TOKENS
    kv_share = None  # plan_kv's own rule

    def __init__(self, threads: int | None):
        self.threads = threads or _native.usable_cores()

    def choose_activations(self, checkpoint, wanted: str | None) -> str:
        """int8 where the model's matrices are quantised, else bf16; an explicit choice wins."""
        if wanted in ("fp16",):
            raise ValueError(f"activations: got {wanted!r}, the CPU has int8, bf16 and fp32")
        if wanted is not None:
            return wanted
        formats = {tensor.format for name, tensor in checkpoint.tensors.items() if name.endswith((".q", ".down"))}
        return "bf16" if formats <= set(_FLOAT_FORMATS) else "int8"

    def pack(self, weights: list, activations: str, is_gated: bool) -> Any:
        """One matrix of row segments, laid out for this device. ``is_gated``: they are gate|up, and run as such."""
        return _native.pack_linear(weights, activations, self.threads)

    def rope_table(self, inv_freq, num_positions: int, attention_factor: float) -> Any:
        return _native.RopeTableStorage(inv_freq, num_positions, attention_factor)

    def buffer_types(self, matrices: list, activations: str) -> BufferTypes:
        row_bytes = max(matrix.prepared_row_bytes for matrix in matrices)
        return BufferTypes("float32", "uint8", (row_bytes + 63) // 64 * 64, False, False)

    def new_program(self) -> Any:
        return _native.Program()

    def kv_arena(self, groups, num_pages: int) -> Any:
        return _native.KvArena(list(groups), num_pages)

    def row_store(self, num_rows: int, max_tokens: int, num_groups: int, page_size: int, vocab_size: int) -> Any:
        return _native.RowStore(num_rows, max_tokens, num_groups, page_size, vocab_size)

    def engine_cores(self) -> list[int]:
        """A core for each thread; with more threads than cores, cores repeat."""
        cores = _native.usable_core_ids()
        return [cores[index % len(cores)] for index in range(self.threads)]

    def engine_lane(self, lane_idx: int, completions, max_num_seqs: int) -> Any:
        """A lane for an engine: a worker on each core."""
        return self.lane(lane_idx, completions, self.engine_cores())

    def partitions(self, cuts) -> CorePartitions:
        """The cores of an engine, to be cut for lanes near these shares."""
        return CorePartitions(self.engine_cores(), cuts)

    def lane(self, lane_idx: int, completions, cores: list[int] | None = None) -> Any:
        """A lane on the given cores, a worker each; None: this device's threads, wherever the system likes."""
        return _native.Lane(lane_idx, cores or [], len(cores) if cores else self.threads, completions)

    def describe(self, activations: str) -> str:
        return f"{_native.active_cpu_isa()}, {self.threads} threads, {activations} activations"


class GpuDevice:
    """One GPU of a world."""

    def __init__(self, world: str, ordinal: int, *, threads: int | None, uses_graphs: bool, is_batch_invariant: bool):
        self.threads = threads or _native.usable_cores()
        self.pack_threads = self.threads  # a matrix each
        self.gpu = _native.open_gpu(world, ordinal)
        self._uses_graphs = uses_graphs
        self._is_batch_invariant = is_batch_invariant
        is_real = world == "cuda"
        self.batched_tokens = _GPU_BATCHED_TOKENS if is_real else _CPU_BATCHED_TOKENS
        # The host execution's memory is the host's: it plans as the CPU does.
        self.kv_share = _GPU_KV_SHARE if is_real else None

    def choose_activations(self, checkpoint, wanted: str | None) -> str:
        """bf16 unless another type is asked for: at small batches the weights' bytes are what counts."""
        return wanted or "bf16"

    def pack(self, weights: list, activations: str, is_gated: bool) -> Any:
        names = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "int8"}
        return _native.pack_linear_gpu(
            self.gpu, weights, names[activations], batch_invariant=self._is_batch_invariant, interleaves_gate=is_gated
        )

    def rope_table(self, inv_freq, num_positions: int, attention_factor: float) -> Any:
        return _native.GpuRopeStorage(self.gpu, _native.RopeTableStorage(inv_freq, num_positions, attention_factor))

    def buffer_types(self, matrices: list, activations: str) -> BufferTypes:
        inner = {"fp32": "float32", "fp16": "float16"}.get(activations, "bfloat16")
        width = (max(matrix.in_features for matrix in matrices) + 63) // 64 * 64
        is_int8 = activations == "int8"
        return BufferTypes(inner, "int8" if is_int8 else inner, width, is_int8, is_int8)

    def new_program(self) -> Any:
        return _native.Program(self.gpu, self._is_batch_invariant)

    def kv_arena(self, groups, num_pages: int) -> Any:
        return _native.KvArena(list(groups), num_pages, self.gpu)

    def row_store(self, num_rows: int, max_tokens: int, num_groups: int, page_size: int, vocab_size: int) -> Any:
        return _native.RowStore(num_rows, max_tokens, num_groups, page_size, vocab_size, self.gpu)

    def engine_lane(self, lane_idx: int, completions, max_num_seqs: int) -> Any:
        """A lane over the whole chip; decode steps of up to ``max_num_seqs`` rows replay graphs."""
        return _native.GpuLane(lane_idx, self.gpu, completions, max_graph_rows=max_num_seqs if self._uses_graphs else 0)

    def partitions(self, cuts) -> SmPartitions:
        """The chip's SMs, to be cut for lanes near these shares."""
        return SmPartitions(self.gpu, cuts, self._uses_graphs)

    def lane(self, lane_idx: int, completions, cores: list[int] | None = None) -> Any:
        """A lane over the whole chip that launches node by node; ``cores`` are the CPU's affair."""
        return _native.GpuLane(lane_idx, self.gpu, completions)

    def reserved_bytes(
        self, program, layouts, *, max_num_seqs: int, max_tokens: int, max_model_len: int, num_frames: int,
        num_decode_lanes: int,
    ) -> int:  # fmt: skip
        """Device memory that an engine's frames, graphs and rows take, beside weights and pages."""

        def frame_bytes(graph_rows: int) -> int:
            return _native.gpu_frame_bytes(
                program, num_rows=max_num_seqs, max_context=max_model_len, num_groups=len(layouts),
                page_size=layouts[0].page_size, max_tokens=max_tokens, max_logit_rows=max_num_seqs,
                max_graph_rows=graph_rows,
            )  # fmt: skip

        row_bytes = 4 * (max_model_len + 1) + (8 << 10)  # tokens, sampling parameters
        graph_bytes = num_decode_lanes * (frame_bytes(max_num_seqs) if self._uses_graphs else 0)
        return num_frames * frame_bytes(0) + graph_bytes + max_num_seqs * row_bytes

    def describe(self, activations: str) -> str:
        graphs = "graphs" if self._uses_graphs else "no graphs"
        invariant = ", batch invariant" if self._is_batch_invariant else ""
        return f"{self.gpu.world}:{self.gpu.ordinal} {self.gpu.name}, {activations} activations, {graphs}{invariant}"


def open_device(args) -> CpuDevice | GpuDevice:
    """The device that EngineArgs name. Raises RuntimeError with the reason where it cannot be had."""
    world, ordinal = parse_device(args.device)
    if world == "cpu":
        return CpuDevice(args.threads)
    return GpuDevice(
        world, ordinal, threads=args.threads, uses_graphs=args.cuda_graphs, is_batch_invariant=args.batch_invariant
    )
