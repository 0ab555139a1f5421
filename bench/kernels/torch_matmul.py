"""The peer of bench_gpu_gemm: torch's own matmuls on the same GPU, in the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

MIN_REPLAYS = 50  # calls timed of each case


class TorchMatmulTimes:
    """torch's own matmul in the same run, once for each shape and number of tokens: bf16 (cuBLAS), or for FP8 weights
    its scaled matmul of per-token and per-channel scales."""

    def __init__(self, gpu, l2_bytes: int):
        self.torch = None
        if gpu.world == "cuda":
            try:
                import torch

                self.torch = torch if torch.cuda.is_available() else None
            except ImportError:
                pass
        self.l2_bytes = l2_bytes
        self.times: dict[tuple[str, int, int, int], float] = {}

    @staticmethod
    def name(activations: str) -> str:
        return "torch fp8" if activations == "e4m3" else "torch bf16"

    def microseconds(self, activations: str, rows: int, cols: int, tokens: int) -> float:
        """0 where torch has no GPU, or refuses the shape (it says so)."""
        if self.torch is None:
            return 0.0
        key = (self.name(activations), rows, cols, tokens)
        if key not in self.times:
            try:
                self.times[key] = self._measure(self._launches(activations, rows, cols, tokens))
            except RuntimeError as error:
                print(f"{self.name(activations)} [{rows}, {cols}] x {tokens}: {str(error).splitlines()[0]}", flush=True)
                self.times[key] = 0.0
        return self.times[key]

    def _launches(self, activations: str, rows: int, cols: int, tokens: int) -> list[Callable[[], object]]:
        """One call for each copy of the weight; together the copies are more than twice the L2."""
        torch = self.torch
        is_fp8 = activations == "e4m3"
        copies = max(2, math.ceil(2.5 * self.l2_bytes / (rows * cols * (1 if is_fp8 else 2))))
        weights = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        if not is_fp8:
            out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
            return [lambda weight=weight: torch.mm(x, weight.t(), out=out) for weight in weights]
        x8, weights8 = x.to(torch.float8_e4m3fn), [weight.to(torch.float8_e4m3fn) for weight in weights]
        x_scale = torch.full((tokens, 1), 0.01, device="cuda")
        scale = torch.full((1, rows), 0.01, device="cuda")
        return [
            lambda weight=weight: torch._scaled_mm(
                x8, weight.t(), scale_a=x_scale, scale_b=scale, out_dtype=torch.bfloat16
            )
            for weight in weights8
        ]

    def _measure(self, launches: list[Callable[[], object]]) -> float:
        torch = self.torch
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(2):
                launches[0]()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for launch in launches:
                    launch()
        times = []
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(max(3, math.ceil(MIN_REPLAYS / len(launches))) + 1):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / len(launches) * 1e3)
        return statistics.median(times[1:])  # the first replay warms up
