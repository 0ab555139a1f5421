"""The engine on a GPU: the same models, flags and answers as on the CPU. In simt always, on a CUDA device where there is
one. Models are tiny: the host executes some 10^7 to 10^8 device instructions a second."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace

import numpy as np
import pytest

from runtime import _native
from runtime.scoring import Scorer
from runtime.step_trace import StepTrace
from runtime.tokenizer import Tokenizer
from tests.kit.engines import load, running_engine
from tests.kit.prompts import PROMPTS
from tests.kit.tiny_models import FAMILIES, write_tiny_gguf, write_tiny_model

TIE = 1e-4  # logits this near (relative to the largest) may go either way
EXACT = {"activations": "fp32", "kv_dtype": "fp32", "max_model_len": 128}
FEW = {"max_num_seqs": 4, "max_num_batched_tokens": 32}  # small frames


@pytest.fixture(scope="module", params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory):
    # Heads of 64 and 4-bit weights: what the tuned kernels take.
    return write_tiny_gguf(
        "Q4_1", tmp_path_factory.mktemp("llama"), num_hidden_layers=2, head_dim=64, max_position_embeddings=1024
    )[0]


@pytest.fixture(scope="module")
def fast(device, llama_path):
    """A tiny Llama in bf16, batch invariant: what its answers are must not depend on how they come about."""
    return load(llama_path, device=device, max_model_len=128, **FEW)


def random_tokens(loaded, count: int) -> list[int]:
    return np.random.default_rng().integers(3, loaded.config.vocab_size, count).tolist()


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


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


@pytest.mark.parametrize(("activations", "bound"), [("bf16", 0.03), ("fp16", 0.01), ("int8", 0.06)])
def test_lower_precisions_stay_near_the_exact_mode(device, llama_path, activations, bound):
    on_cpu = load(llama_path, device="cpu", **EXACT)
    loaded = load(llama_path, device=device, activations=activations, kv_dtype="bf16", max_model_len=128, **FEW)
    tokens = random_tokens(loaded, 24)
    error = relative_error(Scorer(loaded, chunk_tokens=24).logits(tokens), Scorer(on_cpu).logits(tokens))
    assert 0 < error < bound


@pytest.mark.parametrize("kv_dtype", ["int8", "int8:int4"])
def test_integer_pages_hold_what_the_cpu_would_write(device, llama_path, kv_dtype):
    """Prompts are computed in exact mode on both sides, so that only rounding at a code's border may differ."""
    values = {}
    for where in ("cpu", device):
        loaded = load(llama_path, device=where, activations="fp32", kv_dtype=kv_dtype, max_model_len=128, **FEW)
        plan = loaded.kv_plan
        bench = Bench(loaded)
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
        (lane,) = engine.engine._runner.lanes
        assert lane.num_graphs == 1 and lane.num_graph_steps >= 4 * 5
    with running_engine(llama_path, **args, max_num_batched_tokens=19) as engine:
        assert engine.run(prompts, max_tokens=6) == alone, "in a batch, in chunks"
        (lane,) = engine.engine._runner.lanes
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
        (lane,) = engine.engine._runner.lanes
        assert lane.num_graphs == lane.num_graph_steps == 0


def test_graphs_captured_at_start_give_the_same_answers(device, llama_path, fast):
    prompts = [random_tokens(fast, count) for count in (3, 12)]
    args = {"loaded": fast, "device": device, "max_model_len": 128, **FEW}
    with running_engine(llama_path, **args) as engine:
        expected = engine.run(prompts, max_tokens=5) + engine.run(prompts, max_tokens=5, temperature=1.0, seed=3)
    with running_engine(llama_path, **args, capture_at_start=True) as engine:
        (lane,) = engine.engine._runner.lanes
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


# ---------------------------------------------------------------- frames and lanes


