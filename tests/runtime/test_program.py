"""Programs, frames and lanes: any node range, stop and resume, several lanes at once, and the same numbers throughout."""

from __future__ import annotations

import json
import threading
import time
from array import array

import numpy as np
import pytest

from runtime import _native
from runtime.step_trace import StepTrace
from tests.kit.engines import load, running_engine
from tests.kit.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path, _ = write_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return load(path, activations="fp32", kv_dtype="fp32", max_model_len=256)


class Bench:
    """Native state of its own over a loaded model: rows 0..3, one lane per core list."""

    def __init__(self, loaded, lanes=((0,),)):
        self.loaded, plan = loaded, loaded.kv_plan
        pages = plan.max_model_len // plan.page_size
        self.arena = loaded.device.kv_arena(plan.groups, 4 * pages * plan.num_groups)
        self.rows = loaded.device.row_store(
            4, plan.max_model_len, plan.num_groups, plan.page_size, loaded.config.vocab_size
        )
        self.completions = _native.CompletionQueue()
        self.lanes = [loaded.device.lane(i, self.completions, list(cores)) for i, cores in enumerate(lanes)]
        self.pages = pages
        self.groups = plan.num_groups

    def admit(self, row: int, tokens) -> None:
        sampling = _native.SamplingParams()
        sampling.temperature = 0.0
        self.rows.admit(row, array("i", tokens), len(tokens), sampling)
        for group in range(self.groups):
            first = (row * self.groups + group) * self.pages
            self.rows.set_pages(row, group, 0, list(range(first, first + self.pages)), self.arena.num_pages)

    def frame(self):
        return _native.Frame(self.loaded.program, self.arena, self.rows, 128, 128)

    def wait(self, num: int = 1) -> list[dict]:
        done: list[dict] = []
        while len(done) < num:
            done += self.completions.wait_any(30.0)
        return done

    def logits(self, frame, num_rows: int) -> np.ndarray:
        out = np.full((num_rows, self.loaded.config.vocab_size), np.nan, dtype=np.float32)
        frame.read_buffer("logits", out)
        return out

    def whole(self, tokens) -> np.ndarray:
        self.admit(0, tokens)
        frame = self.frame()
        frame.prepare(array("i", (0, 0, len(tokens), 1)))
        self.lanes[0].submit(frame, 0, self.loaded.program.num_nodes)
        assert self.wait()[0]["error"] == ""
        return self.logits(frame, 1)


def tokens_of(loaded, n: int) -> list[int]:
    return np.random.default_rng().integers(0, loaded.config.vocab_size, n).tolist()


def test_any_cut_into_node_ranges_gives_the_same_bits(loaded):
    bench, tokens = Bench(loaded), tokens_of(loaded, 50)
    expected = bench.whole(tokens)
    num_nodes = loaded.program.num_nodes
    for _ in range(10):
        cuts = sorted(set(np.random.default_rng().integers(1, num_nodes, 4).tolist()))
        frame = bench.frame()
        frame.prepare(array("i", (0, 0, 50, 1)))
        for first, last in zip([0, *cuts], [*cuts, num_nodes], strict=True):
            bench.lanes[0].submit(frame, first, last)
            (completion,) = bench.wait()
            assert (completion["first_node"], completion["cursor"], completion["was_stopped"]) == (first, last, False)
            assert frame.cursor == last
        np.testing.assert_array_equal(bench.logits(frame, 1), expected)


def test_a_resting_frame_survives_other_frames_running_between_its_ranges(loaded):
    bench, tokens = Bench(loaded), tokens_of(loaded, 40)
    expected = bench.whole(tokens)
    frame, middle = bench.frame(), loaded.program.num_nodes // 2
    frame.prepare(array("i", (0, 0, 40, 1)))
    bench.lanes[0].submit(frame, 0, middle)
    bench.wait()
    bench.admit(1, tokens_of(loaded, 64))
    other = bench.frame()
    other.prepare(array("i", (1, 0, 64, 1)))
    bench.lanes[0].submit(other, 0, loaded.program.num_nodes)
    bench.wait()
    bench.lanes[0].submit(frame, middle, loaded.program.num_nodes)
    bench.wait()
    np.testing.assert_array_equal(bench.logits(frame, 1), expected)


def test_a_stopped_range_rests_at_its_cursor_and_resumes(loaded):
    bench, tokens = Bench(loaded), tokens_of(loaded, 100)
    expected = bench.whole(tokens)
    num_nodes, was_ever_stopped = loaded.program.num_nodes, False
    attempt, deadline_s = 0, time.monotonic() + 60.0
    while attempt < 50 or (not was_ever_stopped and time.monotonic() < deadline_s):
        attempt += 1
        frame = bench.frame()
        frame.prepare(array("i", (0, 0, 100, 1)))
        while frame.cursor < num_nodes:
            ticket = bench.lanes[0].submit(frame, frame.cursor, num_nodes)
            threading.Event().wait(attempt % 50 * 2e-5)
            bench.lanes[0].request_stop(ticket)
            (completion,) = bench.wait()
            assert completion["was_stopped"] == (completion["cursor"] < num_nodes)
            was_ever_stopped |= 0 < completion["cursor"] < num_nodes
            if completion["was_stopped"]:
                ticket = bench.lanes[0].submit(frame, frame.cursor, num_nodes)
                bench.wait()
        np.testing.assert_array_equal(bench.logits(frame, 1), expected)
    assert was_ever_stopped, "no run was ever caught between two nodes"


