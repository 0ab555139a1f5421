"""From flags to a running engine: find the model, plan memory, pack, record, start. In that order."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime import garbage
from scheduler.nanobatch import MAX_NANO_BATCHES

logger = logging.getLogger("partita.engine")

# Prompts that go through the program in parts go whole, up to so many tokens.
RUN_TOKENS = 2048

# Loading that takes longer than this shows a bar.
_PROGRESS_AFTER_S = 1.0


@dataclass(slots=True)
class LoadedModel:
    """A model on this machine, ready to run: what an Engine or a Scorer needs."""

    name: str
    config: Any  # model_config.ModelConfig
    checkpoint: Any  # loading.checkpoint.Checkpoint: owns the bytes of the embedding table
    packed: Any  # weights.PackedModel
    kv_plan: Any  # kv_plan.KvPlan
    program: Any  # _native.Program
    device: Any  # devices.CpuDevice or GpuDevice


class _ProgressBar:
    """One line on stderr, drawn only when loading turns out to be slow."""

    def __init__(self, label: str):
        self._label = label
        self._start_s = time.monotonic()
        self._is_drawn = False

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._start_s < _PROGRESS_AFTER_S or not sys.stderr.isatty():
            return
        filled = 30 * done // total
        sys.stderr.write(f"\r{self._label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}")
        self._is_drawn = True
        if done == total:
            sys.stderr.write("\n")
        sys.stderr.flush()


def load_model(args, checkpoint=None) -> LoadedModel:
    """Opens, plans, packs and records. Raises ModelFileError or ValueError with what was wrong."""
    from runtime.devices import open_device
    from runtime.kv_plan import kv_groups
    from runtime.loading.checkpoint import open_checkpoint
    from runtime.loading.model_source import resolve_model
    from runtime.models import record_model
    from runtime.recorder import Recorder
    from runtime.weights import pack_model

    device = open_device(args)
    if checkpoint is None:
        checkpoint = open_checkpoint(resolve_model(args.model, offline=args.offline))
    config = checkpoint.config
    activations = device.choose_activations(checkpoint, args.activations)
    layouts, kv_layers = kv_groups(config, *args.kv_codecs, args.page_size)
    # On the CPU the plan comes first: weights stay where the file is. On a GPU it comes last, when it is known to the
    # byte what weights and frames leave.
    kv_plan = _plan_on_cpu(args, checkpoint) if device.gpu is None else None
    longest = kv_plan.max_model_len if kv_plan else args.max_model_len or config.max_position_embeddings
    packed = pack_model(checkpoint, kv_layers, activations, longest, device, _ProgressBar("packing weights"))
    recorder = Recorder(
        device.new_program(), device.buffer_types(packed.matrices, activations), exact=activations == "fp32"
    )
    program = record_model(recorder, config, packed)
    if kv_plan is None:
        kv_plan = _plan_on_gpu(args, config, device, program, layouts, longest)
    # The matrices are packed: of the file only embedding rows are read from here on.
    checkpoint.release_pages()
    return LoadedModel(args.shown_model_name(), config, checkpoint, packed, kv_plan, program, device)


def _plan_arguments(args) -> dict[str, Any]:
    k_codec, v_codec = args.kv_codecs
    return {
        "k_codec": k_codec, "v_codec": v_codec, "page_size": args.page_size, "kv_memory": args.kv_memory,
        "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs,
    }  # fmt: skip


def _plan_on_cpu(args, checkpoint):
    from runtime.kv_plan import plan_kv

    weight_bytes = sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    return plan_kv(checkpoint.config, weight_bytes=weight_bytes, **_plan_arguments(args))


def _plan_on_gpu(args, config, device, program, layouts, longest: int):
    """Pages for what is left of the device's memory beside the weights, which lie there already, and the frames."""
    from runtime.kv_plan import plan_kv
    from runtime.model_runner import FRAMES_PER_LANE

    preset = _preset(args)
    max_tokens = _batched_tokens(args, device)
    has_roles = preset.lanes != "off"
    reserved = device.reserved_bytes(
        program, layouts, max_num_seqs=args.max_num_seqs, max_tokens=max_tokens, max_model_len=longest,
        num_frames=FRAMES_PER_LANE * (2 if has_roles else 1) + _resting_runs(args, preset) + _nano_frames(preset),
        num_decode_lanes=_num_decode_lanes(preset.lanes),
    )  # fmt: skip
    available = max(device.gpu.free_bytes - reserved, 0)
    return plan_kv(config, available_bytes=available, share=device.kv_share, **_plan_arguments(args))


