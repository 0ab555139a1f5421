"""What is known of kinds of steps: found structures, borrowed ones, and the searches that go on.

A kind is a typical step: the sizes of a real one, rounded. A search for one costs some 50 ms; a step has less than one to
spare. So there is one search at a time, of the kind that was asked for most, a little of it whenever anybody asks; and
until it is a kind's turn, the cut and the shares that were found for the kind most like it are tried on it, which costs a
few milliseconds. Where nothing could be hidden whatever the cut, that is known at once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from math import log2
from typing import NamedTuple

from scheduler.nanobatch import MAX_NANO_BATCHES
from scheduler.nanobatch_search import SMALL_STEP_TOKENS, TILE_TOKENS, NanoStructure, search, structure_at
from scheduler.nanobatch_tables import NanoCosts, StepTable, TypicalStep
from scheduler.step_shape import StepShape

# Layers are alike: what a few of them say about cuts and shares holds for all.
SEARCHED_LAYERS = 4
# Predicted part of a step's time below which cutting is not worth trying.
LEAST_PREDICTED_GAIN = 0.03
MOST_DISTANCE_TO_BORROW = 3.0  # octaves
PIECES_PER_ASK = 1  # of a search: some 100 microseconds, the largest several hundred


class Question(NamedTuple):
    kind: TypicalStep
    num_nano: int  # 0: the best


class Answer(NamedTuple):
    structure: NanoStructure | None  # None: too few tokens, or nothing to hide
    is_final: bool = True  # else borrowed, until its own search has ended


class _Loan(NamedTuple):
    """A structure of another kind, tried on this one."""

    owner: Question
    steps: Generator[None, None, NanoStructure | None]


class KindSearch:
    """Deterministic: depends on what it was asked, in order."""

    def __init__(self, costs: NanoCosts) -> None:
        self._costs = costs
        self._answers: dict[Question, Answer] = {}
        self._num_asked: dict[Question, int] = {}  # of kinds whose search has not begun
        self._loans: dict[Question, _Loan] = {}  # being tried
        self._tried: dict[Question, tuple[Question | None, int]] = {}  # whose structure was tried last, and when
        self._num_searched = 0
        self._present: tuple[Question, Generator[None, None, NanoStructure | None]] | None = None  # being searched

    def known(self, kind: TypicalStep, num_nano: int) -> Answer | None:
        """Without any work."""
        return self._answers.get(Question(kind, num_nano))

    def ask(self, kind: TypicalStep, num_nano: int) -> Answer | None:
        """What is known, after a little work: on this kind, or on the kind whose turn it is."""
        question = Question(kind, num_nano)
        answer = self._answers.get(question)
        if answer is not None and answer.is_final:
            self._search_on()
            return answer
        if question in self._num_asked:
            self._num_asked[question] += 1
        elif self._present is None or self._present[0] != question:
            if num_nano == 0 and StepTable(self._costs, kind).hideable() < LEAST_PREDICTED_GAIN:
                self._answers[question] = Answer(None)
                return self._answers[question]
            self._num_asked[question] = 1
        if not self._borrow_on(question):
            self._search_on()
        return self._answers.get(question)

    def search_now(self, kind: TypicalStep, num_nano: int) -> None:
        """The whole search, at once."""
        question = Question(kind, num_nano)
        while self._present is not None:
            self._search_on()
        if not (question in self._answers and self._answers[question].is_final):
            self._num_asked.pop(question, None)
            self._present = question, self._search(question)
        while self._present is not None:
            self._search_on()

    def describe(self) -> list[str]:
        lines = []
        for (kind, _), (structure, is_final) in self._answers.items():
            words = "nothing to hide"
            if structure is not None:
                words = f"{structure.token_counts} tokens at shares {structure.shares}: {structure.gain:+.1%}"
            lines.append(f"{kind_words(kind)}: by {self._costs.source} {words}{'' if is_final else ', borrowed'}")
        return lines

    # Work

    def _search_on(self) -> None:
        if self._present is None:
            if not self._num_asked:
                return
            question = max(self._num_asked, key=self._num_asked.__getitem__)  # of equals, the first one asked for
            del self._num_asked[question]
            self._present = question, self._search(question)
        question, steps = self._present
        for _ in range(PIECES_PER_ASK):
            try:
                next(steps)
            except StopIteration as end:
                self._answers[question] = Answer(end.value)
                self._num_searched += 1
                self._present = None
                self._loans.pop(question, None)
                return

    def _search(self, question: Question) -> Generator[None, None, NanoStructure | None]:
        kind, num_nano = question
        few_layers, whole = StepTable(self._costs, kind, SEARCHED_LAYERS), StepTable(self._costs, kind)
        if num_nano:
            return (yield from search(few_layers, num_nano, whole))
        best: NanoStructure | None = None
        for count in range(2, MAX_NANO_BATCHES + 1):
            structure = yield from search(few_layers, count, whole)
            if structure is None or (best is not None and structure.makespan_s >= best.makespan_s):
                break  # more pieces read the weights more often; where one more does not help, two do not
            best = structure
        return best

    def _borrow_on(self, question: Question) -> bool:
        """A piece of work on trying another kind's structure; False if there is none to try."""
        loan = self._loans.get(question)
        if loan is None:
            tried, when = self._tried.get(question, (None, -1))
            if when == self._num_searched:
                return False  # no search has ended since
            owner = self._most_similar(question)
            self._tried[question] = owner, self._num_searched
            if owner is None or owner == tried:
                return False
            loan = self._loans[question] = _Loan(owner, self._fitted(question.kind, owner))
        for _ in range(PIECES_PER_ASK):
            try:
                next(loan.steps)
            except StopIteration as end:
                del self._loans[question]
                before = self._answers.get(question)
                gain = end.value.gain if end.value is not None else 0.0
                if gain >= max(LEAST_PREDICTED_GAIN, before.structure.gain if before is not None else 0.0):
                    self._answers[question] = Answer(end.value, is_final=False)
                break
        return True

    def _fitted(self, kind: TypicalStep, owner: Question) -> Generator[None, None, NanoStructure | None]:
        found = self._answers[owner].structure
        counts = fit_counts(found.token_counts, owner.kind, kind.num_decodes, kind.num_tokens)
        if counts is None:
            return None
        yield
        return (yield from structure_at(StepTable(self._costs, kind), counts, found.shares))

    def _most_similar(self, question: Question) -> Question | None:
        """Of the kinds whose search has ended with a structure that pays."""
        best: tuple[float, Question] | None = None
        for other, (structure, is_final) in self._answers.items():
            if not is_final or structure is None or other.num_nano != question.num_nano:
                continue
            distance = _distance(other.kind, question.kind)
            if structure.gain > 0.0 and distance <= MOST_DISTANCE_TO_BORROW and (best is None or distance < best[0]):
                best = distance, other
        return best[1] if best is not None else None