class Bench:
    """Native state of its own over a loaded model: four rows of two pages, lanes of the ladder."""

    def __init__(self, loaded, lanes: int = 1):
        plan = loaded.kv_plan
        self.loaded, self.groups, self.pages = loaded, plan.num_groups, 128 // plan.page_size
        self.arena = loaded.device.kv_arena(plan.groups, 4 * self.pages * self.groups)
        self.rows = loaded.device.row_store(4, 128, self.groups, plan.page_size, loaded.config.vocab_size)
        self.completions = _native.CompletionQueue()
        self.lanes = [loaded.device.lane(i, self.completions) for i in range(lanes)]

    def admit(self, row: int, tokens) -> None:
        sampling = _native.SamplingParams()
        sampling.temperature = 0.0
        self.rows.admit(row, array("i", tokens), len(tokens), sampling)
        for group in range(self.groups):
            first = (row * self.groups + group) * self.pages
            self.rows.set_pages(row, group, 0, list(range(first, first + self.pages)), self.arena.num_pages)

    def frame(self):
        return _native.Frame(self.loaded.program, self.arena, self.rows, 64, 4)

    def wait(self, num: int = 1) -> list[dict]:
        done: list[dict] = []
        while len(done) < num:
            done += self.completions.wait_any(60.0)
        return done

    def logits(self, frame, num_rows: int = 1) -> np.ndarray:
        out = np.full((num_rows, self.loaded.config.vocab_size), np.nan, dtype=np.float32)
        frame.read_buffer("logits", out)
        return out

    def run_whole(self, *rows, lane: int = 0):
        frame = self.frame()
        frame.prepare(array("i", [value for row in rows for value in row]))
        self.lanes[lane].submit(frame, 0, self.loaded.program.num_nodes)
        (completion,) = self.wait()
        assert completion["error"] == ""
        return frame


def test_any_cut_into_node_ranges_gives_the_same_bits(fast):
    bench, tokens, num_nodes = Bench(fast), random_tokens(fast, 30), fast.program.num_nodes
    bench.admit(0, tokens)
    expected = bench.logits(bench.run_whole((0, 0, 30, 1)))
    cuts = sorted(set(np.random.default_rng().integers(1, num_nodes, 4).tolist()))
    frame, other = bench.frame(), bench.frame()
    frame.prepare(array("i", (0, 0, 30, 1)))
    bench.admit(1, random_tokens(fast, 20))
    for first, last in zip([0, *cuts], [*cuts, num_nodes], strict=True):
        bench.lanes[0].submit(frame, first, last)
        (completion,) = bench.wait()
        assert (completion["first_node"], completion["cursor"], completion["was_stopped"]) == (first, last, False)
        other.prepare(array("i", (1, 0, 20, 1)))  # another frame runs while this one rests
        bench.lanes[0].submit(other, 0, num_nodes)
        bench.wait()
    np.testing.assert_array_equal(bench.logits(frame), expected)


def test_a_stopped_range_rests_at_its_cursor_and_resumes(fast):
    bench, tokens, num_nodes = Bench(fast), random_tokens(fast, 40), fast.program.num_nodes
    bench.admit(0, tokens)
    expected = bench.logits(bench.run_whole((0, 0, 40, 1)))
    was_caught, deadline_s, delay_s = False, time.monotonic() + 60, 0.0
    while not was_caught and time.monotonic() < deadline_s:
        frame = bench.frame()
        frame.prepare(array("i", (0, 0, 40, 1)))
        ticket = bench.lanes[0].submit(frame, 0, num_nodes)
        time.sleep(delay_s)
        bench.lanes[0].request_stop(ticket)
        (completion,) = bench.wait()
        assert completion["was_stopped"] == (completion["cursor"] < num_nodes) and completion["error"] == ""
        assert frame.cursor == completion["cursor"]
        was_caught = 0 < completion["cursor"] < num_nodes
        if completion["was_stopped"]:
            bench.lanes[0].submit(frame, frame.cursor, num_nodes)
            bench.wait()
        np.testing.assert_array_equal(bench.logits(frame), expected)
        delay_s = 0.0 if delay_s > 0.2 else delay_s + 2e-4
    assert was_caught, "no run was ever caught between two nodes"


def test_a_step_may_be_queued_before_the_token_it_starts_from_is_known(fast):
    bench, tokens, num_nodes = Bench(fast), random_tokens(fast, 10), fast.program.num_nodes
    bench.admit(0, tokens)
    frames = [bench.frame() for _ in range(3)]
    frames[0].prepare(array("i", (0, 0, 10, 1)))
    frames[1].prepare(array("i", (0, 10, 1, 1)))
    frames[2].prepare(array("i", (0, 11, 1, 1)))
    for frame in frames:
        bench.lanes[0].submit(frame, 0, num_nodes)
    assert [completion["ticket"] for completion in bench.wait(3)] == [1, 2, 3]
    sampled = [frame.sampled_tokens()[0] for frame in frames]
    assert bench.rows.tokens(0, 13)[10:] == sampled
    bench.admit(1, tokens + sampled[:2])
    assert bench.run_whole((1, 0, 12, 1)).sampled_tokens() == sampled[2:]


