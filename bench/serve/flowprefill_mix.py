"""Time to first token where short prompts in a hurry meet long ones that can wait: orders and cuts of prefill compared.

    partita calibrate
    python -m bench.serve.flowprefill_mix [--mixes 0.5,0.75,0.9] [--load 0.85] [--duration 20] [--repeats 2] [--http]

A mix is the share of short requests. For each the rate is --load of the capacity that `fcfs` (prompts whole, in order of
arrival) shows when everything waits at once. TTFT goodput counts requests whose first token came in time. The worst mix is
that in which `fcfs` keeps the smallest share of its targets. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from bench.serve.arrangements import (
    add_engine_arguments,
    capacity_of,
    engine_args,
    load_calibrated,
    loop_starter,
    one_alone,
    run_all,
)
from bench.serve.open_loop import RequestClass, draw_trace
from runtime.calibrate import cpu_name

FRAME_TOKENS = 3072
CONFIGURATIONS: dict[str, dict] = {
    "fcfs": {"policy": "prefill-first", "max_num_batched_tokens": FRAME_TOKENS},
    **{f"chunks-{budget}": {"max_num_batched_tokens": budget} for budget in (128, 256, 512, 1024)},
    "operator": {"prefill": "operator", "max_num_batched_tokens": FRAME_TOKENS},  # parts, in order of arrival
    "flowprefill": {"policy": "flowprefill", "max_num_batched_tokens": FRAME_TOKENS},
    "arbitrate": {"policy": "arbitrate", "max_num_batched_tokens": FRAME_TOKENS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.set_defaults(load=0.85, duration=20.0)
    parser.add_argument("--configurations", default=",".join(CONFIGURATIONS))
    parser.add_argument("--mixes", default="0.5,0.75,0.9", help="shares of short requests (default: 0.5,0.75,0.9)")
    parser.add_argument("--short-ttft-ms", type=float, help="target of the short (default: 5 times one alone)")
    parser.add_argument("--long-ttft-ms", type=float, help="target of the long (default: 10 times one alone)")
    parser.add_argument("--output-tokens", type=int, default=8, help="of an answer (default: 8)")
    namespace = parser.parse_args()
    names = [name for name in namespace.configurations.split(",") if name]
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown or "fcfs" not in names:
        parser.error(
            f"--configurations: got {namespace.configurations}, wanted fcfs and some of {', '.join(CONFIGURATIONS)}"
        )

    args = engine_args(namespace)
    start = loop_starter(load_calibrated(parser, args), namespace.http)
    output = (namespace.output_tokens, namespace.output_tokens)
    short, long = RequestClass("short", 0.0, (30, 150), output), RequestClass("long", 0.0, (2000, 3000), output)
    fcfs = replace(args, **CONFIGURATIONS["fcfs"])
    targets = {}
    for kind, given, factor in ((short, namespace.short_ttft_ms, 5), (long, namespace.long_ttft_ms, 10)):
        targets[kind.name] = given / 1e3 if given else factor * one_alone(start, fcfs, kind)[0]
    print(f"{cpu_name()}; TTFT targets: " + ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in targets.items()))

    content = {
        "machine": cpu_name(),
        "is_http": namespace.http,
        "targets_s": targets,
        "load": namespace.load,
        "mixes": {},
    }
    for share in (float(text) for text in namespace.mixes.split(",")):
        classes = [
            replace(short, weight=share, ttft_s=targets["short"]), replace(long, weight=1.0 - share, ttft_s=targets["long"])
        ]  # fmt: skip
        rate = namespace.rate or namespace.load * capacity_of(start, fcfs, classes, 24)
        traces = [draw_trace(classes, rate, namespace.duration, namespace.seed + i) for i in range(namespace.repeats)]
        print(f"\n{share:.0%} short: {rate:.2f} requests/s, {[len(trace) for trace in traces]} requests")
        lines = run_all(
            start, args, names, traces, limit_s=6.0 * namespace.duration + 60.0, quiet_s=namespace.quiet,
            seed=namespace.seed, configurations=CONFIGURATIONS,
        )  # fmt: skip
        base = lines["fcfs"]["ttft_goodput_per_s"]
        headings = ("others %", "kept %", "short %", "long %", "short p50 ms", "short p99 ms", "long p99 ms")
        print(f"{'configuration':<16}" + "".join(f" {h:>13}" for h in (*headings, "TTFT good/s", "to fcfs", "pauses")))
        for name, line in lines.items():
            line["to_fcfs"] = line["ttft_goodput_per_s"] / max(base, 1e-9)
            cells = [100 * line["others"], 100 * line["ttft_attainment"]]
            cells += [100 * line.get(f"{kind}_ttft_attainment", 0.0) for kind in ("short", "long")]
            cells += [1e3 * line.get(key, 0.0) for key in ("short_ttft_p50_s", "short_ttft_p99_s", "long_ttft_p99_s")]
            digits = [f"{cell:13.0f}" for cell in cells]
            digits += [
                f"{line['ttft_goodput_per_s']:13.3f}",
                f"{line['to_fcfs']:13.2f}",
                f"{line.get('pauses', 0):13.0f}",
            ]
            print(f"{name:<16} " + " ".join(digits))
        content["mixes"][str(share)] = {"rate_per_s": rate, "lines": lines}
    worst = min(content["mixes"], key=lambda mix: content["mixes"][mix]["lines"]["fcfs"]["ttft_attainment"])
    content["worst_mix"] = worst
    print(f"\nthe worst mix for fcfs is {float(worst):.0%} short")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