def test_a_range_stopped_before_it_began_has_run_nothing(loaded):
    bench, num_nodes = Bench(loaded), loaded.program.num_nodes
    for row in (0, 1):
        bench.admit(row, tokens_of(loaded, 100))
    ahead, second = [bench.frame() for _ in range(4)], bench.frame()
    was_caught, deadline_s = False, time.monotonic() + 60.0
    while not was_caught and time.monotonic() < deadline_s:
        for frame in ahead:
            frame.prepare(array("i", (0, 0, 100, 1)))
            bench.lanes[0].submit(frame, 0, num_nodes)
        second.prepare(array("i", (1, 0, 100, 1)))
        ticket = bench.lanes[0].submit(second, 0, num_nodes)
        bench.lanes[0].request_stop(ticket)
        done = {completion["ticket"]: completion for completion in bench.wait(len(ahead) + 1)}
        assert done[ticket]["cursor"] == second.cursor
        assert all(not done[other]["was_stopped"] for other in done if other != ticket)
        # Not caught: this thread slept until the four runs ahead of it were over.
        was_caught = done[ticket]["was_stopped"] and second.cursor == 0
    assert was_caught


def test_lanes_on_disjoint_cores_run_at_the_same_time(loaded):
    cores = _native.usable_core_ids()
    if len(cores) < 2:
        pytest.skip("needs two cores")
    bench = Bench(loaded, lanes=((cores[0],), (cores[1],)))
    rows = {row: tokens_of(loaded, 100) for row in (0, 1)}
    expected = {row: bench.whole(tokens) for row, tokens in rows.items()}
    for row, tokens in rows.items():
        bench.admit(row, tokens)
    # One run is over before a busy machine wakes the other lane's thread, so lane 0 is kept fed: three runs stand in
    # its queue at any time until a run of lane 1 was seen to begin within one of them.
    num_nodes, runs = loaded.program.num_nodes, ([], [])
    frames = {0: [bench.frame() for _ in range(3)], 1: [bench.frame()]}
    in_flight = {0: [], 1: []}

    def submit(row: int, frame) -> None:
        frame.prepare(array("i", (row, 0, 100, 1)))
        bench.lanes[row].submit(frame, 0, num_nodes)
        in_flight[row].append(frame)

    def overlap() -> bool:
        return any(a["start_ns"] < b["end_ns"] and b["start_ns"] < a["end_ns"] for a in runs[0] for b in runs[1][-1:])

    for row, of_row in frames.items():
        for frame in of_row:
            submit(row, frame)
    deadline_s = time.monotonic() + 60.0
    while not overlap() and time.monotonic() < deadline_s:
        for completion in bench.wait():
            row = completion["lane"]
            runs[row].append(completion)
            frame = in_flight[row].pop(0)
            np.testing.assert_array_equal(bench.logits(frame, 1), expected[row])
            submit(row, frame)
    bench.wait(sum(len(of_row) for of_row in in_flight.values()))
    assert overlap(), f"{len(runs[0])} runs of lane 0 and {len(runs[1])} of lane 1 took turns"


def test_many_small_ranges_over_more_workers_than_cores_lose_nothing(loaded):
    core = _native.usable_core_ids()[0]
    bench, tokens = Bench(loaded, lanes=((core,) * 5,)), tokens_of(loaded, 8)
    expected = bench.whole(tokens)
    frame = bench.frame()
    for _ in range(100):
        frame.prepare(array("i", (0, 0, 8, 1)))
        for node in range(loaded.program.num_nodes):
            bench.lanes[0].submit(frame, node, node + 1)
            assert bench.wait()[0]["error"] == ""
    np.testing.assert_array_equal(bench.logits(frame, 1), expected)


def test_wait_any_returns_early_when_notified(loaded):
    completions = _native.CompletionQueue()
    threading.Timer(0.05, completions.notify).start()
    assert completions.wait_any(30.0) == []


def test_input_embeddings_replace_the_lookup(loaded):
    bench, tokens = Bench(loaded), tokens_of(loaded, 9)
    expected = bench.whole(tokens)
    table = loaded.checkpoint.tensors["embedding"]
    weight = _native.Weight(table.data, table.format, *table.shape, table.row_order)
    embeddings = np.empty((9, table.shape[1]), dtype=np.float32)
    for i, token in enumerate(tokens):
        weight.dequantize_row(token, embeddings[i])
    bench.admit(0, [0] * 9)
    frame = bench.frame()
    frame.prepare(array("i", (0, 0, 9, 1)))
    frame.set_input_embeddings(embeddings)
    bench.lanes[0].submit(frame, 0, loaded.program.num_nodes)
    bench.wait()
    np.testing.assert_array_equal(bench.logits(frame, 1), expected)


