"""The race check against the definition: random scripts, and vector clocks of every thread beside it.

A script is drawn in one order of events, which its barriers then enforce as far as they go. Two accesses of one place
by different threads, one of them a write and not both atomic, race when neither happens before the other. What happens
before what is worked out here the plain way: each thread has a clock for every thread.
"""

from __future__ import annotations

import numpy as np
import pytest

from runtime import _native
from tests.kernels.device_cases import run

NUM_WARPS, NUM_WORDS = 4, 8
NUM_THREADS = 32 * NUM_WARPS
END, READ, WRITE, ADD, BLOCK, NAMED, ARRIVE, WARP_LANES, READ_BYTE, WRITE_BYTE = range(10)
FULL = 0xFFFFFFFF


class Script:
    """Draws events, and keeps the clocks that follow from them."""

    def __init__(self, rng: np.random.Generator, masks: list[int], access_share: float) -> None:
        self.rng = rng
        self.lines: list[list[tuple[int, int, int]]] = [[] for _ in range(NUM_WARPS)]
        self.clocks = np.zeros((NUM_THREADS, NUM_THREADS), np.int64)
        self.clocks[np.arange(NUM_THREADS), np.arange(NUM_THREADS)] = 1
        self.accesses: list[tuple[int, int, int, bool, bool]] = []  # thread, its clock, byte, is_write, is_atomic
        self.has_race = False
        self.next_barrier = 1
        self.masks = masks
        for _ in range(int(rng.integers(5, 60))):
            if rng.random() < access_share:
                self.access()
            else:
                self.barrier()

    def access(self) -> None:
        warp, lane = int(self.rng.integers(NUM_WARPS)), int(self.rng.choice([0, 1, 16, 31]))
        word = int(self.rng.integers(NUM_WORDS))
        kind = int(self.rng.choice([READ, READ, WRITE, ADD, READ_BYTE, WRITE_BYTE]))
        place = 4 * word + int(self.rng.integers(4)) if kind in (READ_BYTE, WRITE_BYTE) else word
        touched = [place] if kind in (READ_BYTE, WRITE_BYTE) else range(4 * word, 4 * word + 4)
        self.lines[warp].append((kind, lane, place))
        thread = 32 * warp + lane
        is_write, is_atomic = kind in (WRITE, ADD, WRITE_BYTE), kind == ADD
        for byte in touched:
            for other, clock, other_byte, other_writes, other_atomic in self.accesses:
                conflict = byte == other_byte and other != thread and (is_write or other_writes)
                if conflict and not (is_atomic and other_atomic) and self.clocks[thread, other] < clock:
                    self.has_race = True
            self.accesses.append((thread, int(self.clocks[thread, thread]), byte, is_write, is_atomic))

    def meet(self, learning: np.ndarray, teaching: np.ndarray) -> None:
        """Those who learn know all that those who teach know; then everyone's own time goes on."""
        joined = self.clocks[teaching].max(axis=0)
        self.clocks[learning] = np.maximum(self.clocks[learning], joined)
        self.clocks[teaching, teaching] += 1

    def barrier(self) -> None:
        kind = self.rng.choice([BLOCK, NAMED, NAMED, WARP_LANES, WARP_LANES])
        if kind == NAMED and self.next_barrier > 15:
            kind = BLOCK  # every barrier so far is over: their numbers are free again
        if kind == BLOCK:
            self.next_barrier = 1
            for lines in self.lines:
                lines.append((BLOCK, 0, 0))
            everyone = np.arange(NUM_THREADS)
            self.meet(everyone, everyone)
        elif kind == NAMED:
            warps = self.rng.permutation(NUM_WARPS)[: int(self.rng.integers(2, NUM_WARPS + 1))]
            num_waiting = int(self.rng.integers(1, warps.size + 1))
            for i, warp in enumerate(warps):
                self.lines[warp].append((NAMED if i < num_waiting else ARRIVE, self.next_barrier, 32 * warps.size))
            self.next_barrier += 1
            threads = (32 * warps[:, None] + np.arange(32)).reshape(warps.size, 32)
            self.meet(threads[:num_waiting].reshape(-1), threads.reshape(-1))
        else:
            warp, mask = int(self.rng.integers(NUM_WARPS)), int(self.rng.choice(self.masks))
            self.lines[warp].append((WARP_LANES, mask - (1 << 32 if mask >> 31 else 0), 0))
            lanes = 32 * warp + np.flatnonzero([mask >> lane & 1 for lane in range(32)])
            self.meet(lanes, lanes)

    def array(self) -> np.ndarray:
        length = max(len(lines) for lines in self.lines) + 1
        table = np.zeros((NUM_WARPS, length, 3), np.int32)
        for warp, lines in enumerate(self.lines):
            if lines:
                table[warp, : len(lines)] = lines
        return table


def reports_race(gpu, script: Script) -> bool:
    table = script.array()
    try:
        run(gpu, "script", [table], np.zeros(1, np.uint32), [table.shape[1]])
    except RuntimeError as error:
        if ": race: " not in str(error):
            raise
        return True
    return False


@pytest.fixture(autouse=True)
def ascending_order():
    yield
    _native.simt_set_seed(0)


# Masks that divide the warp are followed exactly.
@pytest.mark.parametrize("masks", [[FULL], [FULL, 0x0000FFFF, 0xFFFF0000]], ids=["whole_warps", "half_warps"])
@pytest.mark.parametrize("access_share", [0.3, 0.6])
def test_reports_are_exactly_the_races(masks, access_share):
    gpu = _native.open_gpu("simt")
    rng = np.random.default_rng([len(masks), int(10 * access_share)])
    outcomes = []
    for number in range(60):
        script = Script(rng, masks, access_share)
        for seed in (0, number + 1):
            _native.simt_set_seed(seed)
            assert reports_race(gpu, script) == script.has_race, (number, seed, script.lines)
        outcomes.append(script.has_race)
    assert 6 < sum(outcomes) < 54  # both outcomes were tried


def test_any_masks_hide_no_race():
    """Masks that overlap may report more than there is, never less: see csrc/simt/README.md."""
    gpu = _native.open_gpu("simt")
    rng = np.random.default_rng(7)
    masks = [FULL, 0x00000003, 0x80010000, 0x0000FFFF, 0xFFFF0001, 0x80000001]
    num_races = 0
    for number in range(100):
        script = Script(rng, masks, 0.4)
        _native.simt_set_seed(number)
        reported = reports_race(gpu, script)
        assert reported or not script.has_race, (number, script.lines)
        num_races += script.has_race
    assert num_races > 20
