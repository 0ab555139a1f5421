"""What a simulated run was like for its users and its machine: one dict for JSON, one table for people."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

from scheduler.goodput import outcome_of
from scheduler.machine import Machine
from scheduler.simulator.costs import NANOSECONDS
from scheduler.simulator.simulation import SimulationResult

PERCENTS = (50, 90, 95, 99)
_MOST_ARRANGEMENTS = 6  # that a table names


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, straight between the closest ranks; 0 for none."""
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Report:
    """machine: for utilisation; label: what the run is called in tables and charts."""

    def __init__(self, result: SimulationResult, machine: Machine | None = None, label: str = "") -> None:
        self.result = result
        self.label = label or result.config.policy
        series: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": sorted(result.inter_token_s), "e2e": []}
        num_good = num_good_tokens = num_tokens = num_refused = 0
        kept = {"ttft": 0, "tpot": 0, "deadline": 0}
        asked = dict.fromkeys(kept, 0)
        targets = result.targets
        for record in result.records.values():
            if record.finish_reason not in ("stop", "length"):
                num_refused += 1
                continue
            first_s = (record.first_token_ns - record.arrival_ns) / NANOSECONDS
            end_s = (record.last_token_ns - record.arrival_ns) / NANOSECONDS
            num_tokens += record.num_tokens
            series["ttft"].append(first_s)
            series["e2e"].append(end_s)
            if record.num_tokens > 1:
                series["tpot"].append((end_s - first_s) / (record.num_tokens - 1))
            outcome = outcome_of(
                targets.ttft_s, targets.tpot_s, targets.deadline_s, first_token_s=first_s, end_s=end_s,
                num_tokens=record.num_tokens,
            )  # fmt: skip
            for name, is_kept in outcome._asdict().items():
                if is_kept is not None:
                    asked[name] += 1
                    kept[name] += is_kept
            if outcome.is_good:
                num_good += 1
                num_good_tokens += record.num_tokens
        for values in series.values():
            values.sort()
        self.series = series
        self.num_requests = len(result.records)
        self.num_refused = num_refused
        self.num_tokens = num_tokens
        self.num_good = num_good
        self.num_good_tokens = num_good_tokens
        # Of those that were refused nobody says they were served in time.
        self.attainment = num_good / self.num_requests if self.num_requests else 0.0
        self.target_attainment = {name: kept[name] / (asked[name] + num_refused) for name in kept if asked[name]}
        self._machine = machine

    def to_json(self) -> dict[str, Any]:
        result = self.result
        duration_s = result.duration_s or 1e-9
        steps = sorted(result.step_s)
        num_prompt = sum(record.num_prompt_tokens for record in result.records.values())
        num_cached = sum(record.num_cached_tokens for record in result.records.values())
        report: dict[str, Any] = {
            "label": self.label,
            "policy": result.config.policy,
            "num_requests": self.num_requests,
            "num_refused": self.num_refused,
            "duration_s": duration_s,
            "request_throughput": (self.num_requests - self.num_refused) / duration_s,
            "output_throughput": self.num_tokens / duration_s,
            "prompt_throughput": num_prompt / duration_s,
            "request_goodput": self.num_good / duration_s,
            "token_goodput": self.num_good_tokens / duration_s,
            "slo_attainment": self.attainment,
            **{f"{name}_attainment": share for name, share in self.target_attainment.items()},
            "num_preemptions": result.stats.num_preemptions,
            "num_pauses": result.stats.num_pauses,
            "num_border_moves": result.stats.num_moves,
            "arrangements": dict(result.stats.arrangements),
            "prefix_hit_share": num_cached / num_prompt if num_prompt else 0.0,
            "num_steps": result.num_steps,
            "tokens_per_step": result.num_step_tokens / max(1, result.num_steps),
            "step_s_p50": percentile(steps, 50),
            "step_s_p99": percentile(steps, 99),
            "utilisation": self.utilisation(),
            "wall_s": result.wall_s,
            "requests_per_wall_s": self.num_requests / result.wall_s if result.wall_s else 0.0,
        }
        for name, values in self.series.items():
            report[f"{name}_s_mean"] = sum(values) / len(values) if values else 0.0
            for percent in PERCENTS:
                report[f"{name}_s_p{percent}"] = percentile(values, percent)
        return report

    def utilisation(self) -> dict[str, float]:
        """Shares of the run's time, 0 to 1."""
        result = self.result
        duration_s = result.duration_s or 1e-9
        used = {f"lane_{index}": busy_ns / NANOSECONDS / duration_s for index, busy_ns in enumerate(result.busy_ns)}
        used["kv_mean"], used["kv_peak"] = result.kv_usage_mean, result.kv_usage_peak
        if self._machine is not None:
            # Operations at the rates that their row counts allow: 1.0 would be compute without a pause.
            used["compute"] = result.compute_s / duration_s
            used["memory_bandwidth"] = result.num_bytes / self._machine.shared_bytes_per_s / duration_s
        return used

    def _arrangements_line(self) -> str:
        """How the machine was shared, most frequent first; "" where nothing decides that."""
        stats = self.result.stats
        total = sum(stats.arrangements.values())
        if not total:
            return ""
        ordered = sorted(stats.arrangements.items(), key=lambda item: -item[1])
        shown = [f"{name} {count / total:.0%}" for name, count in ordered[:_MOST_ARRANGEMENTS]]
        if len(ordered) > _MOST_ARRANGEMENTS:
            shown.append(f"{len(ordered) - _MOST_ARRANGEMENTS} more")
        return f"arranged: {', '.join(shown)}; border moved {stats.num_moves} times, prefills paused {stats.num_pauses}"

    def table(self) -> str:
        report = self.to_json()
        lines = [
            f"{self.label}: {report['num_requests']} requests in {report['duration_s']:.1f} s of simulated time, "
            f"{report['num_steps']} steps of {report['tokens_per_step']:.1f} tokens ({report['wall_s']:.1f} s to simulate)",
            f"{'ms':<6}" + "".join(f"{name:>11}" for name in ("mean", *(f"p{percent}" for percent in PERCENTS))),
        ]
        for name in self.series:
            columns = ("mean", *(f"p{percent}" for percent in PERCENTS))
            lines.append(f"{name:<6}" + "".join(f"{report[f'{name}_s_{column}'] * 1e3:>11.2f}" for column in columns))
        lines.append(
            f"throughput {report['request_throughput']:.3f} requests/s, {report['output_throughput']:.1f} tokens/s; "
            f"goodput {report['request_goodput']:.3f} requests/s, {report['token_goodput']:.1f} tokens/s"
        )
        attained = [f"all targets {report['slo_attainment']:.1%}"]
        attained += [f"{name} {share:.1%}" for name, share in self.target_attainment.items()]
        lines.append(
            f"kept: {', '.join(attained)}; refused {report['num_refused']}, preemptions {report['num_preemptions']}, "
            f"prefix hits {report['prefix_hit_share']:.1%}"
        )
        if arranged := self._arrangements_line():
            lines.append(arranged)
        lines.append("used: " + ", ".join(f"{name} {share:.1%}" for name, share in report["utilisation"].items()))
        return "\n".join(lines)
