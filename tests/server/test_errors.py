"""Every refusal is the one OpenAI error object, names what was wrong, and leaves the server alive."""

from __future__ import annotations

import socket

import pytest

from runtime.server.guard import GuardSettings
from tests.server.serving import MODEL, serve
from tests.server.tiny_tokenizer import tiny_template, tiny_tokenizer

CONTEXT = 512
HELLO = [{"role": "user", "content": "hello"}]


def check(answer, status: int, code: str, param: str | None = None, says: tuple[str, ...] = ()) -> dict:
    """The error object of an answer, after checking all of it."""
    assert answer.status == status, answer.raw
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert isinstance(error["type"], str)
    assert "Traceback" not in error["message"]
    for text in says:
        assert text in error["message"], error["message"]
    assert answer.headers["x-request-id"]
    return error


BAD_FIELDS = [
    ("temperature", "hot", "invalid_type", "temperature", "'hot'"),
    ("temperature", -0.5, "invalid_value", "temperature", "-0.5"),
    ("temperature", True, "invalid_type", "temperature", "True"),
    ("top_p", 0, "invalid_value", "top_p", "above 0"),
    ("top_p", 1.5, "invalid_value", "top_p", "1.5"),
    ("top_k", -2, "invalid_value", "top_k", "-2"),
    ("top_k", 1.5, "invalid_type", "top_k", "1.5"),
    ("min_p", 2, "invalid_value", "min_p", "between 0 and 1"),
    ("presence_penalty", 3, "invalid_value", "presence_penalty", "between -2 and 2"),
    ("frequency_penalty", -3, "invalid_value", "frequency_penalty", "-3"),
    ("repetition_penalty", 0, "invalid_value", "repetition_penalty", "above 0"),
    ("seed", 2**70, "invalid_value", "seed", "64-bit"),
    ("n", 0, "invalid_value", "n", "between 1 and 16"),
    ("n", 10**6, "invalid_value", "n", "1000000"),
    ("max_tokens", -1, "invalid_value", "max_tokens", "-1"),
    ("max_tokens", 0, "invalid_value", "max_tokens", "at least 1"),
    ("max_tokens", "9", "invalid_type", "max_tokens", "'9'"),
    ("min_tokens", -1, "invalid_value", "min_tokens", "-1"),
    ("stop", [1], "invalid_type", "stop.0", "1"),
    ("stop", [""], "invalid_value", "stop", "1 to 1024 bytes"),
    ("stop", ["x"] * 40, "invalid_value", "stop", "40 strings"),
    ("stop_token_ids", [-1], "invalid_value", "stop_token_ids", "-1"),
    ("stop_token_ids", [10**6], "invalid_value", "stop_token_ids", "vocabulary"),
    ("logit_bias", {"x": 1}, "invalid_value", "logit_bias", "'x'"),
    ("logit_bias", {"1": 200}, "invalid_value", "logit_bias", "between -100 and 100"),
    ("logit_bias", {"999999": 1}, "invalid_value", "logit_bias", "vocabulary"),
    ("ignore_eos", "yes", "invalid_type", "ignore_eos", "'yes'"),
    ("stream", 1, "invalid_type", "stream", "1"),
    ("stream_options", {"include_usage": True}, "invalid_value", "stream_options", "stream: true"),
    ("cache_salt", "", "invalid_value", "cache_salt", "1024"),
    ("priority", 2**40, "invalid_value", "priority", "32-bit"),
    ("ttft_ms", 0, "invalid_value", "ttft_ms", "more than 0"),
    ("tpot_ms", 1e306, "invalid_value", "tpot_ms", "at most 1e+12"),
    ("tpot_ms", -5, "invalid_value", "tpot_ms", "-5"),
    ("deadline_ms", "soon", "invalid_type", "deadline_ms", "'soon'"),
    ("user", "u" * 300, "invalid_value", "user", "256"),
    ("prompt_logprobs", 1, "unsupported_parameter", "prompt_logprobs", "not supported"),
    ("response_format", {"type": "json_object"}, "unsupported_parameter", "response_format", "not supported"),
    ("tools", [{"type": "function"}], "unsupported_parameter", "tools", "tool_choice"),
    ("best_of", 4, "unsupported_parameter", "best_of", "not supported"),
    ("use_beam_search", True, "unsupported_parameter", "use_beam_search", "not supported"),
    ("bad_words", ["x"], "unsupported_parameter", "bad_words", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "code", "param", "says"), BAD_FIELDS)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_bad_fields_are_named(server, route, field, value, code, param, says):
    body = {"prompt": "hello"} if route == "completions" else {"messages": HELLO}
    check(server.post(f"/v1/{route}", {**body, field: value}), 400, code, param, (field, says))


