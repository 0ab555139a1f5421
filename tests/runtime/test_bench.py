"""The bench commands: their arithmetic, and the keys and flags that scripts made for vllm bench rely on."""

from __future__ import annotations

import json
import math
import random
import statistics
from types import SimpleNamespace

import numpy
import pytest

from runtime import bench
from runtime.bench import latency, serve, throughput
from runtime.bench.summary import deviation, parse_percentiles, percent_key, percentile
from tests.server import serving
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tiny_tokenizer import tiny_template, tiny_tokenizer

ENGINES = []


def load_scripted(args, on_deltas):
    engine = ScriptedEngine(tiny_tokenizer(), on_deltas, max_num_seqs=args.max_num_seqs)
    ENGINES.append(engine)
    return engine, tiny_tokenizer(), tiny_template(), SimpleNamespace()


@pytest.fixture(scope="module")
def server():
    with serving.serve(step_s=0.002) as under_test:
        yield under_test


def test_percentiles_are_numpys():
    generator = random.Random(3)
    for length in (1, 2, 3, 10, 101):
        values = [generator.random() for _ in range(length)]
        for percent in (0, 10, 50, 90, 99, 99.9, 100):
            assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), rel=1e-12)
        assert deviation(values) == pytest.approx(statistics.pstdev(values), rel=1e-9, abs=1e-12)
    assert percentile([], 50) == 0.0
    assert parse_percentiles("50, 99.9") == [50.0, 99.9]
    assert [percent_key(percent) for percent in (50.0, 99.9)] == ["50", "99.9"]
    for text in ("", "x", "101", "-1"):
        with pytest.raises(ValueError):
            parse_percentiles(text)


def test_latency_runs_the_batch_it_is_told(tmp_path, capsys):
    path = tmp_path / "latency.json"
    flags = f"--input-len 9 --output-len 5 --batch-size 3 --num-iters-warmup 1 --num-iters 4 --output-json {path}"
    assert latency.main(flags.split(), prog="bench", load_engine=load_scripted) == 0
    result = json.loads(path.read_text())
    assert set(result) == {"avg_latency", "latencies", "percentiles"}
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    submits = ENGINES[-1].submits
    assert len(submits) == 5 * 3
    assert {len(submit.prompt_token_ids) for submit in submits} == {9}
    assert len({submit.prompt_token_ids for submit in submits}) == 15  # no prefix is found again
    assert {(submit.sampling.max_tokens, submit.sampling.ignore_eos) for submit in submits} == {(5, True)}
    assert "Avg latency" in capsys.readouterr().out


def test_throughput_counts_what_was_made(tmp_path):
    path = tmp_path / "throughput.json"
    flags = f"--num-prompts 6 --input-len 11 --output-len 4 --n 2 --output-json {path}"
    assert throughput.main(flags.split(), prog="bench", load_engine=load_scripted) == 0
    result = json.loads(path.read_text())
    assert (result["num_requests"], result["num_prompt_tokens"], result["num_output_tokens"]) == (6, 66, 48)
    assert result["total_num_tokens"] == 66 + 48
    assert result["requests_per_second"] == pytest.approx(6 / result["elapsed_time"])
    assert result["tokens_per_second"] == pytest.approx(114 / result["elapsed_time"])


def test_throughput_reads_sharegpt_and_custom_files(tmp_path):
    share = tmp_path / "share.json"
    turns = [{"from": "human", "value": "hello world"}, {"from": "gpt", "value": "x" * 40}]
    share.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    custom = tmp_path / "custom.jsonl"
    custom.write_text('{"prompt": "abc", "output_tokens": 3}\n\n{"prompt": [5, 6, 7], "output_tokens": 2}\n')
    for name, path, lengths in (("sharegpt", share, {10}), ("custom", custom, {2, 3})):
        flags = f"--num-prompts 4 --dataset-name {name} --dataset-path {path}"
        assert throughput.main(flags.split(), prog="bench", load_engine=load_scripted) == 0
        assert {submit.sampling.max_tokens for submit in ENGINES[-1].submits} == lengths
        assert len(ENGINES[-1].submits) == 4
    custom.write_text("{}\n")
    assert throughput.main(flags.split(), prog="bench", load_engine=load_scripted) == 1


