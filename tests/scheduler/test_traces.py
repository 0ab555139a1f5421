"""Requests read from files keep every number; requests drawn have the distribution that was asked for."""

from __future__ import annotations

import gzip
import json
import statistics
from itertools import pairwise

import pytest

from scheduler.simulator.arrivals import ServeGenClients, parse_renewal, renewal
from scheduler.simulator.setup import load_requests, parse_targets
from scheduler.simulator.traces import TraceRequest, at_rate, cut, mean_rate, page_keys, read_trace


def test_azure_rows_are_read_as_they_stand(tmp_path):
    path = tmp_path / "conv.csv.gz"
    rows = [(0.0, 374, 44), (4.314579, 396, 109), (5.0, 17, 0), (4.5, 20, 3)]
    text = "timestamp_s,context_tokens,generated_tokens\n" + "".join(f"{t:.7f},{p},{g}\n" for t, p, g in rows)
    path.write_bytes(gzip.compress(text.encode()))
    assert read_trace(path) == [TraceRequest(0.0, 374, 44), TraceRequest(4.314579, 396, 109), TraceRequest(4.5, 20, 3)]


def test_burstgpt_rows_keep_their_session(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,2,ChatGPT,472,18,490,Conversation log\n45,s1,3,GPT-4,1087,230,1317,API log\n46,s2,0,GPT-4,9,0,9,API log\n"
    )
    assert read_trace(path) == [TraceRequest(5.0, 472, 18, user="s1"), TraceRequest(45.0, 1087, 230, user="s1")]


