"""The host execution of the CUDA sources: faults are reported, right kernels are not, whatever the order of warps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import _native
from tests.kernels.device_cases import run

SEEDS = range(6)
# Kernel -> what its report says. No entry of a fault that some order of warps hides.
FAULTS = {
    "read_before_barrier": r"(race: (read|write) of 4 bytes at .*, and a (write|read) by|which nobody wrote)",
    "write_after_read": r"race: (write|read) of 4 bytes at shared memory \+ \d+, and a (read|write) by thread",
    "write_after_two_reads": r"race: (write|read) of 4 bytes at shared memory \+ 0, and a (read|write) by",
    "write_twice": r"race: write of 4 bytes at shared memory \+ \d+, and a write by thread",
    "same_byte": r"race: write of 1 bytes at shared memory \+ \d+, and a write by thread",
    "missing_syncwarp": r"(race: read of 4 bytes|race: write of 4 bytes|which nobody wrote)",
    "shuffle_for_syncwarp": r"race: read of 4 bytes",
    "syncwarp_of_other_half": r"(race: read of 4 bytes|race: write of 4 bytes|which nobody wrote)",
    "write_after_arrive": r"(race: (read|write) of 4 bytes|which nobody wrote)",
    "atomic_and_plain": r"race: (atomic|read) of 4 bytes at shared memory \+ 0, and a (read|atomic) by",
    "missing_wait": r"read of shared memory \+ \d+, which a cp.async of thread \d+ .*still writes",
    "weak_wait": r"read of shared memory \+ \d+, which a cp.async of thread \d+ .*still writes",
    "wait_without_commit": r"read of shared memory \+ \d+, which a cp.async of thread \d+ .*still writes",
    "wait_without_barrier": r"(race: read of 4 bytes|which nobody wrote|still writes)",
    "never_waits": r"ended with a cp.async under way",
    "copies_to_one_place": r"still writes|race: cp.async of 16 bytes",
    "copy_over_reads": r"race: (cp.async|read) of \d+ bytes at shared memory \+ \d+, and a (read|write) by|still writes",
    "uninitialised": r"read of 4 bytes at shared memory \+ 20, which nobody wrote",
    "uninitialised_row": r"read of 16 bytes at shared memory \+ 20, which nobody wrote",
    "row_of_other_warp": r"(race: (read|write) of|which nobody wrote)",
    "read_past_end": r"read of 4 bytes out of bounds: 0 bytes past the end of GpuArray \(1024 bytes\)",
    "write_before_begin": r"write of 4 bytes out of bounds: 4 bytes before the beginning of GpuArray",
    "load_past_end": r"read of 16 bytes out of bounds: 0 bytes past the end of GpuArray",
    "copy_past_end": r"read of 16 bytes out of bounds: 0 bytes past the end of GpuArray",
    "null_pointer": r"(read of 4 bytes out of bounds: at 0x|misaligned read)",
    "shared_past_end": r"write of 4 bytes at shared memory \+ \d+; the launch gave 1088 bytes",
    "misaligned_load": r"misaligned read of 16 bytes",
    "misaligned_float4": r"misaligned read of a .*float4",
    "misaligned_shared": r"misaligned read of a .*uint16_t",
    "misaligned_copy": r"misaligned: shared memory \+ \d+, wanted a multiple of 8",
    "misaligned_row": r"misaligned: shared memory \+ \d+, wanted a multiple of 16",
    "half_warp_barrier": r"divergent barrier",
    "two_barriers_in_a_warp": r"divergent barrier: lane \d+ at .*defects.cu:\d+, other lanes of .* at .*defects.cu:\d+",
    "barrier_without_partner": r"divergent barrier, no thread can go on: .*wait at the barrier .*defects.cu:\d+",
    "different_collectives": r"divergent warp: lane \d+ at .*defects.cu:\d+, others",
    "shuffle_from_outside": r"shuffle: lane \d+ reads lane \d+, which takes no part",
    "not_in_mask": r"mask 0x7fffffff lacks the calling lane 31",
    "part_of_a_warp_mma": r"mma: lanes 0x7fffffff came, wanted the whole warp",
    "other_threads_locals": r"write of 4 bytes out of bounds: at 0x",
    "deep_recursion": r"used up its stack",
    "wgmma_no_fence": r"wgmma of shared memory \+ \d+, which thread \d+ wrote .*: no fence_async_proxy after it",
    "wgmma_fence_before_write": r"wgmma of shared memory \+ \d+, which thread \d+ wrote .*: no fence_async_proxy",
    "wgmma_no_wait": r"which a wgmma still reads: no wgmma_wait before|ended with a wgmma under way",
    "wgmma_weak_wait": r"which a wgmma still reads: no wgmma_wait before|ended with a wgmma under way",
    "wgmma_writes_before_wait": r"write of shared memory \+ \d+, which a wgmma still reads: no wgmma_wait before",
    "wgmma_no_barrier_after_wait": r"race: (read|write) of|which a wgmma still reads",
    "large_plan": r"the plan takes 8192 bytes aligned to 4, the launch gave 1088",
}
REFUSALS = {
    "no_blocks": r"grid: got \(0, 1, 1\)",
    "many_threads": r"block: got \(1025, 1, 1\)",
    "much_shared": r"shared_bytes: got 233472, wanted at most 232448",
}
RIGHT = ["neighbouring_bytes_in_order", "syncwarp_of_own_half", "wgmma_right"]


@pytest.fixture(autouse=True)
def ascending_order():
    yield
    _native.simt_set_seed(0)
    _native.simt_set_disabled_site("")


@pytest.fixture
def simt():
    return _native.open_gpu("simt")


def run_defect(gpu, name: str) -> None:
    run(gpu, name, [np.zeros(256, np.uint32)], np.zeros(256, np.uint32))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(simt, name):
    for seed in SEEDS:
        _native.simt_set_seed(seed)
        with pytest.raises(RuntimeError, match=FAULTS[name]) as caught:
            run_defect(simt, name)
        assert str(caught.value).startswith("simt: kernel device_test defect, block (0, 0, 0)")


@pytest.mark.parametrize("name", REFUSALS)
def test_launch_that_no_gpu_takes_is_refused(simt, name):
    with pytest.raises(RuntimeError, match="kernel device_test defect: " + REFUSALS[name]):
        run_defect(simt, name)


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_is_not_reported(simt, name):
    for seed in SEEDS:
        _native.simt_set_seed(seed)
        run_defect(simt, name)


def test_all_defects_are_tried(simt):
    """Every kernel of csrc/simt/defects stands in a list above, and these lists hold no others."""
    folder = Path(__file__).parents[2] / "csrc/simt/defects"
    text = (folder / "defects.cu").read_text() + (folder / "wgmma.cu").read_text()
    names = [n for n in _native.device_test_kernels(simt) if f'{{"{n}"' in text or f"DEFECT({n})" in text]
    assert sorted(names) == sorted([*FAULTS, *REFUSALS, *RIGHT, "polls_forever"])


def test_report_names_the_line(simt):
    """Of the access, and of the one before that it races with."""
    source = (Path(__file__).parents[2] / "csrc/simt/defects/defects.cu").read_text().splitlines()
    at = next(i for i, line in enumerate(source) if "void write_after_read" in line)
    with pytest.raises(RuntimeError) as caught:
        run_defect(simt, "write_after_read")
    text = str(caught.value)
    if "libpartita_simt.so+0x" in text:
        pytest.skip("addr2line is not installed")
    # The last warp to come to the barrier goes on and writes; then the first reads.
    assert f"simt/defects/defects.cu:{at + 4}: race: read" in text
    assert f"write by thread 32 at simt/defects/defects.cu:{at + 5};" in text


def test_polling_without_end_is_reported():
    """In a process of its own, where the limit can be set."""
    script = (
        "import numpy as np; from tests.kernels.device_cases import run; from runtime import _native\n"
        "run(_native.open_gpu('simt'), 'polls_forever', [np.zeros(256, np.uint32)], np.zeros(256, np.uint32))\n"
    )
    environment = dict(os.environ, PARTITA_SIMT_POLL_SECONDS="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode != 0 and "1 blocks poll memory that nobody writes" in ran.stderr


# ---- the tests' own test: a barrier or wait that is missing shows ------------------------------------------------------


def pipeline(gpu, depth: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 8, size=(64, depth)).astype(np.float16)
    b = rng.integers(-8, 8, size=(64, depth)).astype(np.float16)
    out = run(gpu, "pipeline", [a.view(np.uint16), b.view(np.uint16)], np.zeros((64, 64), np.float32), (64, 64, depth))
    np.testing.assert_array_equal(out, a.astype(np.float32) @ b.astype(np.float32).T)
    return out


def barriers(gpu) -> None:
    run(gpu, "barriers", [np.ones((2, 160), np.uint32)], np.zeros((2, 160), np.uint32), [2])


def named_barriers(gpu) -> None:
    run(gpu, "named_barriers", [np.ones((7, 64), np.uint32)], np.zeros(64, np.uint32), [7])


def copies(gpu) -> None:
    run(gpu, "copies", [np.ones((64, 4), np.uint32)], np.zeros((7, 64, 4), np.uint32))


MUTATED = {
    "pipeline": (lambda gpu: pipeline(gpu, 160), 4),
    "barriers": (barriers, 3),
    "named_barriers": (named_barriers, 4),
    "copies": (copies, 4),
}


@pytest.mark.parametrize("name", MUTATED)
def test_every_barrier_and_wait_is_missed_when_it_is_gone(simt, name):
    work, num_sites = MUTATED[name]
    _native.simt_take_visited_sites()
    for seed in SEEDS:
        _native.simt_set_seed(seed)
        work(simt)
    sites = _native.simt_take_visited_sites()
    assert len(sites) == num_sites, sites
    _native.simt_set_seed(0)
    for site in sites:
        _native.simt_set_disabled_site(site)
        with pytest.raises(RuntimeError, match="simt: kernel device_test"):
            work(simt)
    _native.simt_set_disabled_site("")
    work(simt)


def test_disabled_site_must_be_a_place():
    for site in ("pipeline.cu", ":3", "pipeline.cu:", "pipeline.cu:x", "pipeline.cu:0"):
        with pytest.raises(ValueError, match="site: got"):
            _native.simt_set_disabled_site(site)


def test_seeded_orders_differ(simt):
    """Which thread the report of one fault names depends on the order in which warps and lanes ran."""
    texts = set()
    for seed in SEEDS:
        _native.simt_set_seed(seed)
        with pytest.raises(RuntimeError) as caught:
            run_defect(simt, "write_twice")
        texts.add(str(caught.value))
    assert len(texts) > 2


def test_a_seed_gives_the_same_run_again(simt):
    texts = set()
    _native.simt_set_seed(12345)
    for _ in range(3):
        with pytest.raises(RuntimeError) as caught:
            run_defect(simt, "write_twice")
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_statistics_count(simt):
    before = _native.simt_statistics()
    run_defect(simt, "neighbouring_bytes_in_order")
    with pytest.raises(RuntimeError):
        run_defect(simt, "write_twice")
    after = _native.simt_statistics()
    assert after["num_launches"] - before["num_launches"] == 2
    assert after["num_threads"] - before["num_threads"] == 128
    assert after["num_reports"] - before["num_reports"] == 1
    # One byte and, in a quarter of the threads, a word each way; of the other, at least two words.
    assert after["num_checked_accesses"] - before["num_checked_accesses"] >= 64 + 16 + 16 + 2


def test_launches_of_two_threads_run_side_by_side(simt):
    import threading

    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                pipeline(simt, 64 + 32 * seed)
        except BaseException as error:  # handed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
