"""The commands as a user types them, over a scripted engine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from runtime import chat, command_line, generate
from runtime.engine_args import EngineArgs
from runtime.llm import LLM
from runtime.sampling_params import SamplingParams
from runtime.serve import build_parser, read_api_keys
from runtime.service_level import ServiceLevel
from scheduler import policy as policies
from scheduler.config import SchedulerConfig
from scheduler.policy import with_preset
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tiny_tokenizer import EOS, tiny_template, tiny_tokenizer

ENGINES = []


def load_scripted(args, on_deltas):
    engine = ScriptedEngine(tiny_tokenizer(), on_deltas, max_num_seqs=args.max_num_seqs)
    ENGINES.append(engine)
    return engine, tiny_tokenizer(), tiny_template(), SimpleNamespace(default_sampling={"top_k": 7})


@pytest.fixture
def llm():
    with LLM.from_engine_args(EngineArgs().check(), load_scripted) as made:
        yield made


GREEDY = SamplingParams(temperature=0, max_tokens=50)


def test_import_is_light():
    """No NumPy, no extension, no web framework behind ``import runtime``."""
    program = """
        import sys, runtime
        from runtime import SamplingParams, LLM, EngineArgs
        heavy = {"numpy", "fastapi", "uvicorn", "tokenizers", "jinja2", "pydantic", "runtime._native", "asyncio"}
        print(sorted(heavy & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_llm_reads_every_kind_of_prompt(llm):
    ids = tiny_tokenizer().encode("hello world")
    for prompt in ("hello world", {"prompt": "hello world"}, {"prompt_token_ids": ids}, ids, ["hello world"], [ids]):
        (request,) = llm.generate(prompt, GREEDY)
        assert request.prompt_token_ids == ids
        assert request.outputs[0].text == "hello world"
        assert request.outputs[0].token_ids == [*ids, EOS]
        assert (request.outputs[0].finish_reason, request.finished, request.num_cached_tokens) == ("stop", True, 1)


def test_llm_passes_service_levels_on(llm):
    urgent = ServiceLevel(ttft_ms=200, tpot_ms=20.5, priority=-3, user="a")
    llm.generate(["abc", "def"], GREEDY, service_level=urgent)
    assert [submit.service for submit in llm.engine.submits[-2:]] == [urgent, urgent]
    llm.generate(["abc", "def"], GREEDY, service_level=[urgent, ServiceLevel()])
    assert [submit.service for submit in llm.engine.submits[-2:]] == [urgent, ServiceLevel()]
    llm.generate("abc", GREEDY)
    assert llm.engine.submits[-1].service == ServiceLevel()
    with pytest.raises(ValueError, match="service_level has 1 entries for 2 prompts"):
        llm.generate(["abc", "def"], GREEDY, service_level=[urgent])
    for wrong, error in (({"ttft_ms": -1}, ValueError), ({"user": 3}, TypeError), ({"tpot_ms": True}, TypeError)):
        with pytest.raises(error, match=next(iter(wrong))):
            ServiceLevel(**wrong)


def test_llm_keeps_order_n_and_params_per_prompt(llm):
    params = [SamplingParams(n=2, temperature=0, max_tokens=1), SamplingParams(temperature=0, max_tokens=3, logprobs=2)]
    first, second = llm.generate(["abc", "def"], params)
    assert [output.index for output in first.outputs] == [0, 1]
    assert [output.text for output in (*first.outputs, *second.outputs)] == ["a", "a", "def"]
    logprobs = second.outputs[0].logprobs
    assert len(logprobs) == 3
    assert logprobs[0][second.outputs[0].token_ids[0]].logprob == -0.5
    assert logprobs[0][second.outputs[0].token_ids[0]].decoded_token == "d"
    assert second.outputs[0].cumulative_logprob == -1.5
    assert first.outputs[0].logprobs is None
    assert llm.get_default_sampling_params().top_k == 7


def test_llm_chats_and_streams(llm):
    messages = [{"role": "user", "content": "hello"}]
    (whole,) = llm.chat(messages, GREEDY)
    assert whole.outputs[0].text == "user: hello"
    both = llm.chat([messages, messages], GREEDY)
    assert [request.outputs[0].text for request in both] == ["user: hello"] * 2
    assert "".join(piece.text for piece in llm.stream_chat(messages, GREEDY)) == "user: hello"
    stop = SamplingParams(temperature=0, stop="lo", ignore_eos=True, max_tokens=400)
    pieces = list(llm.stream("hello", stop))
    assert ("".join(piece.text for piece in pieces), pieces[-1].stop_reason) == ("hel", "lo")


def test_llm_aborts_a_stream_that_is_closed(llm):
    stream = llm.stream("hello", SamplingParams(ignore_eos=True, max_tokens=500))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while llm.engine.stats()["num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.002)
    assert [abort.reason for abort in llm.engine.aborts] == ["abort"]
    assert llm.generate("abc", GREEDY)[0].outputs[0].text == "abc"  # deltas of the aborted one do no harm


def test_llm_refuses_before_anything_runs(llm):
    for prompt, message in (
        ("", "empty"), ([[]], "empty"), ([10**6], "token id"), ("x " * 600, "maximum context length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llm.generate(["fine", *prompt] if isinstance(prompt, list) and prompt == [[]] else prompt, GREEDY)
    with pytest.raises(TypeError, match="prompt"):
        llm.generate([3.5], GREEDY)
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="n must be 1"):
        next(llm.stream("a", SamplingParams(n=2)))
    assert llm.engine.submits == []
    with pytest.raises(TypeError, match="no argument 'gpu_memory_utilization'"):
        LLM("smollm2", gpu_memory_utilization=0.9)
    with pytest.raises(ValueError, match="page_size"):
        LLM("smollm2", block_size=7)


def test_generate_streams_one_prompt(capsys):
    assert generate.main(["--prompt", "hello world", "--temperature", "0"], load_engine=load_scripted) == 0
    shown = capsys.readouterr()
    assert shown.out == "hello world\n"
    assert "tok/s" in shown.err


def test_generate_reads_a_file_and_writes_json(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    lines = ["plain text", '"quoted"', '{"prompt": "abc"}', '{"messages": [{"role": "user", "content": "hi"}]}', ""]
    path.write_text("\n".join([*lines, '{"prompt_token_ids": [70, 71]}']))
    arguments = ["--prompts-file", str(path), "--json", "--temperature", "0", "--logprobs", "1", "-n", "2"]
    assert generate.main(arguments, load_engine=load_scripted) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["outputs"][0]["text"] for answer in answers[:4]] == ["plain text", "quoted", "abc", "user: hi"]
    assert answers[4]["outputs"][1]["token_ids"] == [70, 71, EOS]
    assert len(answers[4]["outputs"][1]["logprobs"]) == 3
    assert ENGINES[-1].submits[0].sampling.top_k == 7  # the model's own default


def test_generate_can_use_the_chat_template(capsys):
    arguments = ["--prompt", "hello", "--chat", "--system", "short", "--temperature", "0"]
    assert generate.main(arguments, load_engine=load_scripted) == 0
    assert capsys.readouterr().out == "system: short\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--prompt"), (["--prompt", "a", "--prompts-file", "b"], "either"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"), (["--prompt", "a", "--logprobs", "1"], "--json"),
        (["--prompts-file", "/no/such/file"], "no/such"), (["--prompt", "a", "--kv-dtype", "int3"], "kv_dtype"),
        (["--prompt", "a", "--policy", "random"], "policy"), (["m", "--model", "other", "--prompt", "a"], "twice"),
        (["--prompt", "a", "--kv-memory", "lots"], "kv_memory"),
        (["--prompt", "a", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--prompt", "a", "--max-resting-runs", "0"], "max_resting_runs"),
        (["--prompt", "a", "--lanes", "half"], "lanes must be off, auto or two percentages such as 50:50, got 'half'"),
        (["--prompt", "a", "--lanes", "0:100"], "lanes"), (["--prompt", "a", "--lanes", "50:101"], "lanes"),
        (["--prompt", "a", "--prefill", "word"], "--prefill"),
        (["--prompt", "a", "--nano-batches", "5"], "--nano-batches"),
    ],
)  # fmt: skip
def test_bad_flags_cost_no_load(arguments, says, capsys):
    def never(_args, _on_deltas):
        raise AssertionError("the model was loaded")

    with pytest.raises(SystemExit) as caught:
        generate.main(arguments, load_engine=never)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_line(capsys):
    def broken(_args, _on_deltas):
        raise ValueError("no such model")

    assert generate.main(["--prompt", "a"], load_engine=broken) == 1
    assert capsys.readouterr().err == "error: no such model\n"


def test_chat_keeps_its_history_and_obeys_its_commands(llm):
    lines = iter(
        [
            "hello",
            "/stats",
            "/retry",
            "/system be brief",
            "abc",
            "/nonsense",
            "",
            "refuse me",
            "x" * 900,
            "/reset",
            "/quit",
        ]
    )
    out = io.StringIO()
    conversation = chat.Conversation(llm, GREEDY, out=out)
    chat.run(conversation, lambda _prompt: next(lines))
    shown = out.getvalue()
    assert shown.count("user: hello") == 2
    assert "tok/s" in shown
    assert "system: be brief" in shown
    assert "unknown command /nonsense" in shown
    assert "error: chat template: refused" in shown
    assert "maximum context length" in shown
    assert conversation.messages == []
    assert conversation.system == "be brief"


def test_chat_survives_an_interrupt_during_an_answer(llm, monkeypatch):
    def interrupted(_messages, _sampling):
        yield SimpleNamespace(text="half", token_ids=[1])
        raise KeyboardInterrupt

    conversation = chat.Conversation(llm, GREEDY, out=io.StringIO())
    monkeypatch.setattr(llm, "stream_chat", interrupted)
    conversation.ask("hello")
    assert conversation.messages[-1] == {"role": "assistant", "content": "half"}
    assert "[stopped]" in conversation.out.getvalue()


def test_console_script_lists_and_finds_its_commands(capsys):
    assert command_line.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("serve", "chat", "generate", "bench", "doctor"):
        assert name in listed
    assert command_line.main([]) == 2
    assert command_line.main(["nonsense"]) == 2
    assert "unknown command 'nonsense'" in capsys.readouterr().err
    for name in ("serve", "chat", "generate"):
        with pytest.raises(SystemExit) as caught:
            command_line.main([name, "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert f"partita {name}" in shown
        assert "--kv-cache-dtype" in shown


def test_flags_of_the_scheduler_win_over_its_policy():
    """What is not given is the policy's."""
    parser = build_parser()
    flags = "--policy flowprefill --lanes 25:75 --prefill layer --nano-batches auto --max-resting-runs 5"
    args = EngineArgs.from_namespace(parser.parse_args(flags.split()))
    assert (args.policy, args.lanes, args.prefill, args.nano_batches) == ("flowprefill", "25:75", "layer", "auto")
    assert args.max_resting_runs == 5
    config = with_preset(SchedulerConfig(1, policy=args.policy, lanes=args.lanes, prefill=args.prefill))
    assert (config.lanes, config.prefill, config.nano_batches) == ("25:75", "layer", "off")
    preset = with_preset(SchedulerConfig(1, policy="flowprefill"))
    assert (preset.lanes, preset.prefill) == ("off", "operator")


def test_help_names_every_policy():
    text = " ".join(build_parser().format_help().split())
    for name in policies._presets:
        if name.startswith("chosen"):
            continue  # of another test
        assert f" {name}," in text or f" {name} (" in text or name == "fcfs", name  # which is what default is


def test_flags_become_engine_args():
    parser = build_parser()
    flags = (
        "--model-path x --served-model-name a b --kv-cache-dtype int8:int4 --kv-cache-memory-bytes 1GiB "
        "--block-size 32 "
        "--max-model-len 4k --no-enable-prefix-caching --threads 2 --offline --activations fp32 --trace-steps t.json"
    )
    args = EngineArgs.from_namespace(parser.parse_args(flags.split()))
    assert (args.model, args.served_model_name, args.shown_model_name()) == ("x", ("a", "b"), "a")
    assert (args.kv_codecs, args.kv_memory, args.page_size, args.max_model_len) == (("int8", "int4"), 1 << 30, 32, 4096)
    assert (args.enable_prefix_caching, args.threads, args.offline, args.activations) == (False, 2, True, "fp32")
    assert args.trace_steps == "t.json"
    plain = EngineArgs.from_namespace(parser.parse_args([]))
    assert plain == EngineArgs().check()
    assert EngineArgs.from_namespace(parser.parse_args(["here"])).model == "here"


def test_keys_come_from_flag_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("two\n\nthree\n")
    monkeypatch.setenv("PARTITA_API_KEY", "four")
    namespace = build_parser().parse_args(["--api-key", "one", "two", "--api-key-file", str(path)])
    assert read_api_keys(namespace) == ("one", "two", "three", "four")
    with pytest.raises(ValueError, match="api-key"):
        read_api_keys(build_parser().parse_args(["--api-key", " "]))


SERVE = """
import sys
from types import SimpleNamespace
from runtime.serve import main
from scheduler import policy as policies
from scheduler.config import SchedulerConfig
from scheduler.policy import with_preset
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tiny_tokenizer import tiny_template, tiny_tokenizer

def load(args, on_deltas):
    if args.model == "broken":
        raise ValueError("broken: got a bad header, wanted GGUF")
    engine = ScriptedEngine(tiny_tokenizer(), on_deltas, max_num_seqs=args.max_num_seqs, step_s=0.01)
    return engine, tiny_tokenizer(), tiny_template(), SimpleNamespace()

sys.exit(main(sys.argv[1:], load_engine=load))
"""


def start_server(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def url_of(server: subprocess.Popen) -> str:
    for line in server.stdout:
        if "web chat" in line:
            return line.split()[-1].rstrip("/")
    raise AssertionError(server.stderr.read())


def test_served_process_drains_on_sigterm_and_ends_with_0():
    server = start_server("--port", "0")
    try:
        url = url_of(server)
        body = json.dumps({"prompt": "hello", "ignore_eos": True, "max_tokens": 60, "stream": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.read(6) == b"data: "
            server.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b'"finish_reason":"length"') == 1
        assert server.wait(timeout=20) == 0
        assert "draining 1 requests" in server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_a_second_signal_aborts_what_is_drained():
    server = start_server("--port", "0")
    try:
        url = url_of(server)
        body = json.dumps({"prompt": "hello", "ignore_eos": True, "max_tokens": 500, "stream": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read(6)
            server.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=3) == 0  # 500 tokens would take 5 s
    finally:
        server.kill()
        server.communicate()


def test_serve_says_in_a_line_why_it_cannot():
    broken = start_server("broken", "--port", "0")
    out, err = broken.communicate(timeout=20)
    assert broken.returncode == 2
    assert "error: broken cannot be served: broken: got a bad header, wanted GGUF" in err
    assert "Traceback" not in out + err
    server = start_server("--port", "0")
    try:
        port = url_of(server).rsplit(":", 1)[1]
        second = start_server("--port", port)
        _, err = second.communicate(timeout=20)
        assert second.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in err
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"})
            )
        assert caught.value.code == 403
    finally:
        server.kill()
        server.communicate()


def test_serve_wants_a_key_where_others_can_reach_it():
    server = start_server("--host", "0.0.0.0", "--port", "0")
    _, err = server.communicate(timeout=20)
    assert server.returncode == 2
    assert "--insecure-no-auth" in err
