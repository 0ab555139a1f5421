"""``partita bench latency|throughput|serve``: its flags and JSON keys are those of ``vllm bench``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "latency": "seconds for one batch, start to end, without a server",
    "throughput": "requests and tokens per second for many prompts at once, without a server",
    "serve": "time to first token, time per token and throughput of a running server",
}


def usage(prog: str) -> str:
    lines = [f"usage: {prog} <benchmark> [options]", "", "benchmarks:"]
    return "\n".join(lines + [f"  {name:<11} {text}" for name, text in BENCHMARKS.items()])


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.bench") -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(prog))
        return 0 if arguments else 2
    if arguments[0] not in BENCHMARKS:
        print(f"{prog}: unknown benchmark {arguments[0]!r}\n\n{usage(prog)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"runtime.bench.{arguments[0]}")
    return module.main(arguments[1:], prog=f"{prog} {arguments[0]}")
