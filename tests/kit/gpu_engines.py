"""What tests of GPU programs share: the devices they run on, a tiny model that the tuned kernels take, native state."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from runtime import _native
from tests.kit.tiny_models import write_tiny_gguf

DEVICES = ["simt", pytest.param("cuda", marks=pytest.mark.gpu)]
TIE = 1e-4  # logits this near (relative to the largest) may go either way
EXACT = {"activations": "fp32", "kv_dtype": "fp32", "max_model_len": 128}
FEW = {"max_num_seqs": 4, "max_num_batched_tokens": 32}  # small frames


def write_llama(folder):
    """A Llama with heads of 64 and 4-bit weights. Its path."""
    return write_tiny_gguf("Q4_1", folder, num_hidden_layers=2, head_dim=64, max_position_embeddings=1024)[0]


def random_tokens(loaded, count: int) -> list[int]:
    return np.random.default_rng().integers(3, loaded.config.vocab_size, count).tolist()


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


class GpuBench:
    """Native state of its own over a loaded model: four rows of up to 128 tokens, lanes over the whole chip."""

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
