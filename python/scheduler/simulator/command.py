"""``partita simulate``: a trace, a policy and a machine in; what users would feel out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.policy import policy_named
from scheduler.simulator import setup
from scheduler.simulator.capacity import find_max_rate
from scheduler.simulator.costs import ModelCosts
from scheduler.simulator.report import Report
from scheduler.simulator.simulation import Simulation
from scheduler.simulator.step_log import StepLog
from scheduler.simulator.traces import TraceRequest, at_rate, mean_rate


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs the real scheduler over a trace in virtual time, with the cost model in place of a machine.",
        epilog=f"examples:\n  {prog} --trace conv.csv.gz --machine h100-sxm --slo ttft=500ms,tpot=50ms\n"
        f"  {prog} --trace conv.csv.gz --machine h100-sxm --find-max-rate --slo ttft=500ms,tpot=50ms\n"
        f"  {prog} --trace poisson:rate=4,input=64-4096,output=128 --policy default,fastgen --rates 2,4,8 "
        "--plot-latency load.png",
    )
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--trace", required=True, metavar="TRACE",
        help="Azure, BurstGPT or Mooncake file, a ServeGen *_rates file, or poisson:rate=R,num=N,input=A-B,output=A-B,cv=C",
    )  # fmt: skip
    group.add_argument("--policy", default="default", metavar="NAMES", help="presets, separated by commas")
    group.add_argument(
        "--machine", default="h100-sxm", metavar="NAME|FILE", help="h100-sxm, a100-sxm-80gb, cpu-2-cores or a file of "
        "`partita calibrate` (default: h100-sxm)",
    )  # fmt: skip
    group.add_argument(
        "--model", metavar="NAME|FILE", help="llama-3-8b, smollm2-135m or a config.json (default: the machine's)"
    )
    group.add_argument("--weight-format", metavar="F", help="BF16, Q8_0, Q4_1 ... (default: the model's)")
    group.add_argument("--kv-dtype", metavar="CODEC", help="such as bf16, int8 or int8:int4 (default: bf16)")
    group = parser.add_argument_group("load")
    group.add_argument(
        "--start", type=float, default=0.0, metavar="S", help="slice of the trace (default: its beginning)"
    )
    group.add_argument("--duration", type=float, metavar="S", help="(default: to its end)")
    group.add_argument("--num-requests", type=int, metavar="N", help="at most")
    group.add_argument("--rate", type=float, metavar="R", help="requests/s: stretches the slice (default: as it is)")
    group.add_argument("--rates", metavar="R,R,...", help="several runs")
    group.add_argument("--slo", metavar="TARGETS", help="such as ttft=500ms,tpot=50ms,deadline=30s")
    group.add_argument(
        "--find-max-rate", action="store_true", help="the highest rate at which --attainment of the requests keep --slo"
    )
    group.add_argument("--attainment", type=float, default=0.9, metavar="SHARE", help="(default: 0.9)")
    group.add_argument(
        "--ends-by-stop", action="store_true", help="answers end unforeseen, as by a stop token, not by max_tokens"
    )
    group = parser.add_argument_group("scheduler")
    group.add_argument("--max-num-seqs", type=int, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N")
    group.add_argument("--max-model-len", type=int, metavar="N")
    group.add_argument("--kv-memory", type=float, metavar="BYTES", help="(default: what the weights leave)")
    group.add_argument(
        "--lanes", metavar="LANES", help="auto, off or P:D: percent of the machine for prefill and for decode; or shares "
        "such as 0.5,0.5 of lanes that take both (default: as the policy has it)",
    )  # fmt: skip
    group.add_argument(
        "--prefill", metavar="UNIT", help="how prompts are cut: token, layer or operator (default: policy)"
    )
    group.add_argument("--nano-batches", metavar="N", help="off, auto or 2 to 4 (default: policy)")
    group.add_argument("--max-resting-runs", type=int, metavar="N", help="prefills that may rest between two parts")
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=None)
    group = parser.add_argument_group("disturbance")
    group.add_argument("--error", type=float, default=0.0, metavar="SIGMA", help="log-normal error of step times")
    group.add_argument(
        "--contention",
        type=float,
        metavar="FACTOR",
        help="of the contention that is felt; policies go on predicting the file's",
    )
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="every number of every run; - prints only this")
    group.add_argument("--plot-latency", metavar="FILE", help="latency and goodput over --rates, a line per policy")
    group.add_argument("--plot-lanes", metavar="FILE", help="lane timeline of --window")
    group.add_argument("--trace-steps", metavar="FILE", help="steps of --window as Perfetto JSON")
    group.add_argument("--window", default="0:10", metavar="FROM:TO", help="seconds of virtual time (default: 0:10)")
    return parser


class CommandRun:
    """What all runs of one command share."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace
        self.policies = [name for name in namespace.policy.split(",") if name]
        for name in self.policies:
            policy_named(name)
        machine = self.machine = Machine.load(namespace.machine)
        overrides = {}
        if namespace.weight_format:
            overrides["weight_format"] = namespace.weight_format
        if namespace.kv_dtype:
            k_codec, _, v_codec = namespace.kv_dtype.partition(":")
            overrides["kv_codecs"] = (k_codec, v_codec or k_codec)
        self.spec = setup.load_model(namespace.model or setup.default_model(machine), machine, **overrides)
        self.model = CostModel(self.spec, machine)  # what policies predict with
        felt = machine if namespace.contention is None else replace(machine, contention=namespace.contention)
        self.executor_model = CostModel(self.spec, felt)
        self.targets = setup.parse_targets(namespace.slo)
        if namespace.find_max_rate and self.targets == setup.parse_targets(None):
            raise ValueError("--find-max-rate needs --slo")
        self.requests = setup.load_requests(
            namespace.trace, start_s=namespace.start, duration_s=namespace.duration, num=namespace.num_requests,
            rate=namespace.rate, seed=namespace.seed,
        )  # fmt: skip
        self.window = _window(namespace.window)

    def run(self, policy: str, requests: Sequence[TraceRequest], log: StepLog | None = None, label: str = "") -> Report:
        namespace = self.namespace
        has_prefixes = any(request.hash_ids for request in requests[:100])
        caching = has_prefixes if namespace.enable_prefix_caching is None else namespace.enable_prefix_caching
        config = setup.scheduler_config(
            self.spec, self.machine, kv_bytes=namespace.kv_memory, longest=setup.longest_request(requests),
            policy=policy, max_num_seqs=namespace.max_num_seqs, max_model_len=namespace.max_model_len,
            max_num_batched_tokens=namespace.max_num_batched_tokens, enable_prefix_caching=caching,
            prefill=namespace.prefill, nano_batches=namespace.nano_batches,
            max_resting_runs=namespace.max_resting_runs, **setup.parse_lanes_flag(namespace.lanes),
        )  # fmt: skip
        costs = ModelCosts(self.executor_model, error=namespace.error, seed=namespace.seed)
        simulation = Simulation(
            config, costs, requests, targets=self.targets, ends_by_stop=namespace.ends_by_stop,
            cost_model=self.model, observe=log.add if log is not None else None,
        )  # fmt: skip
        return Report(simulation.run(), self.machine, label or policy)


