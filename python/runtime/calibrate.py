"""``python -m runtime.calibrate``: measures this machine under a model and saves what the cost model needs."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from runtime.engine_args import EngineArgs, parse_or_exit
from scheduler.lane_speeds import LANE_NAMES, LaneSpeeds
from scheduler.machine import Saturation

HELD_OUT_BAR = 0.15  # median relative error of step times that a controller can live with
LANES_PART = 0.1  # of the time for measuring, for what two lanes achieve beside each other


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Runs short steps of a model on this machine, fits the scheduler's cost model to them and saves it. "
        "`partita simulate --machine FILE` and the engine's controllers read it. Takes less than a minute.",
    )
    parser.add_argument("--output", metavar="FILE", help="default: in the cache folder, by machine and model")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="of each step; the median counts (default: 9)")
    parser.add_argument(
        "--seconds", type=float, default=45.0, metavar="S", help="stop measuring after this long (default: 45)"
    )
    EngineArgs.add_arguments(parser)
    return parser


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_file(loaded, kv_dtype: str) -> Path:
    """Where the file of this machine and a LoadedModel lies."""
    from runtime.loading.cache_folder import cache_folder

    key = f"{cpu_name()}|{loaded.device.describe(loaded.packed.activations)}|{kv_dtype}"
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", os.path.basename(loaded.name)).strip("-").lower()
    return cache_folder() / "machines" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def fit_grid(max_tokens: int):
    """Steps to fit to."""
    from runtime.measured_steps import StepKind

    decodes = [StepKind(n, context) for n in (1, 2, 4, 8, 16, 32) for context in (32, 400)]
    decodes += [StepKind(64, context) for context in (32, 200)]
    decodes += [StepKind(1, 1600), StepKind(2, 1200), StepKind(4, 1600), StepKind(8, 1200), StepKind(16, 800)]
    chunks = [StepKind(0, 0, 1, n, start) for n in (16, 32, 64, 128, 256, 512) for start in (0, 512)]
    chunks += [StepKind(0, 0, 1, 256, 1400), StepKind(0, 0, 8, 16, 0), StepKind(0, 0, 4, 64, 0)]
    return [kind for kind in decodes + chunks if sum(n for _, n in kind.parts) <= max_tokens]


def held_out_grid(max_tokens: int):
    """Steps of other sizes, mixed ones among them, to judge the fit by."""
    from runtime.measured_steps import StepKind

    kinds = [StepKind(n, context) for n in (3, 12, 24, 48) for context in (150, 300)]
    kinds += [StepKind(0, 0, 1, n, start) for n in (48, 100, 200, 400) for start in (0, 300)]
    kinds += [StepKind(8, 200, 1, 120, 0), StepKind(16, 100, 1, 300, 200), StepKind(30, 300, 1, 450, 0)]
    kinds += [StepKind(4, 700, 2, 90, 50), StepKind(24, 64, 1, 40, 400)]
    return [kind for kind in kinds if sum(n for _, n in kind.parts) <= max_tokens]


def calibrate(loaded, spec, args, *, num_runs: int = 9, seconds: float = 45.0, log=print):
    """The Machine fitted to `loaded` on this machine, its held_out_error set. `log(line)` hears of the findings."""
    from runtime import _native
    from runtime.fit_rates import fit_classes
    from runtime.measured_engine import measure_engine
    from runtime.measured_steps import StepBench, StepKind
    from scheduler.cost_model import CostModel
    from scheduler.machine import Machine

    started_s = time.monotonic()
    max_tokens = 512
    whole = loaded.device.engine_cores()
    bench = StepBench(loaded, [whole], max_tokens, 64)
    fitted = [kind for kind in fit_grid(max_tokens) if bench.fits(kind)]
    held_out = [kind for kind in held_out_grid(max_tokens) if bench.fits(kind)]
    bench.measure(StepKind(4, 64), 3)  # pages of memory and clocks warm up
    measured = bench.measure_all(fitted + held_out, num_runs, started_s + (0.8 - LANES_PART) * seconds)
    steps, judged = measured[: len(fitted)], measured[len(fitted) :]
    classes = fit_classes(steps, spec)
    between_nodes_s = statistics.median(step.step_s - sum(step.node_s) for step in steps)
    lanes = _measure_lanes(loaded, spec, bench, classes, whole, num_runs, LANES_PART * seconds, log)
    engine = measure_engine(loaded, args)
    log(
        f"engine    {engine.gap_s * 1e6:.0f} us between steps, results heard after {engine.result_delay_s * 1e6:.0f} us, "
        f"host {engine.host_s_per_step * 1e6:.0f} us a step and {engine.host_s_per_request * 1e6:.1f} us a request"
    )
    machine = Machine(
        name=f"{cpu_name()}, {len(whole)} threads",
        source=f"measured by partita calibrate on {time.strftime('%Y-%m-%d')}, {_native.active_cpu_isa()}",
        shared_bytes_per_s=lanes.shared_bytes_per_s,
        classes=classes,
        memory_bytes=float(spec.weight_bytes + loaded.kv_plan.arena_bytes),
        step_overhead_s=engine.gap_s,
        result_delay_s=engine.result_delay_s,
        host_s_per_step=max(0.0, between_nodes_s),
        overlap_gain=lanes.overlap_gain,
        saturation=lanes.saturation,
        rungs=lanes.rungs,
        lane_speeds=lanes.lane_speeds,
        model=spec.name,
    )
    model = CostModel(spec, machine)
    errors = []
    for step in judged:
        predicted_s = model.within_step_s(step.shape)
        errors.append(predicted_s / step.step_s - 1.0)
        log(f"held out  {_shown(step.kind):<34} measured {step.step_s * 1e3:8.2f} ms  model {errors[-1]:+7.1%}")
    absolute = sorted(abs(error) for error in errors)
    # Held-out steps ran without the engine's thread.
    machine = replace(
        machine, held_out_error=statistics.median(absolute), host_s_per_request=engine.host_s_per_request,
        host_s_per_step=machine.host_s_per_step + engine.host_s_per_step,
    )  # fmt: skip
    if machine.lane_speeds and machine.held_out_error > HELD_OUT_BAR:
        # Whoever else was busy meanwhile made lanes look as if they did not share the chip.
        log("lanes     not kept: the machine was too unsteady to tell what they do to each other")
        machine = replace(machine, lane_speeds=())
    return machine, absolute


class _Lanes(NamedTuple):
    """Fields of Machine; these where the cores cannot be cut in two."""

    shared_bytes_per_s: float
    rungs: tuple[float, ...] = (1.0,)
    saturation: Saturation = Saturation()
    overlap_gain: float = 0.0
    lane_speeds: tuple[LaneSpeeds, ...] = ()


def _measure_lanes(loaded, spec, bench, classes, whole: Sequence[int], num_runs: int, speeds_s: float, log) -> _Lanes:
    """speeds_s: for lane_speeds alone."""
    from runtime.fit_rates import fit_saturation
    from runtime.measured_lanes import measure_lane_speeds
    from runtime.measured_steps import StepBench, StepKind
    from scheduler.machine import Machine

    memory_rate = classes["linear"].bytes_per_s
    if len(whole) < 2 or len(set(whole)) < len(whole):
        return _Lanes(memory_rate)
    decode, chunk = StepKind(4, 64), StepKind(0, 0, 1, 256, 0)
    half = len(whole) // 2
    splits = {}
    for first in sorted({half, len(whole) - half}):
        cut = [whole[:first], whole[first:]]
        splits[first / len(whole), 1.0 - first / len(whole)] = StepBench(loaded, cut, bench.max_tokens, 64)
    share = half / len(whole)
    split = splits[share, 1.0 - share]
    times = {}
    for name, kind in (("compute", chunk), ("memory", decode)):
        of_whole = bench.measure(kind, num_runs).step_s
        times[name] = {share: split.measure(kind, num_runs).step_s, 1.0: of_whole}
    saturation = fit_saturation(times["compute"], times["memory"])
    draft = Machine("draft", "", memory_rate, classes, saturation=saturation)
    shared = _shared_rate(split, spec, draft, decode, chunk, share, num_runs, log)
    lane_speeds = measure_lane_speeds(bench, splits, spec, speeds_s)
    for line in shown_speeds(lane_speeds):
        log(line)
    overlap_gain = StepBench(loaded, [whole, whole], bench.max_tokens, 64).overlap_gain(decode, chunk, 1.0)
    log(f"two lanes of all cores each yield {1.0 + overlap_gain:.2f} of one after the other")
    return _Lanes(shared, tuple(sorted({share, 1.0 - share, 1.0})), saturation, overlap_gain, lane_speeds)


def shown_speeds(lane_speeds: Sequence[LaneSpeeds]) -> list[str]:
    lines = []
    for speeds in lane_speeds:
        for pair in speeds.beside:
            names = (pair.compute, pair.memory)
            alone = [speeds.alone[lane][name] for lane, name in zip(LANE_NAMES, names, strict=True)]
            lines.append(
                f"lanes     {pair.compute} on {speeds.shares[0]:.0%}: {alone[0]:.2f} of its speed, "
                f"{pair.compute_speed:.2f} beside {pair.memory} on {speeds.shares[1]:.0%}: {alone[1]:.2f}, "
                f"{pair.memory_speed:.2f}"
            )
    return lines


def _shared_rate(split, spec, machine, decode, chunk, share: float, num_runs: int, log) -> float:
    """Bandwidth of all lanes together, from how much a decode step suffers beside another lane's prefill: where the cost
    model's contention comes to the measured ratio. Not slowed at all: as much as both were seen to want at once."""
    from scheduler.cost_model import CostModel

    measured = split.slow_down(decode, chunk, num_runs)
    log(f"two lanes a decode step beside a prefill takes {measured:.2f} times as long")
    shapes = [kind.shape(split.window) for kind in (decode, chunk)]
    costs = [CostModel(spec, machine).step_cost(shape, share) for shape in shapes]
    own, other = costs[0].demand_bytes_per_s, costs[1].demand_bytes_per_s

    def slow_down(shared: float) -> float:
        model = CostModel(spec, replace(machine, shared_bytes_per_s=shared))
        return model.step_cost(shapes[0], share).duration_s(other) / costs[0].alone_s

    low, high = max(own, other), own + other
    if measured <= 1.01:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slow_down(middle) > measured else (low, middle)
    return high


