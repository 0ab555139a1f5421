"""Attention cases: random steps over a paged arena, and the same computed in float64 NumPy from the page bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from runtime import _native

CODECS = ("fp32", "bf16", "fp16", "int8", "int4", "int4-plain", "fp8")
LEVELS = {"int8": 255, "int4": 15, "int4-plain": 15}


def isas() -> list[str]:
    """Instruction sets that this machine executes, lowest first."""
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(_native.detected_cpu_isa()) + 1]


def relative_error(out: np.ndarray, ref: np.ndarray) -> float:
    assert np.isfinite(out).all(), "output holds NaN or infinity"
    return float(np.linalg.norm(out.astype(np.float64) - ref) / np.linalg.norm(ref))


def rotation_size(head_dim: int) -> int:
    return min(256, head_dim & -head_dim)


def rotate(x: np.ndarray) -> np.ndarray:
    """Block Hadamard of the last axis in float64 (Sylvester order, orthonormal): its own inverse."""
    n = rotation_size(x.shape[-1])
    h = np.ones((1, 1))
    while h.shape[0] < n:
        h = np.block([[h, h], [h, -h]])
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, n)
    return (blocks @ h / math.sqrt(n)).reshape(x.shape)


def e4m3_values() -> np.ndarray:
    """Value of each of the 256 float8_e4m3fn codes, from the format's definition. [256] float64"""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-6 * mantissa / 8)
    values = np.where(codes < 128, magnitude, -magnitude)
    values[[0x7F, 0xFF]] = np.nan
    return values


def decode_page(layout, page: np.ndarray, layer: int, stream: str) -> np.ndarray:
    """One stream of a page from its documented byte image.  page: [page_bytes] uint8 -> [Hkv, page_size, D] float64"""
    codec = layout.k_codec if stream == "k" else layout.v_codec
    start = layer * layout.layer_bytes() + (0 if stream == "k" else layout.k_stream_bytes())
    heads, tokens, dim = layout.num_kv_heads, layout.page_size, layout.head_dim
    count = heads * tokens * dim
    if codec in ("fp32", "bf16", "fp16"):
        size = 4 if codec == "fp32" else 2
        raw = page[start : start + count * size].tobytes()
        if codec == "bf16":
            words = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
            values = words.view(np.float32)
        else:
            values = np.frombuffer(raw, np.float32 if codec == "fp32" else np.float16)
        return values.reshape(heads, tokens, dim).astype(np.float64)
    if codec == "fp8":
        return e4m3_values()[page[start : start + count]].reshape(heads, tokens, dim)
    code_bytes = count if codec == "int8" else count // 2
    raw = page[start : start + code_bytes]
    if codec == "int8":
        codes = raw.reshape(heads, tokens, dim)
    else:
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(heads, tokens, dim)
    raw = page[start + code_bytes : start + code_bytes + heads * tokens * 4]
    params = np.frombuffer(raw.tobytes(), np.float16).reshape(heads, tokens, 2).astype(np.float64)
    values = codes.astype(np.float64) * params[..., :1] + params[..., 1:]
    return rotate(values) if codec == "int4" else values


