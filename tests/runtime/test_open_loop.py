"""The open-loop benches: the same load in this process and over HTTP, against a scripted engine and a tiny model."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import replace

import pytest

from bench.serve import arrangements, flowprefill_mix
from bench.serve.http_loop import HttpLoop, load_server, read_counters, server_flags
from bench.serve.open_loop import LoadRequest, OpenLoop, RequestClass, summarise
from runtime.engine_args import EngineArgs
from runtime.engine_loader import load_model
from tests.kit.tiny_models import write_tiny_model
from tests.server import serving
from tests.server.tiny_tokenizer import tiny_tokenizer

SHORT = RequestClass("short", 1.0, (5, 9), (3, 6), ttft_s=60.0, tpot_s=60.0)
LONG = RequestClass("long", 1.0, (40, 60), (2, 4))
LOAD = [LoadRequest(0.0, SHORT, 7, 5), LoadRequest(0.01, LONG, 50, 3), LoadRequest(0.02, SHORT, 9, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=4096)[0])


def tiny_args(model: str) -> EngineArgs:
    return EngineArgs(
        model=model, kv_memory="16MiB", max_model_len=4096, max_num_seqs=4, enable_prefix_caching=False
    ).check()


@pytest.mark.parametrize("is_http", [False, True])
def test_every_request_is_answered_in_full(model, is_http):
    args = replace(tiny_args(model), prefill="operator").check()
    loaded = load_model(args)
    loop = HttpLoop(loaded.config.vocab_size, args) if is_http else OpenLoop(loaded, args)
    result = loop.run(LOAD, limit_s=120.0, warm_up=LoadRequest(0.0, LONG, 60, 4))
    assert result.is_complete and [len(one.token_s) for one in result.felt] == [5, 3, 4]
    assert {one.finish_reason for one in result.felt} == {"length"}
    assert all(one.token_s == sorted(one.token_s) and one.end_s >= one.token_s[-1] for one in result.felt)
    line = summarise(result)
    assert (line["requests"], line["attainment"], line["short_ttft_attainment"]) == (3, 1.0, 1.0)
    assert line["output_tokens_per_s"] == pytest.approx(12 / result.duration_s)
    assert (line["border_moves"], line["preemptions"]) == (0, 0)


def test_http_sends_targets_and_what_is_late_counts_as_never():
    vocab_size = tiny_tokenizer().vocab_size
    with serving.serve(step_s=0.002) as server:
        result = asyncio.run(load_server(server.url, vocab_size, LOAD, 60.0))
        submits = {len(submit.prompt_token_ids): submit for submit in server.engine.submits}
        assert result.is_complete and set(submits) == {7, 50, 9}
        service = submits[7].service
        assert (service.ttft_ms, service.tpot_ms, service.user) == (60_000.0, 60_000.0, "short")
        assert (submits[50].service.ttft_ms, submits[50].service.user) == (None, "long")
        assert submits[50].sampling.max_tokens == 3 and submits[50].sampling.ignore_eos

        never = [replace(LOAD[0], arrival_s=3600.0)]
        line = summarise(asyncio.run(load_server(server.url, vocab_size, never, 0.0)))
        assert (line["ttft_attainment"], line["short_ttft_p50_s"]) == (0.0, float("inf"))
        with pytest.raises(RuntimeError, match="a request failed"):
            asyncio.run(load_server(server.url, vocab_size, [LoadRequest(0.0, LONG, 100_000, 3)], 60.0))


def test_the_servers_flags_are_the_engines_arguments():
    base = EngineArgs(model="m", kv_memory="1GiB", max_model_len=4096, max_num_seqs=32, enable_prefix_caching=False)
    for fields in [*arrangements.CONFIGURATIONS.values(), *flowprefill_mix.CONFIGURATIONS.values()]:
        args = replace(base, **fields).check()
        parser = argparse.ArgumentParser()
        EngineArgs.add_arguments(parser)
        assert EngineArgs.from_namespace(parser.parse_args(["m", *server_flags(args)])).check() == args


def test_counters_are_read_from_metrics():
    text = '# HELP x\npartita:border_moves_total{model_name="a",engine="0"} 3.0\npartita:prefill_pauses_total 2.0\n'
    counters = read_counters(text)
    assert (counters.num_moves, counters.num_pauses, counters.num_preemptions) == (3.0, 2.0, 0.0)


def test_arrangements_report_is_the_same_over_http(model, monkeypatch, capsys):
    monkeypatch.setattr(arrangements, "load_calibrated", lambda parser, args: load_model(args))
    monkeypatch.setattr(arrangements, "LONG_PROMPT", (100, 200))
    flags = f"--model {model} --kv-memory 16MiB --max-num-seqs 4 --rate 20 --duration 0.3 --repeats 1 --seed 1"
    reports = []
    for http in ([], ["--http"]):
        monkeypatch.setattr(
            sys, "argv", ["arrangements", *flags.split(), "--configurations", "default-128,operator", *http]
        )
        arrangements.main()
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    for report in reports:
        assert set(report["lines"]) == set(report["ratios"]) == {"default-128", "operator"}
        assert report["baseline"] == "default-128"
        assert report["lines"]["operator"]["requests"] == report["num_requests"][0] > 0
    assert [report["is_http"] for report in reports] == [False, True]
    columns = [{name for name in report["lines"]["operator"] if "steps_" not in name and "lane" not in name}
               for report in reports]  # fmt: skip
    assert columns[0] == columns[1]