def test_copies_of_pages_come_before_everything_that_reads_them(fast):
    bench, tokens, num_nodes = Bench(fast), random_tokens(fast, 40), fast.program.num_nodes
    bench.admit(0, tokens)
    bench.run_whole((0, 0, 40, 1))
    expected = bench.logits(bench.run_whole((0, 39, 1, 1)))
    bench.admit(1, tokens)
    frame = bench.frame()
    frame.prepare(array("i", (1, 39, 1, 1)), [(page, self_page) for page, self_page in ((0, bench.pages),)])
    bench.lanes[0].submit(frame, 0, num_nodes)
    bench.wait()
    np.testing.assert_array_equal(bench.logits(frame), expected)
    assert bench.arena.read_page(0) == bench.arena.read_page(bench.pages)


def test_input_embeddings_replace_the_lookup(fast):
    bench, tokens = Bench(fast), random_tokens(fast, 9)
    bench.admit(0, tokens)
    expected = bench.logits(bench.run_whole((0, 0, 9, 1)))
    table = fast.checkpoint.tensors["embedding"]
    weight = _native.Weight(table.data, table.format, *table.shape, table.row_order)
    embeddings = np.empty((9, table.shape[1]), dtype=np.float32)
    for i, token in enumerate(tokens):
        weight.dequantize_row(token, embeddings[i])
    bench.admit(0, [0] * 9)
    frame = bench.frame()
    frame.prepare(array("i", (0, 0, 9, 1)))
    frame.set_input_embeddings(embeddings)
    bench.lanes[0].submit(frame, 0, fast.program.num_nodes)
    bench.wait()
    np.testing.assert_array_equal(bench.logits(frame), expected)


def test_replayed_graphs_of_padded_steps_compute_what_plain_steps_do(device, llama_path):
    """Not batch invariant: the kernels for decoding, whose plans and grids follow from the bucket alone in a graph."""
    loaded = load(llama_path, device=device, batch_invariant=False, max_model_len=128, **FEW)
    bench, num_nodes = Bench(loaded), loaded.program.num_nodes
    lane = loaded.device.engine_lane(1, bench.completions, 4)
    lengths = (50, 3, 21)
    for row, length in enumerate(lengths):
        bench.admit(row, random_tokens(loaded, 64))
        bench.run_whole((row, 0, length, 1))
    for rows in ((0, 1, 2), (2, 1, 0), (1,), (0, 2, 1)):  # bucket 4 with a padded row, three times; bucket 1
        step = [(row, lengths[row], 1, 1) for row in rows]
        expected = bench.logits(bench.run_whole(*step), len(rows))
        frame = bench.frame()
        frame.prepare(array("i", [value for row in step for value in row]))
        lane.submit(frame, 0, num_nodes)
        assert bench.wait()[0]["error"] == ""
        assert relative_error(bench.logits(frame, len(rows)), expected) < 0.01
        assert len(frame.sampled_tokens()) == len(rows)
    assert (lane.num_graphs, lane.num_graph_steps) == (2, 2)


def test_two_lanes_on_two_parts_of_the_chip_work_at_once(fast):
    bench, num_nodes = Bench(fast), fast.program.num_nodes
    ladder = _native.GpuLadder(fast.device.gpu, [0.25, 0.5, 0.75])
    assert ladder.rungs and ladder.note
    first, second = ladder.rungs[ladder.rung_near(0.5)]
    bench.lanes += [
        _native.GpuLane(i + 1, fast.device.gpu, bench.completions, stream=part["stream"], num_ctas=part["num_ctas"])
        for i, part in enumerate((first, second))
    ]
    tokens = {row: random_tokens(fast, 30) for row in (0, 1)}
    expected = {}
    for row in tokens:
        bench.admit(row, tokens[row])
        expected[row] = bench.logits(bench.run_whole((row, 0, 30, 1)))
    frames = {row: [bench.frame() for _ in range(3)] for row in tokens}
    for i in range(3):
        for row in tokens:
            frames[row][i].prepare(array("i", (row, 0, 30, 1)))
            bench.lanes[row + 1].submit(frames[row][i], 0, num_nodes)
    done = bench.wait(6)
    assert sorted(completion["lane"] for completion in done) == [1, 1, 1, 2, 2, 2]
    for row in tokens:
        for frame in frames[row]:
            np.testing.assert_array_equal(bench.logits(frame), expected[row])
    runs = {lane: [c for c in done if c["lane"] == lane] for lane in (1, 2)}
    assert any(a["start_ns"] < b["end_ns"] and b["start_ns"] < a["end_ns"] for a in runs[1] for b in runs[2])


