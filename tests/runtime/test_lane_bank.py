"""Which native lanes a flag opens, and on which part of the chip each of them lies."""

from __future__ import annotations

import pytest

from runtime import _native, engine_loader
from runtime.devices import CpuDevice, GpuDevice
from runtime.lane_bank import ALL_CUTS, NANO_COMPUTE, NANO_MEMORY, CorePartitions, LaneBank
from runtime.model_runner import ModelRunner
from scheduler.arrangement import DECODE_LANE, PREFILL_LANE
from scheduler.config import SchedulerConfig
from scheduler.controllers import layered
from scheduler.lane_planner import controller_for
from scheduler.policy import policy_named, with_preset
from tests.kit.engines import engine_args, load, running_engine
from tests.kit.gpu_engines import FEW, random_tokens, write_llama


class FakeCores:
    """A device of the given cores; a lane is what it was asked for."""

    def __init__(self, num_cores: int):
        self._cores = list(range(10, 10 + num_cores))

    def engine_lane(self, index, completions, max_num_seqs):
        return RecordedLane(index, self._cores)

    def partitions(self, cuts):
        return RecordedPartitions(self._cores, cuts)


class RecordedLane:
    def __init__(self, lane_idx: int, cores: list[int]):
        self.lane_idx, self.cores, self.is_traced = lane_idx, cores, None

    def set_tracing(self, on: bool) -> None:
        self.is_traced = on


class RecordedPartitions(CorePartitions):
    def lane(self, index, completions, is_first, share, graph_rows):
        cores = self.cores(is_first, share)
        return RecordedLane(index, cores), f"cores {cores}"


@pytest.mark.parametrize("num_cores, rungs", [
    (1, ()), (2, (0.5,)), (3, (1 / 3, 2 / 3)), (8, ALL_CUTS), (64, ALL_CUTS),
])  # fmt: skip
def test_every_cut_leaves_both_parts_a_core_and_no_core_to_both(num_cores, rungs):
    partitions = CorePartitions(range(num_cores), ALL_CUTS)
    assert partitions.rungs == pytest.approx(rungs)
    for rung in partitions.rungs:
        first, second = partitions.cores(True, rung), partitions.cores(False, 1.0 - rung)
        assert first and second and first + second == list(range(num_cores))
    assert partitions.cores(True, 1.0) == partitions.cores(False, 1.0) == list(range(num_cores))


@pytest.mark.parametrize("num_cores", [1, 2, 3, 8])
def test_a_movable_border_has_a_lane_for_each_part_and_two_for_the_whole(num_cores):
    bank = LaneBank(FakeCores(num_cores), None, "auto", 4, is_traced=True)
    assert bank.num_roles == 2
    assert len(bank.native_lanes) == 2 * (len(bank.rungs) + 1)
    assert [lane.lane_idx for lane in bank.native_lanes] == list(range(len(bank.native_lanes)))
    assert all(lane.is_traced for lane in bank.native_lanes)
    cores = list(range(10, 10 + num_cores))
    for rung in bank.rungs:
        prefill, decode = bank.lane(PREFILL_LANE, rung), bank.lane(DECODE_LANE, 1.0 - rung)
        assert prefill.cores + decode.cores == cores
        assert bank.role_of(prefill.lane_idx) == PREFILL_LANE and bank.role_of(decode.lane_idx) == DECODE_LANE
    for role in (PREFILL_LANE, DECODE_LANE):
        assert bank.lane(role, 1.0).cores == cores
    assert bank.describe().count("prefill 100%") == 1


def test_shares_that_no_cut_has_go_to_the_nearest():
    bank = LaneBank(FakeCores(8), None, "auto", 4)
    assert bank.lane(PREFILL_LANE, 0.4).cores == [10, 11, 12]
    assert bank.lane(DECODE_LANE, 0.01).cores == [17]