def _preset(args):
    """The SchedulerConfig that flags and policy agree on, as far as it does not depend on the machine."""
    from scheduler.config import SchedulerConfig
    from scheduler.policy import with_preset

    return with_preset(
        SchedulerConfig(
            num_pages=1, policy=args.policy, lanes=args.lanes, prefill=args.prefill, nano_batches=args.nano_batches
        )
    )


def _batched_tokens(args, device) -> int:
    """The most tokens of a step: prompts that are not cut by tokens need a frame that holds them."""
    from scheduler.policy import policy_named

    preset, controller = _preset(args), policy_named(args.policy).controller
    # Arbitration, by its name or as what moves the border of a policy that has no controller, may cut in any way.
    arbitrates = preset.lanes == "auto" and controller in (None, policy_named("arbitrate").controller)
    is_cut = preset.prefill == "token" or (not preset.prefill and not arbitrates)
    default = device.batched_tokens if is_cut else max(device.batched_tokens, RUN_TOKENS)
    return args.max_num_batched_tokens or max(default, args.max_num_seqs)


def _resting_runs(args, preset) -> int:
    return args.max_resting_runs if preset.lanes == "auto" or preset.prefill != "token" else 0


def _nano_frames(preset) -> int:
    """Two plans are in flight, and a third one's results are being read."""
    return 0 if preset.nano_batches == "off" else 3 * MAX_NANO_BATCHES


def _num_decode_lanes(lanes: str) -> int:
    """Parts of the chip on which decodes may run: all of it, and what rungs leave."""
    if lanes == "off":
        return 1
    return 8 if lanes == "auto" else 2


def start_engine(loaded: LoadedModel, args, on_deltas: Callable, trace=None):
    """An Engine over a loaded model, its thread running."""
    from runtime import _native
    from runtime.describe_model import spec_of
    from runtime.engine import Engine, EngineConfig
    from runtime.lane_bank import LaneBank
    from runtime.model_runner import ModelRunner
    from scheduler.scheduler import Scheduler

    kv_plan, config = loaded.kv_plan, loaded.config
    device, preset = loaded.device, _preset(args)
    max_num_batched_tokens = _batched_tokens(args, device)
    completions = _native.CompletionQueue()
    has_nano = preset.nano_batches != "off"
    is_traced = trace is not None and trace.has_nodes
    bank = LaneBank(device, completions, preset.lanes, args.max_num_seqs, is_traced, has_nano)
    scheduler_config = replace(
        preset, num_pages=kv_plan.num_pages, page_size=kv_plan.page_size, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=kv_plan.max_model_len,
        kv_group_windows=tuple(group.window for group in kv_plan.groups),
        enable_prefix_caching=args.enable_prefix_caching, rungs=bank.rungs, num_nodes=loaded.program.num_nodes,
        layer_starts=layer_starts(loaded.program), max_resting_runs=args.max_resting_runs,
    )  # fmt: skip
    spec = spec_of(loaded, args.kv_codecs) if has_nano else None
    scheduler = Scheduler(scheduler_config, calibrated_model(loaded, args), spec)
    runner = ModelRunner(
        loaded.program, kv_plan, device, vocab_size=config.vocab_size, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, bank=bank, completions=completions,
        max_resting_runs=_resting_runs(args, preset), num_nano_frames=_nano_frames(preset),
    )  # fmt: skip
    if args.capture_at_start and args.cuda_graphs and device.gpu is not None:
        runner.capture_graphs()
    engine_config = EngineConfig(
        loaded.name, kv_plan.max_model_len, config.vocab_size, frozenset(config.eos_token_ids), args.seed,
        f"{device.describe(loaded.packed.activations)}, {loaded.packed.packed_bytes / 2**20:.0f} MiB of weights",
    )  # fmt: skip
    return Engine(engine_config, scheduler, runner, on_deltas, trace)


