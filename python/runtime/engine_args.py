"""Everything that shapes an engine, as one dataclass and as command-line flags shared by every command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

DEFAULT_MODEL = "smollm2"
ACTIVATIONS = ("int8", "bf16", "fp16", "fp32")
KV_CODECS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int4-plain")
PAGE_SIZES = (16, 32, 64, 128)
NANO_BATCHES = ("off", "auto", "2", "3", "4")

_BYTE_UNITS = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30, "ti": 2**40, "tib": 2**40,
}  # fmt: skip


def parse_memory(text: str | int | float) -> int | float:
    """Reads an amount of memory: an int is bytes, a float in (0, 1] a share of what is free at start.

    ``"4GiB"`` -> 4294967296, ``"500MB"`` -> 500000000, ``"0.5"`` -> 0.5, ``"50%"`` -> 0.5.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise TypeError(f"kv_memory must be bytes, a size such as 4GiB or a share such as 0.5, got {text!r}")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e\+?([0-9]{1,2}))?\s*(%|[a-zA-Z]*)\s*", str(text))
    wanted = "bytes, a size such as 4GiB or a share of free memory such as 0.5"
    if match is None:
        raise ValueError(f"kv_memory must be {wanted}, got {text!r}")
    number = float(match[1]) * 10 ** int(match[2] or 0)
    unit = match[3].lower()
    if unit == "%":
        number, unit = number / 100, ""
        is_share = True
    else:
        is_share = unit == "" and (number < 1 or ("." in match[1] and number == 1))
    if is_share:
        if not 0 < number <= 1:
            raise ValueError(f"kv_memory must be a share above 0 and at most 1, got {text!r}")
        return number
    if unit not in _BYTE_UNITS:
        raise ValueError(f"kv_memory must be {wanted}; the unit {match[3]!r} in {text!r} is unknown")
    return int(number * _BYTE_UNITS[unit])


def parse_kv_dtype(text: str) -> tuple[str, str]:
    """``"int8"`` -> ("int8", "int8"); ``"int8:int4"`` -> K int8, V int4. ``auto`` is bf16; PyTorch's names are read too."""
    if not isinstance(text, str):
        raise TypeError(f"kv_dtype must be a string, got {text!r}")
    aliases = {
        "auto": "bf16",
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "float": "fp32",
        "fp8_e4m3": "fp8",
        "fp8-e4m3": "fp8",
        "float8_e4m3fn": "fp8",
    }
    parts = [aliases.get(part.strip().lower(), part.strip().lower()) for part in text.split(":")]
    if len(parts) > 2 or any(part not in KV_CODECS for part in parts):
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_CODECS)}, or a pair k:v of them, got {text!r}")
    return parts[0], parts[-1]


def parse_max_model_len(text: str | int | None) -> int | None:
    """A number of tokens (``8192``, ``8k`` = 8192); None for ``auto``, -1 and None: the largest that fits."""
    if text is None or str(text).strip().lower() in ("auto", "-1"):
        return None
    match = re.fullmatch(r"([0-9]{1,9})(k?)", str(text).strip().lower())
    value = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if value < 1:
        raise ValueError(f"max_model_len must be a positive number of tokens or auto, got {text!r}")
    return value


def parse_device(text: str) -> tuple[str, int]:
    """``"cuda:1"`` -> ("cuda", 1); ``"cpu"`` -> ("cpu", 0). Raises ValueError for what names no device."""
    match = re.fullmatch(r"(cuda|simt)(?::([0-9]{1,3}))?", str(text))
    if text == "cpu" or match is None:
        if text != "cpu":
            raise ValueError(f"device must be cpu, cuda or simt, or one of several as cuda:1, got {text!r}")
        return "cpu", 0
    return match[1], int(match[2] or 0)


