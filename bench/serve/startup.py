"""How soon a user sees something: `import runtime`, and the first token of a server counted from its process's start.

    python -m bench.serve.startup [--model smollm2] [--repeats 5]

The first start of a model fills the cache folder and is printed apart; the median is over the warm starts after it.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.serve.server_process import ServerProcess, partita_command

LOG = Path(__file__).resolve().parents[2] / "build" / "serve.log"


def import_s(repeats: int) -> float:
    """Median seconds of `import runtime` beyond an empty interpreter's start."""

    def median_run_s(code: str) -> float:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    return median_run_s("import runtime") - median_run_s("pass")


def start_s(command: str) -> float:
    server = ServerProcess(command, LOG)
    try:
        return server.first_token_s()
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--flags", default="", help="more flags of runtime.serve, in one string")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    command = partita_command(arguments.model, arguments.flags)
    result = {"import_s": import_s(arguments.repeats), "first_start_s": start_s(command)}
    warm = [start_s(command) for _ in range(arguments.repeats)]
    result |= {"warm_start_s": statistics.median(warm), "warm_starts_s": warm}
    print(f"import runtime            {result['import_s']:6.3f} s")
    print(f"first token, first start  {result['first_start_s']:6.3f} s")
    print(f"first token, warm start   {result['warm_start_s']:6.3f} s (median of {len(warm)})")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