@pytest.mark.parametrize("lanes, prefill, decode", [
    ("25:75", [10, 11], [*range(12, 18)]), ("30:70", [10, 11], [*range(12, 18)]), ("1:99", [10], [*range(11, 18)]),
    ("100:100", [*range(10, 18)], [*range(10, 18)]), ("75:50", [*range(10, 16)], [*range(14, 18)]),
])  # fmt: skip
def test_a_fixed_border_is_where_it_was_asked_for(lanes, prefill, decode):
    bank = LaneBank(FakeCores(8), None, lanes, 4)
    config = with_preset(SchedulerConfig(num_pages=1, lanes=lanes, rungs=bank.rungs))
    arrangement = controller_for(config, policy_named("default"), None).arrange(None)
    assert bank.lane(PREFILL_LANE, arrangement.prefill_share).cores == prefill
    assert bank.lane(DECODE_LANE, arrangement.decode_share).cores == decode


def test_one_core_is_not_cut_but_shared_in_time():
    with pytest.raises(ValueError, match="lanes: got '50:50', but one core cannot be cut; 100:100 shares it in time"):
        LaneBank(FakeCores(1), None, "50:50", 4)
    bank = LaneBank(FakeCores(1), None, "100:100", 4)
    assert bank.lane(PREFILL_LANE, 1.0) is not bank.lane(DECODE_LANE, 1.0)
    assert bank.lane(PREFILL_LANE, 1.0).cores == bank.lane(DECODE_LANE, 1.0).cores == [10]


@pytest.mark.parametrize("lanes", ["off", "auto"])
def test_nano_batches_have_lanes_of_their_own(lanes):
    for num_cores in (1, 4):
        bank = LaneBank(FakeCores(num_cores), None, lanes, 4, has_nano_batches=True)
        assert bank.num_roles == (1 if lanes == "off" else 2)
        for rung in bank.rungs or (1.0,):
            compute, memory = bank.lane(NANO_COMPUTE, rung), bank.lane(NANO_MEMORY, 1.0 - rung if bank.rungs else 1.0)
            assert compute is not memory
            whole = list(range(10, 10 + num_cores))
            assert compute.cores + memory.cores == (whole if bank.rungs else whole * 2)
            assert bank.role_of(compute.lane_idx) == NANO_COMPUTE and bank.role_of(memory.lane_idx) == NANO_MEMORY


def test_one_lane_is_the_whole_chip():
    bank = LaneBank(FakeCores(4), None, "off", 4)
    assert bank.num_roles == 1 and bank.rungs == () and bank.describe() == "one, the whole chip"
    assert bank.lane(DECODE_LANE, 1.0).cores == [10, 11, 12, 13]


