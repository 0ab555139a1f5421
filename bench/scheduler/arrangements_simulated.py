"""The comparison of bench/serve/arrangements.py in virtual time: the same configurations and traces, no noisy machine.

    partita calibrate --output machine.json
    python -m bench.scheduler.arrangements_simulated machine.json [--rate 2.4] [--duration 120]

The machine file must be one that `partita calibrate` measured under SmolLM2. One line per configuration; what is simulated
compares policies and shows what a real run, on a machine that others share, should look like. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.serve.arrangements import (
    CHAT_OUTPUT,
    CHAT_PROMPT,
    CONFIGURATIONS,
    LONG_OUTPUT,
    LONG_PROMPT,
)
from bench.serve.open_loop import LoadRequest, RequestClass, draw_trace
from runtime.engine_loader import RUN_TOKENS
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.policy import with_preset
from scheduler.request import Request
from scheduler.simulator import ModelCosts, Report, Simulation
from scheduler.simulator.costs import NANOSECONDS
from scheduler.simulator.setup import default_model, load_model

CPU_TOKENS = 512  # of a step, where nothing else is said: the CPU engine's default
COLUMNS = ("ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99", "itl_s_p99")


def configuration(fields: dict[str, Any], model: CostModel) -> SchedulerConfig:
    """As the engine makes it of the same flags, on two cores."""
    nodes = model.spec.nodes()
    starts = {node.layer: index for index, node in reversed(list(enumerate(nodes))) if node.layer >= 0}
    config = SchedulerConfig(
        num_pages=5000, max_num_seqs=32, max_model_len=4096, enable_prefix_caching=False, num_nodes=len(nodes),
        layer_starts=tuple(sorted(starts.values())), rungs=(0.5,),
        **{"max_num_batched_tokens": CPU_TOKENS, **fields},
    )  # fmt: skip
    is_cut = with_preset(config).prefill == "token" and config.policy != "arbitrate"
    if not is_cut and "max_num_batched_tokens" not in fields:
        return configuration({**fields, "max_num_batched_tokens": RUN_TOKENS}, model)
    return config


def simulate(machine: Machine, fields: dict[str, Any], trace: list[LoadRequest]) -> dict[str, Any]:
    model = CostModel(load_model(default_model(machine), machine), machine)
    simulation = Simulation(configuration(fields, model), ModelCosts(model), cost_model=model)
    for index, one in enumerate(trace):
        request = Request(
            f"r{index}", range(one.num_prompt_tokens), one.num_output_tokens, arrival_s=one.arrival_s,
            namespace=f"r{index}", ttft_s=one.kind.ttft_s, tpot_s=one.kind.tpot_s,
        )  # fmt: skip
        simulation.add(round(one.arrival_s * NANOSECONDS), request)
    report = Report(simulation.run(), machine).to_json()
    stats = simulation.scheduler.stats()
    goodput = stats.goodput
    line = {name: report[name] for name in COLUMNS}
    line |= {
        "requests": goodput.num_finished, "good": goodput.num_good, "ttft_kept": goodput.num_ttft_kept,
        "tpot_kept": goodput.num_tpot_kept, "pauses": stats.num_pauses, "moves": stats.num_moves,
        "arrangements": dict(stats.arrangements),
    }  # fmt: skip
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine")
    parser.add_argument("--configurations", default=",".join(name for name in CONFIGURATIONS if name != "nano-2"))
    parser.add_argument("--rate", type=float, default=2.4, help="requests a second (default: 2.4)")
    parser.add_argument("--duration", type=float, default=120.0, help="of arrivals, seconds (default: 120)")
    parser.add_argument("--long-share", type=float, default=0.2, help="of the requests (default: 0.2)")
    parser.add_argument("--ttft-ms", type=float, default=400.0, help="of chats (default: 400)")
    parser.add_argument("--long-ttft-ms", type=float, default=20_000.0, help="of long prompts (default: 20 s)")
    parser.add_argument("--tpot-ms", type=float, default=25.0, help="of all (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    namespace = parser.parse_args()

    machine = Machine.load(namespace.machine)
    share, tpot_s = namespace.long_share, namespace.tpot_ms / 1e3
    classes = [
        RequestClass("chat", 1.0 - share, CHAT_PROMPT, CHAT_OUTPUT, namespace.ttft_ms / 1e3, tpot_s),
        RequestClass("long", share, LONG_PROMPT, LONG_OUTPUT, namespace.long_ttft_ms / 1e3, tpot_s),
    ]
    trace = draw_trace(classes, namespace.rate, namespace.duration, namespace.seed)
    print(f"{machine.name}, simulated: {len(trace)} requests at {namespace.rate}/s")
    headings = (
        "TTFT p50 ms",
        "p99 ms",
        "TPOT p50 ms",
        "p99 ms",
        "ITL p99 ms",
        "good",
        "TTFT kept",
        "TPOT kept",
        "pauses",
    )
    print(f"{'configuration':<22}" + "".join(f" {heading:>12}" for heading in headings))
    lines = {}
    for name in namespace.configurations.split(","):
        line = lines[name] = simulate(machine, CONFIGURATIONS[name], trace)
        cells = [f"{line[column] * 1e3:12.1f}" for column in COLUMNS]
        cells += [f"{line[column]:12d}" for column in ("good", "ttft_kept", "tpot_kept", "pauses")]
        print(f"{name:<22} " + " ".join(cells), flush=True)
    print(json.dumps({"machine": machine.name, "rate_per_s": namespace.rate, "requests": len(trace), "lines": lines}))


if __name__ == "__main__":
    main()
