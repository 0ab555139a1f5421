"""Tokenizers rebuilt from GGUF vocabularies against known ids and transformers; streams against whole texts."""

from __future__ import annotations

import json
import random
import shutil
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.loading import GgufFile, ModelFileError, open_checkpoint
from runtime.loading.gguf_tokenizer import implied_merges
from runtime.tokenizer import IncrementalDecoder, StopStringMatcher, Tokenizer
from tests.kit.real_model import smollm2_path
from tests.kit.tiny_models import write_tiny_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    'In 1918 the 3,141,592nd soldier — 27 years old — wrote: "It\'s over."',
    "def f(x: int) -> list[int]:\n\treturn [i ** 2 for i in range(x)]  # squares\n\n\n",
    "   leading,  double   and trailing   ",
    "tabs\t\tand\r\nnew\n\n\nlines \n",
    "你好\uff0c世界\uff01日本語のテキスト、한국어 텍스트",
    "emoji 🎉🏳️‍🌈👨‍👩‍👧‍👦 and é è ê combining: e\u0301",
    "Ünïcödé Straße ŁÓDŹ Привет мир مرحبا שלום",
    "can't won't they've I'm you'll he'd IT'S",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a\u00a0b\u2003c\u200bd\ufeff\x00\x01\x7f",
    "https://example.org/a?b=c&d=%20#e",
    "x" * 300,
    "1234567890" * 5,
]


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_checkpoint(open_checkpoint(smollm2_path()))


@pytest.fixture(scope="module")
def smollm2_reference():
    """The published pre-tokenizer of SmolLM2 over the same vocabulary, assembled here by transformers' own parts."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = smollm2_path()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers reads "smollm" as plain GPT-2 words; its published tokenizer cuts digits one by one before.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    return reference


def sample_texts(shared_seed: int = 0) -> list[str]:
    rng = random.Random(shared_seed)
    alphabet = string.printable + "éßøñ你好世界日本🎉🚀\u00a0\u0301 \n\t"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 120))) for _ in range(200)]


def test_ids_equal_transformers(smollm2, smollm2_reference):
    for text in [*TEXTS, *sample_texts()]:
        assert smollm2.encode(text) == smollm2_reference.encode(text, add_special_tokens=False), repr(text)


def test_ids_of_known_texts(smollm2):
    # From the published tokenizer.json of SmolLM2-135M-Instruct.
    assert smollm2.encode("Hello 12345 world") == [19556, 216, 33, 34, 35, 36, 37, 905]
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]
    assert smollm2.encode("<|im_end|>", parse_special_tokens=False) != [2]
    assert smollm2.decode(smollm2.encode("<|im_end|>", parse_special_tokens=False)) == "<|im_end|>"
    assert smollm2.encode("<|im_end|>") == [2]


def test_texts_survive_the_round_trip(smollm2):
    for text in [*TEXTS, *sample_texts(1)]:
        ids = smollm2.encode(text)
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert b"".join(smollm2.token_bytes(token_id) for token_id in ids) == text.encode()


def test_batch_equals_one_by_one(smollm2):
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(text) for text in TEXTS]
    assert smollm2.encode_batch([]) == []


def test_ids_and_names_of_special_tokens(smollm2):
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert 0 in smollm2.eos_token_ids
    assert smollm2.vocab_size == smollm2.num_tokens == 49152
    assert smollm2.token_id("<|im_end|>") == 2
    assert smollm2.token_name(2) == "<|im_end|>"
    assert smollm2.token_id("no such token") is None
    assert smollm2.named_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.decode([1, 19556, 2]) == "Hello"
    assert smollm2.decode([1, 19556, 2], skip_special_tokens=False) == "<|im_start|>Hello<|im_end|>"


def test_bad_input_is_refused(smollm2):
    with pytest.raises(ValueError, match="surrogate at character 1"):
        smollm2.encode("a\ud800")
    with pytest.raises(TypeError, match="wanted str"):
        smollm2.encode(b"bytes")
    with pytest.raises(ValueError, match="-1"):
        smollm2.decode([5, -1])
    assert smollm2.decode([10**9]) == ""
    assert smollm2.token_bytes(10**9) == b""


# -- streams --------------------------------------------------------------------------------------------------------


def streamed(tokenizer, ids, cuts=1, **options) -> str:
    decoder = IncrementalDecoder(tokenizer, **options)
    pieces = [decoder.push(ids[begin : begin + cuts]) for begin in range(0, len(ids), cuts)]
    return "".join(pieces) + decoder.flush()


def test_streams_equal_whole_decodes(smollm2):
    rng = random.Random(3)
    sequences = [smollm2.encode(text) for text in [*TEXTS, *sample_texts(2)]]
    sequences += [[rng.randrange(49152) for _ in range(rng.randint(1, 60))] for _ in range(200)]  # broken UTF-8 too
    for ids in sequences:
        for skip in (True, False):
            for cuts in (1, 3):
                assert streamed(smollm2, ids, cuts, skip_special_tokens=skip) == smollm2.decode(ids, skip)


def test_incomplete_characters_are_held_back(smollm2):
    ids = smollm2.encode("🎉")
    assert len(ids) > 1
    decoder = IncrementalDecoder(smollm2)
    for token_id in ids[:-1]:
        assert decoder.push([token_id]) == ""
    assert decoder.push([ids[-1]]) == "🎉"
    assert decoder.flush() == ""
    decoder = IncrementalDecoder(smollm2)
    assert decoder.push(ids[:1]) == ""
    assert decoder.flush() == "\ufffd"


def gguf_with_vocabulary(path, tokens, types, scores=None, merges=None, model="llama", pre=None, **flags):
    """A GGUF file with nothing but a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, flags.pop("arch", "llama"))
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for name, value in flags.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_vocabulary() -> tuple[list[str], list[int], list[float]]:
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "i", "t", "▁h", "he", "ll", "▁he", "llo", "▁hello", "hello"]
    pieces += ["or", "▁w", "wor", "ld", "▁wor", "▁world", "▁▁", "in", "it", "▁it", "▁in", "..", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|turn|>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 3]
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))] + [0.0]
    scores[tokens.index("▁world")] = -1.5  # not in the order of ids
    return tokens, types, scores


