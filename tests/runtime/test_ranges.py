"""Ranges that come after others: chains of one frame over several lanes, and frames that need what others leave."""

from __future__ import annotations

import random
import time
from array import array

import numpy as np
import pytest

from tests.kit.engines import load
from tests.kit.gpu_engines import FEW, GpuBench, random_tokens, write_llama

DEVICES = ["cpu", "simt", pytest.param("cuda", marks=pytest.mark.gpu)]
BROKEN = "a range before it failed or was stopped"


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(device, tmp_path_factory):
    options = {"threads": 2} if device == "cpu" else {}
    return load(write_llama(tmp_path_factory.mktemp("llama")), device=device, max_model_len=128, **FEW, **options)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def num_rounds(device: str) -> int:
    return 20 if device == "cpu" else 3  # the host execution takes its time


def prepared(bench, *row):
    frame = bench.frame()
    frame.prepare(array("i", row))
    return frame


def submit_chain(bench, frame, rng, num_cuts: int, after=()) -> list:
    """The whole program in pieces, each on a random lane after the one before. Signals of the pieces."""
    num_nodes = bench.loaded.program.num_nodes
    cuts = sorted(rng.sample(range(1, num_nodes), num_cuts))
    signals = []
    for first, last in zip([0, *cuts], [*cuts, num_nodes], strict=True):
        lane = rng.choice(bench.lanes)
        wanted = signals[-1:] if signals else list(after)
        _, signal = lane.submit_with_signal(frame, first, last, wanted)
        signals.append(signal)
    return signals


def test_chains_of_several_frames_over_three_lanes_give_the_same_bits(loaded, device, rng):
    bench = GpuBench(loaded, lanes=3)
    prompts = [random_tokens(loaded, length) for length in (30, 17, 8)]
    expected = []
    for row, tokens in enumerate(prompts):
        bench.admit(row, tokens)
        expected.append(bench.logits(bench.run_whole((row, 0, len(tokens), 1))))
    for _ in range(num_rounds(device)):
        frames = []
        for row, tokens in enumerate(prompts):
            bench.admit(row, tokens)
            frames.append(prepared(bench, row, 0, len(tokens), 1))
        signals = [signal for frame in frames for signal in submit_chain(bench, frame, rng, 4)]
        assert all(completion["error"] == "" for completion in bench.wait(len(signals)))
        deadline_s = time.monotonic() + 10.0
        while not all(signal.has_ended for signal in signals):  # a signal follows its completion
            assert time.monotonic() < deadline_s
        for frame, logits in zip(frames, expected, strict=True):
            assert frame.cursor == loaded.program.num_nodes
            np.testing.assert_array_equal(bench.logits(frame), logits)


def test_a_step_on_another_lane_reads_what_the_one_before_it_appends_and_samples(loaded, device, rng):
    """A prompt in two halves and two decodes, each a frame that goes over the lanes in pieces."""
    bench, tokens, num_nodes = GpuBench(loaded, lanes=3), random_tokens(loaded, 30), loaded.program.num_nodes
    steps = [(0, 0, 14, 0), (0, 14, 16, 1), (0, 30, 1, 1), (0, 31, 1, 1)]
    bench.admit(0, tokens)
    expected = [bench.run_whole(step).sampled_tokens() for step in steps]
    for _ in range(num_rounds(device)):
        bench.admit(0, tokens)
        frames = [prepared(bench, *step) for step in steps]
        before: list = []
        count = 0
        for frame in frames:
            signals = submit_chain(bench, frame, rng, 3, before)
            before, count = signals[-1:], count + len(signals)
        assert {completion["error"] for completion in bench.wait(count)} == {""}
        assert [frame.sampled_tokens() for frame in frames] == expected
        assert all(frame.cursor == num_nodes for frame in frames)


def test_a_range_that_waits_can_be_stopped_and_has_not_begun(loaded, device):
    bench, num_nodes = GpuBench(loaded, lanes=2), loaded.program.num_nodes
    tokens = random_tokens(loaded, 60)
    for row in (0, 1):
        bench.admit(row, tokens)
    was_caught, deadline_s = False, time.monotonic() + 60.0
    while not was_caught and time.monotonic() < deadline_s:
        # The first lane has several runs ahead of the one that the second lane waits for.
        ahead = [prepared(bench, 0, 0, 60, 1) for _ in range(4)]
        signals = [bench.lanes[0].submit_with_signal(frame, 0, num_nodes)[1] for frame in ahead]
        waiting = prepared(bench, 1, 0, 60, 1)
        ticket = bench.lanes[1].submit(waiting, 0, num_nodes, [signals[-1]])
        bench.lanes[1].request_stop(ticket)
        done = bench.wait(len(ahead) + 1)
        (stopped,) = [completion for completion in done if completion["lane"] == 1]
        assert stopped["error"] == "" and stopped["cursor"] == waiting.cursor
        assert all(completion["cursor"] == num_nodes for completion in done if completion["lane"] == 0)
        was_caught = stopped["was_stopped"] and waiting.cursor == 0
    assert was_caught