def test_a_shared_prefix_is_read_once_and_changes_nothing_but_rounding(device, llama_path):
    loaded = load(
        llama_path, device=device, batch_invariant=False, max_model_len=576, page_size=16, max_num_seqs=4,
        max_num_batched_tokens=544,
    )  # fmt: skip
    prefix, num_pages = random_tokens(loaded, 512), 576 // 16
    arena = loaded.device.kv_arena(loaded.kv_plan.groups, 4 * num_pages)
    rows = loaded.device.row_store(4, 576, 1, 16, loaded.config.vocab_size)
    completions = _native.CompletionQueue()
    lane = loaded.device.lane(0, completions)

    def run(*step) -> tuple[np.ndarray, int]:
        frame = _native.Frame(loaded.program, arena, rows, 544, 4)
        frame.prepare(array("i", [value for row in step for value in row]))
        lane.submit(frame, 0, loaded.program.num_nodes)
        while not (done := completions.wait_any(60.0)):
            pass
        assert done[0]["error"] == ""
        out = np.full((len(step), loaded.config.vocab_size), np.nan, dtype=np.float32)
        frame.read_buffer("logits", out)
        return out, frame.num_shared_prefixes

    greedy = _native.SamplingParams()
    greedy.temperature = 0.0
    for row in range(3):
        tokens = prefix + random_tokens(loaded, 9 + row)
        rows.admit(row, array("i", tokens), len(tokens), greedy)
        pages = list(range(32)) + list(range((row + 1) * num_pages, (row + 1) * num_pages + 4))
        rows.set_pages(row, 0, 0, pages, arena.num_pages)
    run((0, 0, 512, 1))
    for row in range(3):
        run((row, 512, 8 + row, 1))
    alone = [run((row, 520 + row, 1, 1)) for row in range(3)]
    assert all(num_shared == 0 for _, num_shared in alone)
    together, num_shared = run(*((row, 520 + row, 1, 1) for row in range(3)))
    assert num_shared == 1
    assert relative_error(together, np.concatenate([out for out, _ in alone])) < 0.02


def test_frames_and_lanes_of_different_devices_are_kept_apart(device, llama_path, fast):
    on_cpu = load(llama_path, device="cpu", **EXACT)
    bench, other = Bench(fast), Bench(on_cpu)
    with pytest.raises(ValueError, match="another device"):
        _native.Frame(fast.program, other.arena, bench.rows, 8, 1)
    with pytest.raises(ValueError, match="another device"):
        _native.Frame(on_cpu.program, other.arena, bench.rows, 8, 1)
    other.admit(0, [3, 4])
    frame = other.frame()
    frame.prepare(array("i", (0, 0, 2, 1)))
    with pytest.raises(ValueError, match="wanted one of this lane's device"):
        bench.lanes[0].submit(frame, 0, 1)


def test_memory_is_planned_to_what_is_left(device, llama_path):
    loaded = load(llama_path, device=device, max_model_len=128, **FEW)
    program, plan = loaded.program, loaded.kv_plan
    sizes = {
        "num_rows": 4, "max_context": 128, "num_groups": plan.num_groups, "page_size": plan.page_size,
        "max_tokens": 32, "max_logit_rows": 4,
    }  # fmt: skip
    wanted = _native.gpu_frame_bytes(program, **sizes)
    arena = loaded.device.kv_arena(plan.groups, 2)
    rows = loaded.device.row_store(4, 128, plan.num_groups, plan.page_size, loaded.config.vocab_size)
    if device == "simt":  # a driver rounds to its own granularity
        before = loaded.device.gpu.free_bytes
        frame = _native.Frame(program, arena, rows, 32, 4)
        pinned = before - loaded.device.gpu.free_bytes - wanted
        assert 0 <= pinned < 64 << 10, "device memory other than planned"
        del frame
    reserved = loaded.device.reserved_bytes(program, plan.groups, max_num_seqs=4, max_tokens=32, max_model_len=128)
    assert reserved > 3 * wanted
    with pytest.raises(ValueError, match=r"kv_memory: got .* only"):
        load(llama_path, device=device, kv_memory=1 << 50, max_model_len=128, **FEW)