def layer_starts(program) -> tuple[int, ...]:
    """The first node of each layer of a recorded Program."""
    starts: dict[int, int] = {}
    for index, name in enumerate(program.node_names):
        if name.startswith("layers."):
            starts.setdefault(int(name.split(".")[1]), index)
    return tuple(starts.values())


def calibrated_model(loaded: LoadedModel, args):
    """The scheduler.CostModel of this machine and model, if `partita calibrate` has left its file; else None."""
    from runtime.calibrate import machine_file

    path = machine_file(loaded, args.kv_dtype)
    if not path.is_file():
        return None
    from runtime.describe_model import spec_of
    from scheduler.cost_model import CostModel
    from scheduler.machine import Machine

    try:
        return CostModel(spec_of(loaded, args.kv_codecs), Machine.load(path))
    except ValueError as error:
        logger.warning("%s; run `partita calibrate` anew", error)
        return None


def load_engine(args, on_deltas: Callable):
    """(engine, tokenizer, chat_template, model_config) for the given EngineArgs.

    ``chat_template`` is None when the model has none. The tokenizer is built beside the packing. Raises
    ModelFileError, ValueError, or what ``on_deltas``' owner must know before anything is served.
    """
    from runtime.loading.checkpoint import open_checkpoint
    from runtime.loading.model_source import resolve_model

    checkpoint = open_checkpoint(resolve_model(args.model, offline=args.offline))
    built: dict[str, Any] = {}

    def build_tokenizer() -> None:
        try:
            from runtime.chat_template import ChatTemplate
            from runtime.tokenizer import Tokenizer

            source = _with_overrides(checkpoint, args)
            built["tokenizer"] = Tokenizer.from_checkpoint(source)
            built["template"] = ChatTemplate.from_checkpoint(source, built["tokenizer"])
        except BaseException as error:
            built["error"] = error

    builder = threading.Thread(target=build_tokenizer, name="tokenizer")
    builder.start()
    try:
        loaded = load_model(args, checkpoint)
    finally:
        builder.join()
    if "error" in built:
        raise built["error"]
    trace = None
    if args.trace_steps:
        from runtime.step_trace import StepTrace

        trace = StepTrace(loaded.program.node_names, args.trace_steps)
    engine = start_engine(loaded, args, on_deltas, trace)
    garbage.settle()
    return engine, built["tokenizer"], built["template"], loaded.config


def _with_overrides(checkpoint, args):
    """The checkpoint with the tokenizer folder and chat template that the flags name in place of its own."""
    from runtime.loading.checkpoint import TokenizerSource, read_json

    if args.tokenizer:
        path = Path(args.tokenizer)
        folder = path.parent if path.name == "tokenizer.json" else path
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer: got {args.tokenizer!r}, wanted a tokenizer.json or a folder that holds one")
        settings = folder / "tokenizer_config.json"
        source = TokenizerSource("hf", folder, checkpoint.key, config=read_json(settings) if settings.is_file() else {})
        checkpoint = replace(checkpoint, tokenizer_source=source)
    if args.chat_template:
        checkpoint = replace(checkpoint, chat_template=_template_text(args.chat_template))
    return checkpoint


def _template_text(path_or_text: str) -> str:
    if os.path.exists(path_or_text):
        with open(path_or_text, encoding="utf-8") as file:
            return file.read()
    if "{" not in path_or_text:
        raise ValueError(f"chat_template: got {path_or_text!r}, wanted a file or template text")
    return path_or_text
