"""The console script ``partita``: one line per command, each imported only when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": ("runtime.serve", "serve a model over an OpenAI-compatible HTTP API, with a web chat"),
    "chat": ("runtime.chat", "talk to a model in the terminal"),
    "generate": ("runtime.generate", "complete one prompt or a file of prompts"),
    "bench": ("runtime.bench", "measure latency, throughput or a running server"),
    "simulate": ("runtime.simulate", "run a trace against the scheduler in virtual time"),
    "calibrate": ("runtime.calibrate", "measure this machine for the cost model"),
    "doctor": ("runtime.doctor", "what this machine has, and which kernels are chosen for it"),
}


def usage() -> str:
    lines = ["usage: partita <command> [options]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "`partita <command> --help` says more; `partita --version` prints the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        from runtime.serve import version

        print(version())
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"partita: unknown command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(command[0]).main(arguments[1:], prog=f"partita {arguments[0]}") or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
