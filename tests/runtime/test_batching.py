"""The same answer however it is batched: alone, in a crowd, in chunks, from cached pages, across preemption."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from runtime.devices import CpuDevice
from runtime.tokenizer import Tokenizer
from tests.kit.engines import load, running_engine
from tests.kit.prompts import PROMPTS

MODES = {
    "int8": {},
    "int8, KV int8:int4": {"kv_dtype": "int8:int4"},
    "exact": {"activations": "fp32", "kv_dtype": "fp32"},
}
NUM_TOKENS = 20


@pytest.fixture(scope="module", params=sorted(MODES))
def mode(request):
    """(loaded model, EngineArgs, prompts of mixed lengths, what each answers alone)."""
    args = {"max_model_len": 1024, **MODES[request.param]}
    loaded = load("smollm2", **args)
    tokenizer = Tokenizer.from_checkpoint(loaded.checkpoint)
    texts = [PROMPTS[i] for i in range(13)]
    prompts = [tokenizer.encode(text) for text in texts]
    prompts += [
        tokenizer.encode(" ".join(PROMPTS) * repeat)[:length] for repeat, length in ((1, 200), (2, 333), (3, 517))
    ]
    assert len(prompts) == 16
    with running_engine("smollm2", loaded=loaded, enable_prefix_caching=False, **args) as engine:
        alone = [engine.run([prompt], max_tokens=NUM_TOKENS)[0] for prompt in prompts]
    return loaded, args, prompts, alone


def test_answers_in_a_batch_of_16_equal_those_alone(mode):
    loaded, args, prompts, alone = mode
    with running_engine("smollm2", loaded=loaded, **args) as engine:
        assert engine.run(prompts, max_tokens=NUM_TOKENS) == alone


@pytest.mark.parametrize("chunk_tokens", [16, 37, 64, 300])
def test_answers_do_not_depend_on_the_chunk_size(mode, chunk_tokens):
    loaded, args, prompts, alone = mode
    with running_engine(
        "smollm2", loaded=loaded, max_num_batched_tokens=chunk_tokens, max_num_seqs=16, **args
    ) as engine:
        assert engine.run(prompts[-3:] + prompts[:3], max_tokens=NUM_TOKENS) == alone[-3:] + alone[:3]


def test_answers_from_cached_pages_equal_those_computed(mode):
    loaded, args, prompts, alone = mode
    with running_engine("smollm2", loaded=loaded, **args) as engine:
        first = engine.run(prompts, max_tokens=NUM_TOKENS)
        ids = [engine.submit(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
        again = [engine.wait(id) for id in ids]
    assert first == alone
    assert [answer.token_ids for answer in again] == alone
    assert again[-1].num_cached_tokens >= 448, "the longest prompt should have come from the cache"
    # A follow-up that goes on behind an earlier answer starts from the pages of that answer too.


def test_a_longer_conversation_reuses_the_pages_of_its_beginning(mode):
    loaded, args, prompts, alone = mode
    follow_up = prompts[-1] + alone[-1] + prompts[0]
    with running_engine("smollm2", loaded=loaded, enable_prefix_caching=False, **args) as engine:
        (expected,) = engine.run([follow_up], max_tokens=NUM_TOKENS)
    with running_engine("smollm2", loaded=loaded, **args) as engine:
        engine.run([prompts[-1]], max_tokens=NUM_TOKENS)
        answer = engine.wait(engine.submit(follow_up, max_tokens=NUM_TOKENS))
    assert answer.token_ids == expected
    assert answer.num_cached_tokens > 0


def test_answers_survive_preemption(mode):
    """A pool too small for all: requests are preempted and recomputed, and answer the same."""
    loaded, args, prompts, alone = mode
    chosen = [13, 14, 15, 0, 1, 2]
    page_tokens = loaded.kv_plan.page_size
    needed = [-(-(len(prompts[i]) + 3 * NUM_TOKENS) // page_tokens) for i in chosen]
    args = {**args, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    with running_engine("smollm2", loaded=loaded, enable_prefix_caching=False, **args) as engine:
        expected = engine.run([prompts[i] for i in chosen], max_tokens=3 * NUM_TOKENS)
    small_plan = _with_pages(loaded, max(needed) + 4)
    with running_engine("smollm2", loaded=small_plan, enable_prefix_caching=False, **args) as engine:
        answers = engine.run([prompts[i] for i in chosen], max_tokens=3 * NUM_TOKENS)
        assert engine.engine.stats()["num_preemptions"] > 0, "the pool was not small enough to force a preemption"
    assert answers == expected
    assert [tokens[:NUM_TOKENS] for tokens in expected] == [alone[i] for i in chosen]


def _with_pages(loaded, num_pages: int):
    from dataclasses import replace

    return replace(loaded, kv_plan=replace(loaded.kv_plan, num_pages=num_pages))


def test_seeded_sampling_does_not_depend_on_the_batch():
    loaded = load("smollm2", max_model_len=512)
    tokenizer = Tokenizer.from_checkpoint(loaded.checkpoint)
    prompts = [tokenizer.encode(text) for text in PROMPTS[:8]]
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 1234, "max_tokens": 12}
    with running_engine("smollm2", loaded=loaded, max_model_len=512) as engine:
        alone = [engine.run([prompt], **sampling)[0] for prompt in prompts]
        assert engine.run(prompts, **sampling) == alone
        assert engine.run(prompts, **{**sampling, "seed": 99}) != alone


def test_thread_counts_give_the_same_tokens():
    loaded = load("smollm2", max_model_len=512, threads=1, device="cpu")
    tokenizer = Tokenizer.from_checkpoint(loaded.checkpoint)
    prompts = [tokenizer.encode(text) for text in PROMPTS[:6]]
    from dataclasses import replace

    answers = []
    for threads in (1, 2, 3):
        on_threads = replace(loaded, device=CpuDevice(threads))
        with running_engine("smollm2", loaded=on_threads, device="cpu", max_model_len=512) as engine:
            answers.append(engine.run(prompts, max_tokens=16))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_generates(isa):
    detected = ["portable", "avx2", "avx512"]
    if detected.index(isa) > detected.index(_native.detected_cpu_isa()):
        pytest.skip(f"this machine has no {isa}")
    active = _native.active_cpu_isa()
    try:
        _native.set_active_cpu_isa(isa)
        loaded = load("smollm2", max_model_len=256)
        tokenizer = Tokenizer.from_checkpoint(loaded.checkpoint)
        with running_engine("smollm2", loaded=loaded, max_model_len=256) as engine:
            (tokens,) = engine.run([tokenizer.encode("The capital of France is")], max_tokens=4)
        assert "Paris" in tokenizer.decode(tokens)
        assert np.all(np.array(tokens) >= 0)
    finally:
        _native.set_active_cpu_isa(active)