GPU_WORLDS = ["simt", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_FLAGS = [
    {"lanes": "50:50"},
    {"lanes": "100:100", "prefill": "operator"},
    {"prefill": "layer"},
    {"nano_batches": "2"},
]


@pytest.mark.parametrize("world", GPU_WORLDS)
def test_the_flags_work_on_a_gpu_with_graphs_captured_at_start(world, tmp_path, monkeypatch):
    """Only lanes for decodes have graphs to capture. The answers are those of one lane, to the bit."""
    path = write_llama(tmp_path)
    args = {**FEW, "device": world, "max_model_len": 64, "batch_invariant": True}
    loaded = load(path, **args)
    prompts = [random_tokens(loaded, length) for length in (20, 5)]
    plans, launch = [], ModelRunner.launch
    monkeypatch.setattr(ModelRunner, "launch", lambda runner, plan: (plans.append(plan), launch(runner, plan))[1])
    monkeypatch.setattr(layered, "_TOKENS_OF_GROUPS", ((4, 1), (64, 2)))  # prompts here are short
    with running_engine(path, loaded=loaded, **args) as engine:
        expected = engine.run(prompts, max_tokens=4)
    for flags in GPU_FLAGS:
        plans.clear()
        with running_engine(path, loaded=loaded, capture_at_start=True, **args, **flags) as engine:
            bank = engine.engine._runner.bank
            assert all(lane.num_graphs > 0 for lane in bank.decode_lanes)
            others = [lane for lane in bank.native_lanes if lane not in bank.decode_lanes]
            assert all(lane.num_graphs == 0 for lane in others)
            assert engine.run(prompts, max_tokens=4) == expected, flags
        assert {plan.lane for plan in plans} == ({0, 1} if "lanes" in flags else {0})
        assert any(plan.nano is not None for plan in plans) == ("nano_batches" in flags)
        assert any(plan.continues for plan in plans) == (flags.get("prefill") == "layer")


def test_native_lanes_run_where_they_were_put():
    cores = _native.usable_core_ids()
    bank = LaneBank(RealCores(cores), _native.CompletionQueue(), "auto", 4)
    for lane in bank.native_lanes:
        assert lane.num_workers == len(lane.cores) and set(lane.cores) <= set(cores)


class RealCores(FakeCores):
    def __init__(self, cores):
        self._cores = cores

    def partitions(self, cuts):
        return CorePartitions(self._cores, cuts)


@pytest.mark.parametrize("flags, is_whole", [
    ({}, False), ({"lanes": "50:50"}, False), ({"policy": "semi-pd"}, False), ({"policy": "nexus", "lanes": "auto"}, False),
    ({"policy": "arbitrate", "lanes": "off"}, False), ({"policy": "arbitrate"}, True), ({"lanes": "auto"}, True),
    ({"prefill": "layer"}, True), ({"policy": "flowprefill"}, True), ({"policy": "flowprefill", "prefill": "token"}, False),
])  # fmt: skip
def test_frames_hold_whole_prompts_where_prompts_go_in_parts(flags, is_whole):
    device = CpuDevice(2)
    num_tokens = engine_loader._batched_tokens(engine_args("any", **flags, device="cpu"), device)
    assert num_tokens == (engine_loader.RUN_TOKENS if is_whole else device.batched_tokens)
    assert engine_loader._batched_tokens(engine_args("any", **flags, max_num_batched_tokens=99), device) == 99


@pytest.mark.parametrize("flags", [
    {}, {"lanes": "50:50"}, {"lanes": "auto"}, {"prefill": "operator", "max_resting_runs": 5}, {"nano_batches": "2"},
    {"lanes": "auto", "prefill": "layer", "nano_batches": "auto"},
], ids=str)  # fmt: skip
def test_frames_and_graphs_take_no_more_memory_than_was_left_for_them(flags, tmp_path, monkeypatch):
    """All frames at once that there can ever be, all graphs captured; the host execution counts what is allocated."""
    args = engine_args(
        write_llama(tmp_path), **{**FEW, "max_num_batched_tokens": 64}, device="simt", max_model_len=64,
        capture_at_start=True, **flags,
    )  # fmt: skip
    reserved, ask = [], GpuDevice.reserved_bytes

    def recording(device, *args, **sizes):
        reserved.append(ask(device, *args, **sizes))
        return reserved[-1]

    monkeypatch.setattr(GpuDevice, "reserved_bytes", recording)
    loaded = engine_loader.load_model(args)
    gpu, plan = loaded.device.gpu, loaded.kv_plan
    before = gpu.free_bytes
    arena = loaded.device.kv_arena(plan.groups, plan.num_pages)
    arena_bytes = before - gpu.free_bytes
    del arena
    assert gpu.free_bytes == before
    engine = engine_loader.start_engine(loaded, args, lambda deltas: None)
    try:
        frames = []
        with pytest.raises(RuntimeError, match="frames: all"):
            while True:
                frames.append(engine._runner._frames.take())
        taken = before - gpu.free_bytes - arena_bytes
        assert 0.5 * reserved[0] < taken <= reserved[0] + (64 << 10) * len(frames)  # pinned blocks are the host's
    finally:
        engine.shutdown()
