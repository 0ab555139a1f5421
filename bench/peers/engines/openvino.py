"""OpenVINO GenAI's continuous-batching pipeline (PyPI: openvino-genai), which reads the same GGUF.

Requests are added as token ids and the pipeline is stepped by hand, so that prefill and decode are timed
apart. It samples greedily inside step().
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time

import numpy as np
import openvino
import openvino_genai

from bench.peers.workload import Workload


def load(model: str, threads: int, kv_dtype: str) -> OpenVino:
    return OpenVino(model, threads, kv_dtype)


class OpenVino:
    def __init__(self, model: str, threads: int, kv_dtype: str):
        precisions = {"bf16": "bf16", "fp16": "f16", "int8": "u8"}
        if kv_dtype not in precisions:
            raise ValueError(f"kv_dtype: got {kv_dtype}, wanted one of {', '.join(precisions)}")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 4096  # a whole prompt in one step: its best case (tried: 256, 512, 4096)
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": precisions[kv_dtype]}
        )
        self._request_ids = itertools.count()

    def version(self) -> str:
        return f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}"

    def measure(self, workload: Workload, prompts: list[list[int]]) -> float:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = workload.num_steps + 1  # the first comes out of the prefill
        config.ignore_eos = True
        config.do_sample = False
        handles = [
            self._pipeline.add_request(
                next(self._request_ids), openvino.Tensor(np.array([prompt], dtype=np.int64)), config
            )
            for prompt in prompts
        ]
        waiting = set(range(len(handles)))
        started = time.perf_counter()
        while waiting:
            self._pipeline.step()
            waiting -= {i for i in waiting if handles[i].can_read() and handles[i].read()}
        prefill_s = time.perf_counter() - started
        if workload.is_prefill:
            return prefill_s

        # Requests whose prefill came early have decoded meanwhile; only what the steps below yield is counted,
        # and the rate is scaled to the whole number of tokens.
        num_decoded = 0
        started = time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle in handles:
                while handle.can_read():
                    num_decoded += sum(len(output.generated_ids) for output in handle.read().values())
        seconds = time.perf_counter() - started
        if num_decoded == 0:
            raise RuntimeError("no token came out of the decode steps")
        return seconds * workload.timed_tokens / num_decoded
