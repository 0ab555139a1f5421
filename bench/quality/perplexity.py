"""Perplexity of a text under each number format of activations and KV: what the formats cost in quality.

    python -m bench.quality.perplexity --text wiki.test.raw.gz
    python -m bench.quality.perplexity --text wiki.test.raw --tokens 16384 --configs fp32/fp32 int8/bf16 int8/int8:int4

A configuration is ACTIVATIONS/KV, KV as --kv-dtype takes it. The text is tokenised as a whole, without special
tokens, and cut into windows of --context tokens that do not overlap; every token of a window but the first is
predicted from those before it. Perplexity is exp(mean of -log p). The first column of losses is against the first
configuration; the second against the first one with the same activations, which is the price of the KV codec alone.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import sys
import time
from pathlib import Path

from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model
from runtime.loading.checkpoint import open_checkpoint
from runtime.loading.model_source import resolve_model
from runtime.scoring import Scorer
from runtime.tokenizer import Tokenizer

DEFAULT_CONFIGS = (
    "fp32/fp32",  # exact mode: the reference
    "int8/fp32",
    "int8/bf16",  # the default
    "int8/int8",
    "int8/int8:int4",
    "int8/int4",
    "int8/int4-plain",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    config: str  # activations/kv
    perplexity: float
    num_predictions: int
    tokens_per_s: float

    @property
    def activations(self) -> str:
        return self.config.split("/")[0]


def read_text(path: Path) -> str:
    """The whole file; a name that ends in .gz is unpacked."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def windows(token_ids: list[int], context: int) -> list[list[int]]:
    """Non-overlapping runs of `context` tokens; a rest too short to fill one is dropped, unless it is all there is."""
    full = [token_ids[start : start + context] for start in range(0, len(token_ids) - context + 1, context)]
    return full or [token_ids]


def score_config(config: str, model: str, texts: list[list[int]], threads: int | None) -> Score:
    """Loads the model in one configuration and scores every window."""
    activations, _, kv_dtype = config.partition("/")
    longest = max(len(text) for text in texts)
    arguments = EngineArgs(
        model=model, activations=activations, kv_dtype=kv_dtype, max_model_len=longest, threads=threads, max_num_seqs=1
    )
    scorer = Scorer(load_model(arguments.check()))
    total, num_predictions = 0.0, 0
    started = time.perf_counter()
    for number, text in enumerate(texts, 1):
        scores = scorer.score(text)
        total += math.fsum(scores)
        num_predictions += len(scores)
        if sys.stderr.isatty():
            perplexity = math.exp(-total / num_predictions)
            print(f"\r{config} window {number}/{len(texts)} perplexity {perplexity:.4f} ", end="", file=sys.stderr)
    seconds = time.perf_counter() - started
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return Score(config, math.exp(-total / num_predictions), num_predictions, sum(map(len, texts)) / seconds)


def losses(scores: list[Score]) -> list[tuple[float, float]]:
    """Of each score: relative loss against the first, and against the first with the same activations."""
    first_of: dict[str, float] = {}
    for score in scores:
        first_of.setdefault(score.activations, score.perplexity)
    return [(s.perplexity / scores[0].perplexity - 1, s.perplexity / first_of[s.activations] - 1) for s in scores]


def print_table(scores: list[Score]) -> None:
    print("| activations/KV | perplexity | against the first | of the KV codec alone | tok/s |")
    print("| -------------- | ---------- | ----------------- | --------------------- | ----- |")
    for score, (total_loss, codec_loss) in zip(scores, losses(scores)):
        line = f"| {score.config:14} | {score.perplexity:10.4f} | {total_loss:+17.2%} | {codec_loss:+21.2%} "
        print(f"{line}| {score.tokens_per_s:5.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, or one packed as .gz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--configs", nargs="+", default=list(DEFAULT_CONFIGS), metavar="ACTIVATIONS/KV")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--tokens", type=int, help="use only this many tokens of the text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the scores here")
    arguments = parser.parse_args()
    if arguments.context < 2:
        parser.error("--context: wanted at least 2 tokens")
    if wrong := [config for config in arguments.configs if config.count("/") != 1]:
        parser.error(f"--configs: got {wrong[0]}, wanted ACTIVATIONS/KV such as int8/bf16")

    path = resolve_model(arguments.model)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(path))
    token_ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=False, parse_special_tokens=False)
    texts = windows(token_ids[: arguments.tokens], arguments.context)
    print(f"{path.name}, {arguments.text.name}: {len(texts)} windows of {len(texts[0])} tokens\n")
    scores = [score_config(config, str(path), texts, arguments.threads) for config in arguments.configs]
    print_table(scores)
    result = {
        "model": path.name,
        "text": arguments.text.name,
        "context": arguments.context,
        "num_windows": len(texts),
        "scores": [dataclasses.asdict(score) for score in scores],
    }
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
