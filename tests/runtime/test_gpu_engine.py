"""The engine on a GPU: the same models, flags and answers as on the CPU. In simt always, on a CUDA device where there is
one. Models are tiny: the host executes some 10^7 to 10^8 device instructions a second."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime import _native
from runtime.scoring import Scorer
from runtime.step_trace import StepTrace
from runtime.tokenizer import Tokenizer
from tests.kit.engines import load, running_engine
from tests.kit.gpu_engines import DEVICES, EXACT, FEW, TIE, GpuBench, random_tokens, relative_error, write_llama
from tests.kit.prompts import PROMPTS
from tests.kit.tiny_models import FAMILIES, write_tiny_gguf, write_tiny_model


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def fast(device, llama_path):
    """In bf16, batch invariant: what its answers are must not depend on how they come about."""
    return load(llama_path, device=device, max_model_len=128, **FEW)


# ---------------------------------------------------------------- numbers


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(path, the model on the CPU in exact mode)."""
    path, _ = write_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return path, load(path, device="cpu", **EXACT)


def test_exact_mode_equals_the_cpu(device, family):
    path, on_cpu = family
    on_gpu = load(path, device=device, **EXACT, **FEW)
    tokens = random_tokens(on_cpu, 21)
    expected = Scorer(on_cpu).logits(tokens)
    assert relative_error(Scorer(on_gpu, chunk_tokens=13).logits(tokens), expected) < 1e-5
    np.testing.assert_allclose(Scorer(on_gpu, chunk_tokens=32).score(tokens), Scorer(on_cpu).score(tokens), atol=1e-3)
    with running_engine(path, loaded=on_gpu, device=device, **EXACT, **FEW) as engine:
        (answer,) = engine.run([tokens], max_tokens=5)
    logits = Scorer(on_cpu).logits(tokens + answer)[len(tokens) - 1 : -1]
    for token, row in zip(answer, logits, strict=True):
        assert row[token] >= row.max() - TIE * np.abs(row).max(), "not the CPU's most likely token"


def test_lower_precisions_stay_as_near_the_exact_mode_as_others_do(device, tmp_path):
    """16-bit activations: at most twice the error of transformers in the same type. int8: of the CPU's int8, whose scales
    are per group of inputs and not per token, four times."""
    torch = pytest.importorskip("torch")
    path, hf_model = write_tiny_gguf("Q4_1", tmp_path, num_hidden_layers=2, head_dim=64)
    on_cpu = load(path, device="cpu", **EXACT)
    tokens = random_tokens(on_cpu, 48)
    exact = Scorer(on_cpu).logits(tokens)

    def error_of(device: str, activations: str, kv_dtype: str = "bf16") -> float:
        loaded = load(path, device=device, activations=activations, kv_dtype=kv_dtype, max_model_len=128, **FEW)
        return relative_error(Scorer(loaded, chunk_tokens=32).logits(tokens), exact)

    with torch.no_grad():
        for activations, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):  # rounds the weights less first
            theirs = hf_model.to(dtype)(torch.tensor([tokens])).logits[0].float().numpy()
            bound = 2 * relative_error(theirs, exact) + 1e-3
            assert 0 < error_of(device, activations, kv_dtype=activations) <= bound, activations
            hf_model.to(torch.float32)
    assert 0 < error_of(device, "int8") <= 4 * error_of("cpu", "int8")


@pytest.mark.parametrize("kv_dtype", ["int8", "int8:int4"])
def test_integer_pages_hold_what_the_cpu_would_write(device, llama_path, kv_dtype):
    """Prompts are computed in exact mode on both sides, so that only rounding at a code's border may differ."""
    values = {}
    for where in ("cpu", device):
        loaded = load(llama_path, device=where, activations="fp32", kv_dtype=kv_dtype, max_model_len=128, **FEW)
        plan = loaded.kv_plan
        bench = GpuBench(loaded)
        bench.admit(0, [(7 * i + 3) % 384 for i in range(40)])
        bench.run_whole((0, 0, 40, 1))
        page, layout = np.frombuffer(bench.arena.read_page(0), dtype=np.uint8), plan.groups[0]
        values[where] = []
        for stream in ("k", "v"):
            for layer in range(layout.num_layers):
                out = np.empty((layout.page_size, layout.head_dim), dtype=np.float32)
                _native.decode_page_stream(layout, page.reshape(1, -1), 0, layer, 1, stream, out)
                values[where].append(out[:40])
    assert relative_error(np.concatenate(values[device]), np.concatenate(values["cpu"])) < 0.02


