"""Text to token ids and back: whole, or token by token as a stream, and stop strings in that stream.

Decoding goes through bytes wherever the tokenizer allows it (byte-level BPE, SentencePiece with byte fallback): a token
is a byte string, text is the UTF-8 decoding of their concatenation, so a stream can be cut anywhere.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.loading.errors import ModelFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from runtime.loading.checkpoint import Checkpoint, TokenizerSource
    from runtime.model_config import ModelConfig

MAX_TOKENIZER_JSON_BYTES = 256 << 20
# The tokenizers library would start threads of its own on the engine's cores, and warn about them at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _byte_of_char() -> dict[int, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class _TokenBytes(dict):
    """Token id -> its bytes, filled as ids are met (a whole vocabulary would cost the start 50 ms)."""

    def __init__(self, backend: Backend, added: dict[int, str], decoding: str) -> None:
        super().__init__()
        self._backend, self._added, self._decoding = backend, added, decoding

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._compute(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:  # a row that pads the embedding table
            return b""
        if self._decoding == "byte_level":
            if all(ord(char) in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[ord(char)] for char in token)
            return token.encode()
        if self._decoding == "sentencepiece":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    pass
            return token.replace("▁", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


class Tokenizer:
    """One model's tokenizer. Thread-safe. Make it with `from_checkpoint`."""

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        first_ids: Sequence[int] = (),
        last_ids: Sequence[int] = (),
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """vocab_size: rows of the embedding table. first_ids, last_ids: added around what the backend encodes.

        named_tokens: the tokens that chat templates know by role, such as {"eos_token": "<|im_end|>"}.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain_backend: Backend | None = None  # takes special tokens in a text for text; made when first asked for
        added = backend.get_added_tokens_decoder()
        self._decoding, self._strips_space = _decoding_of(backend)
        self._bytes = _TokenBytes(backend, {index: token.content for index, token in added.items()}, self._decoding)
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.named_tokens = dict(named_tokens or {})
        self._first_ids, self._last_ids = list(first_ids), list(last_ids)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """From a folder's tokenizer.json, or rebuilt from a GGUF file. Raises ModelFileError."""
        return _from_source(checkpoint.tokenizer_source, checkpoint.config)

    @classmethod
    def from_path(cls, path: str | os.PathLike) -> Tokenizer:
        """From a folder with tokenizer.json (weights and config.json are not needed) or a GGUF file."""
        from runtime.loading.checkpoint import open_tokenizer_source

        return _from_source(open_tokenizer_source(path), None)

    @property
    def eos_token_id(self) -> int | None:
        """The first of eos_token_ids."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def num_tokens(self) -> int:
        """Tokens that have a text; at most vocab_size in a sound model, often fewer."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens`: with the model's bos (and eos), as it was trained; rendered chat
        templates write their own, so pass False there. `parse_special_tokens=False` takes "<|im_end|>" and the like
        in the text as plain characters. ValueError for lone surrogates, TypeError for what is not a str.
        """
        return self.encode_batch([text], add_special_tokens, parse_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, parse_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text. Raises as encode does, for the first text that is refused."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text: got {type(text).__name__}, wanted str")
        backend = self._backend if parse_special_tokens else self._without_special_tokens()
        try:  # the call that leaves out what nobody reads: offsets, masks
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except BaseException as error:
            _refuse_surrogates(texts)
            if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
                raise
            raise ValueError(f"text: the tokenizer failed on it: {str(error)[:200]}") from None
        first, last = (self._first_ids, self._last_ids) if add_special_tokens else ([], [])
        results = [first + encoding.ids + last for encoding in encodings]
        highest = max((max(ids) for ids in results if ids), default=0)
        if highest >= self.vocab_size:
            raise ValueError(f"text: got token id {highest}, wanted ids below the model's vocabulary {self.vocab_size}")
        return results

    def _without_special_tokens(self) -> Backend:
        # A backend of its own, because the choice is a property of the backend and calls come from several threads.
        if self._plain_backend is None:
            plain = type(self._backend).from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain_backend = plain
        return self._plain_backend

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `continuation`: the ids follow other text, so a
        SentencePiece leading space is kept. Negative ids are a ValueError; ids without a token have no text.
        """
        ids = [int(token_id) for token_id in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"ids: got {min(ids)}, wanted token ids of at least 0")
        if self._decoding == "other":
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids if skip_special_tokens else ()
        raw = b"".join([self._bytes[token_id] for token_id in ids if token_id not in skipped])
        if self._strips_space and not continuation and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for (special tokens: their name), as logprobs report them."""
        return self._bytes[int(token_id)]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<|im_end|>"."""
        return self._backend.token_to_id(token)

    def token_name(self, token_id: int) -> str | None:
        """The token's name in the vocabulary, such as "<|im_end|>" or "Ġhello"; None past its end."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"text: got a lone surrogate at character {error.start}, wanted valid Unicode"
            raise ValueError(what) from None


def _decoding_of(backend: Backend) -> tuple[str, bool]:
    """("byte_level" | "sentencepiece" | "other", whether the first space of a text is dropped)."""
    if backend.decoder is None:
        return "other", False
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    meta_symbol = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if steps[:1] == [meta_symbol] and kinds[1:3] == ["ByteFallback", "Fuse"]:
        if len(kinds) == 3:
            return "sentencepiece", False
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return "sentencepiece", True
    return "other", False


def _from_source(source: TokenizerSource, config: ModelConfig | None) -> Tokenizer:
    """config None: the tokenizer alone, whose own vocabulary is then the bound of its ids."""
    return _from_gguf(source, config) if source.kind == "gguf" else _from_folder(source, config)


def _from_gguf(source: TokenizerSource, config: ModelConfig | None) -> Tokenizer:
    from runtime.loading.gguf_tokenizer import GgufVocabulary, build_tokenizer

    vocabulary = GgufVocabulary(source.metadata, source.path)
    backend = build_tokenizer(vocabulary, source)
    ids = {role: vocabulary.token_id(f"{key}_token_id") for role, key in _GGUF_ROLES.items()}
    bos, eos = ids["bos"], ids["eos"]
    return Tokenizer(
        backend,
        vocab_size=len(vocabulary.tokens) if config is None else config.vocab_size,
        bos_token_id=bos,
        eos_token_ids=config.eos_token_ids if config is not None else () if eos is None else (eos,),
        pad_token_id=ids["pad"],
        first_ids=[bos] if bos is not None and vocabulary.adds_bos() else [],
        last_ids=[eos] if eos is not None and vocabulary.adds_eos() else [],
        named_tokens={f"{role}_token": vocabulary.tokens[index] for role, index in ids.items() if index is not None},
    )


_GGUF_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _from_folder(source: TokenizerSource, config: ModelConfig | None) -> Tokenizer:
    backend = _load_tokenizer_json(source.path / "tokenizer.json")
    names = {}
    for role in _GGUF_ROLES:
        value = source.config.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            names[f"{role}_token"] = token

    def id_of(role: str, default: int | None) -> int | None:
        found = backend.token_to_id(names[f"{role}_token"]) if f"{role}_token" in names else None
        return default if found is None else found

    bos = id_of("bos", config and config.bos_token_id)
    eos = id_of("eos", None)
    ends = [*(config.eos_token_ids if config is not None else ()), *([] if eos is None else [eos])]
    if bos is not None:
        names.setdefault("bos_token", backend.id_to_token(bos) or "")
    if ends:
        names.setdefault("eos_token", backend.id_to_token(ends[0]) or "")
    # Without a post-processor nothing in tokenizer.json adds the bos that tokenizer_config.json asks for.
    adds_bos = backend.post_processor is None and source.config.get("add_bos_token") is True and bos is not None
    return Tokenizer(
        backend,
        vocab_size=backend.get_vocab_size(with_added_tokens=True) if config is None else config.vocab_size,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=id_of("pad", config and config.pad_token_id),
        first_ids=[bos] if adds_bos else [],
        named_tokens=names,
    )


def _load_tokenizer_json(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    if not path.is_file():
        others = ", ".join(
            name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (path.parent / name).is_file()
        )
        raise ModelFileError(path, "tokenizer", f"only {others}" if others else "no such file", "tokenizer.json")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_TOKENIZER_JSON_BYTES:
        raise ModelFileError(path, "file size", num_bytes, f"at most {MAX_TOKENIZER_JSON_BYTES}")
    try:
        return Backend.from_file(str(path))
    except BaseException as error:  # tokenizers raises bare Exception, and Rust panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(path, f"is not a sound tokenizer.json: {str(error)[:200]}") from None


class IncrementalDecoder:
    """One request's token stream as text. The pushed texts and the flushed one together equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continuation: bool = False) -> None:
        """continuation: as in Tokenizer.decode; pass True for a stream that follows a prompt."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = tokenizer._bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer._strips_space and not continuation
        self._pending: PrefixDifference | None = None
        if tokenizer._decoding == "other":
            self._pending = PrefixDifference(tokenizer)

    def push(self, ids: Iterable[int]) -> str:
        """The text that became final; bytes of an incomplete character are held back."""
        kept = [token_id for token_id in ids if token_id not in self._skipped]
        if self._pending is not None:
            return self._pending.push(kept)
        raw = b"".join([self._bytes[token_id] for token_id in kept])
        if self._drops_space and raw:
            self._drops_space = False
            raw = raw[1:] if raw.startswith(b" ") else raw
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """The rest: what is still incomplete, as U+FFFD."""
        return self._pending.flush() if self._pending is not None else self._utf8.decode(b"", True)


class PrefixDifference:
    """Streams through a decoder whose tokens are not bytes: the growth of the decoded text is what a token adds.

    The window starts at the last place known to decode alone, one token back for decoders that look at neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_given = 0  # tokens of the window whose text was given out

    def push(self, ids: Sequence[int]) -> str:
        given = []
        for token_id in ids:
            self._ids.append(token_id)
            before, text = self._texts()
            if len(text) > len(before) and not text.endswith("\ufffd"):
                given.append(text[len(before) :])
                self._ids = self._ids[self._num_given :]
                self._num_given = len(self._ids)
        return "".join(given)

    def flush(self) -> str:
        before, text = self._texts()
        self._num_given = len(self._ids)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer._backend.decode
        before = decode(self._ids[: self._num_given], skip_special_tokens=False)
        return before, decode(self._ids, skip_special_tokens=False)


