"""Records a model's forward pass into a native Program: what model files are written in.

A method is a node; what it returns is a buffer, whose rows are the step's tokens (or, behind ``gather_logit_rows``,
the tokens that get logits). Sizes come from the frame at run time, so a program is recorded once per model.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

from runtime.devices import BufferTypes


@dataclass(frozen=True, slots=True)
class Buffer:
    """Rows [T or S, width] between nodes."""

    buffer_id: int
    width: int
    rows: str  # "token" | "logit_row"
    dtype: str  # "float32"; on a GPU "bfloat16" or "float16" too


class Recorder:
    """Records nodes in the order in which they are called; ``seal()`` ends it."""

    def __init__(self, program, types: BufferTypes, exact: bool):
        """``program``: a new _native.Program; ``types``: of its device's buffers. ``exact``: fp32 attention."""
        self.program = program
        self._types = types
        self._exact = exact
        self._buffers: dict[str, Buffer] = {}
        # What linears convert their input rows into: the same memory for all of them.
        self._prepared: dict[str, dict[str, int]] = {}
        for rows in ("token", "logit_row"):
            of_rows = {"prepared": program.add_buffer(f"prepared_{rows}", rows, types.prepared_width, types.prepared)}
            if types.has_scales:
                of_rows["scales"] = program.add_buffer(f"prepared_scales_{rows}", rows, 1, "float32")
            if types.has_sums:
                of_rows["sums"] = program.add_buffer(f"prepared_sums_{rows}", rows, 1, "int32")
            self._prepared[rows] = of_rows
        self._layer = -1

    def buffer(self, name: str, width: int, rows: str = "token", dtype: str = "float32") -> Buffer:
        """The buffer of this name, made at first use. Layers share buffers: one lives only while it is read."""
        found = self._buffers.get(name)
        if found is None:
            found = Buffer(self.program.add_buffer(name, rows, width, dtype), width, rows, dtype)
            self._buffers[name] = found
        if (found.width, found.rows, found.dtype) != (width, rows, dtype):
            raise ValueError(
                f"buffer {name!r}: got {rows} rows of {width} {dtype}, it has {found.rows} rows of {found.width} "
                f"{found.dtype}"
            )
        return found

    @contextmanager
    def layer(self, layer: int):
        """Nodes recorded inside belong to this layer."""
        self._layer = layer
        yield
        self._layer = -1

    def _name(self, name: str) -> str:
        return name if self._layer < 0 else f"layers.{self._layer}.{name}"

    def copy_pages(self) -> None:
        """Copy-on-write of the step's pages, before anything touches them."""
        self.program.add_copy_pages("copy_pages")

    def embedding(self, table, scale: float = 1.0) -> Buffer:
        """Token ids -> rows of the table, times ``scale``.  -> [T, H]"""
        hidden = self.buffer("hidden", table.in_features)
        if self.program.gpu is None:
            self.program.add_embedding("embedding", table, scale, hidden.buffer_id)
        else:
            token_ids = self.buffer("token_ids", 1, dtype="int32")
            self.program.add_embedding("embedding", table, scale, hidden.buffer_id, token_ids.buffer_id)
        return hidden

    def linear(
        self, name, x: Buffer, weights, *, norm=None, norm_eps=0.0, bias=None, gate="", out=None, add=False
    ) -> Buffer:
        """out = [rms_norm](x) @ W.T [+ bias].  [T, in] -> [T, out]

        ``norm``: fp32 weight of an RMS norm of x. ``gate`` ("silu", "gelu_tanh"): W is gate|up and
        out = gate(x @ Wg.T) * (x @ Wu.T). ``add``: out += instead of out =. Without ``out`` the rows are of the
        device's inner type, those behind ``gather_logit_rows`` float32.
        """
        width = weights.out_features // 2 if gate else weights.out_features
        out = out or self.buffer(name, width, x.rows, self._types.inner if x.rows == "token" else "float32")
        self.program.add_linear(
            self._name(name), self._layer, weights, input=x.buffer_id, output=out.buffer_id, rows=x.rows,
            norm_weight=norm, norm_eps=norm_eps, bias=bias, add_to_output=add, gate=gate, **self._prepared[x.rows],
        )  # fmt: skip
        return out

    def linear_add(self, name: str, x: Buffer, weights, residual: Buffer, *, bias=None) -> None:
        """residual += x @ W.T [+ bias].  [T, in] -> [T, H]"""
        self.linear(name, x, weights, bias=bias, out=residual, add=True)

    def attention(
        self,
        name,
        qkv: Buffer,
        kv_layer,
        *,
        num_q_heads,
        rope,
        scale,
        soft_cap=0.0,
        q_norm=None,
        k_norm=None,
        norm_eps=1e-6,
    ) -> Buffer:
        """(q/k norm,) RoPE, append to pages, causal attention over them.  [T, (Hq + 2 Hkv) D] -> [T, Hq D]

        ``kv_layer`` (a kv_plan.KvLayer) names the KV group and the layer's place in it.
        """
        out = self.buffer("attended", num_q_heads * kv_layer.layout.head_dim, dtype=self._types.inner)
        self.program.add_attention(
            self._name(name), self._layer, kv_layer.group, kv_layer.layer_in_group, kv_layer.layout, num_q_heads, rope,
            q_norm, k_norm, norm_eps, scale, soft_cap, self._exact, qkv.buffer_id, out.buffer_id,
        )  # fmt: skip
        return out

    def norm_add(self, name: str, branch: Buffer, residual: Buffer, weight, eps: float) -> None:
        """residual += rms_norm(branch).  [T, H]"""
        self.program.add_norm_add(self._name(name), self._layer, weight, eps, branch.buffer_id, residual.buffer_id)

    def gather_logit_rows(self, hidden: Buffer) -> Buffer:
        """The rows whose logits are wanted.  [T, H] -> [S, H]"""
        rows = self.buffer("logit_hidden", hidden.width, "logit_row")
        self.program.add_gather_logit_rows("gather_logit_rows", hidden.buffer_id, rows.buffer_id)
        return rows

    def soft_cap(self, logits: Buffer, cap: float | None) -> None:
        """logits = cap * tanh(logits / cap); no node where the model has no cap.  [S, V]"""
        if cap:
            self.program.add_soft_cap("soft_cap", cap, logits.buffer_id)

    def sampling(self, logits: Buffer) -> None:
        """A token for each sampling row.  [S, V]"""
        self.program.add_sampling("sampling", logits.buffer_id)

    def seal(self):
        self.program.seal()
        return self.program
