"""Ways to share the chip between prompts and decodes, on the real engine under one open-loop load of chats and long prompts.

    partita calibrate
    python -m bench.serve.arrangements [--configurations default-128,layer,...] [--load 0.7] [--duration 25] [--repeats 2]
                                       [--http]

First the capacity is measured: what `default` at its largest budget answers when everything waits at once. Then every
configuration gets the same Poisson trace at --load of it, in a new random order in every repeat, because the machine is
never quiet for long; `others` is the share of it that other processes used meanwhile. A line per configuration: the median
over repeats. Then ratios to the best decode-first chunked prefill: of the `default-N` whose throughput is within --equal of
their best, the one with the lowest P99 TPOT. The last line is JSON. Targets of the chats are multiples of what one of them
alone takes, unless given in milliseconds. With --http all of it goes through the real server (http_loop.py).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from bench.serve.http_loop import HttpLoop
from bench.serve.open_loop import LoadRequest, OpenLoop, RequestClass, draw_trace, summarise
from bench.serve.other_load import OtherLoad, wait_until_quiet
from runtime.calibrate import cpu_name
from runtime.engine_args import EngineArgs
from runtime.engine_loader import calibrated_model, load_model

CHAT_PROMPT, CHAT_OUTPUT = (30, 200), (30, 120)
LONG_PROMPT, LONG_OUTPUT = (1000, 3000), (10, 50)
BUDGETS = (64, 128, 256, 512)

# Name -> flags. The budget of a step is the frame's where prompts do not go by tokens.
CONFIGURATIONS: dict[str, dict] = {
    **{f"default-{budget}": {"max_num_batched_tokens": budget} for budget in BUDGETS},
    "prefill-first": {"policy": "prefill-first"},
    "fastgen": {"policy": "fastgen"},
    "layer": {"prefill": "layer"},
    "operator": {"prefill": "operator"},
    "lanes-50-50": {"lanes": "50:50"},
    "lanes-50-50-operator": {"lanes": "50:50", "prefill": "operator"},
    "lanes-100-100": {"lanes": "100:100"},
    "semi-pd": {"policy": "semi-pd"},
    "nexus": {"policy": "nexus"},
    "flowprefill": {"policy": "flowprefill"},
    "nano-2": {"nano_batches": "2"},
    "arbitrate": {"policy": "arbitrate"},
}
BASELINES = tuple(f"default-{budget}" for budget in BUDGETS)
COLUMNS = (
    # (of the summary, heading, factor, digits)
    ("others", "others %", 1e2, 0),
    ("output_tokens_per_s", "tok/s", 1.0, 1),
    ("chat_ttft_p50_s", "chat TTFT p50", 1e3, 0),
    ("chat_ttft_p99_s", "p99 ms", 1e3, 0),
    ("long_ttft_p50_s", "long TTFT p50", 1e3, 0),
    ("long_ttft_p99_s", "p99 ms", 1e3, 0),
    ("tpot_p50_s", "TPOT p50", 1e3, 1),
    ("tpot_p99_s", "p99 ms", 1e3, 1),
    ("itl_p99_s", "ITL p99 ms", 1e3, 1),
    ("ttft_goodput_per_s", "TTFT good/s", 1.0, 3),
    ("goodput_per_s", "good/s", 1.0, 3),
    ("steps_decode", "decode", 1.0, 0),
    ("steps_mixed", "mixed", 1.0, 0),
    ("steps_prefill", "prefill", 1.0, 0),
    ("steps_part", "parts", 1.0, 0),
    ("pauses", "pauses", 1.0, 0),
    ("border_moves", "moves", 1.0, 0),
)


Start = Callable[[EngineArgs], OpenLoop | HttpLoop]  # of a configuration, for one load


def loop_starter(loaded, is_http: bool) -> Start:
    """What starts a configuration: an engine in this process over the loaded model, or a server in a child process."""
    return partial(HttpLoop, loaded.config.vocab_size) if is_http else partial(OpenLoop, loaded)


def measure(
    start: Callable[[EngineArgs], OpenLoop | HttpLoop],
    args: EngineArgs,
    requests: Sequence[LoadRequest],
    limit_s: float,
) -> dict[str, float]:
    warm_up = LoadRequest(0.0, RequestClass("warm-up", 1.0, (1, 1), (1, 1)), 600, 8)
    load = OtherLoad()
    line = summarise(start(args).run(requests, limit_s=limit_s, warm_up=warm_up))
    line["others"] = load.share()
    return line


def one_alone(start: Start, args: EngineArgs, kind: RequestClass) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds of a request of the class when nobody else is there: the median of five."""
    request = LoadRequest(0.0, kind, sum(kind.prompt) // 2, 16)
    lines = [measure(start, args, [request], 60.0) for _ in range(5)]
    return (
        statistics.median(line[f"{kind.name}_ttft_p50_s"] for line in lines),
        statistics.median(line["tpot_p50_s"] for line in lines),
    )


def capacity_of(start: Start, args: EngineArgs, classes: Sequence[RequestClass], num_requests: int) -> float:
    """Requests a second when all of them wait at once."""
    trace = draw_trace(classes, 1.0, 10.0 * num_requests, seed=7)[:num_requests]
    line = measure(start, args, [replace(request, arrival_s=0.0) for request in trace], 600.0)
    return line["requests"] / line["duration_s"]


def median_line(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(line[name] for line in lines) for name in lines[0] if all(name in o for o in lines)}


def run_all(
    start: Start, args: EngineArgs, names: Sequence[str], traces, *, limit_s: float, quiet_s: float, seed: int = 0,
    configurations: Mapping[str, dict] = CONFIGURATIONS,
) -> dict[str, dict]:  # fmt: skip
    """Configuration -> its median line; a trace per repeat, the configurations in a new order for each. quiet_s: how long
    to wait at most, before each run, for others to be done. Ctrl-C ends it with what there is."""
    rng = random.Random(seed)
    lines: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for repeat, trace in enumerate(traces):
            for name in rng.sample(list(names), len(names)):
                others_before = wait_until_quiet(quiet_s) if quiet_s else 0.0
                started_s = time.monotonic()
                line = measure(start, replace(args, **configurations[name]).check(), trace, limit_s)
                lines[name].append(line)
                took_s = time.monotonic() - started_s
                print(
                    f"# repeat {repeat + 1}  {name:<22} {took_s:5.1f} s  TPOT p99 {line['tpot_p99_s'] * 1e3:7.1f} ms  "
                    f"others {others_before:.0%}, then {line['others']:.0%}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("# interrupted: what follows is of the runs that ended", flush=True)
    return {name: median_line(of_name) for name, of_name in lines.items() if of_name}


def best_baseline(lines: dict[str, dict], equal: float) -> str | None:
    """The decode-first chunked prefill with the lowest P99 TPOT, among those as quick as the quickest of them."""
    known = [name for name in BASELINES if name in lines]
    if not known:
        return None
    quickest = max(lines[name]["output_tokens_per_s"] for name in known)
    within = [name for name in known if lines[name]["output_tokens_per_s"] >= (1.0 - equal) * quickest]
    return min(within, key=lambda name: lines[name]["tpot_p99_s"])


def print_table(lines: dict[str, dict]) -> None:
    print(f"{'configuration':<22}" + "".join(f" {heading:>13}" for _, heading, _, _ in COLUMNS))
    for name, line in lines.items():
        cells = [f"{line.get(key, math.nan) * factor:13.{digits}f}" for key, _, factor, digits in COLUMNS]
        print(f"{name:<22} " + " ".join(cells))


def print_ratios(lines: dict[str, dict], baseline: str) -> dict[str, dict[str, float]]:
    """Above 1 is better, in every column."""
    base, ratios = lines[baseline], {}
    print(f"\nto {baseline}, above 1 is better:")
    headings = ("throughput", "P99 TPOT", "ITL p99", "TTFT goodput", "goodput")
    print(f"{'configuration':<22}" + "".join(f" {heading:>13}" for heading in headings))
    for name, line in lines.items():
        ratios[name] = {
            "throughput": line["output_tokens_per_s"] / base["output_tokens_per_s"],
            "tpot_p99": base["tpot_p99_s"] / line["tpot_p99_s"],
            "itl_p99": base["itl_p99_s"] / line["itl_p99_s"],
            "ttft_goodput": line["ttft_goodput_per_s"] / max(base["ttft_goodput_per_s"], 1e-9),
            "goodput": line["goodput_per_s"] / max(base["goodput_per_s"], 1e-9),
        }
        print(f"{name:<22} " + " ".join(f"{value:13.2f}" for value in ratios[name].values()))
    return ratios


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--duration", type=float, default=25.0, help="of arrivals, seconds (default: 25)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.7, help="of capacity (default: 0.7)")
    parser.add_argument("--rate", type=float, help="requests a second, instead of --load of a measured capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--http",
        action="store_true",
        help="through a server in a child process, one per run, and a streaming client; else in this process",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.0,
        metavar="S",
        help="before each run, wait so long at most for a quiet machine",
    )


def load_calibrated(parser: argparse.ArgumentParser, args: EngineArgs):
    """The loaded model; without a machine file half of the configurations would not be what they are called."""
    loaded = load_model(args)
    if calibrated_model(loaded, args) is None:
        parser.error(f"no machine file for {loaded.name} on this machine: run `partita calibrate {args.model}` first")
    return loaded


def engine_args(namespace: argparse.Namespace) -> EngineArgs:
    return EngineArgs(
        model=namespace.model, kv_memory=namespace.kv_memory, max_model_len=namespace.max_model_len,
        max_num_seqs=namespace.max_num_seqs, enable_prefix_caching=False,
    ).check()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--configurations", default=",".join(name for name in CONFIGURATIONS if name != "nano-2"))
    parser.add_argument("--long-share", type=float, default=0.2, help="of the requests (default: 0.2)")
    parser.add_argument("--ttft-ms", type=float, help="target of chats (default: 8 times one alone)")
    parser.add_argument("--tpot-ms", type=float, help="target of all (default: 8 times one chat alone)")
    parser.add_argument("--long-ttft-ms", type=float, default=20_000.0, help="target of long prompts (default: 20 s)")
    parser.add_argument("--equal", type=float, default=0.03, help="throughputs so close are equal (default: 0.03)")
    namespace = parser.parse_args()
    names = [name for name in namespace.configurations.split(",") if name]
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown:
        parser.error(f"--configurations: got {', '.join(unknown)}, wanted some of {', '.join(CONFIGURATIONS)}")

    args = engine_args(namespace)
    start = loop_starter(load_calibrated(parser, args), namespace.http)
    chat = RequestClass("chat", 1.0 - namespace.long_share, CHAT_PROMPT, CHAT_OUTPUT)
    alone_ttft_s, alone_tpot_s = one_alone(start, args, chat)
    ttft_s = namespace.ttft_ms / 1e3 if namespace.ttft_ms else 8 * alone_ttft_s
    tpot_s = namespace.tpot_ms / 1e3 if namespace.tpot_ms else 8 * alone_tpot_s
    chat = replace(chat, ttft_s=ttft_s, tpot_s=tpot_s)
    long = RequestClass("long", namespace.long_share, LONG_PROMPT, LONG_OUTPUT, namespace.long_ttft_ms / 1e3, tpot_s)
    classes = [chat, long]
    largest = replace(args, max_num_batched_tokens=BUDGETS[-1])
    capacity = None if namespace.rate else capacity_of(start, largest, classes, 40)
    rate = namespace.rate or namespace.load * capacity
    traces = [draw_trace(classes, rate, namespace.duration, namespace.seed + i) for i in range(namespace.repeats)]
    print(
        f"{cpu_name()}; one chat alone: TTFT {alone_ttft_s * 1e3:.0f} ms, TPOT {alone_tpot_s * 1e3:.1f} ms; targets "
        f"{ttft_s * 1e3:.0f} ms, {tpot_s * 1e3:.1f} ms; {rate:.2f} requests/s"
        + (f" of {capacity:.2f}/s" if capacity else "")
        + f"; {[len(trace) for trace in traces]} requests, {namespace.long_share:.0%} long"
    )
    lines = run_all(
        start,
        args,
        names,
        traces,
        limit_s=6.0 * namespace.duration + 60.0,
        quiet_s=namespace.quiet,
        seed=namespace.seed,
    )
    print_table(lines)
    baseline = best_baseline(lines, namespace.equal)
    ratios = print_ratios(lines, baseline) if baseline else {}
    content = {
        "machine": cpu_name(), "is_http": namespace.http, "capacity_per_s": capacity, "rate_per_s": rate,
        "ttft_target_s": ttft_s, "tpot_target_s": tpot_s, "duration_s": namespace.duration, "repeats": namespace.repeats,
        "num_requests": [len(trace) for trace in traces], "baseline": baseline, "lines": lines, "ratios": ratios,
    }  # fmt: skip
    print(json.dumps(content))


if __name__ == "__main__":
    main()