@dataclass(slots=True)
class EngineArgs:
    """The one description of an engine. ``check()`` normalises and raises ValueError naming the field."""

    model: str = DEFAULT_MODEL  # alias, folder, GGUF file or hub id
    served_model_name: tuple[str, ...] = ()  # names that answer in the API; the first one is shown
    tokenizer: str | None = None  # folder or tokenizer.json; None: the model's own
    chat_template: str | None = None  # file or template text; None: the model's own
    device: str = "cpu"  # cpu, cuda or simt; cuda:1 is the second GPU
    cuda_graphs: bool = True  # on a GPU, decode steps replay captured graphs
    capture_at_start: bool = False  # all of them before the first request; otherwise each when a step first wants it
    batch_invariant: bool = False  # on a GPU, a token's result never depends on what else is in its step
    activations: str | None = None  # None: CPU int8 where the weights are quantised, else bf16; GPU bf16
    kv_dtype: str = "bf16"  # codec or k:v
    kv_memory: int | float | None = None  # bytes, or a share of free memory; None: the engine decides
    page_size: int = 64  # tokens
    max_model_len: int | None = None  # tokens; None: the largest that fits
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # token budget of one step; None: the engine decides
    policy: str = "default"  # preset of scheduler.policy
    lanes: str = ""  # off, auto or P:D in percent; "": as the policy has it
    prefill: str = ""  # token, layer or operator; "": as the policy has it
    nano_batches: str = ""  # off, auto or 2 to 4; "": as the policy has it
    max_resting_runs: int = 3  # prefills that rest between two of their parts at the same time
    enable_prefix_caching: bool = True
    threads: int | None = None  # None: one per core this process may use
    seed: int = 0  # of requests that bring none
    offline: bool = False  # never touch the network
    trace_steps: str | None = None  # file that gets the step trace (Perfetto JSON) when the engine ends

    def check(self) -> EngineArgs:
        if isinstance(self.served_model_name, str):
            self.served_model_name = (self.served_model_name,)
        self.served_model_name = tuple(self.served_model_name or ())
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a name or a path, got {self.model!r}")
        world, ordinal = parse_device(self.device)
        self.device = f"{world}:{ordinal}" if ordinal else world
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")
        self.kv_dtype = ":".join(dict.fromkeys(parse_kv_dtype(self.kv_dtype)))
        if self.kv_memory is not None:
            self.kv_memory = parse_memory(self.kv_memory)
        self.max_model_len = parse_max_model_len(self.max_model_len)
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {self.page_size!r}")
        for name in ("max_num_seqs", "max_resting_runs", "max_num_batched_tokens", "threads"):
            value = getattr(self, name)
            if value is None and name in ("max_num_batched_tokens", "threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        from scheduler.arrangement import GRANULARITIES
        from scheduler.config import SchedulerConfig, is_lanes
        from scheduler.policy import policy_named, with_preset

        policy_named(self.policy)
        if not isinstance(self.lanes, str) or not is_lanes(self.lanes):
            raise ValueError(f"lanes must be off, auto or two percentages such as 50:50, got {self.lanes!r}")
        if self.prefill not in ("", *GRANULARITIES):
            raise ValueError(f"prefill must be one of {', '.join(GRANULARITIES)}, got {self.prefill!r}")
        if self.nano_batches not in ("", *NANO_BATCHES):
            raise ValueError(f"nano_batches must be one of {', '.join(NANO_BATCHES)}, got {self.nano_batches!r}")
        # Whether they go together, before a model is loaded.
        flags = {"lanes": self.lanes, "prefill": self.prefill, "nano_batches": self.nano_batches}
        with_preset(SchedulerConfig(num_pages=1, policy=self.policy, **flags))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        return self

    @property
    def kv_codecs(self) -> tuple[str, str]:
        """(K codec, V codec)."""
        return parse_kv_dtype(self.kv_dtype)

    def shown_model_name(self) -> str:
        return self.served_model_name[0] if self.served_model_name else self.model

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, *, positional_model: bool = True) -> None:
        """Adds every flag, in groups that read well in --help."""
        group = parser.add_argument_group("model")
        if positional_model:
            group.add_argument(
                "positional_model", nargs="?", metavar="MODEL",
                help=f"folder, GGUF file, hub id or alias (default: {DEFAULT_MODEL})",
            )  # fmt: skip
        group.add_argument("--model", "--model-path", dest="model", metavar="MODEL", help="the same, as a flag")
        group.add_argument(
            "--served-model-name", nargs="+", default=(), metavar="NAME", help="names under which the API serves it"
        )
        group.add_argument("--tokenizer", metavar="PATH", help="folder or tokenizer.json (default: the model's own)")
        group.add_argument("--chat-template", metavar="FILE", help="jinja file or text (default: the model's own)")
        group.add_argument(
            "--max-model-len", metavar="N|auto", help="context in tokens (default: the largest that fits)"
        )
        group.add_argument("--offline", action="store_true", help="never touch the network")

        group = parser.add_argument_group("precision")
        group.add_argument(
            "--activations", choices=ACTIVATIONS,
            help="default: on a CPU int8 where the weights are quantised, else bf16; on a GPU bf16; fp32 is the exact mode",
        )  # fmt: skip
        group.add_argument(
            "--kv-dtype", "--kv-cache-dtype", default="bf16", metavar="CODEC",
            help=f"{', '.join(KV_CODECS)}, or a pair k:v such as int8:int4 (default: bf16)",
        )  # fmt: skip

        group = parser.add_argument_group("memory and scheduling")
        group.add_argument(
            "--kv-memory", "--kv-cache-memory-bytes", metavar="SIZE",
            help="bytes (4GiB) or a share of free memory (0.5) for the KV pool; default: one whole context, or 256 tokens "
            "for each of --max-num-seqs within the size of the weights or 256 MiB; at most half of free memory",
        )  # fmt: skip
        group.add_argument(
            "--page-size", "--block-size", type=int, default=64, choices=PAGE_SIZES, help="tokens (default: 64)"
        )
        group.add_argument(
            "--max-num-seqs", type=int, default=64, metavar="N", help="requests that run at once (default: 64)"
        )
        group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="token budget of one step")
        group.add_argument(
            "--policy", default="default", metavar="NAME",
            help="scheduling preset: default, fastgen, layered, flowprefill, two-lanes, semi-pd, nexus, nanoflow, "
            "arbitrate, prefill-first (default: default)",
        )  # fmt: skip
        group.add_argument(
            "--lanes", default="", metavar="auto|off|P:D",
            help="prefill and decode at the same time on parts of the chip, in percent; 100:100 shares it in time; auto "
            "lets the policy's controller move the border (default: as the policy has it, mostly off)",
        )  # fmt: skip
        group.add_argument(
            "--prefill", default="", choices=("", "token", "layer", "operator"), metavar="token|layer|operator",
            help="how prompts are cut: by tokens, by groups of layers, or at any operator (default: as the policy has it)",
        )  # fmt: skip
        group.add_argument(
            "--nano-batches", default="", choices=("", *NANO_BATCHES), metavar="off|auto|2|3|4",
            help="cut a step into nano-batches whose operators overlap; auto keeps to what measures better (default: as the "
            "policy has it, mostly off)",
        )  # fmt: skip
        group.add_argument(
            "--max-resting-runs", type=int, default=3, metavar="N",
            help="prefills that may rest between two of their parts; each keeps its activations (default: 3)",
        )  # fmt: skip
        group.add_argument(
            "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
            help="reuse the KV of shared prompt prefixes (default: on)",
        )  # fmt: skip

        group.add_argument(
            "--trace-steps", metavar="FILE", help="write what every step ran, node by node, as Perfetto JSON at the end"
        )

        group = parser.add_argument_group("machine")
        group.add_argument(
            "--device", default="cpu", metavar="cpu|cuda[:N]|simt",
            help="where the model runs (default: cpu); simt executes the CUDA kernels on the host, for tests",
        )  # fmt: skip
        group.add_argument(
            "--cuda-graphs", action=argparse.BooleanOptionalAction, default=True,
            help="GPU: decode steps replay captured graphs (default: on)",
        )  # fmt: skip
        group.add_argument(
            "--capture-at-start", action=argparse.BooleanOptionalAction, default=False,
            help="GPU: capture all graphs before the first request (default: each when a step first wants it)",
        )  # fmt: skip
        group.add_argument(
            "--batch-invariant", action=argparse.BooleanOptionalAction, default=False,
            help="GPU: a token's result never depends on what else is in its step, at a price (default: off; a CPU is "
            "always so)",
        )  # fmt: skip
        group.add_argument(
            "--threads", type=int, metavar="N", help="CPU threads (default: the cores this process may use)"
        )
        group.add_argument("--seed", type=int, default=0, help="of requests that bring none (default: 0)")

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> EngineArgs:
        """Reads what ``add_arguments`` added; raises ValueError naming the field."""
        values = {field.name: getattr(namespace, field.name) for field in fields(cls) if hasattr(namespace, field.name)}
        positional = getattr(namespace, "positional_model", None)
        if positional and values.get("model") and positional != values["model"]:
            raise ValueError(f"model was given twice: {positional!r} and --model {values['model']!r}")
        values["model"] = positional or values.get("model") or DEFAULT_MODEL
        return cls(**values).check()


def parse_or_exit(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, EngineArgs]:
    """Parses a command line; a bad value ends the process with usage and one line, as argparse itself does."""
    namespace = parser.parse_args(argv)
    try:
        return namespace, EngineArgs.from_namespace(namespace)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
