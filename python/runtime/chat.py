"""``python -m runtime.chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from runtime.engine_args import EngineArgs, parse_or_exit
from runtime.sampling_flags import add_sampling_arguments, sampling_from

HELP = """/reset          forget the conversation
/system [TEXT]  set the system message (nothing: remove it), and forget the conversation
/retry          another answer to the last message
/stats          tokens and speed of the last answer
/help           this list
/quit           end (Ctrl-D does too); Ctrl-C stops an answer"""


def build_parser(prog: str = "python -m runtime.chat") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Talks to a model in the terminal.", epilog="in the chat:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser, max_tokens=None)
    EngineArgs.add_arguments(parser)
    return parser


class Conversation:
    """The messages so far, and the next answer to them."""

    def __init__(self, llm, sampling, system: str | None = None, out=None) -> None:
        self.llm = llm
        self.sampling = sampling
        self.system = system
        self.out = out or sys.stdout
        self.messages: list[dict[str, str]] = []
        self.last_stats = "no answer yet"

    def reset(self) -> None:
        self.messages = []

    def all_messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def ask(self, text: str) -> None:
        """Streams an answer and keeps it; one that does not fit the context is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except ValueError:
            self.messages.pop()
            raise

    def retry(self) -> None:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            self.out.write("nothing to retry\n")
            return
        self._answer()

    def _answer(self) -> None:
        pieces: list[str] = []
        num_tokens, started_s, first_s = 0, time.monotonic(), None
        stream = self.llm.stream_chat(self.all_messages(), self.sampling)
        try:
            for piece in stream:
                first_s = first_s or time.monotonic()
                num_tokens += len(piece.token_ids)
                pieces.append(piece.text)
                self.out.write(piece.text)
                self.out.flush()
        except KeyboardInterrupt:
            self.out.write(" [stopped]")
        finally:
            stream.close()  # aborts what still runs
        self.out.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        now = time.monotonic()
        rate = (num_tokens - 1) / (now - first_s) if first_s and num_tokens > 1 else 0.0
        first_ms = ((first_s or now) - started_s) * 1e3
        self.last_stats = f"{num_tokens} tokens, first after {first_ms:.0f} ms, then {rate:.1f} tok/s"


def run(conversation: Conversation, read_line: Callable[[str], str]) -> None:
    """The loop of the terminal, until /quit or the end of input."""
    out = conversation.out
    while True:
        try:
            line = read_line("> ").strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("\n(/quit or Ctrl-D ends)\n")
            continue
        if not line:
            continue
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        elif command == "/reset":
            conversation.reset()
            out.write("forgotten\n")
        elif command == "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            out.write("system message set\n" if conversation.system else "system message removed\n")
        elif command == "/stats":
            out.write(conversation.last_stats + "\n")
        elif command == "/help":
            out.write(HELP + "\n")
        elif command.startswith("/") and command != "/retry":
            out.write(f"unknown command {command}\n{HELP}\n")
        else:
            try:
                conversation.retry() if command == "/retry" else conversation.ask(line)
            except (ValueError, RuntimeError) as error:
                out.write(f"error: {error}\n")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m runtime.chat", load_engine=None) -> int:
    parser = build_parser(prog)
    namespace, args = parse_or_exit(parser, argv)
    try:
        sampling_from(namespace)  # a bad flag costs no load
    except (ValueError, TypeError) as error:
        parser.error(str(error))

    from runtime.llm import LLM

    try:
        with LLM.from_engine_args(args, load_engine) as llm:
            sampling = sampling_from(namespace, llm.default_sampling)
            conversation = Conversation(llm, sampling, namespace.system)
            if sys.stdin.isatty():
                import readline  # noqa: F401  (line editing and history for input())

                print(f"{args.shown_model_name()}, context {llm.max_model_len} tokens. /help lists the commands.")
                run(conversation, input)
            else:
                run(conversation, _read_piped_line)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read_piped_line(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


if __name__ == "__main__":
    sys.exit(main())
