"""TRACE: what the engine really ran of a step in nano-batches keeps NanoFlow's two rules (arXiv 2408.12757, section 4.2),
and the tokens are those of whole steps. Real weights, two lanes of the CPU."""

from __future__ import annotations

import random

import pytest

from runtime import engine_loader
from runtime.describe_model import spec_of
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine, Saturation
from scheduler.nanobatch import cut_chunks, split_requests
from scheduler.nanobatch_check import check_nano_plan
from scheduler.step_shape import shape_of
from tests.kit.engines import engine_args, load, running_engine

LIMITS = {"max_model_len": 512, "page_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 160, "device": "cpu"}
MAX_TOKENS = 12


class SpansOfPlans:
    """A step trace that keeps plans and what their nodes took."""

    has_nodes = True

    def __init__(self):
        self.steps: list[tuple] = []  # (plan, [(nano, node, start_ns, end_ns)])

    def add(self, completion: dict, plan) -> None:
        spans = [(nano, node, start, end) for node, start, end, _, nano in completion.get("nano_spans", ())]
        self.steps.append((plan, spans))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2", **LIMITS)


@pytest.fixture(scope="module")
def prompts(loaded):
    rng = random.Random(11)
    lengths = (150, 3, 90, 17, 200, 64, 33, 120, 70, 5)
    return [[rng.randrange(3, loaded.config.vocab_size) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    with running_engine("smollm2", loaded=loaded, **LIMITS) as engine:
        return engine.run(prompts, max_tokens=MAX_TOKENS)


@pytest.mark.parametrize("nano_batches", ["2", "3", "4"])
def test_spans_keep_the_rules_and_tokens_are_the_same(loaded, prompts, expected, nano_batches):
    args = engine_args("smollm2", **LIMITS)
    spec, trace = spec_of(loaded, args.kv_codecs), SpansOfPlans()
    with running_engine("smollm2", loaded=loaded, trace=trace, nano_batches=nano_batches, **LIMITS) as engine:
        assert engine.run(prompts, max_tokens=MAX_TOKENS) == expected
    cut = [(plan, spans) for plan, spans in trace.steps if plan.nano is not None]
    assert max(plan.nano.num_nano for plan, _ in cut) == int(nano_batches)
    assert any(any(cut_chunks(plan.requests, plan.nano.token_counts)) for plan, _ in cut), (
        "no prompt was cut in the middle"
    )
    for plan, spans in cut:
        check_nano_plan(plan, spec, spans)
        pieces = split_requests(plan.requests, plan.nano.token_counts)
        busy = {
            (nano, node)
            for nano, piece in enumerate(pieces)
            for node, known in enumerate(spec.nodes())
            if known.kind != "copy_pages" and known.num_rows(shape_of(piece)) > 0
        }
        assert busy <= {span[:2] for span in spans}, "a node with rows never ran"
    lanes = {
        (entry.nano, node): entry.lane for entry in cut[0][0].nano.ranges for node in range(entry.first, entry.last)
    }
    assert set(lanes.values()) == {0, 1}
    assert any(_overlaps(plan, spans) for plan, spans in cut), "nothing ever ran beside anything"


def _overlaps(plan, spans) -> bool:
    """Whether a node of one lane ran while one of the other did."""
    lane_of = {(entry.nano, node): entry.lane for entry in plan.nano.ranges for node in range(entry.first, entry.last)}
    sides = ([], [])
    for nano, node, start, end in spans:
        sides[lane_of[nano, node]].append((start, end))
    return any(
        start < other_end and other_start < end for start, end in sides[0] for other_start, other_end in sides[1]
    )


# On paper a machine on which overlap pays: decodes wait for memory, linears for arithmetic, and half of it gives either
# nearly all that it wants. The real one is another matter, which is what the trial is for.
OPTIMIST = Machine(
    "optimist", "made up for a test", 1e12,
    {"default": ClassRates(((1, 1e12),), 1e12), "attention_decode": ClassRates(((1, 1e12),), 1e9)},
    saturation=Saturation(compute_share=0.5, memory_share=0.5), rungs=(0.5, 1.0),
)  # fmt: skip


def test_auto_tries_measures_and_keeps_to_the_answer(loaded, prompts, expected, monkeypatch):
    """What the trial finds depends on the machine; that it finds something, that steps follow it, and that tokens do not
    depend on it, must hold anywhere."""
    monkeypatch.setattr(
        engine_loader, "calibrated_model", lambda loaded, args: CostModel(spec_of(loaded, args.kv_codecs), OPTIMIST)
    )
    trace = SpansOfPlans()
    with running_engine(
        "smollm2", loaded=loaded, trace=trace, nano_batches="auto", policy="nanoflow", **LIMITS
    ) as engine:  # fmt: skip
        for _ in range(
            60
        ):  # rounds; the search goes on a little with every step, and a trial takes eight steps of a kind
            assert engine.run(prompts, max_tokens=MAX_TOKENS) == expected
            lines = engine.engine.describe_nano_batches()
            decided = [line for line in lines if line.startswith("trial") and "us per token cut" in line]
            if decided:
                break
    assert decided, lines
    for line in decided:
        gain = float(line.split("(")[-1].split("%")[0])  # rounded: 3.0 may be a little less
        assert gain == 3.0 or (": cut: " in line) == (gain > 3.0), line
    num_cut = sum(plan.nano is not None for plan, _ in trace.steps)
    assert num_cut > 0
    if not any(": cut: " in line for line in lines):
        # Four of each trial, and what was queued when it was decided; a trial without a verdict has had no more.
        assert num_cut <= 6 * sum(line.startswith("trial") for line in lines)
    print("\n".join(decided))