def test_describe_lists_every_node_with_its_cost_and_what_lives_after_it(loaded):
    nodes = loaded.program.describe(num_tokens=16, num_requests=2, num_logit_rows=2, score_pairs=100.0)
    config = loaded.config
    names = [node["name"] for node in nodes]
    assert names == loaded.program.node_names
    assert names[:2] == ["copy_pages", "embedding"] and names[-2:] == ["logits", "sampling"]
    by_name = {node["name"]: node for node in nodes}
    qkv = by_name["layers.0.qkv"]
    width = (config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    assert qkv["operations"] == 2 * 16 * config.hidden_size * width
    assert qkv["kind"] == "linear" and qkv["layer"] == 0 and qkv["bytes"] > 0
    assert by_name["layers.1.attention"]["operations"] == 4 * 100 * config.num_q_heads * config.head_dim
    assert set(qkv["live_after"]) == {"hidden", "qkv"}
    assert by_name["layers.0.down"]["live_after"] == ["hidden"]
    assert by_name["sampling"]["live_after"] == []
    assert {node["class"] for node in nodes} <= {"compute", "memory", "network"}
    assert loaded.program.head_node == names.index("gather_logit_rows")


def test_the_step_trace_shows_each_step_with_its_nodes_in_order(loaded, tmp_path):
    trace = StepTrace(loaded.program.node_names)
    with running_engine(
        "tiny", loaded=loaded, trace=trace, activations="fp32", kv_dtype="fp32", max_model_len=256
    ) as engine:
        engine.run([tokens_of(loaded, 30), tokens_of(loaded, 5)], max_tokens=4)
    path = tmp_path / "trace.json"
    trace.write(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["cat"] == "step"]
    assert steps and sum(n for step in steps for _, _, n in step["args"]["requests"]) >= 30 + 5 + 2 * 3
    for step in steps:
        nodes = [e for e in events if e["cat"] == "node" and e["args"]["plan"] == step["args"]["plan"]]
        starts = [node["ts"] for node in nodes]
        assert starts == sorted(starts)
        assert nodes[0]["name"] == "embedding"  # there was nothing to copy
        assert all(
            step["ts"] <= node["ts"] <= node["ts"] + node["dur"] <= step["ts"] + step["dur"] + 1 for node in nodes
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((9, 0, 1, 1), "row 9, wanted 0 to 3"),
        ((0, 0, 0, 1), "tokens 0 to 0"),
        ((0, -1, 4, 1), "tokens -1 to 3"),
        ((0, 250, 10, 1), "within 0 to 256"),
        ((3, 0, 10, 1), "hold fewer"),
        ((0, 0, 1), "quadruples"),
        ((0, 0, 200, 1), "wanted 1 to 128"),
        ((), "got 0 tokens"),
    ],
)
def test_bad_steps_are_refused_by_name_and_value(loaded, rows, message):
    bench = Bench(loaded)
    bench.admit(0, tokens_of(loaded, 10))
    frame = bench.frame()
    with pytest.raises(ValueError, match=message):
        frame.prepare(array("i", rows))
    with pytest.raises(ValueError, match="before prepare"):
        bench.lanes[0].submit(frame, 0, 1)


def test_bad_submissions_are_refused(loaded):
    bench = Bench(loaded)
    bench.admit(0, tokens_of(loaded, 10))
    frame = bench.frame()
    frame.prepare(array("i", (0, 0, 10, 1)))
    for first, last in ((0, 0), (-1, 2), (0, loaded.program.num_nodes + 1)):
        with pytest.raises(ValueError, match="nodes: got"):
            bench.lanes[0].submit(frame, first, last)
    with pytest.raises(ValueError, match="cursor"):
        bench.lanes[0].submit(frame, 1, 2)
    with pytest.raises(ValueError, match=r"tokens\[1\]: got id 999999"):
        bench.rows.admit(0, array("i", (1, 999999)), 2, _native.SamplingParams())
    with pytest.raises(ValueError, match="pages"):
        bench.rows.set_pages(0, 0, 0, [10**6], bench.arena.num_pages)
    with pytest.raises(ValueError, match="not a known|wanted 'token'"):
        _native.Program().add_buffer("x", "column", 4)


def test_core_splits_are_disjoint_and_cover():
    assert _native.split_cores([0, 1], 0.5) == ([0], [1])
    assert _native.split_cores([0, 1, 2, 3, 4, 5, 6, 7], 0.75) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert _native.split_cores([3], 0.5) == ([3], [])
    assert _native.split_cores([0, 1], 1.0) == ([0, 1], [])
    with pytest.raises(ValueError, match="share"):
        _native.split_cores([0, 1], 0.0)
