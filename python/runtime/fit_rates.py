"""From measured steps to a scheduler.machine.Machine: small least-squares fits, one node class at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.measured_steps import MeasuredStep
from scheduler.machine import ClassRates, Saturation
from scheduler.model_spec import ModelSpec, NodeSpec

# A sample whose bytes explain so much of its time waits for memory; its compute rate was not seen, and is set so that it
# never binds.
_MEMORY_BOUND = 0.9
_UNSEEN_RATE = 1.25


class Sample(NamedTuple):
    """One node of one measured step."""

    filling_rows: float  # what the class's compute rate depends on
    num_rows: int
    operations: float
    num_bytes: float
    seconds: float


def samples_of(steps: Iterable[MeasuredStep], spec: ModelSpec) -> dict[str, list[Sample]]:
    """Node times by class. Steps with decodes and chunks have no attention sample: their node holds both kinds."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    nodes = spec.nodes()
    for step in steps:
        for node, seconds in zip(nodes, step.node_s, strict=True):
            node_class = _class_of(node, step)
            if seconds > 0 and node_class:
                num_rows = node.num_rows(step.shape)
                filling = num_rows / step.kind.num_chunks if node_class == "attention_chunk" else num_rows
                samples[node_class].append(
                    Sample(filling, num_rows, node.operations(step.shape), node.bytes(step.shape), seconds)
                )
    return dict(samples)


def _class_of(node: NodeSpec, step: MeasuredStep) -> str:
    if node.kind != "attention":
        return node.kind
    if step.kind.num_chunks and step.kind.num_decodes:
        return ""
    return "attention_chunk" if step.kind.num_chunks else "attention_decode"


def fit_class(samples: Sequence[Sample], memory_rate_floor: float = 0.0, has_row_time: bool = False) -> ClassRates:
    """overhead + rows * row_s + max(operations / rate(rows), bytes / bytes_per_s), relative errors squared.

    First overhead and, where asked for, row time by non-negative least squares beside an even work rate; behind them the
    best memory rate that any number of rows reached (at least `memory_rate_floor`, which others of this machine
    reached), and a compute rate per number of rows.
    """
    by_rows: dict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_rows[sample.filling_rows].append(sample)
    overhead_s, row_s = 0.0, 0.0
    if has_row_time:
        overhead_s, row_s, _ = nonnegative_fit(
            [(1.0, s.num_rows, s.operations) for s in samples], [s.seconds for s in samples]
        )
    else:
        fewest = by_rows[min(by_rows)]
        overhead_s, _ = nonnegative_fit([(1.0, s.num_bytes) for s in fewest], [s.seconds for s in fewest])
    # Fixed parts never explain all of a sample.
    excess = max((overhead_s + row_s * s.num_rows) / s.seconds for s in samples)
    shrink = min(1.0, 0.9 / excess) if excess > 0 else 1.0
    overhead_s, row_s = overhead_s * shrink, row_s * shrink

    def slope(group: Sequence[Sample], amounts: Sequence[float]) -> float:
        """Seconds per unit of amount behind the fixed parts."""
        seconds = np.array([s.seconds for s in group])
        fixed = np.array([overhead_s + row_s * s.num_rows for s in group])
        x, y = np.array(amounts) / seconds, (seconds - fixed) / seconds
        return max(float(x @ y / (x @ x)), 1e-18) if x @ x > 0 else 1e-18

    memory_rates = {rows: 1.0 / slope(group, [s.num_bytes for s in group]) for rows, group in by_rows.items()}
    bytes_per_s = max(memory_rate_floor, *memory_rates.values())
    knots = []
    for rows, group in sorted(by_rows.items()):
        if max(s.operations for s in group) <= 0:
            continue
        rate = 1.0 / slope(group, [s.operations for s in group])
        is_memory_bound = memory_rates[rows] >= _MEMORY_BOUND * bytes_per_s
        knots.append((max(1.0, float(rows)), rate * _UNSEEN_RATE if is_memory_bound else rate))
    if not knots:  # it computes nothing worth counting
        knots = [(1.0, 1e15)]
    return ClassRates(tuple(knots), bytes_per_s, overhead_s, row_s)


def nonnegative_fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, of the relative least squares fit seconds ~ rows @ coefficients. Of so few columns
    every subset is tried: the best one without a negative coefficient is the optimum."""
    matrix = np.array(rows, dtype=float) / np.array(seconds)[:, None]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    num_columns, target = matrix.shape[1], np.ones(len(seconds))
    best, best_error = np.zeros(num_columns), float(target @ target)
    for chosen in range(1, 1 << num_columns):
        columns = [c for c in range(num_columns) if chosen >> c & 1]
        solved = np.linalg.lstsq(matrix[:, columns] / scale[columns], target, rcond=None)[0] / scale[columns]
        error = float(np.sum((matrix[:, columns] @ solved - target) ** 2))
        if solved.min() >= 0 and error < best_error:
            best, best_error = np.zeros(num_columns), error
            best[columns] = solved
    return best.tolist()


def fit_classes(steps: Sequence[MeasuredStep], spec: ModelSpec) -> dict[str, ClassRates]:
    samples = samples_of(steps, spec)
    linear = fit_class(samples["linear"])
    classes = {"linear": linear}
    for node_class, of_class in samples.items():
        if node_class != "linear":
            is_attention = node_class.startswith("attention")
            classes[node_class] = fit_class(of_class, linear.bytes_per_s if is_attention else 0.0, is_attention)
    classes["default"] = ClassRates(((1.0, 1e15),), linear.bytes_per_s)
    return classes


def fit_saturation(compute_s: dict[float, float], memory_s: dict[float, float]) -> Saturation:
    """Shares -> seconds of a step bound by compute, and of one bound by memory; 1.0 is among the shares."""
    smallest = min(compute_s)
    if smallest == 1.0:
        return Saturation()
    speed = compute_s[1.0] / compute_s[smallest]  # of the small share against the whole
    decay = (smallest / max(speed, smallest) / smallest - 1.0) / (1.0 - smallest)
    decay = min(max(decay, 0.0), 1.0 / smallest)
    memory_speed = memory_s[1.0] / memory_s[smallest]
    memory_share = min(1.0, max(smallest, smallest / memory_speed))
    return Saturation(smallest, decay, memory_share)