SENTENCES = [
    "hello world",
    " hello  world",
    "hello",
    "",
    "héllo wörld 🎉",
    "hello<|turn|>hello",
    "it in. .. ...",
    "\n\n",
]


def test_sentencepiece_vocabulary_equals_transformers(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    tokens, types, scores = sentencepiece_vocabulary()
    flags = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    path = gguf_with_vocabulary(tmp_path / "spm.gguf", tokens, types, scores, **flags)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for _ in range(2):  # the second time from the cache folder
        tokenizer = Tokenizer.from_path(path)
        for text in SENTENCES:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == reference.encode(text, add_special_tokens=False), repr(text)
            assert tokenizer.encode(text) == [1, *ids]
            if not text.startswith(" "):
                assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        assert tokenizer.decode(tokenizer.encode("hello world"), continuation=True) == " hello world"
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1


def test_damaged_tokenizer_cache_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    tokens, types, scores = sentencepiece_vocabulary()
    path = gguf_with_vocabulary(tmp_path / "spm.gguf", tokens, types, scores)
    ids = Tokenizer.from_path(path).encode("hello world")
    (cached,) = (tmp_path / "cache" / "tokenizers").iterdir()
    cached.write_text("{ damaged")
    assert Tokenizer.from_path(path).encode("hello world") == ids
    assert json.loads(cached.read_text())


def test_gemma_vocabulary_keeps_spaces(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    tokens, types, _ = sentencepiece_vocabulary()
    tokens[:3] = ["<pad>", "<eos>", "<bos>"]
    types[:3] = [3, 3, 3]
    tokens[tokens.index("▁▁")] = "  "
    tokens.append("<unk>")
    types.append(2)
    flags = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": len(tokens) - 1, "add_space_prefix": False}
    path = gguf_with_vocabulary(tmp_path / "g.gguf", tokens, types, [0.0] * len(tokens), arch="gemma3", **flags)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer = Tokenizer.from_path(path)
    for text in SENTENCES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_implied_merges_rank_by_score():
    ids = {token: index for index, token in enumerate(["a", "b", "ab", "ba", "aba"])}
    merges = implied_merges(list(ids), ids, [0, 0, -2.0, -1.0, -3.0], None)
    assert merges == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", [["I", "'m"], ["123", "45"], ["a", "\n\n"]]),
        ("qwen2", [["I", "'m"], ["1", "2", "3", "4", "5"], ["a", "\n\n"]]),
        ("smollm", [["I", "'m"], ["1", "2", "3", "4", "5"], ["a", "\n\n"]]),
        ("gpt-2", [["I", "'m"], ["12345"], ["a", "\n\n"]]),
        ("tekken", [["I", "'m"], ["1", "2", "3", "4", "5"], ["a", "\n\n"]]),
    ],
)
def test_words_are_cut_as_the_vocabulary_was_trained(tmp_path, pre, pieces):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet.append("ab")
    path = gguf_with_vocabulary(tmp_path / "b.gguf", alphabet, [1] * 257, merges=["a b"], model="gpt2", pre=pre)
    backend = Tokenizer.from_path(path)._backend
    for text, wanted in zip(["I'm", "12345", "a\n\n"], pieces, strict=True):
        words = [word.replace("Ċ", "\n") for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert words == wanted


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre"),
        ({"merges": None}, "merges"),
        ({"merges": ["a b c"]}, "merges"),
        ({"merges": ["a zz"]}, "not consistent"),
        ({"types": [1]}, "token_type"),
        ({"model": "llama", "pre": None, "scores": None}, "scores"),
        ({"model": "llama", "pre": None, "scores": [0.0]}, "scores"),
    ],
)
def test_inconsistent_vocabularies_are_named(tmp_path, monkeypatch, changes, match):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    values = {"tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"], "model": "gpt2", "pre": "gpt-2"}
    values.update(changes)
    if values["model"] == "llama":
        values["merges"] = None
    path = gguf_with_vocabulary(tmp_path / "bad.gguf", **values)
    with pytest.raises(ModelFileError, match=match):
        Tokenizer.from_path(path)