VLLM_KEYS = {
    "date", "endpoint_type", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_concurrent_requests",
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
      for kind in ("mean", "median", "std", "p50", "p99")),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve_measures_a_running_server(server, tmp_path, capsys, backend):
    path = tmp_path / "serve.json"
    flags = (
        f"--base-url {server.url} --backend {backend} --num-prompts 12 --max-concurrency 4 --input-len 20 "
        "--output-len 8 "
        f"--metric-percentiles 50,99 --goodput ttft:10000 --save-detailed --output-json {path}"
    )
    num_before = len(server.engine.submits)
    assert serve.main(flags.split()) == 0
    result = json.loads(path.read_text())
    assert set(result) >= VLLM_KEYS
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (12, 0, 12 * 8)
    assert result["max_concurrent_requests"] == 4
    assert result["request_throughput"] == pytest.approx(12 / result["duration"])
    assert result["request_goodput"] == pytest.approx(12 / result["duration"])
    assert 0 < result["mean_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert result["mean_tpot_ms"] > 1  # a step takes 2 ms
    assert result["output_lens"] == [8] * 12
    submits = server.engine.submits[num_before:]
    assert len(submits) == 13  # with one to warm up
    if backend == "openai":
        assert {len(submit.prompt_token_ids) for submit in submits} == {20}
    shown = capsys.readouterr().out
    for label in ("Successful requests", "Mean TTFT (ms)", "P99 ITL (ms)", "Output token throughput"):
        assert label in shown


def test_serve_keeps_to_the_request_rate(server, tmp_path):
    path = tmp_path / "rate.json"
    flags = (
        f"--base-url {server.url} --num-prompts 10 --request-rate 40 --input-len 4 --output-len 2 --output-json {path}"
    )
    assert serve.main([*flags.split(), "--save-detailed"]) == 0
    result = json.loads(path.read_text())
    assert max(result["start_times"]) - min(result["start_times"]) > 0.1
    assert result["request_rate"] == 40
    generator = random.Random(0)
    times = serve.arrival_times(2000, 50.0, 1.0, generator)
    gaps = numpy.diff([0.0, *times])
    assert times[-1] == pytest.approx(40.0)
    assert numpy.std(gaps) / numpy.mean(gaps) == pytest.approx(1.0, abs=0.1)  # Poisson
    even = numpy.diff([0.0, *serve.arrival_times(2000, 50.0, 100.0, generator)])
    assert numpy.std(even) / numpy.mean(even) == pytest.approx(0.1, abs=0.02)


def test_summary_follows_the_definitions():
    good = serve.RequestResult(True, "", 10, 5, 0.0, 1.0, 0.2, [0.1, 0.3, 0.2, 0.2])
    single = serve.RequestResult(True, "", 10, 1, 0.0, 0.4, 0.4, [])
    bad = serve.RequestResult(False, "HTTP 500: x", 10, 0, 0.0, 9.0, 0.0, [])
    summary = serve.summarise([good, single, bad], 2.0, [99], {"ttft": 300.0})
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["mean_tpot_ms"] == pytest.approx(200.0)  # (1.0 - 0.2) / 4, of the one with more than a token
    assert summary["mean_ttft_ms"] == pytest.approx(300.0)
    assert summary["median_itl_ms"] == pytest.approx(200.0)
    assert summary["request_goodput"] == pytest.approx(0.5)
    assert summary["output_throughput"] == pytest.approx(3.0)
    assert summary["total_token_throughput"] == pytest.approx(13.0)


def test_serve_replays_a_trace_with_its_lengths_times_and_shared_blocks(server, tmp_path):
    trace, path = tmp_path / "mooncake.jsonl", tmp_path / "out.json"
    rows = [(0, 40, 3, [7, 1]), (60, 30, 2, [7, 2]), (200, 700, 5, [8, 9])]
    lines = [
        json.dumps({"timestamp": at, "input_length": n, "output_length": out, "hash_ids": ids})
        for at, n, out, ids in rows
    ]
    trace.write_text("\n".join(lines) + "\n")
    flags = (
        f"--base-url {server.url} --dataset-name trace --dataset-path {trace} --trace-max-len 100 --num-warmups 0 "
        f"--save-detailed --output-json {path}"
    )
    num_before = len(server.engine.submits)
    assert serve.main(flags.split()) == 0
    submits = sorted(server.engine.submits[num_before:], key=lambda submit: submit.arrival_s)
    assert [(len(s.prompt_token_ids), s.sampling.max_tokens) for s in submits] == [(40, 3), (30, 2), (95, 5)]
    assert submits[0].prompt_token_ids[:30] == submits[1].prompt_token_ids  # the same block
    assert submits[2].prompt_token_ids[:30] != submits[1].prompt_token_ids
    starts = json.loads(path.read_text())["start_times"]
    assert starts[2] - starts[0] >= 0.19
    assert serve.trace_times([5.0, 6.0, 9.0], math.inf) == [0.0, 1.0, 4.0]
    assert serve.trace_times([5.0, 6.0, 9.0], 2.0) == [0.0, 0.25, 1.0]


def test_serve_sends_targets_and_reports_what_was_kept(server, tmp_path, capsys):
    path = tmp_path / "slo.json"
    flags = f"--base-url {server.url} --num-prompts 6 --input-len 8 --output-len 4 --output-json {path}"
    assert serve.main([*flags.split(), "--slo", "ttft=10000,tpot=0.01"]) == 0
    service = server.engine.submits[-1].service
    assert (service.ttft_ms, service.tpot_ms, service.deadline_ms) == (10000.0, 0.01, None)
    result = json.loads(path.read_text())
    assert (result["ttft_attainment"], result["tpot_attainment"], result["slo_attainment"]) == (1.0, 0.0, 0.0)
    assert result["token_goodput"] == 0.0 and "SLO attainment (%)" in capsys.readouterr().out
    assert serve.main([*flags.split(), "--slo", "deadline=60000"]) == 0
    result = json.loads(path.read_text())
    assert result["slo_attainment"] == 1.0 and result["token_goodput"] == pytest.approx(24 / result["duration"])


def test_serve_reports_failures(server, capsys):
    flags = f"--base-url {server.url} --num-prompts 2 --input-len 600 --num-warmups 0"
    assert serve.main(flags.split()) == 1
    assert "maximum context length" in capsys.readouterr().err
    assert serve.main(f"{flags} --num-warmups 1".split()) == 1
    assert "warm-up request failed" in capsys.readouterr().err
    assert serve.main(["--base-url", "http://127.0.0.1:9", "--num-prompts", "1"]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("serve --num-prompts 0", "num-prompts"), ("serve --request-rate 0", "request-rate"),
        ("serve --goodput itl:3", "goodput"), ("serve --slo itl=3", "slo"),
        ("serve --percentile-metrics xyz", "percentile-metrics"),
        ("serve --dataset-name custom", "dataset-path"), ("serve --max-concurrency 0", "max-concurrency"),
        ("latency --batch-size 0", "batch-size"), ("throughput --random-range-ratio 1", "range-ratio"),
    ],
)  # fmt: skip
def test_bad_flags_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments.split())
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_bench_lists_its_commands(capsys):
    assert bench.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("latency", "throughput", "serve"))
    assert bench.main(["nonsense"]) == 2
    assert bench.main([]) == 2