def test_what_comes_after_a_stopped_range_fails_and_leaves_its_frame_where_it_rests(loaded, device, rng):
    """A stop in the middle of a chain: all that is queued behind it is over, and the frame can still go on."""
    bench, num_nodes = GpuBench(loaded, lanes=2), loaded.program.num_nodes
    tokens = random_tokens(loaded, 60)
    bench.admit(0, tokens)
    expected = bench.logits(bench.run_whole((0, 0, 60, 1)))
    first, second = num_nodes - 4, num_nodes - 2
    was_caught, deadline_s = False, time.monotonic() + 60.0
    while not was_caught and time.monotonic() < deadline_s:
        frame, other = prepared(bench, 0, 0, 60, 1), prepared(bench, 0, 0, 60, 1)
        ticket, signal = bench.lanes[0].submit_with_signal(frame, 0, first)
        _, signal = bench.lanes[1].submit_with_signal(frame, first, second, [signal])
        bench.lanes[0].submit(frame, second, num_nodes, [signal])
        bench.lanes[1].submit(other, 0, num_nodes, [signal])
        stop_s = time.perf_counter() + rng.uniform(0.0, 0.02 if device == "simt" else 0.002)
        while time.perf_counter() < stop_s:  # a sleep would be longer than the range
            pass
        bench.lanes[0].request_stop(ticket)
        done = bench.wait(4)
        (begun,) = [each for each in done if each["ticket"] == ticket and each["lane"] == 0]
        was_caught = begun["was_stopped"] and begun["cursor"] > 0
        if begun["was_stopped"]:
            assert [each["error"] for each in done if each is not begun] == [BROKEN] * 3
            assert frame.cursor == begun["cursor"] < first and other.cursor == 0
            bench.lanes[1].submit(frame, frame.cursor, num_nodes)
            (last,) = bench.wait()
            assert last["error"] == ""
        else:
            assert {each["error"] for each in done} == {""}
        np.testing.assert_array_equal(bench.logits(frame), expected)
    assert was_caught, "no range was ever caught between two nodes"


def test_a_lane_that_goes_away_ends_those_that_wait_for_it(loaded):
    bench, num_nodes = GpuBench(loaded, lanes=2), loaded.program.num_nodes
    bench.admit(0, random_tokens(loaded, 60))
    frames = [prepared(bench, 0, 0, 60, 1) for _ in range(3)]
    _, signal = bench.lanes[0].submit_with_signal(frames[0], 0, num_nodes)
    _, signal = bench.lanes[0].submit_with_signal(frames[1], 0, num_nodes, [signal])
    bench.lanes[1].submit(frames[2], 0, num_nodes, [signal])
    del bench.lanes[0]  # waits for its workers
    done = {(each["lane"], each["ticket"]): each for each in bench.wait(3)}
    assert set(done) == {(0, 1), (0, 2), (1, 1)}
    assert done[1, 1]["error"] == (BROKEN if done[0, 2]["was_stopped"] else "")
    # And one that waits does not hold up the end of its own lane.
    _, signal = bench.lanes[0].submit_with_signal(prepared(bench, 0, 0, 60, 1), 0, num_nodes)
    waiter = loaded.device.lane(5, bench.completions)
    waiter.submit(frames[0], frames[0].cursor, num_nodes, [signal]) if frames[0].cursor < num_nodes else None
    del waiter


def test_bad_chains_are_refused(loaded, device):
    bench, num_nodes = GpuBench(loaded, lanes=2), loaded.program.num_nodes
    bench.admit(0, random_tokens(loaded, 60))
    frame, other = prepared(bench, 0, 0, 60, 1), prepared(bench, 0, 0, 60, 1)
    _, foreign = bench.lanes[0].submit_with_signal(other, 0, 1)
    ahead = [
        prepared(bench, 0, 0, 60, 1) for _ in range(100 if device == "cpu" else 4)
    ]  # so that the frame's range is still queued below
    for before in ahead:
        bench.lanes[0].submit(before, 0, num_nodes)
    _, signal = bench.lanes[0].submit_with_signal(frame, 0, 3)
    with pytest.raises(ValueError, match="not finished, and not after it"):
        bench.lanes[1].submit(frame, 3, num_nodes, [foreign])
    with pytest.raises(ValueError, match="first: got node 4, wanted the end of the range before it, node 3"):
        bench.lanes[1].submit(frame, 4, num_nodes, [signal])
    with pytest.raises(ValueError, match="prepare"):
        frame.prepare(array("i", (0, 0, 60, 1)))
    bench.wait(len(ahead) + 2)
