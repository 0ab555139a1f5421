"""`partita simulate` end to end: table, JSON, trace, charts, capacity, and what it says of bad input."""

from __future__ import annotations

import json

import pytest

from scheduler.simulator.command import main

TRACE = "poisson:rate=8,num=60,input=32-900,output=4-40"


def test_a_run_prints_a_table_and_writes_json_and_a_step_trace(tmp_path, capsys):
    numbers, steps = tmp_path / "r.json", tmp_path / "t.json"
    arguments = ["--trace", TRACE, "--slo", "ttft=500ms,tpot=50ms", "--json", str(numbers), "--trace-steps", str(steps)]
    assert main([*arguments, "--window", "0:2"]) == 0
    out = capsys.readouterr().out
    for word in ("public numbers", "llama-3-8b", "ttft", "p99", "goodput", "kv_peak", "preemptions"):
        assert word in out
    content = json.loads(numbers.read_text())
    (run,) = content["runs"]
    assert content["machine_source"].startswith("public numbers")
    assert run["num_requests"] == 60 and 0 < run["slo_attainment"] <= 1
    assert run["ttft_s_p50"] <= run["ttft_s_p99"] and run["utilisation"]["memory_bandwidth"] <= 1
    assert json.loads(steps.read_text())["traceEvents"]


def test_more_rates_and_policies_are_more_runs(capsys):
    assert main(["--trace", TRACE, "--policy", "default,fcfs", "--rates", "2,20", "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["policy"], round(run["offered_rate"])) for run in runs] == [
        ("default", 2), ("default", 20), ("fcfs", 2), ("fcfs", 20),
    ]  # fmt: skip


def test_charts(tmp_path):
    pytest.importorskip("matplotlib")
    load, lanes = tmp_path / "load.png", tmp_path / "lanes.png"
    arguments = ["--trace", TRACE, "--rates", "2,20", "--plot-latency", str(load), "--plot-lanes", str(lanes)]
    assert main([*arguments, "--lanes", "0.5,0.5", "--window", "0:30"]) == 0
    for path in (load, lanes):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "arranged"),
    [
        (["--lanes", "50:50"], "50:50 token"),
        (["--lanes", "25:75", "--prefill", "operator"], "25:75 operator"),
        (["--lanes", "100:100", "--prefill", "layer"], "100:100 layer"),
        (["--prefill", "layer"], "one lane, layer"),
    ],
)
def test_lanes_and_granularities_are_flags_and_the_report_says_what_was_arranged(flags, arranged, tmp_path, capsys):
    numbers, steps = tmp_path / "r.json", tmp_path / "t.json"
    arguments = ["--trace", TRACE, *flags, "--json", str(numbers), "--trace-steps", str(steps), "--window", "0:60"]
    assert main(arguments) == 0
    assert f"arranged: {arranged}" in capsys.readouterr().out
    (run,) = json.loads(numbers.read_text())["runs"]
    assert run["num_refused"] == 0 and arranged in run["arrangements"]
    assert {"num_pauses", "num_border_moves"} <= run.keys()
    shown = [event for event in json.loads(steps.read_text())["traceEvents"] if event["cat"] == "step"]
    assert {event["tid"] for event in shown} == ({0, 1} if "--lanes" in flags else {0})
    ranges = {tuple(event["args"]["nodes"]) for event in shown}
    # Parts: groups of layers, and runs that were stopped to go on with the whole chip when the decodes were over.
    assert (len(ranges) > 1) == (arranged in ("one lane, layer", "25:75 operator"))


def test_a_run_of_a_prompt_may_be_longer_than_a_step_and_the_program_is_known(capsys):
    from scheduler.machine import Machine
    from scheduler.simulator import setup

    machine = Machine.load("h100-sxm")
    spec = setup.load_model("llama-3-8b", machine)
    by_tokens, by_layers = (setup.scheduler_config(spec, machine, prefill=prefill) for prefill in (None, "layer"))
    assert by_layers.max_num_batched_tokens > by_tokens.max_num_batched_tokens
    assert by_tokens.rungs == machine.rungs[:-1] and by_tokens.num_nodes == len(spec.nodes())
    assert len(by_tokens.layer_starts) == spec.num_layers
    for layer, node in enumerate(by_tokens.layer_starts):
        assert spec.nodes()[node].layer == layer and spec.nodes()[node - 1].layer != layer


def test_capacity(capsys):
    arguments = ["--trace", TRACE, "--machine", "cpu-2-cores", "--find-max-rate", "--slo", "ttft=1s,tpot=100ms"]
    assert main([*arguments, "--json", "-"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["max_rate"] > 0 and run["slo_attainment"] >= 0.9
    assert min(kept for rate, kept in run["tried"] if rate > run["max_rate"]) < 0.9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "nothing.csv"], "nothing.csv"),
        (["--trace", TRACE, "--machine", "abacus"], "h100-sxm"),
        (["--trace", TRACE, "--model", "gpt-9"], "llama-3-8b"),
        (["--trace", TRACE, "--policy", "random"], "policy"),
        (["--trace", TRACE, "--slo", "ttft"], "--slo"),
        (["--trace", TRACE, "--find-max-rate"], "--slo"),
        (["--trace", TRACE, "--rates", "0,1"], "--rates"),
        (["--trace", TRACE, "--window", "5"], "--window"),
        (["--trace", TRACE, "--kv-memory", "10"], "kv memory"),
        (["--trace", TRACE, "--kv-dtype", "int3"], "int3"),
        (["--trace", TRACE, "--lanes", "half"], "lanes"),
        (["--trace", TRACE, "--lanes", "0.5,x"], "--lanes"),
        (["--trace", TRACE, "--prefill", "word"], "prefill"),
        (["--trace", TRACE, "--nano-batches", "9"], "nano_batches"),
    ],
)
def test_bad_input_is_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in capsys.readouterr().err