BAD_BODIES = [
    (b"", "invalid_json", None, "JSON"),
    (b"{", "invalid_json", None, "JSON"),
    (b"[]", "invalid_json", None, "list"),
    (b'"x"', "invalid_json", None, "str"),
    (b'{"prompt": "\xff"}', "invalid_utf8", None, "byte 12"),
    (b'{"prompt": "\\ud800"}', "invalid_utf8", None, "surrogate"),
    (b'{"prompt": "x", "temperature": NaN}', "invalid_json", None, "NaN"),
    (b'{"prompt": "x", "temperature": -Infinity}', "invalid_json", None, "Infinity"),
    (b'{"prompt": "x", "temperature": 1e999}', "invalid_value", "temperature", "inf"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "invalid_json", None, "JSON"),
    (b"[" * 100000, "invalid_json", None, "64 levels"),
    (b'{"a":' * 65 + b"1" + b"}" * 65, "invalid_json", None, "64 levels"),
    (b"{}", "missing_parameter", "prompt", "required"),
    (b'{"prompt": 5}', "invalid_type", "prompt", "5"),
    (b'{"prompt": {}}', "invalid_type", "prompt", "{}"),
    (b'{"prompt": ""}', "empty_prompt", "prompt", "empty"),
    (b'{"prompt": []}', "empty_prompt", "prompt", "empty"),
    (b'{"prompt": [[]]}', "empty_prompt", "prompt", "empty"),
    (b'{"prompt": ["a", ""]}', "empty_prompt", "prompt", "empty"),
    (b'{"prompt": [-1]}', "invalid_value", "prompt", "-1"),
    (b'{"prompt": [999999]}', "invalid_value", "prompt", "999999"),
    (b'{"prompt": ["a", 5]}', "invalid_type", "prompt.1", "5"),
    (b'{"prompt": [1, true]}', "invalid_type", "prompt.1", "True"),
    (b'{"prompt": "a", "logprobs": 21}', "invalid_value", "logprobs", "21"),
    (b'{"prompt": "a", "logprobs": 1, "echo": true}', "unsupported_parameter", "echo", "logprobs"),
    (b'{"prompt": "a", "suffix": "b"}', "unsupported_parameter", "suffix", "not supported"),
    (b'{"prompt": [' + b'"a",' * 64 + b'"a"]}', "invalid_value", "prompt", "65"),
]


