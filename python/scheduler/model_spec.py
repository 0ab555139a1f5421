"""What a model's forward pass consists of, without the model: the node list of its Program, from a description.

spec = ModelSpec.from_config(json.load(open("config.json")), weight_format="BF16")
for node in spec.nodes():
    node.operations(shape), node.bytes(shape)

Every node's operations and bytes are linear in a step's shape, so a node is a row of coefficients. Names, order, classes
and numbers are those of `program.describe()` of the recorded Program (tests/runtime/test_model_spec.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scheduler.byte_sizes import (
    check_weight_format,
    gpu_packed_bytes,
    kv_layer_page_bytes,
    packed_bytes,
    stored_row_bytes,
)
from scheduler.step_shape import StepShape

# So many operations fit in the time of one byte; a linear below it waits for memory (csrc/program/node_linear.cpp and
# csrc/program/node_linear_gpu.cpp).
OPERATIONS_PER_BYTE = {"cpu": 28.0, "gpu": 200.0}
RESIDUAL_BYTES = 4  # of a value of the residual stream and of the logits, on every device


class NodeSpec(NamedTuple):
    """One node. Its work is the product of these coefficients with the numbers of a StepShape."""

    name: str
    layer: int  # -1 outside of the layers
    kind: (
        str  # as Op::kind(): linear, attention, embedding, norm_add, gather_logit_rows, soft_cap, sampling, copy_pages
    )
    rows: str  # "token" | "logit_row": what its row count is
    operations_per_row: float = 0
    bytes_per_row: float = 0
    fixed_bytes: float = 0  # read once if there is a row at all: weights
    operations_per_pair: float = 0  # attention: a query row over one KV token
    bytes_per_kv_token: float = 0
    is_windowed: bool = False
    operations_per_byte: float = 0  # of the device: where a linear's class changes

    def num_rows(self, shape: StepShape) -> int:
        return shape.num_tokens if self.rows == "token" else shape.num_logit_rows

    def operations(self, shape: StepShape) -> float:
        operations = self.operations_per_row * self.num_rows(shape)
        if self.operations_per_pair:
            pairs = (
                shape.window_decode_kv_tokens + shape.window_chunk_score_pairs
                if self.is_windowed
                else shape.decode_kv_tokens + shape.chunk_score_pairs
            )
            operations += self.operations_per_pair * pairs
        return operations

    def bytes(self, shape: StepShape) -> float:
        num_rows = self.num_rows(shape)
        if num_rows == 0:
            return 0.0
        total = self.fixed_bytes + self.bytes_per_row * num_rows
        if self.bytes_per_kv_token:
            kv_tokens = (
                shape.window_decode_kv_tokens + shape.window_chunk_kv_tokens
                if self.is_windowed
                else shape.decode_kv_tokens + shape.chunk_kv_tokens
            )
            total += self.bytes_per_kv_token * kv_tokens
        return total

    def resource_class(self, shape: StepShape) -> str:
        if self.kind == "linear":
            return "memory" if self.operations(shape) < self.operations_per_byte * self.bytes(shape) else "compute"
        if self.kind == "attention":
            return "compute" if shape.num_tokens > 2 * shape.num_requests else "memory"
        return "memory"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer by its dimensions. Raises ValueError for a weight format or codec that does not exist."""

    name: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    has_post_norms: bool = False  # Gemma 3: a branch is normed before it is added
    has_soft_cap: bool = False  # of the logits
    sliding_window: int = 0  # tokens that a query of a windowed layer sees
    windowed_layers: frozenset[int] = frozenset()
    weight_format: str = "BF16"  # of the packed matrices
    output_format: str = ""  # of the logits' matrix; "": weight_format
    embedding_format: str = ""  # of the table that rows are looked up in; "": output_format
    # (layer, "q" | "k" | "v" | "o" | "gate" | "up" | "down") -> format, where it differs from weight_format
    layer_formats: Mapping[tuple[int, str], str] = field(default_factory=dict)
    kv_codecs: tuple[str, str] = ("bf16", "bf16")
    page_size: int = 64
    device: str = "cpu"  # "cpu" | "gpu": how matrices are packed and what a node writes
    inner_bytes: int = 4  # of a value that nodes hand each other, but for the residual stream and the logits: fp32
    max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelSpec.{name}: got {getattr(self, name)}, wanted at least 1")
        check_weight_format(self.weight_format)
        if self.device not in ("cpu", "gpu") or self.inner_bytes not in (2, 4):
            raise ValueError(
                f"ModelSpec: got device {self.device!r}, inner_bytes {self.inner_bytes}, wanted cpu or gpu, 2 or 4"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> ModelSpec:
        """From a Hugging Face config.json (a multimodal wrapper's text_config is taken). Raises ValueError naming the
        field that is missing. overrides: fields of ModelSpec, formats and codecs above all.
        """
        config = config.get("text_config", config)

        def wanted(name: str) -> int:
            if not isinstance(config.get(name), int):
                raise ValueError(f"config.json: {name}: got {config.get(name)!r}, wanted an integer")
            return config[name]

        family = str(config.get("model_type", "llama"))
        if config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts"):
            raise ValueError(f"config.json: model_type {family!r} has experts; only dense models have a node list")
        is_gemma = family.startswith("gemma3")
        num_layers, num_q_heads = wanted("num_hidden_layers"), wanted("num_attention_heads")
        hidden_size = wanted("hidden_size")
        layer_types = config.get("layer_types") or []
        windowed = frozenset(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
        fields: dict[str, Any] = {
            "name": str(config.get("name") or config.get("_name_or_path") or family),
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_q_heads": num_q_heads,
            "num_kv_heads": config.get("num_key_value_heads") or num_q_heads,
            "head_dim": config.get("head_dim") or hidden_size // num_q_heads,
            "intermediate_size": wanted("intermediate_size"),
            "vocab_size": wanted("vocab_size"),
            "has_post_norms": is_gemma,
            "has_soft_cap": bool(config.get("final_logit_softcapping")),
            "sliding_window": (config.get("sliding_window") or 0) if windowed else 0,
            "windowed_layers": windowed,
            "max_position_embeddings": config.get("max_position_embeddings") or 8192,
        }
        return cls(**{**fields, **overrides})

    # Sizes

    @property
    def kv_token_bytes(self) -> float:
        """KV bytes of one token, all layers."""
        return self.num_layers * self.kv_layer_page_bytes / self.page_size

    @property
    def kv_layer_page_bytes(self) -> int:
        return kv_layer_page_bytes(self.kv_codecs, self.num_kv_heads, self.head_dim, self.page_size)

    @property
    def weight_bytes(self) -> float:
        """What one step reads of the packed matrices."""
        return sum(node.fixed_bytes for node in self.nodes())

    @property
    def num_kv_groups(self) -> int:
        return 2 if 0 < len(self.windowed_layers) < self.num_layers else 1

    # Nodes

    @property
    def layer_starts(self) -> tuple[int, ...]:
        """The first node of every layer."""
        layers = [node.layer for node in self.nodes()]
        return tuple(layers.index(layer) for layer in range(self.num_layers))

    def _packed(self, layer: int, parts: tuple[tuple[str, int], ...], in_features: int) -> int:
        size = gpu_packed_bytes if self.device == "gpu" and self.inner_bytes == 2 else packed_bytes
        formats = self.layer_formats
        return sum(size(formats.get((layer, part), self.weight_format), rows, in_features) for part, rows in parts)

    def _packed_output(self, weight_format: str) -> int:
        size = gpu_packed_bytes if self.device == "gpu" and self.inner_bytes == 2 else packed_bytes
        return size(weight_format, self.vocab_size, self.hidden_size)

    def _linear(
        self, name: str, layer: int, parts: tuple[tuple[str, int], ...], in_features: int, row_bytes: int
    ) -> NodeSpec:
        """row_bytes: read and written per row."""
        out_features = sum(rows for _, rows in parts)
        return NodeSpec(
            name, layer, "linear", "token",
            operations_per_row=2.0 * in_features * out_features,
            bytes_per_row=float(row_bytes),
            fixed_bytes=float(self._packed(layer, parts, in_features)),
            operations_per_byte=OPERATIONS_PER_BYTE[self.device],
        )  # fmt: skip

    def _layer_nodes(self, layer: int) -> list[NodeSpec]:
        hidden, width, forward = self.hidden_size, self.num_q_heads * self.head_dim, self.intermediate_size
        kv_width = self.num_kv_heads * self.head_dim
        prefix, inner, residual = f"layers.{layer}.", self.inner_bytes, RESIDUAL_BYTES

        def norm_add(name: str) -> NodeSpec:
            return NodeSpec(prefix + name, layer, "norm_add", "token", 5.0 * hidden, 3.0 * residual * hidden)

        qkv = self._linear(
            prefix + "qkv", layer, (("q", width), ("k", kv_width), ("v", kv_width)), hidden,
            residual * hidden + inner * (width + 2 * kv_width),
        )  # fmt: skip
        attention = NodeSpec(
            prefix + "attention", layer, "attention", "token",
            bytes_per_row=float(inner * (2 * width + 2 * kv_width)),
            operations_per_pair=4.0 * width,
            bytes_per_kv_token=self.kv_layer_page_bytes / self.page_size,
            is_windowed=layer in self.windowed_layers,
        )  # fmt: skip
        # The CPU's node counts gate and up apart, the GPU's what is written: their product.
        gated = forward if self.device == "gpu" else 2 * forward
        gate_up = self._linear(
            prefix + "gate_up", layer, (("gate", forward), ("up", forward)), hidden, residual * hidden + inner * gated
        )
        out = self._linear(prefix + "o", layer, (("o", hidden),), width, inner * width + residual * hidden)
        down = self._linear(prefix + "down", layer, (("down", hidden),), forward, inner * forward + residual * hidden)
        if self.has_post_norms:
            return [qkv, attention, out, norm_add("post_attention"), gate_up, down, norm_add("post_ffn")]
        return [qkv, attention, out, gate_up, down]

    def nodes(self) -> tuple[NodeSpec, ...]:
        """In the order of the Program."""
        hidden, vocab = self.hidden_size, self.vocab_size
        output_format = self.output_format or self.weight_format
        embedding_format = self.embedding_format or output_format
        value_bytes = RESIDUAL_BYTES
        row_bytes = stored_row_bytes(embedding_format, hidden) + value_bytes * hidden
        nodes = [
            NodeSpec("copy_pages", -1, "copy_pages", "token"),
            NodeSpec("embedding", -1, "embedding", "token", bytes_per_row=row_bytes),
        ]
        for layer in range(self.num_layers):
            nodes.extend(self._layer_nodes(layer))
        nodes.append(
            NodeSpec(
                "gather_logit_rows", -1, "gather_logit_rows", "logit_row", bytes_per_row=2.0 * value_bytes * hidden
            )
        )
        nodes.append(
            NodeSpec(
                "logits",
                -1,
                "linear",
                "logit_row",
                operations_per_row=2.0 * hidden * vocab,
                bytes_per_row=float(value_bytes * (hidden + vocab)),
                fixed_bytes=float(self._packed_output(output_format)),
                operations_per_byte=OPERATIONS_PER_BYTE[self.device],
            )
        )
        if self.has_soft_cap:
            nodes.append(NodeSpec("soft_cap", -1, "soft_cap", "logit_row", 10.0 * vocab, 2.0 * value_bytes * vocab))
        nodes.append(NodeSpec("sampling", -1, "sampling", "logit_row", float(vocab), float(value_bytes * vocab)))
        return tuple(nodes)
