"""Programs, frames and lanes of a GPU: any node range, stop and resume, graphs, partitions, memory to the byte."""

from __future__ import annotations

import time
from array import array

import numpy as np
import pytest

from runtime import _native
from tests.kit.engines import load
from tests.kit.gpu_engines import DEVICES, EXACT, FEW, GpuBench, random_tokens, relative_error, write_llama


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


def test_any_cut_into_node_ranges_gives_the_same_bits(fast):
    bench, tokens, num_nodes = GpuBench(fast), random_tokens(fast, 30), fast.program.num_nodes
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
    bench, tokens, num_nodes = GpuBench(fast), random_tokens(fast, 40), fast.program.num_nodes
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
    bench, tokens, num_nodes = GpuBench(fast), random_tokens(fast, 10), fast.program.num_nodes
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
    bench, tokens, num_nodes = GpuBench(fast), random_tokens(fast, 40), fast.program.num_nodes
    bench.admit(0, tokens)
    bench.run_whole((0, 0, 40, 1))
    expected = bench.logits(bench.run_whole((0, 39, 1, 1)))
    bench.admit(1, tokens)
    frame = bench.frame()
    frame.prepare(array("i", (1, 39, 1, 1)), [(0, bench.pages)])
    bench.lanes[0].submit(frame, 0, num_nodes)
    bench.wait()
    np.testing.assert_array_equal(bench.logits(frame), expected)
    assert bench.arena.read_page(0) == bench.arena.read_page(bench.pages)


def test_input_embeddings_replace_the_lookup(fast):
    bench, tokens = GpuBench(fast), random_tokens(fast, 9)
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
    bench, num_nodes = GpuBench(loaded), loaded.program.num_nodes
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


def test_a_split_that_an_engine_gave_back_serves_the_next_one(fast):
    """Contexts of parts of the chip are few in a process, and only its end frees them."""

    def streams(ladder) -> list[int]:
        return [part["stream"] for rung in ladder.rungs for part in rung]

    first = _native.GpuLadder(fast.device.gpu, [0.25, 0.5])
    beside = _native.GpuLadder(fast.device.gpu, [0.25, 0.5])
    taken = streams(first)
    assert len(set(taken + streams(beside))) == 2 * len(taken)  # nothing is shared while both are there
    if not first.is_isolated:
        pytest.skip("this driver splits nothing")
    del first
    assert streams(_native.GpuLadder(fast.device.gpu, [0.25, 0.5])) == taken


def test_two_lanes_on_two_parts_of_the_chip_work_at_once(fast):
    bench, num_nodes = GpuBench(fast), fast.program.num_nodes
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
    bench, other = GpuBench(fast), GpuBench(on_cpu)
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
    reserved = loaded.device.reserved_bytes(
        program,
        plan.groups,
        max_num_seqs=4,
        max_tokens=32,
        max_model_len=128,
        num_frames=3,
        num_decode_lanes=1,
    )
    assert reserved > 3 * wanted
    with pytest.raises(ValueError, match=r"kv_memory: got .* only"):
        load(llama_path, device=device, kv_memory=1 << 50, max_model_len=128, **FEW)
