"""S-EDF with lazy re-ranking against its definition evaluated by brute force; SLO-aware batching; the TTFT predictor."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.controllers.slack_order import PATIENCE_S, SlackOrder, first_token_deadline_s
from scheduler.controllers.slo_batching import BATCH_TOKENS, RESERVE, batch_budget
from scheduler.controllers.ttft_prediction import TtftPredictor
from scheduler.cost_model import CostModel
from scheduler.machine import Machine
from scheduler.request import Request
from scheduler.simulator.setup import load_model
from scheduler.step_shape import StepShape

MACHINE = Machine.load("h100-sxm")
MODEL = CostModel(load_model("llama-3-8b", MACHINE), MACHINE)
CONFIG = SchedulerConfig(num_pages=4096, max_num_batched_tokens=2048)


def request(name: str, num_tokens: int, arrival_s: float = 0.0, **levels) -> Request:
    return Request(name, range(num_tokens), 4, arrival_s=arrival_s, **levels)


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 8000),  # prompt tokens
        st.sampled_from(["ttft", "deadline", "none"]),
        st.floats(0.01, 2.0),  # target
        st.floats(0.0, 1.0),  # arrival
        st.integers(0, 1),  # priority
    ),
    min_size=1,
    max_size=12,
)


def definition(one: Request, sequence: int, now: float, executed_s: float) -> tuple:
    deadline_s = first_token_deadline_s(one)
    if deadline_s is None:
        return (one.priority, 0, one.arrival_s + PATIENCE_S, sequence)
    predicted_s = TtftPredictor(MODEL, CONFIG.max_num_batched_tokens).prompt_s(one.num_prompt_tokens)
    slack_s = deadline_s - now - max(predicted_s - executed_s, 0.0)
    if slack_s > 0.0:
        return (one.priority, 0, deadline_s, sequence)
    return (one.priority, 1, -deadline_s, sequence)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.lists(st.floats(0.0, 0.6), min_size=1, max_size=12), st.data())
def test_the_lazy_order_is_the_definition_at_any_time(drawn, waits, data):
    order, requests, executed = SlackOrder(CONFIG, MODEL), [], {}
    now = 1.0
    for sequence, (num_tokens, kind, target_s, arrival_s, priority) in enumerate(drawn):
        levels = {} if kind == "none" else {f"{kind}_s": target_s}
        one = request(f"r{sequence}", num_tokens, arrival_s, priority=priority, **levels)
        requests.append(one)
        executed[one.request_id] = 0.0
        one.rank = order.rank(one, sequence, now)
    hopeless = set()
    for wait_s in waits:
        # One of them works for a while; the others wait.
        worker = data.draw(st.sampled_from(requests))
        order.started(worker, now)
        now += wait_s
        executed[worker.request_id] += wait_s
        order.paused(worker, executed[worker.request_id], now)
        for one, rank in order.due(now):
            one.rank = rank
        for sequence, one in enumerate(requests):
            wanted = definition(one, sequence, now, executed[one.request_id])
            if one.request_id in hopeless:
                continue  # who was hopeless stays so: slack falls or stands, it never rises
            if abs(_slack(one, now, executed[one.request_id])) > 1e-9:
                # One of those that are hopeless may have its turn.
                assert one.rank == wanted or (wanted[1] == 1 and one.rank[:3] == (one.priority, 0, -math.inf))
            if wanted[1] == 1:
                hopeless.add(one.request_id)


def _slack(one: Request, now: float, executed_s: float) -> float:
    deadline_s = first_token_deadline_s(one)
    if deadline_s is None:
        return 1.0
    predicted_s = TtftPredictor(MODEL, CONFIG.max_num_batched_tokens).prompt_s(one.num_prompt_tokens)
    return deadline_s - now - max(predicted_s - executed_s, 0.0)


def test_hopeless_ones_come_last_and_nobody_is_asked_before_its_moment():
    order = SlackOrder(CONFIG, MODEL)
    tight, loose = request("tight", 2000, ttft_s=0.2), request("loose", 2000, ttft_s=5.0)
    tight_rank, loose_rank = order.rank(tight, 1, 0.0), order.rank(loose, 2, 0.0)
    assert tight_rank < loose_rank
    tight.rank, loose.rank = tight_rank, loose_rank
    moment_s = order.slack_s(tight, 0.0)
    assert list(order.due(moment_s - 1e-6)) == []
    assert [(one.request_id, rank[1]) for one, rank in order.due(moment_s + 1e-6)] == [("tight", 1)]
    assert list(order.due(moment_s + 1e-3)) == []  # once
    (_, late_rank) = tight, order.rank(request("later", 10, ttft_s=1e-6), 3, 10.0)
    assert late_rank > loose_rank


def test_no_queue_is_scanned():
    order = SlackOrder(CONFIG, MODEL)
    for index in range(2000):
        one = request(f"r{index}", 100, ttft_s=10.0 + index)
        one.rank = order.rank(one, index, 0.0)
    assert list(order.due(5.0)) == []
    given_up = [one for one, rank in order.due(10.0 + 99.5) if rank[1] == 1]
    assert len(given_up) == 100


def test_without_a_target_one_gives_way_but_never_starves():
    order = SlackOrder(CONFIG, MODEL)
    patient = order.rank(request("patient", 100), 1, 0.0)
    hurried = request("hurried", 100, ttft_s=1.0)
    hurried_rank = order.rank(hurried, 2, 0.0)
    assert hurried_rank < patient
    late = request("much later", 100, arrival_s=PATIENCE_S, ttft_s=1.0)
    late_rank = order.rank(late, 3, PATIENCE_S)
    assert patient < late_rank
    assert patient < order.rank(request("second", 100, arrival_s=0.1), 4, 0.1)
    hurried.rank, late.rank = hurried_rank, late_rank
    assert {one.request_id for one, _ in order.due(1e6 - 1)} == {"hurried", "much later"}  # only they become hopeless


def test_a_cached_prefix_makes_a_prompt_shorter():
    order = SlackOrder(CONFIG, MODEL)
    one = request("cached", 2000, ttft_s=0.5)
    order.rank(one, 1, 0.0)
    before_s = order.slack_s(one, 0.0)
    one.num_cached_tokens = 1900
    order.started(one, 0.0)
    assert order.slack_s(one, 0.0) > before_s + 0.02


def test_prompts_above_a_run_are_full_runs_and_a_remainder():
    predictor = TtftPredictor(MODEL, 2048)
    nothing = StepShape(0, 0, 0)
    wanted = sum(MODEL.step_s(nothing.plus_chunk(start, n)) for start, n in ((0, 2048), (2048, 2048), (4096, 904)))
    assert predictor.prompt_s(5000) == pytest.approx(wanted)
    assert TtftPredictor(None, 2048).prompt_s(5000) == 0.0
    with pytest.raises(ValueError, match="run_tokens"):
        TtftPredictor(MODEL, 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4000), st.floats(0.001, 2.0), st.floats(0.0, 2.0))
def test_a_batch_keeps_its_leads_target(num_tokens, ttft_s, now):
    predictor, lead = TtftPredictor(MODEL, 2048), request("lead", num_tokens, ttft_s=ttft_s)
    budget = batch_budget(lead, now, predictor)
    left_s = ttft_s - now
    assert budget >= num_tokens
    if num_tokens > BATCH_TOKENS or left_s < RESERVE * ttft_s:
        assert budget == num_tokens
        return
    assert budget <= BATCH_TOKENS

    def keeps(total: int) -> bool:
        return left_s - predictor.prompt_s(total) >= RESERVE * ttft_s

    # By brute force over tiles: the largest total that keeps the lead in time.
    fitting = [total for total in range(16, BATCH_TOKENS + 1, 16) if keeps(total)]
    assert budget == max(num_tokens, max(fitting, default=0))


def test_a_lead_without_a_target_takes_what_a_batch_holds():
    assert batch_budget(request("free", 100), 5.0, TtftPredictor(MODEL, 2048)) == BATCH_TOKENS


def test_slack_that_only_rounding_leaves_comes_due_once(monkeypatch):
    """100 - (1 - 2**-53) is 99 in doubles, though at 99 there are 2**-53 s of slack: a moment that is due and stays due."""
    order = SlackOrder(CONFIG, None)
    monkeypatch.setattr(order._predictor, "prompt_s", lambda num_tokens, start=0: 1.0 - 2.0**-53)
    num_watched, watch = 0, order._watch

    def counting(entry, now):
        nonlocal num_watched
        num_watched += 1
        assert num_watched < 10, "looked at again and again at the same moment"
        watch(entry, now)

    monkeypatch.setattr(order, "_watch", counting)
    one = request("r0", 16, arrival_s=98.0, ttft_s=2.0)
    one.rank = order.rank(one, 0, 99.0)
    assert one.rank[1] == 0 and order.slack_s(one, 99.0) > 0.0
    assert [(each, rank[1]) for each, rank in order.due(99.0)] == [(one, 1)]
    assert list(order.due(99.5)) == []