def _shown(kind) -> str:
    parts = []
    if kind.num_decodes:
        parts.append(f"{kind.num_decodes} decodes at {kind.decode_context}")
    if kind.num_chunks:
        parts.append(f"{kind.num_chunks} x {kind.chunk_tokens} at {kind.chunk_start}")
    return " + ".join(parts)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.calibrate") -> int:
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    if namespace.runs < 1 or namespace.seconds <= 0:
        parser.error("--runs must be at least 1 and --seconds above 0")
    if args.device != "cpu":
        parser.error(
            f"--device: got {args.device!r}; only the CPU is calibrated, a GPU's machine file is written by hand"
        )
    from runtime.describe_model import spec_of
    from runtime.engine_loader import load_model

    started_s = time.monotonic()
    try:
        loaded = load_model(args)
        spec = spec_of(loaded, args.kv_codecs)
        machine, errors = calibrate(loaded, spec, args, num_runs=namespace.runs, seconds=namespace.seconds)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    path = Path(namespace.output) if namespace.output else machine_file(loaded, args.kv_dtype)
    machine.save(path)
    for name, rates in machine.classes.items():
        if name != "default":
            best = max(rate for _, rate in rates.operations_per_s)
            print(
                f"{name:<18} {rates.bytes_per_s / 1e9:8.1f} GB/s {min(best, 9e14) / 1e9:10.1f} G operations/s "
                f"{rates.overhead_s * 1e6:7.1f} us a node"
            )
    worst = errors[int(0.95 * (len(errors) - 1))]
    print(
        f"{len(errors)} held-out steps: median error {machine.held_out_error:.1%}, 95 % within {worst:.1%} "
        f"({'within' if machine.held_out_error <= HELD_OUT_BAR else 'ABOVE'} the bar of {HELD_OUT_BAR:.0%})"
    )
    print(f"machine file {path} ({time.monotonic() - started_s:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
