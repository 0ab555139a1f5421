"""This engine and its peers in turn on the same model file, threads and prompts: one table, tokens a second.

    python -m bench.peers.compare --model model.gguf
    python -m bench.peers.compare --model model.gguf --python llama_cpp=../peers/bin/python --json table.json

Each engine lives in its own process, which is stopped (SIGSTOP) while another one runs, so that none disturbs
another with its threads. The engines take turns (A B C A B C ...) and the median of --repeats is printed, so a
drift of the machine falls on all of them alike. A percentage is the share of this machine's limit for that
column (bench/peers/limits.py). An engine that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.peers import limits
from bench.peers.workload import DEFAULT_COLUMNS, WORKLOADS, Workload

ENGINES = {"partita": "Partita", "llama_cpp": "llama.cpp", "openvino": "OpenVINO GenAI"}
ROOT = Path(__file__).resolve().parents[2]


class EngineFailed(Exception):
    """The engine's process said why; the text is for the user."""


class EngineProcess:
    """A bench.peers.worker that runs only while it is being measured."""

    def __init__(self, name: str, python: str, arguments: list[str], log: Path):
        self.name = name
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", "bench.peers.worker", name, *arguments],
                cwd=ROOT,
                env=dict(
                    os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._log = log
        loaded = self._receive()
        self.version: str = loaded["version"]
        self.load_s: float = loaded["load_s"]
        self.peak_resident_bytes = 0
        self._pause()

    def measure(self, workload: Workload, seed: int) -> float:
        """Tokens a second of one run. Raises EngineFailed with what the process said."""
        measured = self._ask({"workload": dataclasses.asdict(workload), "seed": seed})
        self.peak_resident_bytes = measured["peak_resident_bytes"]
        return measured["tokens_per_s"]

    def top_logprobs(self, prompt: list[int]) -> list[tuple[int, float]]:
        """The most likely next tokens with their log probabilities. Raises EngineFailed."""
        return [(token, logprob) for token, logprob in self._ask({"prompt": prompt})["top_logprobs"]]

    def close(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, request: dict) -> dict:
        os.kill(self._process.pid, signal.SIGCONT)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        try:
            return self._receive()
        finally:
            self._pause()

    def _pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def _receive(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            raise EngineFailed("its process ended: " + " | ".join(tail))
        message = json.loads(line)
        if "missing" in message:
            raise EngineFailed(f"not installed ({message['missing']})")
        if "error" in message:
            raise EngineFailed(message["error"])
        return message


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--columns", nargs="+", choices=WORKLOADS, default=list(DEFAULT_COLUMNS))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each cell; the median is printed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-dtype", choices=["bf16", "int8"], default="bf16", help="KV cache of all engines")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter of the virtual environment that holds an engine (default: this one)",
    )
    parser.add_argument("--int8-gops", type=float, help="machine limit, instead of measuring it")
    parser.add_argument("--bandwidth-gb-s", type=float, help="machine limit, instead of measuring it")
    parser.add_argument("--json", type=Path, help="also write the table, every single run and the machine here")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "peers", help="stderr of each engine")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--repeats and --threads: wanted positive numbers")
    if not Path(arguments.model).is_file():
        parser.error(f"--model: no file {arguments.model}")
    arguments.model = str(Path(arguments.model).resolve())
    arguments.python = dict(pair.split("=", 1) for pair in arguments.python)
    if unknown := set(arguments.python) - set(ENGINES):
        parser.error(f"--python: unknown engine {', '.join(unknown)}")
    return arguments


def machine_peaks(arguments: argparse.Namespace) -> limits.MachinePeaks:
    if arguments.int8_gops and arguments.bandwidth_gb_s:
        # A bf16 dot product does half the multiplies of an int8 one in a vector of the same width.
        return limits.MachinePeaks(arguments.int8_gops, arguments.int8_gops / 2, arguments.bandwidth_gb_s)
    return limits.measure_peaks(arguments.threads)


def start_engines(arguments: argparse.Namespace, vocab_size: int) -> tuple[list[EngineProcess], dict[str, str]]:
    """The engines that loaded the model, and for each of the others the reason why it did not."""
    arguments.logs.mkdir(parents=True, exist_ok=True)
    worker_arguments = ["--model", arguments.model, "--threads", str(arguments.threads)]
    worker_arguments += ["--kv-dtype", arguments.kv_dtype, "--vocab-size", str(vocab_size)]
    engines, left_out = [], {}
    for name in arguments.engines:
        print(f"loading {ENGINES[name]} ...", file=sys.stderr)
        try:
            python = arguments.python.get(name, sys.executable)
            engines.append(EngineProcess(name, python, worker_arguments, arguments.logs / f"{name}.log"))
        except EngineFailed as reason:
            left_out[name] = str(reason)
    return engines, left_out


