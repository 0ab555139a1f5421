"""The engine thread: messages in, deltas out; everything that it takes comes back."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from runtime.messages import Abort
from scheduler.controllers import layered
from tests.kit.engines import EngineUnderTest, engine_args, load, running_engine
from tests.kit.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path, _ = write_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return path, load(path, max_model_len=256)


def random_prompt(loaded, low=1, high=120) -> list[int]:
    rng = np.random.default_rng()
    return rng.integers(0, loaded.config.vocab_size, int(rng.integers(low, high))).tolist()


def test_a_thousand_requests_a_third_aborted_leave_nothing_behind(tiny):
    path, loaded = tiny
    rng = random.Random()
    with running_engine(path, loaded=loaded, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=64) as engine:
        ids, doomed = [], set()
        for _ in range(1000):
            ids.append(engine.submit(random_prompt(loaded), max_tokens=rng.randint(1, 24)))
            if rng.random() < 1 / 3:
                doomed.add(ids[-1])
            for victim in rng.sample(sorted(doomed), min(2, len(doomed))):  # queued, in prefill, in decode, or over
                if rng.random() < 0.2:
                    engine.engine.abort(victim)
            if rng.random() < 0.05:
                time.sleep(0.002)
        for victim in doomed:
            engine.engine.abort(victim)
        answers = {id: engine.wait(id) for id in ids}
        for id, answer in answers.items():
            assert answer.finish_reason in (("abort", "length") if id in doomed else ("length",)), (id, answer)
        assert engine.engine.wait_idle(30)
        stats = engine.engine.stats()
        assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0
        engine.engine.check_integrity()


def test_no_plan_made_after_an_abort_names_its_request(tiny, monkeypatch):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        happened: list = []
        runner = engine.engine._runner
        launch, event_of = runner.launch, engine.engine._event_of

        def recorded_launch(plan):
            happened.append({scheduled.request_id for scheduled in plan.requests})
            launch(plan)
            if len(happened) == 6:  # here and not from the test's thread, which may come when all is said
                engine.engine.abort(plan.requests[0].request_id, "client gone")

        def recorded_event(message, deltas):
            happened.append(message)
            return event_of(message, deltas)

        monkeypatch.setattr(runner, "launch", recorded_launch)
        monkeypatch.setattr(engine.engine, "_event_of", recorded_event)
        request_id = engine.submit(random_prompt(loaded, 5, 10), max_tokens=240)
        answer = engine.wait(request_id)
    assert answer.finish_reason == "client gone"
    (aborted_at,) = [i for i, entry in enumerate(happened) if isinstance(entry, Abort)]
    assert any(request_id in plan for plan in happened[:aborted_at] if isinstance(plan, set))
    assert not any(request_id in plan for plan in happened[aborted_at:] if isinstance(plan, set))


def test_stop_token_ids_end_a_request_and_min_tokens_hold_them_off(tiny):
    path, loaded = tiny
    prompt = random_prompt(loaded, 10, 20)
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        (free,) = engine.run([prompt], max_tokens=12)
        stop = free[5]
        first = free.index(stop)
        answer = engine.wait(engine.submit(prompt, max_tokens=12, stop_token_ids=(stop,)))
        assert (answer.token_ids, answer.finish_reason) == (free[: first + 1], "stop")
        held = engine.wait(engine.submit(prompt, max_tokens=12, stop_token_ids=(stop,), min_tokens=10))
        assert len(held.token_ids) >= 10 and stop not in held.token_ids[:10]


def test_logprobs_come_with_every_token(tiny):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        answer = engine.wait(engine.submit(random_prompt(loaded), max_tokens=6, logprobs=3))
    assert len(answer.logprobs) == 6
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry.token_id == token and entry.rank == 1 and len(entry.top) == 3
        assert entry.top[0] == (token, pytest.approx(entry.logprob))
        assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)


def test_service_levels_reach_the_scheduler_and_goodput_comes_back(tiny):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        engine.wait(engine.submit(random_prompt(loaded), max_tokens=4, ttft_ms=60_000.0, tpot_ms=60_000.0))
        engine.wait(engine.submit(random_prompt(loaded), max_tokens=4, ttft_ms=0.001))
        engine.wait(engine.submit(random_prompt(loaded), max_tokens=4, deadline_ms=0.001, user="b"))
        goodput = engine.engine.stats()["goodput"]
    assert (goodput["num_finished"], goodput["num_good"], goodput["num_good_tokens"]) == (3, 1, 4)
    assert (goodput["num_ttft_targets"], goodput["num_ttft_kept"]) == (2, 1)
    assert (goodput["num_tpot_kept"], goodput["num_deadlines"], goodput["num_deadlines_kept"]) == (1, 1, 0)


def test_lower_priority_numbers_run_first(tiny, monkeypatch):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256, max_num_seqs=1) as engine:
        runner, launch = engine.engine._runner, engine.engine._runner.launch
        others: list[str] = []

        def launch_and_submit(plan):
            launch(plan)
            if not others:  # from the step loop: a test's own thread may come when the first request has ended
                others.extend(engine.submit(random_prompt(loaded), max_tokens=2, priority=p) for p in (5, -5))

        monkeypatch.setattr(runner, "launch", launch_and_submit)
        running = engine.submit(random_prompt(loaded, 5, 10), max_tokens=20)
        engine.wait_until(lambda: len(engine.finished) == 3)
        late, urgent = others
        assert engine.finished == [running, urgent, late]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "got 0 tokens"),
        ([0] * 256, {}, "got 256 tokens, wanted 1 to 255"),
        ([10**7], {}, "token id outside"),
        ([-1], {}, "token id outside"),
        ([1], {"logit_bias": ((10**7, 1.0),)}, "logit_bias"),
    ],
)
def test_bad_requests_end_with_an_error_and_the_engine_lives(tiny, prompt, sampling, message):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        answer = engine.wait(engine.submit(prompt, **sampling))
        assert answer.finish_reason == "error" and message in answer.error
        assert len(engine.run([random_prompt(loaded)], max_tokens=3)[0]) == 3


def test_shutdown_ends_requests_in_flight(tiny):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        ids = [engine.submit(random_prompt(loaded), max_tokens=100) for _ in range(20)]
        engine.wait_until(lambda: any(engine.answers[id].token_ids for id in ids))
        engine.engine.shutdown()
        assert all(engine.answers[id].finish_reason in ("abort", "length") for id in ids)


def test_shutdown_with_drain_lets_them_finish(tiny):
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        ids = [engine.submit(random_prompt(loaded), max_tokens=10) for _ in range(5)]
        engine.engine.shutdown(drain_seconds=60)
        assert all(engine.answers[id].finish_reason == "length" for id in ids)


def test_who_comes_after_the_end_is_told_so(tiny):
    """A server that closes still has callers under way: their message must not lie in an inbox that nobody reads."""
    path, loaded = tiny
    with running_engine(path, loaded=loaded, max_model_len=256) as engine:
        engine.engine.shutdown()
        late = engine.submit(random_prompt(loaded), max_tokens=2)
        answer = engine.answers[late]
        assert (answer.finish_reason, answer.error) == ("error", "the engine has shut down")


class ClosedTrace:
    """A trace that counts."""

    has_nodes = False

    def __init__(self):
        self.num_steps = self.num_closed = 0

    def add(self, completion, plan) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("the trace is full")

    def close(self) -> None:
        self.num_closed += 1


def test_an_engine_that_died_answers_everybody_and_closes_its_trace(tiny):
    path, loaded = tiny
    trace = ClosedTrace()
    engine = EngineUnderTest(loaded, engine_args(path, max_model_len=256), trace)
    ids = [engine.submit(random_prompt(loaded), max_tokens=100) for _ in range(4)]
    for id in ids:
        answer = engine.wait(id)
        assert answer.finish_reason == "error" and "the trace is full" in answer.error
    late = engine.submit(random_prompt(loaded), max_tokens=2)
    assert "the trace is full" in engine.wait(late).error
    assert "the trace is full" in engine.engine.stats()["fatal"]
    engine.engine.shutdown()
    engine.engine.shutdown()
    assert trace.num_closed == 1


def test_tokens_of_a_prompt_that_goes_in_parts_are_counted_once(tiny, monkeypatch):
    path, loaded = tiny
    monkeypatch.setattr(layered, "_TOKENS_OF_GROUPS", ((8, 1), (512, 2)))
    options = {"max_model_len": 256, "enable_prefix_caching": False, "prefill": "layer"}
    with running_engine(path, loaded=loaded, **options) as engine:
        prompt = random_prompt(loaded, 60, 61)
        engine.run([prompt], max_tokens=5)
        assert engine.engine.wait_idle(30)
        stats = engine.engine.stats()
    assert stats["steps"] == 2 + 4, "the prompt did not go in two parts"
    assert stats["step_tokens"] == len(prompt) + 4
