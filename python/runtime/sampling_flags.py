"""SamplingParams as command-line flags, shared by generate and chat."""

from __future__ import annotations

import argparse

from runtime.sampling_params import SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Unset flags leave the model's own defaults alone. ``max_tokens`` None: the rest of the context."""
    shown = "the rest of the context" if max_tokens is None else str(max_tokens)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"(default: {shown})")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's, else 1)")
    group.add_argument("--top-p", type=float, metavar="P", help="above 0 and at most 1")
    group.add_argument("--top-k", type=int, metavar="K", help="0 = all")
    group.add_argument("--min-p", type=float, metavar="P", help="0 to 1, relative to the most likely token")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="-2 to 2")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1 = none")
    group.add_argument("--sampling-seed", type=int, metavar="N", help="makes the draw reproducible by itself")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the output; may be repeated")
    group.add_argument("--min-tokens", type=int, default=0, metavar="N")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")


def sampling_from(namespace: argparse.Namespace, defaults: dict | None = None, **more) -> SamplingParams:
    """Raises ValueError or TypeError naming the field."""
    names = (
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(namespace, name)) is not None}
    return SamplingParams(
        **{
            **(defaults or {}),
            **given,
            "max_tokens": namespace.max_tokens,
            "min_tokens": namespace.min_tokens,
            "seed": namespace.sampling_seed,
            "stop": tuple(namespace.stop),
            "ignore_eos": namespace.ignore_eos,
            **more,
        }
    )
