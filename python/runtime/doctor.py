"""``python -m runtime.doctor``: what this machine has, what was compiled in, and which kernels are chosen for it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WIDTH = 92
#: What each level of csrc/core/cpu_features.h asks of the CPU, beyond the level before.
LEVEL_FLAGS = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"),
}
#: Weight format -> (elements, bytes) of a block: the formats of the GGUF files that people run most.
BLOCKS = {"Q4_1": (32, 20), "Q4_K": (256, 144), "Q6_K": (256, 210), "Q8_0": (32, 34), "BF16": (1, 2)}
ACTIVATIONS = ("int8", "bf16", "fp32")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Shows what this machine offers to Partita: the CPU's instruction set and the cores this\n"
            "process may use, memory, GPUs, what was compiled in, the arithmetic and bandwidth peaks\n"
            "(measured, in about a second), and which matmul kernel is chosen for each weight format."
        ),
        epilog=textwrap.dedent(
            f"""\
            environment:
              PARTITA_CPU_ISA=portable|avx2|avx512   forces a lower instruction set than the CPU's best

            exit status: 0, or 1 when something keeps the engine from running (it says what)

            examples:
              {prog}                     the report
              {prog} --json              the same for a program (or a bug report)
              {prog} --seconds 0         without the measurement
              {prog} --reasons           every kernel candidate, with why it was not chosen"""
        ),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument(
        "--seconds", type=float, default=0.6, metavar="S", help="time to measure peaks in; 0: do not (default: 0.6)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads to measure with (default: every usable core)"
    )
    parser.add_argument("--reasons", action="store_true", help="list every kernel candidate with its reason")
    return parser


# What there is. Each function below answers one section of the report, in plain JSON types.


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def describe_versions() -> dict[str, str]:
    from importlib import metadata

    def version(name: str, otherwise: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return otherwise

    return {
        "partita": version("partita", "(source tree)"),
        "python": platform.python_version(),
        **{name: version(name, "(missing)") for name in ("numpy", "ml_dtypes", "tokenizers")},
    }


def cgroup_quota_cores() -> float | None:
    """Cores' worth of time the cgroup grants; None without a limit."""
    quota, _, period = (read_text("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota != "max" and period:
        return int(quota) / int(period)
    quota = read_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
    period = read_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "0"
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None


def describe_cpu(native: Any) -> dict[str, Any]:
    lines = (line.partition(":") for line in (read_text("/proc/cpuinfo") or "").splitlines())
    models = [value.strip() for key, _, value in lines if key.strip() in ("model name", "Model")]
    flags = native.cpu_flags()
    detected, active = native.detected_cpu_isa(), native.active_cpu_isa()
    forced = os.environ.get("PARTITA_CPU_ISA")
    levels = list(LEVEL_FLAGS)
    if forced:
        why = f"forced by PARTITA_CPU_ISA; this CPU's best is {detected}"
    elif detected == levels[-1]:
        why = "the best level there is"
    else:
        wanted = levels[levels.index(detected) + 1]
        missing = [flag for flag in LEVEL_FLAGS[wanted] if not flags[flag]]
        why = f"{wanted} needs {', '.join(missing)}"
    return {
        "model": models[0] if models else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "active_isa": active,
        "detected_isa": detected,
        "why": why,
        "flags": flags,
        "online_cores": os.cpu_count(),
        "affinity_cores": len(os.sched_getaffinity(0)),
        "cgroup_quota_cores": cgroup_quota_cores(),
        "usable_cores": native.usable_cores(),
        "partitions": describe_core_partitions(native.usable_core_ids()),
    }


def describe_core_partitions(cores: Sequence[int]) -> list[dict[str, Any]]:
    """The cuts between prefill and decode among which --lanes auto may choose."""
    from runtime.lane_bank import ALL_CUTS, CorePartitions

    partitions = CorePartitions(cores, ALL_CUTS)
    return [
        {"share": rung, "prefill": partitions.cores(True, rung), "decode": partitions.cores(False, 1.0 - rung)}
        for rung in partitions.rungs
    ]


def describe_memory() -> dict[str, int | None]:
    sizes: dict[str, int] = {}
    for line in (read_text("/proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        sizes[key] = int(value.split()[0]) * 1024
    limit = read_text("/sys/fs/cgroup/memory.max") or read_text("/sys/fs/cgroup/memory/memory.limit_in_bytes") or "max"
    # cgroup v1 writes "no limit" as a number near 2^63.
    limit_bytes = None if limit == "max" or int(limit) >= 2**62 else int(limit)
    return {
        "total_bytes": sizes.get("MemTotal"),
        "available_bytes": sizes.get("MemAvailable"),
        "cgroup_limit_bytes": limit_bytes,
    }


def describe_device_library(native: Any, world: str) -> dict[str, Any]:
    """What a device library offers, and how its first device can be split."""
    library = native.gpu_library(world)
    note = None
    if library["num_devices"]:
        try:
            note = native.open_gpu(world).partition_note
        except RuntimeError as error:
            library["reason"] = str(error)
    return {**library, "partition_note": note}


def measure_peaks(native: Any, num_threads: int, seconds: float) -> dict[str, float]:
    started_s = time.perf_counter()
    peaks = native.machine_peaks(num_threads, seconds)
    return {
        "num_threads": num_threads if num_threads > 0 else native.usable_cores(),
        "measured_s": time.perf_counter() - started_s,
        **peaks,
    }


def choose_kernels(native: Any) -> list[dict[str, Any]]:
    """Packs one small linear of each weight format for each activation type: the library itself says what it chose."""
    import numpy as np

    side = 256
    choices = []
    for weight_format, (block_length, block_bytes) in BLOCKS.items():
        data = np.zeros(side * side // block_length * block_bytes, np.uint8)
        weight = native.Weight(data, weight_format, side, side)
        for activations in ACTIVATIONS:
            try:
                packed = native.pack_linear([weight], activations, 1)
                kernel, reason = packed.kernel, packed.reason
            except ValueError as error:
                kernel, reason = None, str(error)
            choices.append(
                {"weights": weight_format, "activations": activations, "kernel": kernel, "reasons": reason.split("\n")}
            )
    return choices


def examine(num_threads: int = 0, seconds: float = 0.6) -> dict[str, Any]:
    """The whole report as plain JSON types. Raises ImportError or ValueError when the engine could not run here."""
    from runtime import _native

    return {
        "versions": describe_versions(),
        "cpu": describe_cpu(_native),
        "memory": describe_memory(),
        "cuda": _native.cuda_status(),
        "device_libraries": [describe_device_library(_native, world) for world in ("cuda", "simt")],
        "peaks": measure_peaks(_native, num_threads, seconds) if seconds > 0 else None,
        "kernels": choose_kernels(_native),
    }


# How it looks: a title, then sections of "name  value" lines.


def line(name: str, value: str) -> Iterable[str]:
    return textwrap.wrap(value, WIDTH, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16) or [f"  {name}"]


def gibibytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"


def render_cpu(cpu: dict[str, Any]) -> Iterable[str]:
    yield from line("model", f"{cpu['model']} ({cpu['architecture']})")
    yield from line("kernels run", f"{cpu['active_isa']} ({cpu['why']})")
    yield from line("has", " ".join(flag for flag, has in cpu["flags"].items() if has) or "no flag that a kernel uses")
    if not all(cpu["flags"].values()):
        yield from line("has not", " ".join(flag for flag, has in cpu["flags"].items() if not has))
    quota = cpu["cgroup_quota_cores"]
    limits = f"{cpu['online_cores']} online, {cpu['affinity_cores']} in the affinity mask, "
    limits += "no cgroup quota" if quota is None else f"cgroup quota of {quota:g}"
    yield from line("cores", f"{cpu['usable_cores']} usable ({limits})")
    cuts = ", ".join(f"{round(100 * cut['share'])}:{round(100 * (1 - cut['share']))}" for cut in cpu["partitions"])
    whole = "one core cannot be cut; --lanes 100:100 shares it in time"
    yield from line("lanes", f"{cuts} (--lanes prefill:decode, percent of the cores)" if cuts else whole)


def render_memory(memory: dict[str, int | None]) -> Iterable[str]:
    yield from line("total", gibibytes(memory["total_bytes"]))
    yield from line("available", gibibytes(memory["available_bytes"]))
    if memory["cgroup_limit_bytes"] is not None:
        yield from line("cgroup limit", gibibytes(memory["cgroup_limit_bytes"]))


def render_cuda(cuda: dict[str, Any]) -> Iterable[str]:
    kernels = f"CUDA {cuda['toolkit']} kernels for {cuda['targets']}"
    yield from line("this build", kernels if cuda["compiled"] else "no CUDA kernels (CPU only)")
    yield from line("driver", f"up to CUDA {cuda['driver']}" if cuda["driver"] else "none")
    for ordinal, gpu in enumerate(cuda["devices"]):
        yield from line(
            f"device {ordinal}",
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} SMs, "
            f"{gibibytes(gpu['memory_bytes'])}",
        )
    yield from line("usable", "yes" if cuda["reason"] is None else f"no ({cuda['reason']})")


def render_gpu(report: dict[str, Any]) -> Iterable[str]:
    yield from render_cuda(report["cuda"])
    for library in report["device_libraries"]:
        yield from render_device_library(library)


def render_device_library(library: dict[str, Any]) -> Iterable[str]:
    """One device library: where its kernels can run, how many there are, how many passed on hardware."""
    what = {"cuda": "--device cuda", "simt": "--device simt"}[library["world"]]
    if library["reason"] is not None:
        yield from line(what, f"no ({library['reason']})")
    if not library["compiled"]:
        return
    num_kernels, num_verified = sum(library["kernels"].values()), sum(library["verified"].values())
    families = ", ".join(f"{family} {count}" for family, count in sorted(library["kernels"].items()))
    kernels = f"{num_kernels} kernels ({library['targets']}): {families}"
    if library["world"] == "cuda":
        kernels += f"; {num_verified} have passed their tests on hardware"
    else:
        kernels += "; the CUDA sources run by the host, for tests"
    yield from line(what if library["reason"] is None else "", kernels)
    if library["partition_note"]:
        yield from line("partitions" if library["world"] == "cuda" else "", library["partition_note"])


def render_peaks(peaks: dict[str, float]) -> Iterable[str]:
    yield from line("int8", f"{peaks['int8_gops']:8.0f} GOP/s")
    bf16 = peaks["bf16_gflops"]
    yield from line("bf16", f"{bf16:8.0f} GFLOP/s" if bf16 > 0 else "no bf16 dot product at this level")
    yield from line("fp32", f"{peaks['fp32_gflops']:8.0f} GFLOP/s")
    bandwidth = peaks["read_gb_per_second"]
    yield from line("memory reads", f"{bandwidth:8.1f} GB/s")
    yield ""
    yield from textwrap.wrap(
        f"Decoding one request reads every weight for each token, so 1 GB of weights cannot give more than "
        f"{bandwidth:.3g} tokens/s here; prompts and batches are bound by the arithmetic instead.",
        WIDTH, initial_indent="  ", subsequent_indent="  ",
    )  # fmt: skip


def render_kernels(kernels: list[dict[str, Any]], every_reason: bool) -> Iterable[str]:
    chosen = {(choice["weights"], choice["activations"]): choice for choice in kernels}
    yield f"  {'weights':<14}" + "".join(f"{activations + ' activations':<22}" for activations in ACTIVATIONS).rstrip()
    for weights in BLOCKS:
        names = (chosen[weights, activations]["kernel"] or "none" for activations in ACTIVATIONS)
        yield f"  {weights:<14}" + "".join(f"{name:<22}" for name in names).rstrip()
    shown = kernels if every_reason else [chosen["Q4_1", "int8"]]
    for choice in shown:
        # A candidate for other activations than asked for says nothing new, unless all are wanted.
        reasons = [text for text in choice["reasons"] if every_reason or ": activations are" not in text]
        yield ""
        kernel = choice["kernel"] or "no kernel"
        yield f"  why {kernel} for {choice['weights']} weights, {choice['activations']} activations:"
        for reason in reasons:
            yield from textwrap.wrap(reason, WIDTH, initial_indent="    ", subsequent_indent="      ")


def render(report: dict[str, Any], every_reason: bool = False) -> str:
    """The report as text of at most WIDTH columns."""
    lines = ["  ".join(f"{name} {version}" for name, version in report["versions"].items())]
    sections: list[tuple[str, Iterable[str]]] = [
        ("CPU", render_cpu(report["cpu"])),
        ("Memory", render_memory(report["memory"])),
        ("GPU", render_gpu(report)),
    ]
    if peaks := report["peaks"]:
        title = f"Peaks, measured on {peaks['num_threads']} threads in {peaks['measured_s']:.1f} s"
        sections.append((title, render_peaks(peaks)))
    sections.append(("Matmul kernels", render_kernels(report["kernels"], every_reason)))
    for title, body in sections:
        lines += ["", title, *body]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.doctor") -> int:
    """Prints the report; returns the exit status."""
    parser = build_parser(prog)
    options = parser.parse_args(argv)
    if not 0 <= options.seconds <= 60:  # NaN fails too
        parser.error(f"--seconds: got {options.seconds}, wanted 0 to 60")
    try:
        report = examine(options.threads, options.seconds)
    except (ImportError, ValueError) as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"Partita cannot run here: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else render(report, options.reasons))
    return 0


if __name__ == "__main__":
    sys.exit(main())
