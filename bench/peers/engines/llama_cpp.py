"""llama.cpp through its C interface (PyPI: llama-cpp-python), driven as llama-bench and llama-batched-bench do.

For a figure of this machine rather than of a generic binary, build it from source for the native CPU:
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
As in those tools no sampler runs (the next tokens are random ones), which flatters llama.cpp a little.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import random
import time

import llama_cpp

from bench.peers.workload import Workload

MAX_BATCH_TOKENS = 2048  # tokens of one llama_decode call; llama-bench's default, as is the micro-batch of 512
NUM_TOP_LOGPROBS = 2000  # so that another engine's first twenty are among them


def load(model: str, threads: int, kv_dtype: str) -> LlamaCpp:
    return LlamaCpp(model, threads, kv_dtype)


class LlamaCpp:
    def __init__(self, model: str, threads: int, kv_dtype: str):
        cache_types = {
            "bf16": llama_cpp.GGML_TYPE_F16,  # its own 16-bit default; bf16 is slower in it
            "fp16": llama_cpp.GGML_TYPE_F16,
            "int8": llama_cpp.GGML_TYPE_Q8_0,
        }
        if kv_dtype not in cache_types:
            raise ValueError(f"kv_dtype: got {kv_dtype}, wanted one of {', '.join(cache_types)}")
        self._cache_type = cache_types[kv_dtype]
        self._threads = threads
        llama_cpp.llama_backend_init()
        self._silent = llama_cpp.llama_log_callback(lambda level, text, user: None)  # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def version(self) -> str:
        return f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"

    def measure(self, workload: Workload, prompts: list[list[int]]) -> float:
        context = self._context(workload)
        batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        try:
            # The first call of a fresh context lays out its graph and touches its memory.
            self._decode(context, batch, [(prompts[0][0], 0, 0, True)])
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            return self._run(context, batch, workload, prompts)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def top_logprobs(self, prompt: list[int]) -> list[tuple[int, float]]:
        context = self._context(Workload("check", "check", len(prompt), 1, 1))
        batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
        try:
            last = len(prompt) - 1
            self._decode(context, batch, [(token, place, 0, place == last) for place, token in enumerate(prompt)])
            raw = llama_cpp.llama_get_logits_ith(context, last)
            logits = [raw[token] for token in range(self._vocab_size)]
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        most = max(logits)
        log_sum = most + math.log(math.fsum(math.exp(logit - most) for logit in logits))
        order = sorted(range(len(logits)), key=lambda token: -logits[token])[:NUM_TOP_LOGPROBS]
        return [(token, logits[token] - log_sum) for token in order]

    def _context(self, workload: Workload) -> object:
        params = llama_cpp.llama_context_default_params()
        per_request = (workload.prompt_len + workload.num_steps + 255) // 256 * 256
        params.n_ctx = per_request * workload.num_requests
        params.n_batch = MAX_BATCH_TOKENS
        params.n_ubatch = 512
        params.n_seq_max = workload.num_requests
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._cache_type
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp could not make a context of {params.n_ctx} tokens")
        return context

    def _run(self, context: object, batch: object, workload: Workload, prompts: list[list[int]]) -> float:
        draw = random.Random(0)
        places = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        started = time.perf_counter()
        for first in range(0, len(places), MAX_BATCH_TOKENS):
            self._decode(context, batch, places[first : first + MAX_BATCH_TOKENS])
        if workload.is_prefill:
            return time.perf_counter() - started

        tokens = [
            [draw.randrange(self._vocab_size) for _ in range(workload.num_requests)] for _ in range(workload.num_steps)
        ]
        started = time.perf_counter()
        for step, step_tokens in enumerate(tokens):
            position = workload.prompt_len + step
            self._decode(
                context, batch, [(token, position, sequence, True) for sequence, token in enumerate(step_tokens)]
            )
        return time.perf_counter() - started

    @staticmethod
    def _decode(context: object, batch: object, places: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode over (token, position, sequence, wants logits)."""
        batch.n_tokens = len(places)
        for i, (token, position, sequence, wants_logits) in enumerate(places):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} on {len(places)} tokens")
        llama_cpp.llama_synchronize(context)