class StopStringMatcher:
    """Finds the first stop string in a stream of text, however the stream is cut.

    One Knuth-Morris-Pratt automaton per stop string; the longest partial match is held back. The match that ends first
    wins, the longest of those that end together.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """include_stop: the stop string itself is given out too. ValueError for an empty stop string."""
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop: got {stop!r}, wanted strings of at least one character")
        self._stops = tuple(sorted(dict.fromkeys(stops), key=len, reverse=True))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched_chars = [0] * len(self._stops)
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the stream

    def push(self, text: str) -> str:
        """The text that can be given out. After a match: what came before it, then always ""."""
        if self.matched is not None:
            return ""
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        text, begin = self._held + text, len(self._held)
        for position in range(begin, len(text)):
            char = text[position]
            for index, stop in enumerate(self._stops):
                count, failures = self._matched_chars[index], self._failures[index]
                while count and stop[count] != char:
                    count = failures[count - 1]
                count += stop[count] == char
                self._matched_chars[index] = count
                if count == len(stop):
                    self.matched, self._held = stop, ""
                    return text[: position + 1] if self._include_stop else text[: position + 1 - len(stop)]
        num_held = max(self._matched_chars)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, at the end of a stream in which no stop string was found."""
        held, self._held = self._held, ""
        self._matched_chars = [0] * len(self._stops)
        return held


def _failure_table(stop: str) -> list[int]:
    """failures[i]: length of the longest proper prefix of stop[:i + 1] that is also its suffix."""
    failures, count = [0] * len(stop), 0
    for position in range(1, len(stop)):
        while count and stop[count] != stop[position]:
            count = failures[count - 1]
        count += stop[count] == stop[position]
        failures[position] = count
    return failures


__all__: list[str] = ["IncrementalDecoder", "StopStringMatcher", "Tokenizer"]