def test_the_default_model_in_exact_mode_equals_the_cpu(device):
    """SmolLM2's real weights: on the host a prompt of a few tokens and two more, on a GPU some of each."""
    args = {"activations": "fp32", "kv_dtype": "fp32", "max_model_len": 256, "max_num_seqs": 1}
    on_cpu = load("smollm2", device="cpu", **args)
    tokenizer = Tokenizer.from_checkpoint(on_cpu.checkpoint)
    texts, num_tokens = (PROMPTS[:1], 2) if device == "simt" else (PROMPTS[:8], 32)
    on_gpu = load("smollm2", device=device, max_num_batched_tokens=64, **args)
    for text in texts:
        prompt = tokenizer.encode(text)[: 4 if device == "simt" else None]
        with running_engine("smollm2", loaded=on_gpu, device=device, max_num_batched_tokens=64, **args) as engine:
            (answer,) = engine.run([prompt], max_tokens=num_tokens)
        assert len(answer) == num_tokens
        logits = Scorer(on_cpu).logits(prompt + answer)[len(prompt) - 1 : -1]
        for token, row in zip(answer, logits, strict=True):
            assert row[token] >= row.max() - TIE * np.abs(row).max(), "not the CPU's most likely token"


# ---------------------------------------------------------------- the engine


def test_answers_do_not_depend_on_batches_chunks_cached_pages_or_graphs(device, llama_path, fast):
    prompts = [random_tokens(fast, count) for count in (3, 40, 17, 66, 25)]
    args = {"loaded": fast, "device": device, "max_model_len": 128, "max_num_seqs": 4}

    with running_engine(llama_path, **args, max_num_batched_tokens=80, enable_prefix_caching=False) as engine:
        alone = [engine.run([prompt], max_tokens=6)[0] for prompt in prompts]
        (lane,) = engine.engine._runner.bank.native_lanes
        assert lane.num_graphs == 1 and lane.num_graph_steps >= 4 * 5
    with running_engine(llama_path, **args, max_num_batched_tokens=19) as engine:
        assert engine.run(prompts, max_tokens=6) == alone, "in a batch, in chunks"
        (lane,) = engine.engine._runner.bank.native_lanes
        assert lane.num_graph_steps > 0
        again = engine.wait(engine.submit(prompts[3] + alone[3], max_tokens=3))
        assert again.num_cached_tokens > 0
    with running_engine(llama_path, **args, max_num_batched_tokens=80, enable_prefix_caching=False) as engine:
        assert engine.run([prompts[3] + alone[3]], max_tokens=3) == [again.token_ids], "from cached pages"
    without = replace(fast, device=type(fast.device)(
        device, 0, threads=1, uses_graphs=False, is_batch_invariant=True
    ))  # fmt: skip
    with running_engine(llama_path, **{**args, "loaded": without}, max_num_batched_tokens=80) as engine:
        assert engine.run(prompts, max_tokens=6) == alone, "without graphs"
        (lane,) = engine.engine._runner.bank.native_lanes
        assert lane.num_graphs == lane.num_graph_steps == 0