def _window(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        window = float(low), float(high)
    except ValueError:
        window = (0.0, 0.0)
    if not colon or not window[0] < window[1]:
        raise ValueError(f"--window: got {text!r}, wanted FROM:TO in seconds")
    return window


def _rates(text: str) -> list[float]:
    try:
        rates = sorted(float(part) for part in text.split(","))
    except ValueError:
        rates = [0.0]
    if rates[0] <= 0:
        raise ValueError(f"--rates: got {text!r}, wanted requests per second above 0, separated by commas")
    return rates


def _find_rates(run: CommandRun, say) -> list[dict]:
    namespace, reports = run.namespace, []
    for policy in run.policies:
        capacity = find_max_rate(
            lambda rate, policy=policy: run.run(policy, at_rate(run.requests, rate)),
            attainment=namespace.attainment, first_rate=mean_rate(run.requests),
        )  # fmt: skip
        say(
            f"{policy}: {capacity.rate:.3f} requests/s keep {namespace.slo} for {namespace.attainment:.0%} "
            f"({len(capacity.tried)} runs)"
        )
        best = capacity.report.to_json() if capacity.report is not None else {"policy": policy}
        reports.append({**best, "max_rate": capacity.rate, "tried": capacity.tried})
        if capacity.report is not None:
            say(capacity.report.table() + "\n")
    return reports


def _run_all(run: CommandRun, say) -> list[dict]:
    namespace = run.namespace
    rates = _rates(namespace.rates) if namespace.rates else [None]
    wants_log = bool(namespace.plot_lanes or namespace.trace_steps)
    reports, charted = [], {}
    for policy in run.policies:
        for rate in rates:
            requests = run.requests if rate is None else at_rate(run.requests, rate)
            log = StepLog(run.model, *run.window) if wants_log and not reports else None
            offered = mean_rate(requests)
            report = run.run(policy, requests, log, f"{policy} at {offered:.3g} requests/s")
            say(report.table() + "\n")
            content = {**report.to_json(), "offered_rate": offered}
            reports.append(content)
            charted.setdefault(policy, []).append((offered, content))
            if log is not None and namespace.trace_steps:
                log.write(namespace.trace_steps)
                say(f"steps in {namespace.trace_steps}")
            if log is not None and namespace.plot_lanes:
                from scheduler.simulator.plots import plot_lanes

                plot_lanes(log, namespace.plot_lanes, f"{report.label} on {run.machine.name}")
                say(f"lanes in {namespace.plot_lanes}")
    if namespace.plot_latency:
        from scheduler.simulator.plots import plot_latency_over_load

        plot_latency_over_load(charted, namespace.plot_latency)
        say(f"latency in {namespace.plot_latency}")
    return reports


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.simulate") -> int:
    parser = build_parser(prog)
    namespace = parser.parse_args(argv)
    say = (lambda text: None) if namespace.json == "-" else print
    try:
        run = CommandRun(namespace)
        machine, num = run.machine, len(run.requests)
        say(f"machine   {machine.name} ({machine.source})")
        say(f"model     {run.spec.name}, {run.spec.weight_bytes / 1e9:.2f} GB of weights read a step")
        say(f"trace     {namespace.trace}: {num} requests at {mean_rate(run.requests):.3g}/s\n")
        reports = _find_rates(run, say) if namespace.find_max_rate else _run_all(run, say)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    content = json.dumps({"machine": machine.name, "machine_source": machine.source, "model": run.spec.name,
                          "trace": namespace.trace, "seed": namespace.seed, "runs": reports}, indent=1)  # fmt: skip
    if namespace.json == "-":
        print(content)
    elif namespace.json:
        with open(namespace.json, "w", encoding="utf-8") as file:
            file.write(content + "\n")
        print(f"numbers in {namespace.json}", file=sys.stderr)
    return 0