def run_in_turn(
    engines: list[EngineProcess], columns: list[str], repeats: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Tokens a second of every run: {engine: {column: [...]}}, and what failed."""
    runs: dict[str, dict[str, list[float]]] = {engine.name: {column: [] for column in columns} for engine in engines}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        for column in columns:
            for engine in engines:
                if f"{engine.name}/{column}" in failed:
                    continue
                try:
                    tokens_per_s = engine.measure(WORKLOADS[column], seed=repeat)
                except EngineFailed as reason:
                    failed[f"{engine.name}/{column}"] = str(reason)
                    continue
                runs[engine.name][column].append(tokens_per_s)
                progress = f"[{repeat + 1}/{repeats}] {WORKLOADS[column].title:20} {ENGINES[engine.name]:16}"
                print(f"{progress} {tokens_per_s:8.0f} tok/s", file=sys.stderr)
    return runs, failed


def print_table(columns: list[str], rows: dict[str, dict[str, float]], limit: dict[str, float]) -> None:
    """Markdown; a row an engine, a cell `tokens a second, share of the limit`."""

    def figure(value: float) -> str:
        return f"{value:.0f}" if value >= 20 else f"{value:.1f}"

    def cell(column: str, value: float | None) -> str:
        return f"{figure(value)} ({value / limit[column]:.0%})" if value else "-"

    header = ["tok/s (share of the limit)", *(WORKLOADS[column].title for column in columns)]
    lines = [header, ["---"] * len(header)]
    lines += [[ENGINES[name], *(cell(column, row.get(column)) for column in columns)] for name, row in rows.items()]
    lines.append(["limit of this machine", *(figure(limit[column]) for column in columns)])
    peers = {name: row for name, row in rows.items() if name != "partita"}
    if "partita" in rows and peers:
        ratios = []
        for column in columns:
            best = max((row[column] for row in peers.values() if row.get(column)), default=None)
            own = rows["partita"].get(column)
            ratios.append(f"{own / best:.2f}x" if own and best else "-")
        lines.append(["Partita / best peer", *ratios])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")


def describe_machine() -> dict[str, object]:
    cpu_model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu_model = names[0] if names else cpu_model
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu_model,
        "cores": len(os.sched_getaffinity(0)),
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    arguments = parse_arguments()
    model = limits.ModelCost.from_checkpoint(arguments.model)
    peaks = machine_peaks(arguments)
    engines, left_out = start_engines(arguments, model.vocab_size)
    try:
        runs, failed = run_in_turn(engines, arguments.columns, arguments.repeats)
    finally:
        for engine in engines:
            engine.close()

    limit = {
        column: limits.limit_tokens_per_s(WORKLOADS[column], model, peaks, arguments.kv_dtype)
        for column in arguments.columns
    }
    medians = {
        name: {column: statistics.median(values) for column, values in row.items() if values}
        for name, row in runs.items()
    }
    machine = describe_machine()
    print(f"{model.name}, {Path(arguments.model).name}, {arguments.threads} threads, KV {arguments.kv_dtype}, ", end="")
    print(f"median of {arguments.repeats}; {machine['cpu']}, {machine['date']}, commit {machine['commit']}")
    print(f"limit from {peaks.int8_gops:.0f} int8 GOP/s, {peaks.attention_gflops:.0f} attention GFLOP/s, ", end="")
    print(f"{peaks.bandwidth_gb_s:.1f} GB/s\n")
    print_table(arguments.columns, medians, limit)
    for engine in engines:
        resident_mb = engine.peak_resident_bytes / 1e6
        print(f"{engine.version}: loaded in {engine.load_s:.1f} s, at most {resident_mb:.0f} MB resident")
    for where, reason in {**left_out, **failed}.items():
        print(f"{where}: {reason}")
    if arguments.json:
        result = {
            "machine": machine,
            "peaks": dataclasses.asdict(peaks),
            "model": dataclasses.asdict(model),
            "settings": {"threads": arguments.threads, "kv_dtype": arguments.kv_dtype, "repeats": arguments.repeats},
            "engines": {
                e.name: {"version": e.version, "load_s": e.load_s, "peak_resident_bytes": e.peak_resident_bytes}
                for e in engines
            },
            "limit_tokens_per_s": limit,
            "median_tokens_per_s": medians,
            "runs_tokens_per_s": runs,
            "left_out": {**left_out, **failed},
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if left_out or failed else 0


if __name__ == "__main__":
    sys.exit(main())