def test_graphs_captured_at_start_give_the_same_answers(device, llama_path, fast):
    prompts = [random_tokens(fast, count) for count in (3, 12)]
    args = {"loaded": fast, "device": device, "max_model_len": 128, **FEW}
    with running_engine(llama_path, **args) as engine:
        expected = engine.run(prompts, max_tokens=5) + engine.run(prompts, max_tokens=5, temperature=1.0, seed=3)
    with running_engine(llama_path, **args, capture_at_start=True) as engine:
        (lane,) = engine.engine._runner.bank.native_lanes
        assert lane.num_graphs == 2 * len(_native.decode_buckets(4)) and lane.num_graph_steps == 0
        answers = engine.run(prompts, max_tokens=5) + engine.run(prompts, max_tokens=5, temperature=1.0, seed=3)
        assert answers == expected
        assert lane.num_graphs == 2 * len(_native.decode_buckets(4)) and lane.num_graph_steps >= 8


def test_answers_survive_preemption(device, llama_path, fast):
    prompts = [random_tokens(fast, count) for count in (50, 55, 60)]
    args = {"device": device, "max_model_len": 128, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with running_engine(llama_path, loaded=fast, max_num_seqs=1, **args) as engine:
        expected = engine.run(prompts, max_tokens=20)
    tight = replace(fast, kv_plan=replace(fast.kv_plan, num_pages=4))
    with running_engine(llama_path, loaded=tight, max_num_seqs=4, **args) as engine:
        assert engine.run(prompts, max_tokens=20) == expected
        assert engine.engine.stats()["num_preemptions"] > 0


def test_sampling_parameters_do_what_they_do_on_the_cpu(device, llama_path):
    """Exact mode, where logits agree to rounding: seeds, cuts, penalties, biases and stop ids give the same tokens."""
    prompts = [[5, 6, 7, 5], [9, 300, 41], [77] * 9]
    sampling = [
        {"temperature": 0.8, "seed": 11},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.8, "seed": 5, "presence_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": {12: 3.0, 40: -5.0}, "logprobs": 3},
    ]
    answers = {}
    for where in ("cpu", device):
        loaded = load(llama_path, device=where, **EXACT, **FEW)
        with running_engine(llama_path, loaded=loaded, device=where, **EXACT, **FEW) as engine:
            ids = [engine.submit(p, max_tokens=6, **s) for p, s in zip(prompts, sampling, strict=True)]
            answers[where] = [engine.wait(id) for id in ids]
    for on_gpu, on_cpu in zip(answers[device], answers["cpu"], strict=True):
        assert on_gpu.error is None
        assert on_gpu.token_ids == on_cpu.token_ids
    for on_gpu, on_cpu in zip(answers[device][2].logprobs, answers["cpu"][2].logprobs, strict=True):
        assert on_gpu.rank == on_cpu.rank
        assert [id for id, _ in on_gpu.top] == [id for id, _ in on_cpu.top]
        np.testing.assert_allclose(on_gpu.logprob, on_cpu.logprob, atol=1e-3)


def test_what_a_gpu_does_not_take_is_refused_alone(device, llama_path, fast):
    with running_engine(llama_path, loaded=fast, device=device, max_model_len=128, **FEW) as engine:
        bad = engine.wait(engine.submit([3, 4], max_tokens=2, stop_token_ids=list(range(3, 103))))
        good = engine.wait(engine.submit([3, 4], max_tokens=2))
    assert bad.finish_reason == "error" and "stop_token_ids: got 100" in bad.error
    assert good.finish_reason == "length"


def test_the_trace_shows_nodes_in_order(device, llama_path, fast):
    trace = StepTrace(fast.program.node_names)
    with running_engine(llama_path, loaded=fast, device=device, trace=trace, max_model_len=128, **FEW) as engine:
        engine.run([random_tokens(fast, 20)], max_tokens=3)
    events = trace.events()
    steps = [event for event in events if event["cat"] == "step"]
    assert len(steps) >= 3
    for step in steps:
        nodes = [e for e in events if e["cat"] == "node" and e["args"]["plan"] == step["args"]["plan"]]
        assert nodes[0]["name"] == "embedding" and nodes[-1]["name"] == "sampling"
        starts = [node["ts"] for node in nodes]
        assert starts == sorted(starts)
        assert all(step["ts"] - 1 <= n["ts"] and n["ts"] + n["dur"] <= step["ts"] + step["dur"] + 1 for n in nodes)
