"""The one aligned line of a kernel bench, and its JSON beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime import _native


@dataclass
class Measurement:
    """One case. Shares are of the peaks that the same run measured (0 to 1)."""

    name: str
    microseconds: float
    operations: float  # 2 per multiply-add
    bytes: float  # that the case must at least move
    arithmetic_peak_gops: float
    bandwidth_peak_gb_per_second: float

    @property
    def gops(self) -> float:
        """1e9 operations per second."""
        return self.operations / self.microseconds * 1e-3

    @property
    def gb_per_second(self) -> float:
        return self.bytes / self.microseconds * 1e-3

    @property
    def roofline_share(self) -> float:
        """Share of the limit that binds: arithmetic or bandwidth, whichever is nearer."""
        arithmetic = self.gops / self.arithmetic_peak_gops if self.arithmetic_peak_gops else 0.0
        bandwidth = self.gb_per_second / self.bandwidth_peak_gb_per_second if self.bandwidth_peak_gb_per_second else 0.0
        return max(arithmetic, bandwidth)

    def line(self) -> str:
        return (
            f"{self.name:<32} {self.microseconds:11.1f} us {self.gops:9.1f} GOP/s {self.gb_per_second:8.2f} GB/s "
            f"{100 * self.roofline_share:6.1f} % of the roofline"
        )


def machine_lines(peaks: dict[str, float], num_threads: int) -> str:
    """What was measured against: ISA, threads and the peaks in this run."""
    return (
        f"{_native.active_cpu_isa()}, {num_threads} threads: int8 {peaks['int8_gops']:.0f} GOP/s, "
        f"bf16 dots {peaks['bf16_gflops']:.0f} GFLOP/s, fp32 {peaks['fp32_gflops']:.0f} GFLOP/s, "
        f"read {peaks['read_gb_per_second']:.1f} GB/s"
    )


def write_json(path: Path, peaks: dict[str, float], measurements: list[Measurement]) -> None:
    """All cases with their derived figures, for tools."""
    cases = [
        asdict(m) | {"gops": m.gops, "gb_per_second": m.gb_per_second, "roofline_share": m.roofline_share}
        for m in measurements
    ]
    path.write_text(json.dumps({"isa": _native.active_cpu_isa(), "peaks": peaks, "cases": cases}, indent=1) + "\n")
