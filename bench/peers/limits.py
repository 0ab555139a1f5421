"""What this machine could do at most with a model: the floor under every time in the peer table.

A step takes at least as long as its arithmetic at the measured peaks (linear layers: int8 dot products;
attention: bf16 dot products or fp32 multiply-adds, whichever is higher), and at least as long as reading its
weights and KV once at the measured bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.peers.workload import Workload


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    int8_gops: float  # 1e9 multiplies and additions a second, all threads together
    attention_gflops: float  # bf16 dot products or fp32 multiply-adds, whichever is more
    bandwidth_gb_s: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one token costs; taken from the model file's header."""

    name: str
    vocab_size: int
    linear_weights: int  # elements of the layers' matrices
    linear_bytes: int  # the same, as the file holds them
    head_weights: int
    head_bytes: int
    attention_flops_per_key: int  # of one query token over one key, all layers: dot products of scores and values
    kv_elements_per_token: int  # K and V of one token, all layers

    @classmethod
    def from_checkpoint(cls, path: str) -> ModelCost:
        from runtime.loading.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        layers = [t for name, t in checkpoint.tensors.items() if name.startswith("layers.") and len(t.shape) == 2]
        head = checkpoint.tensors.get("lm_head", checkpoint.tensors["embedding"])
        return cls(
            name=checkpoint.name,
            vocab_size=config.vocab_size,
            linear_weights=sum(math.prod(tensor.shape) for tensor in layers),
            linear_bytes=sum(tensor.data.nbytes for tensor in layers),
            head_weights=math.prod(head.shape),
            head_bytes=head.data.nbytes,
            attention_flops_per_key=4 * config.num_layers * config.num_q_heads * config.head_dim,
            kv_elements_per_token=2 * config.num_layers * config.num_kv_heads * config.head_dim,
        )


KV_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 4.5}  # per element; integers with scale and min


def limit_tokens_per_s(workload: Workload, model: ModelCost, peaks: MachinePeaks, kv_dtype: str) -> float:
    """The most tokens a second that the workload's timed part could reach."""
    if workload.is_prefill:
        num_passes = 1
        num_tokens = workload.timed_tokens
        keys_per_token = workload.prompt_len / 2
        kv_tokens_read = 0  # a chunk's own keys stay in cache
    else:
        num_passes = workload.num_steps
        num_tokens = workload.num_requests
        keys_per_token = workload.prompt_len + workload.num_steps / 2
        kv_tokens_read = workload.num_requests * keys_per_token
    # Only the last token of each request needs logits.
    int8_ops = 2.0 * (num_tokens * model.linear_weights + workload.num_requests * model.head_weights)
    attention_flops = float(num_tokens * keys_per_token * model.attention_flops_per_key)
    arithmetic_s = int8_ops / (peaks.int8_gops * 1e9) + attention_flops / (peaks.attention_gflops * 1e9)
    num_bytes = (
        model.linear_bytes + model.head_bytes + kv_tokens_read * model.kv_elements_per_token * (KV_BITS[kv_dtype] / 8)
    )
    return workload.timed_tokens / (num_passes * max(arithmetic_s, num_bytes / (peaks.bandwidth_gb_s * 1e9)))


def measure_peaks(threads: int) -> MachinePeaks:
    """Asks the extension, which runs dot products out of registers and reads memory for about a second."""
    from runtime import _native

    peaks = _native.machine_peaks(threads, 1.0)
    # There are processors without a bf16 dot product, and some where it is slower than fp32 multiply-adds.
    attention_gflops = max(peaks["bf16_gflops"], peaks["fp32_gflops"])
    return MachinePeaks(peaks["int8_gops"], attention_gflops, peaks["read_gb_per_second"])
