"""Finds the first node at which two ways of running one model differ.

    python tools/bisect_output.py --a activations=fp32,kv_dtype=fp32 --b activations=int8 --text "The capital of France is"
    python tools/bisect_output.py --a isa=avx512 --b isa=avx2 --tolerance 0

Both sides run the same tokens node by node; after each node the rows of every buffer it wrote are compared
(||a - b|| / ||a||). The first node above the tolerance is named, with the worst row; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from array import array

import numpy as np

from runtime import _native
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model
from runtime.tokenizer import Tokenizer


class NodeByNode:
    """One side: a loaded model whose program runs one node at a time over one row."""

    def __init__(self, model: str, settings: str, max_tokens: int):
        values = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
        self.isa = values.pop("isa", _native.active_cpu_isa())
        self.threads = int(values.pop("threads", 0)) or None
        _native.set_active_cpu_isa(self.isa)
        self.loaded = load_model(
            EngineArgs(model=model, threads=self.threads, max_model_len=max_tokens, **values).check()
        )
        plan = self.loaded.kv_plan
        pages = -(-plan.max_model_len // plan.page_size)
        self.arena = self.loaded.device.kv_arena(plan.groups, pages * plan.num_groups)
        self.rows = self.loaded.device.row_store(
            1, plan.max_model_len, plan.num_groups, plan.page_size, self.loaded.config.vocab_size
        )
        self.completions = _native.CompletionQueue()
        self.lane = self.loaded.device.lane(0, self.completions)
        self.frame = _native.Frame(self.loaded.program, self.arena, self.rows, plan.max_model_len, plan.max_model_len)
        self.pages = pages

    def start(self, token_ids: list[int]) -> None:
        greedy = _native.SamplingParams()
        greedy.temperature = 0.0
        self.rows.admit(0, array("i", token_ids), len(token_ids), greedy)
        for group in range(self.loaded.kv_plan.num_groups):
            first = group * self.pages
            self.rows.set_pages(0, group, 0, list(range(first, first + self.pages)), self.arena.num_pages)
        self.frame.prepare(array("i", (0, 0, len(token_ids), 1)), [], True)

    def run(self, node: int) -> None:
        _native.set_active_cpu_isa(self.isa)
        self.lane.submit(self.frame, node, node + 1)
        while not (done := self.completions.wait_any(-1.0)):
            pass
        if done[0]["error"]:
            raise RuntimeError(done[0]["error"])

    def read(self, buffer: str, width: int, num_tokens: int) -> np.ndarray:
        out = np.empty((num_tokens, width), dtype=np.float32)
        self.frame.read_buffer(buffer, out)
        return out


def written_buffers(node: dict, widths: dict[str, int]) -> list[str]:
    """What to compare after a node: the buffers that live on after it; scratch rows are in the machine's own form."""
    return [name for name in node["live_after"] if name in widths]


def buffer_widths(loaded) -> dict[str, int]:
    config = loaded.config
    heads = config.num_q_heads * config.head_dim
    return {
        "hidden": config.hidden_size,
        "branch": config.hidden_size,
        "qkv": heads + 2 * config.num_kv_heads * config.head_dim,
        "attended": heads,
        "gate_up": config.intermediate_size,
        "logit_hidden": config.hidden_size,
        "logits": config.vocab_size,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--a", default="", metavar="NAME=VALUE,...", help="EngineArgs of one side; also isa=")
    parser.add_argument("--b", default="", metavar="NAME=VALUE,...", help="of the other")
    parser.add_argument("--text", default="The capital of France is")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args(argv)
    first = NodeByNode(options.model, options.a, 1024)
    second = NodeByNode(options.model, options.b, 1024)
    token_ids = Tokenizer.from_checkpoint(first.loaded.checkpoint).encode(options.text)
    widths = buffer_widths(first.loaded)
    sides = (first, second)
    for side in sides:
        side.start(token_ids)
    shape = {"num_tokens": len(token_ids), "num_requests": 1, "num_logit_rows": len(token_ids), "score_pairs": 1.0}
    worst_so_far = 0.0
    for index, node in enumerate(first.loaded.program.describe(**shape)):
        for side in sides:
            side.run(index)
        for name in written_buffers(node, widths):
            a, b = (side.read(name, widths[name], len(token_ids)) for side in sides)
            error = float(np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-30))
            worst_so_far = max(worst_so_far, error)
            if not error <= options.tolerance:
                rows = np.linalg.norm(a - b, axis=1) / (np.linalg.norm(a, axis=1) + 1e-30)
                worst = f"most in row {int(rows.argmax())} of {len(rows)}"
                print(f"node {index} {node['name']}: {name} differs by {error:.2e}, {worst}")
                return 1
    what = f"{index + 1} nodes over {len(token_ids)} tokens (largest {worst_so_far:.2e})"
    print(f"no difference above {options.tolerance:g} in {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
