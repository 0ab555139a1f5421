"""Other number formats at a real model's shape: this engine and llama.cpp on random weights, checked, then timed.

    python -m bench.peers.shapes --tokenizer model.gguf [--formats Q4_0 Q8_0 Q4_K_M BF16] [--python llama_cpp=PATH]

For each format a GGUF file of Llama-3.2-1B's shape is written (bench/peers/random_model.py; --tokenizer is any GGUF file
with a vocabulary of at most 128,256 tokens, such as the default model's), both engines load it, and their next-token
log probabilities after a short prompt are compared before anything is timed. Then they take turns as in
bench/peers/compare.py. The file (0.7 to 2.5 GB) is deleted again. The last line is JSON; the exit status is 1 when the
engines disagree or one of them failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.peers import compare, limits
from bench.peers.random_model import LLAMA_3_2_1B, MIXES, write_random_model
from bench.peers.workload import WORKLOADS

COLUMNS = ("prefill_512", "decode_x1_short", "decode_x8_short")
CHECK_PROMPT_TOKENS = 24
# Both engines round activations to 8 bits in blocks (llama.cpp of some formats in blocks of 256, this one of 32), so a
# log probability may differ by some hundredths of the logits' spread, which is 3 to 4.
TOLERANCE = 0.35


def disagreement(engines: list[compare.EngineProcess]) -> dict:
    """How far the engines' log probabilities lie apart over this engine's most likely next tokens."""
    prompt = [1000 + 37 * place for place in range(CHECK_PROMPT_TOKENS)]
    own, peer = (dict(engine.top_logprobs(prompt)) for engine in engines)
    differences = [abs(logprob - peer.get(token, -1e9)) for token, logprob in own.items()]
    greedy, peers_greedy = max(own, key=own.get), max(peer, key=peer.get)
    return {
        "largest_difference": max(differences),
        "mean_difference": statistics.fmean(differences),
        "greedy": [greedy, peers_greedy],
        # Where they choose differently, the two tokens must lie closer than the tolerance.
        "agrees": max(differences) <= TOLERANCE
        and (greedy == peers_greedy or peer[peers_greedy] - peer[greedy] <= TOLERANCE),
    }


def measure_format(arguments: argparse.Namespace, mix: str, peaks: limits.MachinePeaks, folder: Path) -> dict:
    path = folder / f"random_{mix.lower()}.gguf"
    begin = time.perf_counter()
    write_random_model(path, LLAMA_3_2_1B, mix, arguments.tokenizer)
    size_gb = path.stat().st_size / 1e9
    print(f"{path.name}: {size_gb:.2f} GB written in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    arguments.model = str(path)
    engines = []
    try:
        cost = limits.ModelCost.from_checkpoint(str(path))
        engines, failed = compare.start_engines(arguments, cost.vocab_size)
        result: dict = {"format": mix, "size_gb": size_gb, "failed": failed}
        if failed:
            return result
        try:
            result["check"] = disagreement(engines)
        except compare.EngineFailed as reason:
            return result | {"failed": {"check": str(reason)}}
        runs, result["failed"] = compare.run_in_turn(engines, arguments.columns, arguments.repeats)
    finally:
        for engine in engines:
            engine.close()
        path.unlink()
    if mix == "BF16":  # its matrices are multiplied by bf16 dots
        peaks = dataclasses.replace(peaks, int8_gops=peaks.attention_gflops)
    result["limit_tokens_per_s"] = limit = {
        column: limits.limit_tokens_per_s(WORKLOADS[column], cost, peaks, "bf16") for column in arguments.columns
    }
    result["median_tokens_per_s"] = medians = {
        name: {column: statistics.median(values) for column, values in row.items() if values}
        for name, row in runs.items()
    }
    result["runs_tokens_per_s"] = runs
    check = result["check"]
    print(f"\n{LLAMA_3_2_1B.name} shape, {mix}, {size_gb:.2f} GB, {arguments.threads} threads")
    print(
        f"log probabilities differ by {check['mean_difference']:.3f} (most {check['largest_difference']:.3f}), "
        f"greedy {check['greedy']}: {'agreement' if check['agrees'] else 'DISAGREEMENT'}"
    )
    compare.print_table(arguments.columns, medians, limit)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file whose tokenizer is borrowed")
    parser.add_argument("--formats", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--columns", nargs="+", choices=WORKLOADS, default=list(COLUMNS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="as in compare.py")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--logs", type=Path, default=compare.ROOT / "build" / "peers", help="stderr of each engine")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    arguments.python = dict(pair.split("=", 1) for pair in arguments.python)
    arguments.engines, arguments.kv_dtype = ["partita", "llama_cpp"], "bf16"
    peaks = limits.measure_peaks(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = [measure_format(arguments, mix, peaks, Path(folder)) for mix in arguments.formats]
    has_failed = False
    for result in results:
        for where, reason in result["failed"].items():
            print(f"{result['format']}, {where}: {reason}")
        has_failed |= bool(result["failed"]) or not result["check"]["agrees"]
    result = {"machine": compare.describe_machine(), "peaks": dataclasses.asdict(peaks), "formats": results}
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
