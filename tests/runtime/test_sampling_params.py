"""SamplingParams accepts what it documents and names what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine_args import EngineArgs, parse_device, parse_kv_dtype, parse_max_model_len, parse_memory
from runtime.sampling_params import SamplingParams

REFUSED = [
    ("n", 0), ("n", -1), ("n", 17), ("n", True), ("n", 1.0), ("n", "1"),
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", -1e-9), ("temperature", 11),
    ("temperature", True),
    ("temperature", "1"), ("temperature", None), ("temperature", 10**400),
    ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("top_k", -2), ("top_k", 2**31), ("top_k", 1.5),
    ("top_k", False),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("presence_penalty", 2.1), ("presence_penalty", -math.inf), ("frequency_penalty", -2.1), ("frequency_penalty", []),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.nan),
    ("seed", 2**64), ("logit_bias", [0]), ("logit_bias", "0"), ("logit_bias", True),  ("seed", -(2**63) - 1),
    ("seed", 1.5), ("seed", True),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", 2**31), ("max_tokens", True),
    ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", None),
    ("ignore_eos", 1), ("ignore_eos", None), ("skip_special_tokens", "no"), ("include_stop_str_in_output", 0),
    ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", 0),
    ("stop", 5), ("stop", [""]), ("stop", [5]), ("stop", ["x"] * 17), ("stop", ["x" * 1025]), ("stop", [None]),
    ("stop_token_ids", [-1]), ("stop_token_ids", "12"), ("stop_token_ids", [1.0]), ("stop_token_ids", [0] * 129),
    ("stop_token_ids", 5), ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}), ("logit_bias", {-1: 0}),
    ("logit_bias", {"a": 0}), ("logit_bias", {"1.0": 0}), ("logit_bias", {1: "x"}),
    ("logit_bias", dict.fromkeys(range(1025), 0)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_refused_values_are_named(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"^{field}"):
        SamplingParams(**{field: value})


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert params.seed is None
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), ())


def test_values_are_normalised():
    params = SamplingParams(
        temperature=0, top_k=-1, stop="x", stop_token_ids=[3], logit_bias={"5": 1, 6: -2.5}, max_tokens=None
    )
    assert params.temperature == 0.0
    assert isinstance(params.temperature, float)
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("x",), (3,))
    assert params.logit_bias == ((5, 1.0), (6, -2.5))
    hash(params)
    assert dataclasses.replace(params, n=2).logit_bias == params.logit_bias
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_token_ids_must_exist():
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}).check_vocabulary(10)
    with pytest.raises(ValueError, match=r"stop_token_ids.*vocabulary size 9, got 9"):
        SamplingParams(stop_token_ids=[9]).check_vocabulary(9)
    with pytest.raises(ValueError, match=r"logit_bias.*vocabulary size 9, got 9"):
        SamplingParams(logit_bias={9: 1}).check_vocabulary(9)


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
)


@given(st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]), anything)
def test_any_value_is_taken_or_refused_by_name(field, value):
    refusal = None
    try:
        SamplingParams(**{field: value})
    except (ValueError, TypeError) as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith((field, "min_tokens"))


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4GiB", 4 << 30), ("4gib", 4 << 30), ("500MB", 500_000_000), ("1.5 GiB", 3 << 29), ("123456", 123456),
        (123456, 123456),
        ("0.5", 0.5), (0.5, 0.5), ("50%", 0.5), ("1.0", 1.0), (1.0, 1.0), ("100%", 1.0), ("2K", 2000), ("1", 1),
        (1e9, 10**9),
    ],
)  # fmt: skip
def test_memory_is_bytes_or_a_share(text, amount):
    parsed = parse_memory(text)
    assert parsed == amount
    assert type(parsed) is type(amount)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.5GiB", "4XiB", "0", "0.0", "150%", None, True, "nan", "1e999"])
def test_bad_memory_is_refused(text):
    with pytest.raises((ValueError, TypeError), match="kv_memory"):
        parse_memory(text)


def test_kv_dtype_is_a_codec_or_a_pair():
    assert parse_kv_dtype("int8:int4") == ("int8", "int4")
    assert parse_kv_dtype("auto") == ("bf16", "bf16")
    assert parse_kv_dtype("bfloat16") == ("bf16", "bf16")
    assert parse_kv_dtype("int4-plain") == ("int4-plain", "int4-plain")
    assert parse_kv_dtype("fp8_e4m3:FP8") == ("fp8", "fp8")
    for text in ("", "int3", "int8:", "a:b:c", "int8:int4:int4"):
        with pytest.raises(ValueError, match="kv_dtype"):
            parse_kv_dtype(text)


def test_max_model_len_is_tokens_or_auto():
    assert [parse_max_model_len(text) for text in ("auto", None, -1, "-1")] == [None] * 4
    assert [parse_max_model_len(text) for text in (8192, "8192", "8k")] == [8192] * 3
    for text in ("0", "-5", "x", "1.5", "99999999999"):
        with pytest.raises(ValueError, match="max_model_len"):
            parse_max_model_len(text)


def test_a_device_is_a_world_and_a_number():
    assert [parse_device(text) for text in ("cpu", "cuda", "cuda:0", "cuda:3", "simt")] == [
        ("cpu", 0), ("cuda", 0), ("cuda", 0), ("cuda", 3), ("simt", 0),
    ]  # fmt: skip
    assert [EngineArgs(device=text).check().device for text in ("cuda:0", "cuda:2")] == ["cuda", "cuda:2"]
    for text in ("", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", None):
        with pytest.raises(ValueError, match="device"):
            parse_device(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"), ("activations", "int3"), ("page_size", 48), ("max_num_seqs", 0), ("threads", -1),
        ("threads", True),
        ("policy", "random"), ("seed", "x"), ("max_num_batched_tokens", 0), ("model", ""), ("max_num_seqs", None),
    ],
)  # fmt: skip
def test_engine_args_name_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        EngineArgs(**{field: value}).check()


def test_a_number_too_long_to_write_is_still_refused_by_name():
    with pytest.raises(ValueError, match=r"^seed must be a 64-bit integer"):
        SamplingParams(seed=10**5000)
