"""Attention steps on a GPU: the pages of attention_cases.Step, appended by the CPU and uploaded, attended on the device."""

from __future__ import annotations

import numpy as np

from runtime import _native
from tests.kernels.attention_cases import Step, rotate
from tests.kit.gpu_arrays import DTYPES, download, upload


class GpuStep:
    """One step on a device. q, appended K and V come from the CPU's append, so that only attend is under test."""

    def __init__(self, gpu, step: Step, dtype: str = "bfloat16", padded_rows: int = 0, plan=None) -> None:
        self.gpu, self.step, self.dtype = gpu, step, dtype
        layout = step.layout
        # Contexts go into the pages first, then the scheduled tokens; append leaves the final q in qkv.
        counts = [count for _, count in step.requests]
        self.cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.starts = np.array([start for start, _ in step.requests], np.int32)
        qkv = self._append([(0, start) for start, _ in step.requests])
        qkv = self._append([(start, start + count) for start, count in step.requests])
        self.q = qkv.astype(DTYPES[dtype])  # what the device computes with
        if padded_rows:
            assert all(count == 1 for count in counts)
            self.q = np.concatenate([self.q, np.full((padded_rows, qkv.shape[1]), np.nan, self.q.dtype)])
            self.cu = np.arange(len(self.q) + 1, dtype=np.int32)
            self.starts = np.concatenate([self.starts, np.full(padded_rows, -1, np.int32)])
        self.requests = np.concatenate(
            [np.repeat(np.arange(len(counts)), counts), len(counts) + np.arange(padded_rows)]
        ).astype(np.int32)
        self.positions = np.concatenate([np.arange(s, s + n) for s, n in step.requests] + [np.full(padded_rows, -1)])
        tables = np.full((len(self.starts), step.page_tables.shape[1]), -1, np.int32)
        tables[: len(counts)] = step.page_tables
        self.plan = plan or _native.GpuAttentionPlan(gpu, layout, step.num_q_heads, qkv_dtype=dtype, exact=step.exact)
        self.arrays = [
            upload(gpu, step.arena), upload(gpu, self.positions.astype(np.int32)),
            upload(gpu, self.requests), upload(gpu, tables),
        ]  # fmt: skip
        self.qkv = upload(gpu, self.q)

    def _append(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        step = self.step
        cu = np.concatenate([[0], np.cumsum([end - begin for begin, end in ranges])]).astype(np.int32)
        qkv = np.concatenate([x[begin:end] for x, (begin, end) in zip(step.tokens, ranges)])
        _native.attention_append(
            qkv, step.arena, cu, np.array([begin for begin, _ in ranges], np.int32), step.page_tables, step.layout,
            layer=step.layer, num_q_heads=step.num_q_heads, rope=step.rope,
        )  # fmt: skip
        return qkv

    def run(self, out_dtype: str | None = None, num_ctas: int = 0, **options) -> np.ndarray:
        """Plans and attends.  [T, Hq * D] with padded rows as they were (NaN)"""
        self.plan.build(self.cu, self.starts, num_ctas=num_ctas, **options)
        return self.attend(out_dtype, num_ctas)

    def attend(self, out_dtype: str | None = None, num_ctas: int = 0) -> np.ndarray:
        step = self.step
        tables = np.frombuffer(self.plan.tables(), np.int32)
        device_tables = upload(self.gpu, tables if len(tables) else np.zeros(1, np.int32))
        workspace = _native.GpuArray(self.gpu, [max(1, self.plan.workspace_bytes)], "uint8")
        shape = (len(self.q), step.num_q_heads * step.layout.head_dim)
        out = upload(self.gpu, np.full(shape, np.nan, DTYPES[out_dtype or self.dtype]))
        _native.attend_gpu(
            self.plan, self.qkv, out, *self.arrays, device_tables, workspace, layer=step.layer, scale=step.scale,
            soft_cap=step.soft_cap, num_ctas=num_ctas,
        )  # fmt: skip
        return download(out)

    def reference(self) -> list[np.ndarray]:
        """Float64 attention of the q that the device has over what the pages hold; [num_tokens, Hq * D] a request."""
        step, outputs = self.step, []
        hq, hkv, dim = step.num_q_heads, step.num_kv_heads, step.layout.head_dim
        for i, (start, count) in enumerate(step.requests):
            q = self.q[self.cu[i] : self.cu[i] + count, : hq * dim].astype(np.float64).reshape(count, hq, dim)
            if step.layout.k_codec == "int4":
                q = rotate(q)  # append rotated it; the values of the pages are turned back
            k, v = (np.repeat(step.cached(i, s), hq // hkv, axis=0) for s in "kv")
            scores = np.einsum("thd,hsd->hts", q, k) * step.scale
            if step.soft_cap:
                scores = step.soft_cap * np.tanh(scores / step.soft_cap)
            query, key = np.arange(start, start + count)[:, None], np.arange(k.shape[1])[None]
            visible = key <= query
            if step.layout.window:
                visible &= key > query - step.layout.window
            scores = np.where(visible, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            outputs.append(np.einsum("hts,hsd->thd", p, v).reshape(count, -1))
        return outputs

    def error(self, out: np.ndarray) -> float:
        """Relative error of all rows that are no padding."""
        wanted = np.concatenate(self.reference())
        got = out[: len(wanted)].astype(np.float64)
        assert np.isfinite(got).all(), "output holds NaN or infinity"
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