@pytest.mark.parametrize(("body", "code", "param", "says"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_bodies_are_refused(server, body, code, param, says):
    check(server.post("/v1/completions", body), 400, code, param, (says,))


BAD_MESSAGES = [
    ([], "empty_prompt", "messages", "empty"),
    ([{}], "invalid_value", "messages[0].role", "None"),
    ([{"role": "robot", "content": "x"}], "invalid_value", "messages[0].role", "'robot'"),
    ([{"role": "user"}], "missing_parameter", "messages[0].content", "required"),
    ([{"role": "user", "content": 5}], "invalid_type", "messages[0].content", "int"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "unsupported_parameter",
     "messages[0].content[0]", "image_url"),
    ([{"role": "user", "content": ["x"]}], "unsupported_parameter", "messages[0].content[0]", "str"),
    ([{"role": "user", "content": "refuse me"}], "chat_template_error", "messages", "refused"),
    ("hello", "invalid_type", "messages", "'hello'"),
    (["hello"], "invalid_type", "messages.0", "'hello'"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "code", "param", "says"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_bad_messages_are_refused(server, messages, code, param, says):
    check(server.post("/v1/chat/completions", {"messages": messages}), 400, code, param, (says,))


def test_chat_only_fields(server):
    check(server.chat(top_logprobs=3), 400, "invalid_value", "top_logprobs", ("logprobs",))
    check(server.chat(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs", ("21",))
    check(server.chat(chat_template="{{ 1 }}"), 400, "unsupported_parameter", "chat_template")
    bad = server.chat(chat_template_kwargs={"messages": 1})
    check(bad, 400, "invalid_value", "chat_template_kwargs.messages")
    bad = server.chat(chat_template_kwargs={"deep": {"er": 1}})
    check(bad, 400, "invalid_value", "chat_template_kwargs.deep")
    bad = server.chat(continue_final_message=True, add_generation_prompt=False)
    check(bad, 400, "invalid_value", "continue_final_message", ("assistant",))


def test_a_prompt_longer_than_the_context_says_both_numbers(server):
    too_long = server.post("/v1/completions", {"prompt": [5] * 600})
    check(too_long, 400, "context_length_exceeded", "prompt", (str(CONTEXT), "600"))
    messages = [{"role": "user", "content": "x " * 700}]
    num_tokens = len(tiny_tokenizer().encode(tiny_template().render(messages), add_special_tokens=False))
    too_long = server.chat(messages=messages)
    check(too_long, 400, "context_length_exceeded", "messages", (str(CONTEXT), str(num_tokens)))
    exactly_full = server.post("/v1/completions", {"prompt": [5] * CONTEXT})
    check(exactly_full, 400, "context_length_exceeded", "prompt", (str(CONTEXT),))
    sum_too_long = server.post("/v1/completions", {"prompt": [5] * 500, "max_tokens": 13})
    check(sum_too_long, 400, "context_length_exceeded", "max_tokens", ("512", "500", "13"))
    assert server.post("/v1/completions", {"prompt": [5] * 500, "max_tokens": 12}).status == 200


def test_a_text_far_too_long_is_refused_without_reading_all_of_it(server):
    answer = server.post("/v1/completions", {"prompt": "x y " * 1_000_000})
    check(answer, 400, "context_length_exceeded", "prompt", (str(CONTEXT), "4000000 characters"))


def test_unknown_model(server):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        check(server.post(path, {"model": "gpt-9", **body}), 404, "model_not_found", "model", ("gpt-9", MODEL))
    check(server.request("GET", "/v1/models/gpt/9"), 404, "model_not_found", "model", ("gpt/9",))


def test_tokenize_and_detokenize_check_their_fields(server):
    check(server.post("/tokenize", {}), 400, "missing_parameter", "prompt")
    check(server.post("/tokenize", {"prompt": "a", "messages": HELLO}), 400, "missing_parameter", "prompt")
    check(server.post("/detokenize", {"tokens": [-1]}), 400, "invalid_value", "tokens", ("-1",))
    check(server.post("/detokenize", {"tokens": [10**7]}), 400, "invalid_value", "tokens")
    check(server.post("/detokenize", {}), 400, "missing_parameter", "tokens")


def test_routes_and_methods(server):
    check(server.request("GET", "/nope"), 404, "route_not_found", None, ("/nope",))
    check(server.post("/v1/embeddings", {}), 404, "route_not_found")
    answer = server.request("GET", "/v1/completions")
    check(answer, 405, "method_not_allowed", None, ("GET",))
    assert answer.headers["allow"] == "POST"
    check(server.request("DELETE", "/v1/models"), 405, "method_not_allowed")


def test_content_type_must_be_json(server):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = server.request("POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": content_type})
        check(answer, 415, "unsupported_media_type", None, (content_type,))
    given = {"Content-Type": "application/json; charset=utf-8"}
    assert server.request("POST", "/v1/completions", b'{"prompt": "a"}', given).status == 200


def test_unknown_and_ignorable_fields_are_ignored(server):
    answer = server.complete(
        prompt="hello", user="me", metadata={"a": 1}, store=True, service_tier="auto", no_such_field=[1], tools=[],
        response_format={"type": "text"}, best_of=1, suffix=None, logit_bias={}, stop=None,
    )  # fmt: skip
    assert answer.status == 200
    assert server.chat(tools=[{"type": "function"}], tool_choice="none").status == 200


def test_bodies_over_the_limit_are_refused_before_they_are_read():
    with serve(guard=GuardSettings(max_body_bytes=1000)) as server:
        answer = server.post("/v1/completions", b'{"prompt": "' + b"x" * 1000 + b'"}')
        check(answer, 413, "request_too_large", None, ("1000",))
        # chunked: no length is announced
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            for _ in range(400):  # goes on sending long after it was refused, and gets its answer all the same
                client.sendall(b"200\r\n" + b"x" * 0x200 + b"\r\n")
            assert b" 413 " in client.recv(65536)
        assert server.complete(prompt="hello").status == 200


def test_what_is_no_http_gets_the_error_object_too(server):
    for request, status in (
        (b"NONSENSE\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70000, b" 431 "),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(request)
            answer = b""
            while block := client.recv(65536):
                answer += block
        assert status in answer.split(b"\r\n")[0]
        assert b'{"error":' in answer
    assert server.complete(prompt="hello").status == 200


def test_keys_are_asked_for_everywhere_but_where_nothing_is_told():
    with serve(guard=GuardSettings(api_keys=("secret-one", "zwölf"))) as server:
        for path in ("/", "/live", "/ready", "/health"):
            assert server.request("GET", path).status == 200
        for method, path in (
            ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/openapi.json"), ("GET", "/nope"),
            ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
        ):  # fmt: skip
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-one"}, {"X-Api-Key": "x"}):
                answer = server.request(method, path, {"prompt": "a"} if method == "POST" else None, headers)
                check(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert b"secret" not in answer.raw
        for headers in (
            {"Authorization": "Bearer secret-one"}, {"authorization": "bearer secret-one"}, {"X-Api-Key": "secret-one"},
            {"Authorization": "Bearer zwölf".encode()},
        ):  # fmt: skip
            assert server.request("GET", "/v1/models", headers=headers).status == 200


def test_a_foreign_host_header_is_refused_on_loopback():
    with serve(guard=GuardSettings(allowed_hosts=("localhost", "chat.example"))) as server:
        for host in ("evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"):
            check(server.request("GET", "/v1/models", headers={"Host": host}), 403, "host_not_allowed")
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000", "chat.example"):
            assert server.request("GET", "/v1/models", headers={"Host": host}).status == 200


def test_a_model_that_is_still_loading_answers_503():
    with serve(attached=False) as server:
        assert server.request("GET", "/live").status == 200
        for answer in (server.request("GET", "/ready"), server.complete(prompt="a"), server.chat()):
            check(answer, 503, "loading")
            assert answer.headers["retry-after"] == "1"
        assert server.request("GET", "/metrics").status == 200
        server.front.load_error = "no such file"
        check(server.complete(prompt="a"), 503, "load_failed", None, ("no such file",))


def test_an_error_of_the_engine_fails_that_request_alone():
    with serve(fail_request=lambda request_id: "logits were not finite" if "bad" in request_id else None) as server:
        bad = {"X-Request-Id": "bad"}
        body = {"prompt": "hello", "max_tokens": 4}
        answer = server.post("/v1/completions", body, bad)
        check(answer, 500, "generation_failed", None, ("logits were not finite",))
        # nothing was sent yet: a stream fails with a status, too
        check(server.post("/v1/completions", {**body, "stream": True}, bad), 500, "generation_failed")
        assert server.complete(prompt="hello").status == 200
        assert server.is_idle()


def test_an_error_in_the_middle_of_a_stream_is_an_event():
    failing = {}
    with serve(step_s=0.005, fail_request=lambda _id: failing.get("why")) as server:
        import http.client
        import json

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = json.dumps({"prompt": "hello world", "stream": True, "ignore_eos": True, "max_tokens": 400})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        response.read(10)
        failing["why"] = "a kernel failed"
        events = response.read().decode().split("\n\n")
        connection.close()
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert error["code"] == "generation_failed"
        assert "a kernel failed" in error["message"]


def test_a_dead_engine_is_told_and_the_server_lives():
    with serve() as server:
        server.engine.fatal = "it crashed"
        check(server.request("GET", "/health"), 503, "engine_dead", None, ("it crashed",))
        check(server.complete(prompt="a"), 503, "engine_dead")
        assert server.request("GET", "/live").status == 200


def test_an_exception_in_a_route_is_a_500_without_a_trace(server, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(server.front, "generate", broken)
    answer = server.complete(prompt="hello")
    check(answer, 500, "internal_error")
    assert b"secret" not in answer.raw
    assert b"ZeroDivision" not in answer.raw
    monkeypatch.undo()
    assert server.complete(prompt="hello").status == 200
