"""``python -m runtime.generate``: completes one prompt, streaming, or a file of prompts, in one batch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from runtime.engine_args import EngineArgs, parse_or_exit
from runtime.sampling_flags import add_sampling_arguments, sampling_from


def build_parser(prog: str = "python -m runtime.generate") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Completes one prompt, or every prompt of a file.",
        epilog=f'example: {prog} smollm2 --prompt "The sea is" --max-tokens 40 --temperature 0',
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", metavar="TEXT", help="one prompt; - reads it from standard input")
    group.add_argument(
        "--prompts-file", metavar="FILE",
        help='a prompt a line, or JSON lines: text, {"prompt": text}, {"prompt_token_ids": ids}, {"messages": [...]}',
    )  # fmt: skip
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=False,
        help="give each prompt to the chat template as a user's message (default: off)",
    )  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    group.add_argument("-n", "--num-outputs", type=int, default=1, metavar="N", help="outputs per prompt (default: 1)")
    group.add_argument(
        "--json", action="store_true", help="one JSON object a line on standard output, nothing else there"
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: of each token and the N most likely ones"
    )
    add_sampling_arguments(parser, max_tokens=256)
    EngineArgs.add_arguments(parser)
    return parser


def read_prompts(path: str) -> list[Any]:
    """A text, a mapping or a list of messages per line. Raises ValueError naming the line, OSError for the file."""
    prompts: list[Any] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\n")
            if not line.strip():
                continue
            if line[0] not in '"{' or path.endswith(".txt"):
                prompts.append(line)
                continue
            try:
                parsed = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not valid JSON: {error}") from None
            known = isinstance(parsed, str) or (
                isinstance(parsed, dict) and any(key in parsed for key in ("prompt", "prompt_token_ids", "messages"))
            )
            if not known:
                raise ValueError(f"{path}:{number} must be a text or hold prompt, prompt_token_ids or messages")
            prompts.append(parsed)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _as_prompt(llm, prompt: Any, namespace: argparse.Namespace):
    """What LLM reads: a text, token ids or what the chat template makes of messages."""
    if isinstance(prompt, dict) and "messages" in prompt:
        messages = prompt["messages"]
    elif namespace.chat and not (isinstance(prompt, dict) and "prompt_token_ids" in prompt):
        text = prompt["prompt"] if isinstance(prompt, dict) else prompt
        messages = [{"role": "user", "content": text}]
        if namespace.system:
            messages.insert(0, {"role": "system", "content": namespace.system})
    else:
        return prompt
    return llm.read_conversation(messages)


def _as_json(request) -> str:
    answer = {
        "prompt": request.prompt,
        "num_prompt_tokens": len(request.prompt_token_ids),
        "num_cached_tokens": request.num_cached_tokens,
        "outputs": [
            {
                "index": output.index, "text": output.text, "token_ids": output.token_ids,
                "finish_reason": output.finish_reason, "stop_reason": output.stop_reason,
                **({} if output.logprobs is None else {
                    "cumulative_logprob": output.cumulative_logprob,
                    "logprobs": [
                        {str(token_id): entry.logprob for token_id, entry in position.items()}
                        for position in output.logprobs
                    ],
                }),
            }
            for output in request.outputs
        ],
    }  # fmt: skip
    return json.dumps(answer, ensure_ascii=False)


def _stream(llm, prompt, sampling, out) -> None:
    started_s = time.monotonic()
    num_tokens, first_s = 0, None
    for piece in llm.stream(prompt, sampling):
        first_s = first_s or time.monotonic()
        num_tokens += len(piece.token_ids)
        out.write(piece.text)
        out.flush()
    out.write("\n")
    now = time.monotonic()
    rate = (num_tokens - 1) / (now - first_s) if first_s and num_tokens > 1 else 0.0
    first_ms = ((first_s or now) - started_s) * 1e3
    print(f"[{num_tokens} tokens, first after {first_ms:.0f} ms, then {rate:.1f} tok/s]", file=sys.stderr)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.generate", load_engine=None) -> int:
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    if (namespace.prompt is None) == (namespace.prompts_file is None):
        parser.error("give either --prompt or --prompts-file")
    if namespace.logprobs is not None and not namespace.json:
        parser.error("--logprobs is only shown with --json")
    try:
        if namespace.prompts_file:
            wanted = read_prompts(namespace.prompts_file)
        else:
            wanted = [sys.stdin.read() if namespace.prompt == "-" else namespace.prompt]
        sampling_from(namespace, n=namespace.num_outputs, logprobs=namespace.logprobs)  # a bad flag costs no load
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))

    from runtime.llm import LLM

    try:
        with LLM.from_engine_args(args, load_engine) as llm:
            sampling = sampling_from(
                namespace, llm.default_sampling, n=namespace.num_outputs, logprobs=namespace.logprobs
            )
            prompts = [_as_prompt(llm, prompt, namespace) for prompt in wanted]
            if len(prompts) == 1 and namespace.num_outputs == 1 and not namespace.json:
                _stream(llm, prompts[0], sampling, sys.stdout)
                return 0
            for request in llm.generate(prompts, sampling, use_tqdm=True):
                if namespace.json:
                    print(_as_json(request), flush=True)
                    continue
                for output in request.outputs:
                    print(f"--- {request.prompt!r}\n{output.text}", flush=True)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
