"""From names and flags to the objects of a run: model, limits, requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scheduler.config import SchedulerConfig
from scheduler.machine import Machine
from scheduler.model_spec import ModelSpec
from scheduler.policy import policy_named
from scheduler.simulator.arrivals import ServeGenClients, parse_renewal
from scheduler.simulator.simulation import ServiceTargets
from scheduler.simulator.traces import TraceRequest, at_rate, cut, read_trace

MODEL_FOLDER = Path(__file__).parent / "models"
DRAWN_TRACES = ("poisson", "gamma")
SERVEGEN_DEFAULT_S = 600.0
# Prompts that cross the program in parts are not cut by tokens: a run of theirs may hold so many more than a step.
_RUN_TOKENS = {True: 8192, False: 2048}
# A machine with this much memory runs the larger of the default limits.
_LARGE_MACHINE_BYTES = 16e9


def load_model(name_or_path: str, machine: Machine | None = None, **overrides: Any) -> ModelSpec:
    """A config.json, or the name of a model that ships with the simulator. machine: a config.json does not say how its
    nodes look on it; one that `partita calibrate` did not measure is a GPU in bf16. Raises ValueError.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = MODEL_FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MODEL_FOLDER.glob("*.json")))
        raise ValueError(f"model: got {name_or_path!r}, wanted a config.json or one of {known}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if "config" in content:
        fields = content.get("fields", {})
    else:
        is_gpu = machine is not None and not machine.model
        fields = {"device": "gpu", "inner_bytes": 2} if is_gpu else {}
    return ModelSpec.from_config(content.get("config", content), **{**fields, **overrides})


def default_model(machine: Machine) -> str:
    return "smollm2-135m" if machine.model.startswith("smollm2") else "llama-3-8b"


def scheduler_config(
    spec: ModelSpec, machine: Machine, *, kv_bytes: float | None = None, longest: int = 0, **fields: Any
) -> SchedulerConfig:
    """Pages for what memory the machine has beside the weights; limits as given, else by the machine's size. longest: of
    the trace, so that no request is refused for its length alone."""
    page_bytes = spec.kv_layer_page_bytes * spec.num_layers / spec.num_kv_groups
    budget = machine.memory_bytes - spec.weight_bytes if kv_bytes is None else kv_bytes
    num_pages = int(budget / page_bytes)
    if num_pages < spec.num_kv_groups:
        raise ValueError(
            f"kv memory: {spec.name} leaves {budget / 1e9:.2f} GB on {machine.name}, wanted at least a page of "
            f"{page_bytes:.0f} bytes; give --kv-memory"
        )
    is_large = machine.memory_bytes >= _LARGE_MACHINE_BYTES
    windows = (0,) if not spec.windowed_layers else (spec.sliding_window,)
    if spec.num_kv_groups == 2:
        windows = (0, spec.sliding_window)
    preset = policy_named(fields.get("policy") or "default")
    is_cut_by_tokens = (fields.get("prefill") or preset.prefill or "token") == "token"
    budget_tokens = (2048 if is_large else 512) if is_cut_by_tokens else _RUN_TOKENS[is_large]
    values = {
        "num_pages": num_pages,
        "page_size": spec.page_size,
        "max_num_seqs": 256 if is_large else 64,
        "max_num_batched_tokens": budget_tokens,
        "max_model_len": max(spec.max_position_embeddings, longest),
        "kv_group_windows": windows,
        "rungs": tuple(rung for rung in machine.rungs if rung < 1.0),
        "num_nodes": len(spec.nodes()),
        "layer_starts": spec.layer_starts,
    }
    return SchedulerConfig(**{**values, **{name: value for name, value in fields.items() if value is not None}})


def parse_lanes_flag(text: str | None) -> dict[str, Any]:
    """``auto``, ``off`` or ``P:D`` -> the field lanes; ``0.5,0.5``: as many lanes that take prompts and decodes alike ->
    lane_shares. Raises ValueError."""
    if not text:
        return {}
    if "," not in text:
        return {"lanes": text}
    try:
        return {"lane_shares": tuple(float(share) for share in text.split(","))}
    except ValueError:
        raise ValueError(
            f"--lanes: got {text!r}, wanted auto, off, P:D in percent, or shares such as 0.5,0.5"
        ) from None


def load_requests(
    trace: str, *, start_s: float = 0.0, duration_s: float | None = None, num: int | None = None,
    rate: float | None = None, seed: int = 0,
) -> list[TraceRequest]:  # fmt: skip
    """Of a file (traces.py), of ServeGen's fitted clients (a *_rates file), or drawn (``poisson:...``, arrivals.py). The
    slice is cut first, then stretched to the rate."""
    if trace.partition(":")[0] in DRAWN_TRACES:
        requests = cut(parse_renewal(trace, seed), start_s=start_s, duration_s=duration_s, num=num)
    else:
        path = Path(trace)
        if not path.is_file():
            raise ValueError(f"--trace: got {trace!r}, wanted a file or poisson:rate=...,input=...,output=...")
        if ServeGenClients.is_rates_file(path):
            clients = ServeGenClients(path)
            requests = clients.draw(start_s, duration_s or SERVEGEN_DEFAULT_S, rate=rate, seed=seed)[:num]
            rate = None  # drawn at it
        else:
            requests = cut(read_trace(path), start_s=start_s, duration_s=duration_s, num=num)
    if not requests:
        raise ValueError(f"--trace {trace}: no request arrives in the slice")
    return requests if rate is None else at_rate(requests, rate)


def parse_targets(text: str | None) -> ServiceTargets:
    """``ttft=0.5,tpot=0.05,deadline=30`` in seconds, or with a unit: ``ttft=500ms``. Raises ValueError."""
    values: dict[str, float] = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, amount = pair.strip().partition("=")
        number, scale = (amount[:-2], 1e-3) if amount.endswith("ms") else (amount.removesuffix("s"), 1.0)
        if not equals or name not in ("ttft", "tpot", "deadline"):
            raise ValueError(f"--slo: got {pair!r}, wanted such as ttft=500ms,tpot=50ms of ttft, tpot, deadline")
        try:
            values[name] = float(number) * scale
        except ValueError:
            raise ValueError(f"--slo: {name}: got {amount!r}, wanted seconds or milliseconds such as 500ms") from None
        if not values[name] > 0:
            raise ValueError(f"--slo: {name}: got {amount!r}, wanted more than 0")
    return ServiceTargets(values.get("ttft"), values.get("tpot"), values.get("deadline"))


def longest_request(requests: Sequence[TraceRequest]) -> int:
    return max(request.num_prompt_tokens + request.num_output_tokens for request in requests)