def test_mooncake_ids_become_page_keys(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 1000, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 2360]},
        {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [46, 50]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    early, late = read_trace(path)
    assert (early.arrival_s, late.arrival_s, late.hash_ids) == (0.0, 1.0, (46, 47, 2360))
    early_keys, late_keys = page_keys(early, 64), page_keys(late, 64)
    assert (len(early_keys), len(late_keys)) == (700 // 64, 1200 // 64)
    num_equal = sum(a == b for a, b in zip(early_keys, late_keys, strict=False))
    assert num_equal == 512 // 64  # the first block, and nothing behind it
    assert len(set(late_keys)) == len(late_keys)
    assert page_keys(TraceRequest(0.0, 10, 1), 64) is None


def test_an_unknown_file_is_refused_with_its_first_line(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("when,how_long\n1,2\n")
    with pytest.raises(ValueError, match="when,how_long"):
        read_trace(path)
    with pytest.raises(ValueError, match="nothing.csv"):
        load_requests(str(tmp_path / "nothing.csv"))


def test_slices_and_rates():
    requests = [TraceRequest(float(i), 10 + i, 1) for i in range(20)]
    part = cut(requests, start_s=5.0, duration_s=4.0)
    assert [(r.arrival_s, r.num_prompt_tokens) for r in part] == [(0.0, 15), (1.0, 16), (2.0, 17), (3.0, 18)]
    assert len(cut(requests, num=3)) == 3
    faster = at_rate(requests, 4.0)
    assert mean_rate(faster) == pytest.approx(4.0) and mean_rate(requests) == 1.0
    assert [r.num_prompt_tokens for r in faster] == [r.num_prompt_tokens for r in requests]
    with pytest.raises(ValueError, match="rate"):
        at_rate(requests, 0.0)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_burstiness_asked_for(cv):
    requests = renewal(5.0, 40_000, cv=cv, lengths=[(10, 1), (30, 3)], seed=1)
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(requests)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in requests} == {(10, 1), (30, 3)}


def test_drawn_lengths_have_the_quantiles_of_the_rows_they_are_drawn_from():
    lengths = [(10 + 3 * i, 1 + i % 50) for i in range(500)]
    requests = renewal(5.0, 40_000, cv=2.0, lengths=lengths, seed=2)
    drawn, wanted = sorted(r.num_prompt_tokens for r in requests), sorted(p for p, _ in lengths)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert drawn[int(share * len(drawn))] == pytest.approx(wanted[int(share * len(wanted))], rel=0.05)
    joint = set(lengths)  # prompt and output stay together
    assert all((r.num_prompt_tokens, r.num_output_tokens) in joint for r in requests)


def test_a_slice_of_a_replay_keeps_count_sums_and_order(tmp_path):
    path = tmp_path / "burst.csv"
    rows = [(i // 3, f"s{i % 4}", 10 + i, 1 + i % 7) for i in range(300)]
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(header + "".join(f"{t},{s},0,m,{p},{o},{p + o},API log\n" for t, s, p, o in rows))
    part = cut(read_trace(path), start_s=20.0, duration_s=30.0)
    wanted = [row for row in rows if 20 <= row[0] < 50]
    assert [(r.arrival_s + 20.0, r.user, r.num_prompt_tokens, r.num_output_tokens) for r in part] == wanted


def test_drawn_traces_are_described_in_a_word():
    requests = parse_renewal("poisson:rate=4,num=200,input=64-1024,output=8", seed=3)
    assert len(requests) == 200 and mean_rate(requests) == pytest.approx(4.0, rel=0.2)
    assert all(64 <= r.num_prompt_tokens <= 1024 and r.num_output_tokens == 8 for r in requests)
    assert parse_renewal("poisson:rate=4,num=200,input=64-1024,output=8", seed=3) == requests
    for text, said in (("poisson:speed=2", "speed"), ("poisson:input=9-2", "input"), ("poisson:rate=0", "rate")):
        with pytest.raises(ValueError, match=said):
            parse_renewal(text)


@pytest.fixture
def servegen(tmp_path):
    rates = tmp_path / "x_rates.csv"
    rows = ["client_id,timestamp_s,rate_rps,cv,dist,param1,param2"]
    rows += [f"a,{w},2.0,3.0,Gamma,0.11,1.0" for w in range(0, 3600, 600)]
    rows += [f"b,{w},0.5,1.0,Weibull,1.0,1.0" for w in range(0, 3600, 600)]
    rates.write_text("\n".join(rows) + "\n")
    names = ["p0", "p50", "p100"]
    lengths = [f"client_id,window_start_s,field,{','.join(names)}"]
    for client, base in (("a", 100), ("b", 1000)):
        lengths.append(f"{client},0,input_tokens,{base},{2 * base},{4 * base}")
        lengths.append(f"{client},0,output_tokens,10,20,40")
    (tmp_path / "x_lengths.csv").write_text("\n".join(lengths) + "\n")
    return rates


def test_servegen_clients_keep_rate_bursts_and_lengths(servegen):
    assert ServeGenClients.is_rates_file(servegen)
    clients = ServeGenClients(servegen)
    assert clients.total_rate(0.0, 3600.0) == pytest.approx(2.5)
    drawn = clients.draw(0.0, 3600.0, seed=1)
    assert len(drawn) == pytest.approx(2.5 * 3600, abs=12)
    of_a = [r for r in drawn if r.user == "client a"]
    gaps = [y.arrival_s - x.arrival_s for x, y in pairwise(of_a)]
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(3.0, rel=0.25)
    assert statistics.median(r.num_prompt_tokens for r in of_a) == pytest.approx(200, rel=0.05)
    assert min(r.num_prompt_tokens for r in drawn if r.user == "client b") >= 1000
    assert len(clients.draw(600.0, 1200.0, rate=0.5, seed=1)) == pytest.approx(600, abs=12)
    assert load_requests(str(servegen), duration_s=1200.0, rate=0.5, seed=1) == clients.draw(
        0.0, 1200.0, rate=0.5, seed=1
    )
    with pytest.raises(ValueError, match="_lengths"):
        ServeGenClients(servegen.with_name("x_lengths.csv"))


def test_targets_are_read_with_their_units():
    targets = parse_targets("ttft=500ms, tpot=0.05,deadline=30s")
    assert (targets.ttft_s, targets.tpot_s, targets.deadline_s) == (0.5, 0.05, 30.0)
    for text in ("ttft", "speed=3", "ttft=soon", "tpot=0"):
        with pytest.raises(ValueError, match="--slo"):
            parse_targets(text)
