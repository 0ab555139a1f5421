"""Whole steps of a model of Llama-3-8B's shape with random weights on a GPU, beside their floor.

    PYTHONPATH=python:. python bench/kernels/bench_gpu_step.py [--format Q4_0] [--kv-dtype bf16] [--json out.json]

`device` is the time from a step's upload to its results on the device, decode steps as replayed graphs; `engine` the time
between two tokens of a request through the engine, scheduler and all. The floor of a decode step is what it must read
and write once at the memory's data-sheet speed; of a prompt its operations, no peak being known without a measurement.
Layers repeat after --distinct-layers. --world simt runs a tiny model on the host, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from random_checkpoint import LLAMA_3_8B, TINY, config_of, random_checkpoint
from step_runner import StepRunner

from runtime.devices import open_device
from runtime.engine_args import EngineArgs
from runtime.engine_loader import LoadedModel, start_engine
from runtime.kv_plan import kv_groups, plan_kv
from runtime.messages import Submit
from runtime.models import record_model
from runtime.recorder import Recorder
from runtime.sampling_params import SamplingParams
from runtime.weights import pack_model


def load_random(args: EngineArgs, shape, weight_format: str, distinct_layers: int) -> LoadedModel:
    """As engine_loader.load_model, with layers that repeat."""
    device, config = open_device(args), config_of(shape)
    checkpoint = random_checkpoint(shape, weight_format, min(distinct_layers, shape.num_layers))
    activations = device.choose_activations(checkpoint, args.activations)
    kv_layers = kv_groups(config, *args.kv_codecs, args.page_size)[1]
    few = pack_model(checkpoint, kv_layers, activations, args.max_model_len, device)
    layers = tuple(replace(few.layers[i % len(few.layers)], kv=kv_layers[i]) for i in range(shape.num_layers))
    packed = replace(few, layers=layers)
    types = device.buffer_types(packed.matrices, activations)
    program = record_model(Recorder(device.new_program(), types, exact=activations == "fp32"), config, packed)
    k_codec, v_codec = args.kv_codecs
    kv_plan = plan_kv(
        config, k_codec=k_codec, v_codec=v_codec, page_size=args.page_size, kv_memory=args.kv_memory,
        max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, available_bytes=device.gpu.free_bytes,
        share=0.5,
    )  # fmt: skip
    return LoadedModel(shape.name, config, checkpoint, packed, kv_plan, program, device)


def floor_of(loaded: LoadedModel, requests: int, context: int, new_tokens: int) -> tuple[float, float]:
    """(operations, bytes) of a step, from what its nodes say."""
    pairs = float(requests * sum(range(context + 1, context + new_tokens + 1)))
    nodes = loaded.program.describe(
        num_tokens=requests * new_tokens, num_requests=requests, num_logit_rows=requests, score_pairs=pairs
    )
    return sum(node["operations"] for node in nodes), sum(node["bytes"] for node in nodes)


def device_us(loaded: LoadedModel, requests: int, context: int, new_tokens: int, repeats: int) -> float:
    runner = StepRunner(loaded, requests, context + new_tokens, uses_graphs=True, step_tokens=requests * new_tokens)
    runner.fill(context)
    for _ in range(3):  # the first loads kernels, the second is the graph's first
        runner.step(context, new_tokens)
    return statistics.median(runner.step_us(context, new_tokens) for _ in range(repeats))


def engine_us(loaded: LoadedModel, args: EngineArgs, requests: int, context: int, num_tokens: int) -> float:
    """Time between two tokens of a request, all requests decoding, over the middle of their answers."""
    times: dict[str, list[float]] = {f"r{i}": [] for i in range(requests)}
    num_open, all_done = requests, threading.Event()

    def on_deltas(deltas) -> None:
        nonlocal num_open
        now = time.perf_counter()
        for delta in deltas:
            times[delta.request_id].extend([now] * len(delta.token_ids))
            if delta.finish_reason is not None:
                num_open -= 1
                if num_open == 0:
                    all_done.set()

    engine = start_engine(loaded, args, on_deltas)
    try:
        rng = np.random.default_rng(0)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for request_id in times:
            prompt = tuple(rng.integers(0, loaded.config.vocab_size, context).tolist())
            engine.submit(Submit(request_id, prompt, sampling, 0))
        if not all_done.wait(300):
            raise RuntimeError("the engine did not finish in time")
    finally:
        engine.shutdown()
    begin = max(stamps[num_tokens // 4] for stamps in times.values())  # all of them decode by then
    spans = [stamp for stamps in times.values() for stamp in stamps if stamp >= begin]
    longest = max(len([s for s in stamps if s >= begin]) for stamps in times.values())
    return (max(spans) - begin) / max(longest - 1, 1) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="cuda", choices=("cuda", "simt"))
    parser.add_argument("--format", default="Q4_0", help="of the weights: Q4_0, Q8_0, Q4_K or BF16 (default: Q4_0)")
    parser.add_argument("--activations", default=None)
    parser.add_argument("--kv-dtype", default="bf16")
    parser.add_argument("--distinct-layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=30, help="steps whose median counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    is_real = options.world == "cuda"
    shape = LLAMA_3_8B if is_real else TINY
    cases = (
        ((1, 128, 1), (1, 4096, 1), (8, 1024, 1), (32, 1024, 1), (64, 512, 1), (1, 0, 512), (1, 0, 2048))
        if is_real
        else ((1, 10, 1), (3, 5, 1), (1, 0, 16))
    )
    args = EngineArgs(
        model=shape.name, device=options.world, activations=options.activations, kv_dtype=options.kv_dtype,
        max_model_len=8192 if is_real else 128, max_num_seqs=64 if is_real else 4,
        max_num_batched_tokens=2048 if is_real else 32, enable_prefix_caching=False,
    ).check()  # fmt: skip
    loaded = load_random(args, shape, options.format, options.distinct_layers)
    gpu, speed = loaded.device.gpu, loaded.device.gpu.memory_gb_per_second
    print(f"{gpu.name}, {speed:.0f} GB/s; {shape.name} shape, {options.format} weights, {loaded.packed.activations} "
          f"activations, KV {options.kv_dtype}; {loaded.program.num_nodes} nodes")  # fmt: skip
    results = []
    for requests, context, new_tokens in cases:
        operations, num_bytes = floor_of(loaded, requests, context, new_tokens)
        on_device_us = device_us(loaded, requests, context, new_tokens, options.runs if is_real else 2)
        case = {
            "requests": requests, "context": context, "new_tokens": new_tokens, "device_us": on_device_us,
            "operations": operations, "bytes": num_bytes, "tflops": operations / on_device_us * 1e-6,
            "floor_us": num_bytes / speed * 1e-3 if speed else 0.0,
        }  # fmt: skip
        line = f"x{requests:<3} context {context:5} new {new_tokens:4}  device {on_device_us:10.1f} us"
        if new_tokens == 1:
            case["engine_us"] = engine_us(loaded, args, requests, context, 64 if is_real else 6)
            share = 100 * case["floor_us"] / on_device_us
            through_engine = 100 * case["floor_us"] / case["engine_us"]
            line += f"  engine {case['engine_us']:10.1f} us  floor {case['floor_us']:8.1f} us  {share:5.1f} % of the "
            line += f"bandwidth, {through_engine:5.1f} % through the engine"
        else:
            line += f"  {case['tflops']:8.1f} TFLOP/s"
        results.append(case)
        print(line, flush=True)
    if options.json:
        settings = {"shape": shape.name, "format": options.format, "activations": loaded.packed.activations}
        properties = {"name": gpu.name, "num_sms": gpu.num_sms, "gb_per_second": speed}
        options.json.write_text(
            json.dumps({"gpu": properties, "settings": settings, "cases": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