def kind_of(shape: StepShape) -> TypicalStep:
    """The typical step that stands for all whose sizes are within a factor of about 1.2 (context before the chunks: 2).
    Whole powers of two were tried: a cut that was found 15 % better lost 2 % on a step at the far end of its kind."""
    num_chunks = shape.num_requests - shape.num_decodes
    num_chunk_tokens = shape.num_chunk_tokens
    decode_kv = shape.decode_kv_tokens / shape.num_decodes if shape.num_decodes else 0
    chunk_start = (shape.chunk_kv_tokens - num_chunk_tokens) / num_chunks if num_chunks else 0
    return TypicalStep(
        _rounded(shape.num_decodes, 2),
        _rounded(decode_kv, 2),
        _rounded(num_chunk_tokens, 2),
        _rounded(chunk_start, 0.5),
    )


def _distance(one: TypicalStep, other: TypicalStep) -> float:
    """In octaves, all sizes together; context before the chunk counts little, as attention is little of a chunk."""
    octaves = [abs(log2(a + 1) - log2(b + 1)) for a, b in zip(one, other, strict=True)]
    return sum(octaves[:3]) + 0.1 * octaves[3]


def _rounded(value: float, steps_per_octave: float) -> int:
    """To a power of two, or one between; 0 stays 0."""
    return round(2.0 ** (round(log2(value) * steps_per_octave) / steps_per_octave)) if value >= 1 else 0


def kind_words(kind: TypicalStep) -> str:
    return (
        f"about {kind.num_decodes} decodes of {kind.decode_kv} tokens, {kind.num_chunk_tokens} prompt tokens after "
        f"{kind.chunk_start}"
    )


def fit_counts(
    token_counts: Sequence[int], step: TypicalStep, num_decodes: int, num_tokens: int
) -> tuple[int, ...] | None:
    """The cuts of a typical step, at the same places among the decodes and among the prompt tokens of this one; None if
    some part would be empty."""
    tile = TILE_TOKENS if num_tokens >= SMALL_STEP_TOKENS else 1
    num_chunk_tokens = num_tokens - num_decodes
    bounds, reached = [0], 0
    for count in token_counts[:-1]:
        reached += count
        if reached <= step.num_decodes:
            bound = num_decodes * reached // step.num_decodes
            # The nearest whole tile, but not beyond the decodes: what lies there was found without a wait.
            nearest = (bound + tile // 2) // tile * tile
            bound = nearest if reached < step.num_decodes and nearest <= num_decodes else bound
        else:
            bound = num_decodes + num_chunk_tokens * (reached - step.num_decodes) // step.num_chunk_tokens
            nearest = (bound + tile // 2) // tile * tile
            bound = nearest if num_decodes < nearest < num_tokens else bound
        bounds.append(bound)
    bounds.append(num_tokens)
    counts = tuple(last - first for first, last in pairwise(bounds))
    return counts if min(counts) > 0 else None
