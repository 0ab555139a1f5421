"""What this machine could do at most with a model: the floor under every time in the peer table.

A step takes at least as long as its arithmetic at the measured int8 dot-product peak (attention: at the
bf16 dot-product peak), and at least as long as reading its weights and KV once at the measured bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.peers.workload import Workload


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    int8_gops: float  # 1e9 multiplies and additions a second, all threads together
    bf16_gflops: float
    bandwidth_gb_s: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one token costs; taken from a GGUF file's header."""

    name: str
    vocab_size: int
    linear_weights: int  # elements of the layers' matrices
    linear_bytes: int  # the same, as the file holds them
    head_weights: int
    head_bytes: int
    attention_flops_per_key: int  # of one query token over one key, all layers: dot products of scores and values
    kv_elements_per_token: int  # K and V of one token, all layers

    @classmethod
    def from_gguf(cls, path: str) -> ModelCost:
        import gguf  # the test extra; its two seconds do not matter here

        reader = gguf.GGUFReader(path)

        def value(key: str) -> int:
            return int(reader.fields[f"{architecture}.{key}"].contents())

        architecture = reader.fields["general.architecture"].contents()
        matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
        layers = [tensor for tensor in matrices if tensor.name.startswith("blk.")]
        embedding = next(tensor for tensor in matrices if tensor.name == "token_embd.weight")
        head = next((tensor for tensor in matrices if tensor.name == "output.weight"), embedding)
        num_layers, num_heads = value("block_count"), value("attention.head_count")
        num_kv_heads = value("attention.head_count_kv")
        has_head_dim = f"{architecture}.attention.key_length" in reader.fields
        head_dim = value("attention.key_length") if has_head_dim else value("embedding_length") // num_heads
        name = reader.fields.get("general.name")
        return cls(
            name=str(name.contents()) if name else architecture,
            vocab_size=int(embedding.shape[1]),
            linear_weights=sum(int(tensor.n_elements) for tensor in layers),
            linear_bytes=sum(int(tensor.n_bytes) for tensor in layers),
            head_weights=int(head.n_elements),
            head_bytes=int(head.n_bytes),
            attention_flops_per_key=4 * num_layers * num_heads * head_dim,
            kv_elements_per_token=2 * num_layers * num_kv_heads * head_dim,
        )


KV_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 4.5}  # per element; integers with scale and min


def limit_tokens_per_s(workload: Workload, model: ModelCost, peaks: MachinePeaks, kv_dtype: str) -> float:
    """The most tokens a second that the workload's timed part could reach."""
    if workload.is_prefill:
        num_tokens = workload.timed_tokens
        keys_per_token = workload.prompt_len / 2
        num_heads_run = workload.num_requests  # only a prompt's last token needs logits
        num_passes = 1
        kv_tokens_read = 0  # a chunk's own keys stay in cache
    else:
        num_tokens = workload.num_requests
        keys_per_token = workload.prompt_len + workload.num_steps / 2
        num_heads_run = workload.num_requests
        num_passes = workload.num_steps
        kv_tokens_read = workload.num_requests * keys_per_token
    int8_ops = 2.0 * (num_tokens * model.linear_weights + num_heads_run * model.head_weights)
    attention_flops = float(num_tokens * keys_per_token * model.attention_flops_per_key)
    arithmetic_s = int8_ops / (peaks.int8_gops * 1e9) + attention_flops / (peaks.bf16_gflops * 1e9)
    num_bytes = (
        model.linear_bytes + model.head_bytes + kv_tokens_read * model.kv_elements_per_token * (KV_BITS[kv_dtype] / 8)
    )
    return workload.timed_tokens / (num_passes * max(arithmetic_s, num_bytes / (peaks.bandwidth_gb_s * 1e9)))


def measure_peaks(threads: int) -> MachinePeaks:
    """Asks the extension, which runs dot products out of registers and reads memory for about a second."""
    from runtime import _native

    peaks = _native.machine_peaks(threads)
    return MachinePeaks(peaks["int8_gops"], peaks["bf16_gflops"], peaks["bandwidth_gb_s"])
