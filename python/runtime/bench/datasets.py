"""Where a benchmark's prompts come from: random tokens of a given length, a file of prompts or conversations, or a trace's
lengths and times."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DATASETS = ("random", "sharegpt", "custom", "trace")


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    prompt: str | list[int]  # a text, or token ids
    num_prompt_tokens: int | None  # None where only the server can tell
    num_output_tokens: int
    arrival_s: float | None = None  # of a trace; None: the load decides


def add_dataset_arguments(
    parser: argparse.ArgumentParser, *, num_prompts: int, input_len: int, output_len: int
) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--num-prompts", type=int, default=num_prompts, metavar="N", help=f"(default: {num_prompts})")
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    group.add_argument(
        "--dataset-path", "--dataset", metavar="FILE",
        help='sharegpt: JSON as ShareGPT has it; custom: JSON lines with "prompt" and, if wanted, "output_tokens"; '
        "trace: what `partita simulate --trace` reads",
    )  # fmt: skip
    group.add_argument("--trace-start", type=float, default=0.0, metavar="S", help="slice of a trace (default: 0)")
    group.add_argument("--trace-duration", type=float, metavar="S", help="(default: to its end, or --num-prompts)")
    group.add_argument(
        "--trace-max-len", type=int, metavar="N", help="cut prompt + answer to N tokens, the answer to N / 4 at most"
    )
    group.add_argument(
        "--random-input-len", "--input-len", type=int, default=input_len, metavar="N", help=f"(default: {input_len})"
    )
    group.add_argument(
        "--random-output-len", "--output-len", type=int, default=None, metavar="N",
        help=f"tokens per answer (default: {output_len}; of the dataset where it says)",
    )  # fmt: skip
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R",
        help="lengths are drawn from [len * (1 - R), len * (1 + R)] (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts share (default: 0)"
    )
    group.set_defaults(default_output_len=output_len)


def check_dataset_arguments(namespace: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    for name in ("num_prompts", "random_input_len"):
        if getattr(namespace, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(namespace, name)}")
    if namespace.random_output_len is not None and namespace.random_output_len < 1:
        raise ValueError(f"--random-output-len must be at least 1, got {namespace.random_output_len}")
    if not 0 <= namespace.random_range_ratio < 1:
        raise ValueError(f"--random-range-ratio must be at least 0 and below 1, got {namespace.random_range_ratio}")
    if namespace.random_prefix_len < 0:
        raise ValueError(f"--random-prefix-len must be at least 0, got {namespace.random_prefix_len}")
    if (namespace.dataset_name == "random") != (namespace.dataset_path is None):
        raise ValueError("--dataset-path is for --dataset-name sharegpt, custom or trace, and they need it")
    if namespace.trace_max_len is not None and namespace.trace_max_len < 8:
        raise ValueError(f"--trace-max-len must be at least 8, got {namespace.trace_max_len}")


def make_prompts(namespace: argparse.Namespace, token_ids: Callable[[], Sequence[int]], seed: int) -> list[BenchPrompt]:
    """The prompts that the flags describe. ``token_ids()`` gives the ids that random prompts are drawn from."""
    generator = random.Random(seed)
    if namespace.dataset_name == "random":
        return _random_prompts(namespace, list(token_ids()), generator)
    if namespace.dataset_name == "trace":
        return _trace_prompts(namespace, list(token_ids()), generator)
    read = _read_sharegpt if namespace.dataset_name == "sharegpt" else _read_custom
    found = read(namespace.dataset_path, namespace)
    if not found:
        raise ValueError(f"{namespace.dataset_path} holds no prompt")
    generator.shuffle(found)
    return [found[i % len(found)] for i in range(namespace.num_prompts)]  # oversampled when the file is short


def _random_prompts(namespace, ids: list[int], generator: random.Random) -> list[BenchPrompt]:
    ratio = namespace.random_range_ratio
    output_len = namespace.random_output_len or namespace.default_output_len

    def draw(length: int) -> int:
        return max(1, generator.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))

    prefix = generator.choices(ids, k=namespace.random_prefix_len)
    prompts = []
    for _ in range(namespace.num_prompts):
        prompt = prefix + generator.choices(ids, k=draw(namespace.random_input_len))
        prompts.append(BenchPrompt(prompt, len(prompt), draw(output_len)))
    return prompts


def _trace_prompts(namespace, ids: list[int], generator: random.Random) -> list[BenchPrompt]:
    """Random tokens of the trace's lengths at its times; blocks with equal hash ids hold equal tokens."""
    from scheduler.simulator.setup import load_requests

    requests = load_requests(
        namespace.dataset_path, start_s=namespace.trace_start, duration_s=namespace.trace_duration,
        num=namespace.num_prompts, seed=namespace.seed,
    )  # fmt: skip
    limit, prompts = namespace.trace_max_len, []
    for request in requests:
        num_prompt, num_output = request.num_prompt_tokens, request.num_output_tokens
        if limit is not None:
            num_output = min(num_output, limit // 4)
            num_prompt = min(num_prompt, limit - num_output)
        prompt: list[int] = []
        for block in request.hash_ids:
            prompt += random.Random(block).choices(ids, k=request.block_tokens)
        prompt += generator.choices(ids, k=max(0, num_prompt - len(prompt)))
        prompts.append(BenchPrompt(prompt[:num_prompt], num_prompt, num_output, request.arrival_s))
    return prompts


def _read_sharegpt(path: str, namespace) -> list[BenchPrompt]:
    """The first question of each conversation, the answer as long as the recorded one (four characters a token)."""
    with open(path, encoding="utf-8") as file:
        conversations = json.load(file)
    found = []
    for conversation in conversations:
        turns = conversation.get("conversations") or conversation.get("conversation") or []
        if len(turns) < 2:
            continue
        question, answer = (str(turn.get("value", turn.get("content", ""))) for turn in turns[:2])
        if len(question) >= 4 and len(answer) >= 4:
            found.append(BenchPrompt(question, None, namespace.random_output_len or max(1, len(answer) // 4)))
    return found


def _read_custom(path: str, namespace) -> list[BenchPrompt]:
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry: dict[str, Any] = json.loads(line)
                prompt = entry["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}:{number} must be a JSON object with "prompt"') from None
            length = namespace.random_output_len or entry.get("output_tokens") or namespace.default_output_len
            found.append(BenchPrompt(prompt, len(prompt) if isinstance(prompt, list) else None, int(length)))
    return found
