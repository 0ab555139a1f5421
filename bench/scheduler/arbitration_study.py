"""Whether the arbitration rule loses to any single way of sharing the chip, from an idle chip to overload (simulated).

    PYTHONPATH=python python bench/scheduler/arbitration_study.py TRACE [--num-requests 1500] [--rates 5,10,...]
        [--policies ...] [--error 0.08] [--contentions 1,0.75,1.25] [--slo ttft=1s,tpot=25ms] [--hopeless-share 0.005]
        [--chart FILE] [--json FILE]

TRACE: such as azure_llm_2023_conv.csv.gz, on Llama 3 8B and the h100-sxm file, which nobody has measured. Every policy
predicts with the machine file as it is; what executes is wrong by --error (log-normal, per run) and feels --contentions
times the contention between lanes that the file says. Goodput is the tokens of requests that keep both targets, per second
in which requests arrive: what is answered after the last arrival counts, the time it takes does not. The exit status is 1
if the rule is more than 5 % below any other policy at any load.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scheduler.controllers import hopeless_line
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.simulator.costs import ModelCosts
from scheduler.simulator.setup import (
    load_model,
    load_requests,
    longest_request,
    parse_targets,
    scheduler_config,
)
from scheduler.simulator.simulation import Simulation
from scheduler.simulator.traces import at_rate

RULE = "arbitrate"
POLICIES = ("default", "fastgen", "layered", "flowprefill", "semi-pd", "nexus", "two-lanes", "nanoflow", RULE)
TOLERANCE = 0.05
COLOURS = {
    "default": "#999999", "fastgen": "#0072b2", "layered": "#56b4e9", "flowprefill": "#cc79a7", "semi-pd": "#009e73",
    "nexus": "#e69f00", "two-lanes": "#d55e00", "nanoflow": "#8c564b", RULE: "#000000",
}  # fmt: skip


def goodput(
    policy: str, requests, targets, machine: Machine, executing: Machine, error: float, seed: int
) -> tuple[float, float]:
    """(tokens/s of good requests, share of requests that are good)."""
    spec = load_model("llama-3-8b", machine)
    config = scheduler_config(
        spec, machine, longest=longest_request(requests), policy=policy, enable_prefix_caching=False
    )
    costs = ModelCosts(CostModel(spec, executing), error=error, seed=seed)
    result = Simulation(config, costs, requests, targets=targets, cost_model=CostModel(spec, machine)).run()
    seconds = requests[-1].arrival_s - requests[0].arrival_s
    stats = result.stats.goodput
    return stats.num_good_tokens / seconds, stats.num_good / stats.num_finished


def worst_ratio(of: Mapping[str, Sequence[float]]) -> tuple[float, str, int]:
    """The rule's goodput over another policy's, where it is lowest: (ratio, policy, index of the load)."""
    return min(
        (of[RULE][index] / max(values[index], 1e-9), policy, index)
        for policy, values in of.items()
        if policy != RULE
        for index in range(len(values))
    )


def chart(tables: Mapping[float, Mapping[str, Sequence[float]]], rates: Sequence[float], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "partita", "svg.fonttype": "none"})  # equal numbers give equal files
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.6), sharey=True, layout="constrained")
    for axis, (contention, table) in zip([axes] if len(tables) == 1 else axes, tables.items(), strict=True):
        for policy, values in table.items():
            width = 2.2 if policy == RULE else 1.1
            axis.plot(
                rates, values, label=policy, color=COLOURS.get(policy), linewidth=width, marker="o", markersize=2.5
            )
        axis.set_title(f"contention x {contention:g}", fontsize=9)
        axis.set_xlabel("requests/s offered")
        axis.grid(alpha=0.3)
    (axes if len(tables) == 1 else axes[0]).set_ylabel("goodput, tokens/s")
    (axes if len(tables) == 1 else axes[0]).legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--num-requests", type=int, default=1500)
    parser.add_argument("--rates", default="5,10,15,20,25,30,40")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument(
        "--error", type=float, default=0.08, help="of the executor: standard deviation of log(actual/model)"
    )
    parser.add_argument("--contentions", default="1,0.75,1.25")
    parser.add_argument("--slo", default="ttft=1s,tpot=25ms")
    parser.add_argument("--machine", default="h100-sxm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--hopeless-share",
        type=float,
        default=hopeless_line.SHARE,
        help=f"of the time, for turns of those that are late anyway; 0: none (default: {hopeless_line.SHARE})",
    )
    parser.add_argument("--chart", help="write a picture (needs matplotlib)")
    parser.add_argument("--json", help="write the numbers")
    arguments = parser.parse_args()
    if arguments.hopeless_share > 0.0:
        hopeless_line.SHARE = arguments.hopeless_share
    else:
        hopeless_line.LATENESS = math.inf
    machine, targets = Machine.load(arguments.machine), parse_targets(arguments.slo)
    rates = [float(rate) for rate in arguments.rates.split(",")]
    policies = arguments.policies.split(",")
    trace = load_requests(arguments.trace, num=arguments.num_requests)
    tables: dict[float, dict[str, list[float]]] = {}
    shares: dict[float, dict[str, list[float]]] = {}
    is_ok = True
    for contention in [float(each) for each in arguments.contentions.split(",")]:
        executing = replace(machine, contention=machine.contention * contention)
        table = tables[contention] = {policy: [] for policy in policies}
        share = shares[contention] = {policy: [] for policy in policies}
        for rate in rates:
            requests = at_rate(trace, rate)
            for policy in policies:
                tokens, part = goodput(policy, requests, targets, machine, executing, arguments.error, arguments.seed)
                table[policy].append(tokens)
                share[policy].append(part)
        print(f"\n{arguments.machine}, contention x {contention:g}, error {arguments.error:g}, {arguments.slo}: goodput in "
              "tokens/s (share of requests that are good)\n")  # fmt: skip
        print("| policy | " + " | ".join(f"{rate:g}/s" for rate in rates) + " |")
        print("|---" * (1 + len(rates)) + "|")
        for policy in policies:
            cells = (f"{value:.0f} ({part:.0%})" for value, part in zip(table[policy], share[policy], strict=True))
            print(f"| `{policy}` | " + " | ".join(cells) + " |")
        if RULE in policies and len(policies) > 1:
            ratio, policy, index = worst_ratio(table)
            print(f"\nthe rule at worst: {ratio:.2f} of {policy} at {rates[index]:g} requests/s", flush=True)
            is_ok = is_ok and ratio >= 1.0 - TOLERANCE
    if arguments.chart:
        chart(tables, rates, arguments.chart)
    if arguments.json:
        content = {"rates": rates, "slo": arguments.slo, "error": arguments.error, "goodput": tables, "good": shares}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
