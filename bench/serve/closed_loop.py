"""Output tokens a second over HTTP, closed loop: each client asks again as soon as it has its answer.

    python -m bench.serve.closed_loop
    python -m bench.serve.closed_loop --clients 1 8 32 --flags "--kv-dtype int8" --json closed_loop.json
    python -m bench.serve.closed_loop --command "python -m llama_cpp.server --model m.gguf --port {port}"

Starts the server, loads it with `runtime.bench serve` (random prompts, ignore_eos) for each number of clients in
turn, and prints one line each with the server's largest resident memory so far. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.serve.server_process import ServerProcess, partita_command

LOG = Path(__file__).resolve().parents[2] / "build" / "serve.log"


def load_server(server: ServerProcess, num_clients: int, num_prompts: int, seed: int, arguments) -> dict:
    """One run of `runtime.bench serve`; its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "runtime.bench", "serve", "--base-url", server.base_url]
        command += ["--num-prompts", str(num_prompts), "--max-concurrency", str(num_clients)]
        command += ["--input-len", str(arguments.input_len), "--output-len", str(arguments.output_len)]
        command += ["--ignore-eos", "--seed", str(seed), "--output-json", str(result)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"runtime.bench serve failed: {run.stderr.strip()[-500:]}")
        return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--flags", default="", help="more flags of runtime.serve, in one string")
    parser.add_argument("--command", help="another OpenAI-compatible server; {port} is filled in")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client in a run")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="runs per number of clients; the median is printed")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()

    server = ServerProcess(arguments.command or partita_command(arguments.model, arguments.flags), LOG)
    rows = []
    try:
        start_s = server.first_token_s()
        print(f"first token {start_s:.2f} s after the start of the process")
        print(f"{'clients':>7}  {'output tok/s':>12}  {'TTFT ms':>9}  {'TPOT ms':>8}  {'resident MB':>11}")
        for num_clients in arguments.clients:
            runs = [
                load_server(server, num_clients, num_clients * arguments.rounds, seed, arguments)
                for seed in range(arguments.repeats)
            ]
            row = {
                "clients": num_clients,
                "output_throughput": statistics.median(run["output_throughput"] for run in runs),
                "median_ttft_ms": statistics.median(run["median_ttft_ms"] for run in runs),
                "median_tpot_ms": statistics.median(run["median_tpot_ms"] for run in runs),
                "peak_resident_bytes": server.peak_resident_bytes(),
            }
            rows.append(row)
            print(
                f"{num_clients:7d}  {row['output_throughput']:12.1f}  {row['median_ttft_ms']:9.1f}  "
                f"{row['median_tpot_ms']:8.2f}  {row['peak_resident_bytes'] / 1e6:11.0f}"
            )
    finally:
        server.stop()
    result = {
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "start_to_first_token_s": start_s,
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
