"""Charts of simulated runs. Needs matplotlib (an extra); everything else of the simulator does without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.simulator.costs import NANOSECONDS
from scheduler.simulator.step_log import StepLog

# Colours that people with red-green blindness tell apart, and a mark each for print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKS = "os^Dv*P"


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_latency_over_load(reports_of: Mapping[str, Sequence[tuple[float, dict[str, Any]]]], path: str) -> None:
    """reports_of: policy -> (rate, Report.to_json()) by rising rate. Four charts: TTFT, TPOT, attainment, goodput."""
    pyplot = _pyplot()
    panels = (
        ("TTFT (s): median, dashed p99", ("ttft_s_p50", "ttft_s_p99"), True),
        ("TPOT (ms): median, dashed p99", ("tpot_s_p50", "tpot_s_p99"), True),
        ("requests that keep their targets (%)", ("slo_attainment",), False),
        ("goodput (tokens/s)", ("token_goodput",), False),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (title, keys, is_log) in zip(axes.flat, panels, strict=True):
        scale = 1e3 if "(ms)" in title else 100.0 if "(%)" in title else 1.0
        for index, (policy, reports) in enumerate(reports_of.items()):
            colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
            for line, key in enumerate(keys):
                axis.plot(
                    [rate for rate, _ in reports], [report[key] * scale for _, report in reports], color=colour,
                    marker=mark, markersize=4, linestyle="--" if line else "-", label=None if line else policy,
                )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests per second offered")
        if is_log:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_lanes(log: StepLog, path: str, title: str = "") -> None:
    """A Gantt chart: a row per lane, a bar per plan as high as its share of the machine, prefill and decode parts of its
    tokens in different colours. Parts of a run are lighter; a black edge: it was paused there."""
    pyplot = _pyplot()
    if not log.steps:
        raise ValueError("plot_lanes: no step lies in the window")
    lanes = sorted({step.plan.lane for step in log.steps})
    figure, axis = pyplot.subplots(figsize=(12, 1.2 + 1.1 * len(lanes)), layout="constrained")
    for step in log.steps:
        plan = step.plan
        row = lanes.index(plan.lane)
        height = 0.2 + 0.7 * plan.share
        start_s, width_s = step.start_ns / NANOSECONDS, (step.end_ns - step.start_ns) / NANOSECONDS
        num_chunk_tokens = sum(scheduled.num_tokens for scheduled in plan.requests if scheduled.num_tokens > 1)
        share = num_chunk_tokens / plan.num_tokens
        alpha = 1.0 if step.first == 0 and step.ends_run else 0.6
        axis.barh(
            row, width_s, left=start_s, height=height, color=_COLOURS[0] if share < 1 else "white", alpha=alpha,
            edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        if share > 0:  # from one edge: what part of the step's tokens are prefill
            bottom = row - height / 2 + height * share / 2
            axis.barh(bottom, width_s, left=start_s, height=height * share, color=_COLOURS[1], alpha=alpha, linewidth=0)
        if step.is_stopped:
            axis.vlines(start_s + width_s, row - height / 2, row + height / 2, color="black", linewidth=1.2)
    axis.set_yticks(range(len(lanes)), [f"lane {lane}" for lane in lanes])
    axis.set_xlabel("seconds")
    axis.set_title(title, fontsize=10)
    axis.invert_yaxis()
    marks = [
        pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[0], label="decode tokens"),
        pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[1], label="prefill tokens"),
        pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[1], alpha=0.6, label="part of a run"),
        pyplot.Line2D([], [], color="black", linewidth=1.2, label="paused"),
    ]
    axis.legend(handles=marks, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