@dataclass
class Step:
    """One step of mixed requests over a shared arena; each request is (context_start, num_tokens)."""

    requests: list[tuple[int, int]]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 64
    kv_dtype: str = "bf16"
    window: int = 0
    soft_cap: float = 0.0
    exact: bool = False
    rotary_dim: int | None = None
    seed: int = 0
    num_layers: int = 2
    layer: int = 1
    spread: float = 1.0
    layout: object = field(init=False)

    def __post_init__(self) -> None:
        self.layout = _native.KvGroupLayout(
            self.num_layers, self.num_kv_heads, self.head_dim, self.page_size, self.kv_dtype, self.window
        )
        rng = np.random.default_rng(self.seed)
        ends = [start + tokens for start, tokens in self.requests]
        pages = [-(-end // self.page_size) for end in ends]
        ids = rng.permutation(sum(pages) + 3).astype(np.int32)
        # Pages that nobody owns, and every byte nobody wrote, hold NaN whatever the codec.
        self.arena = np.full((len(ids), self.layout.page_bytes()), 0xFF, np.uint8)
        self.page_tables = np.full((len(self.requests), max(pages) + 1), -1, np.int32)
        at = 0
        for row, count in enumerate(pages):
            self.page_tables[row, :count] = ids[at : at + count]
            at += count
        width = (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        self.tokens = [self.spread * rng.standard_normal((end, width)).astype(np.float32) for end in ends]
        for x in self.tokens:  # a few loud channels, as real keys have
            x[:, :: max(1, self.head_dim // 2 + 3)] *= 6
        self.scale = 1 / math.sqrt(self.head_dim)
        rotary = self.head_dim if self.rotary_dim is None else self.rotary_dim
        self.inv_freq = 10000.0 ** (-np.arange(0, rotary, 2) / max(rotary, 1)) if rotary else None
        self.rope = _native.RopeTableStorage(self.inv_freq.tolist(), 8192) if rotary else None
        self.norms = None

    def rope_rows(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x: [T, H, D] float64, rotated in float64 with the table's fp32 angles."""
        if self.rope is None:
            return x
        angles = (positions.astype(np.float32)[:, None] * self.inv_freq.astype(np.float32)).astype(np.float64)
        half = len(self.inv_freq)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)

    def run(self, chunks: list[list[tuple[int, int]]] | None = None, num_threads: int = 2) -> list[np.ndarray]:
        """Appends and attends; each request's outputs [num_tokens, Hq * D].

        chunks: for each step, for each request, the positions [begin, end) it computes; by default the context in one
        step, then all scheduled tokens.
        """
        if chunks is None:
            chunks = [[(0, start) for start, _ in self.requests], [(s, s + n) for s, n in self.requests]]
        outputs = [np.full((len(x), self.num_q_heads * self.head_dim), np.nan, np.float32) for x in self.tokens]
        for step in chunks:
            counts = [end - begin for begin, end in step]
            cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            starts = np.array([begin for begin, _ in step], np.int32)
            qkv = np.concatenate([x[begin:end] for x, (begin, end) in zip(self.tokens, step)])
            out = np.full((len(qkv), self.num_q_heads * self.head_dim), np.nan, np.float32)
            arrays = (self.arena, cu, starts, self.page_tables, self.layout)
            q_norm, k_norm = self.norms or (None, None)
            _native.attention_append(
                qkv, *arrays, layer=self.layer, num_q_heads=self.num_q_heads, rope=self.rope, q_norm_weight=q_norm,
                k_norm_weight=k_norm, num_threads=num_threads,
            )  # fmt: skip
            _native.attention_attend(
                qkv, out, *arrays, layer=self.layer, num_q_heads=self.num_q_heads, scale=self.scale,
                soft_cap=self.soft_cap, exact=self.exact, num_threads=num_threads,
            )  # fmt: skip
            for i, (begin, end) in enumerate(step):
                outputs[i][begin:end] = out[cu[i] : cu[i + 1]]
        return [out[start:] for out, (start, _) in zip(outputs, self.requests)]

    def cached(self, request: int, stream: str) -> np.ndarray:
        """K or V of a request as its pages hold it.  [Hkv, tokens, D] float64"""
        end = len(self.tokens[request])
        pages = self.page_tables[request, : -(-end // self.page_size)]
        parts = [decode_page(self.layout, self.arena[page], self.layer, stream) for page in pages]
        return np.concatenate(parts, axis=1)[:, :end]

    def split_qkv(self, request: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q [T, Hq, D], k and v [T, Hkv, D] of a request in float64, q and k normed and roped."""
        x = self.tokens[request].astype(np.float64)
        hq, hkv, dim = self.num_q_heads, self.num_kv_heads, self.head_dim
        q, k, v = np.split(x.reshape(len(x), hq + 2 * hkv, dim), [hq, hq + hkv], axis=1)
        if self.norms:
            q, k = (
                h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * w.astype(np.float64)
                for h, w in zip((q, k), self.norms)
            )
        positions = np.arange(len(x))
        return self.rope_rows(q, positions), self.rope_rows(k, positions), v

    def attend_reference(self, request: int, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Float64 attention of the scheduled tokens.  k, v: [Hkv, tokens, D] -> [num_tokens, Hq * D]"""
        start, count = self.requests[request]
        q = self.split_qkv(request)[0][start:]
        group = self.num_q_heads // self.num_kv_heads
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = np.einsum("thd,hsd->hts", q, k) * self.scale
        if self.soft_cap:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        query, key = np.arange(start, start + count)[:, None], np.arange(k.shape[1])[None]
        visible = key <= query
        if self.window:
            visible &= key > query - self.window
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.einsum("hts,hsd->thd", p, v).reshape(count, -1)

    def errors(self, outputs: list[np.ndarray]) -> list[float]:
        """Relative error of each request's outputs against float64 attention over what its pages hold."""
        return [
            relative_error(out, self.attend_reference(i, self.cached(i, "k"), self.cached(i, "v")))
            for i, out in enumerate(outputs)
            if len(out)
        ]