def test_file_without_vocabulary_is_named(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GgufFile(tmp_path / "none.gguf").tensors == {}
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.tokens"):
        Tokenizer.from_path(tmp_path / "none.gguf")


# -- Hugging Face folders -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("llama"))[0]


def test_folder_equals_transformers(folder):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip, clean_up_tokenization_spaces=False)
    assert tokenizer.vocab_size == 384
    assert tokenizer.num_tokens < 384
    assert tokenizer.decode([383]) == ""
    assert tokenizer.named_tokens == {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}


def test_bos_is_added_where_only_the_config_asks_for_it(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = Tokenizer.from_path(copied)
    assert tokenizer.encode("hi") == [1, *tokenizer.encode("hi", add_special_tokens=False)]


def test_truncation_and_padding_of_the_file_are_switched_off(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    content = json.loads((copied / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (copied / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_path(copied).encode("zyxwvutsrq")) == 10


def test_ids_past_the_embedding_are_refused(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    content = json.loads((copied / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 400
    (copied / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(copied))
    with pytest.raises(ValueError, match=r"400.*384"):
        tokenizer.encode("a<far>")


def test_missing_and_damaged_tokenizer_files_are_named(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    for content in ("", "{}", "[1", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'):
        (copied / "tokenizer.json").write_text(content)
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            Tokenizer.from_path(copied)
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ModelFileError, match=r"only tokenizer\.model"):
        Tokenizer.from_path(copied)


@pytest.mark.parametrize("decoder", ["WordPiece", "Metaspace", "none"])
def test_streams_of_other_decoders_equal_whole_decodes(decoder):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = ["hello", "##ing", "▁wor", "ld", "▁a", "x", ".", "##s", "'", "▁"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="x"))
    if decoder != "none":
        backend.decoder = decoders.WordPiece(cleanup=False) if decoder == "WordPiece" else decoders.Metaspace()
    tokenizer = Tokenizer(backend, vocab_size=len(words))
    rng = random.Random(5)
    for _ in range(100):
        ids = [rng.randrange(len(words)) for _ in range(rng.randint(1, 12))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


# -- stop strings ---------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the match that ends first, the longest of them: the definition, by trying every end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
    cut=st.integers(1, 7),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, cut, include):
    matcher = StopStringMatcher(stops, include_stop=include)
    given_out = ""
    for begin in range(0, len(text), cut):
        given_out += matcher.push(text[begin : begin + cut])
        # What is given out early is never part of a stop string.
        match = first_stop(text[: begin + cut], stops)
        limit = len(text) if match is None else match[0] - (0 if include else len(match[1]))
        assert len(given_out) <= limit
    match = first_stop(text, stops)
    if match is None:
        assert matcher.matched is None
        assert given_out + matcher.flush() == text
    else:
        end, stop = match
        assert matcher.matched == stop
        assert given_out == text[: end if include else end - len(stop)]
        assert matcher.push("more") == matcher.flush() == ""


def test_only_a_possible_match_is_held_back():
    matcher = StopStringMatcher(["###", "\nUser:"])
    assert matcher.push("abc") == "abc"
    assert matcher.push("d#") == "d"
    assert matcher.push("#") == ""
    assert matcher.push("e\nUs") == "##e"
    assert matcher.push("er: hi") == ""
    assert matcher.matched == "\nUser:"


def test_no_stop_strings_and_bad_ones():
    matcher = StopStringMatcher([])
    assert matcher.push("anything") == "anything"
    assert matcher.flush() == ""
    for bad in ("", None, 5):
        with pytest.raises(ValueError, match="stop"):
            StopStringMatcher([bad])
