"""A `tokenizers` Tokenizer rebuilt from the vocabulary in a GGUF file's metadata.

Two kinds are known: "gpt2", byte-level BPE with its merges in the file and a named splitting of text into words, and
"llama", SentencePiece BPE, whose merges are implied by its pieces and their scores (or their order, for Gemma).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.loading.cache_folder import cache_folder, write_atomically
from runtime.loading.errors import ModelFileError
from runtime.loading.gguf_reader import GgufStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from runtime.loading.checkpoint import TokenizerSource

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CACHE_LAYOUT = 1  # of the tokenizer.json files kept in the cache folder

# How text is cut into words before merging, by llama.cpp's name for it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORD_PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3_WORDS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_WORDS),
    "tekken": _TEKKEN_WORDS,
}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # GPT-2's words, digits one by one
_GPT2_WORDS = ("gpt-2", "default", "gpt2", "mpt", "olmo", "jais")
_WHOLE_WORDS_FIRST = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "pixtral",
    "tekken",
)  # a word in the vocabulary is not cut
_UNICODE_COMPOSED = ("qwen2", "megrez")  # text is normalised to NFC


class GgufVocabulary:
    """The checked tokenizer metadata of a GGUF file."""

    def __init__(self, metadata: Mapping[str, Any], file: Path) -> None:
        self.file = file
        self.metadata = metadata
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, GgufStrings) or not len(tokens):
            raise ModelFileError(file, "tokenizer.ggml.tokens", tokens and type(tokens).__name__, "an array of strings")
        self.tokens: list[str] = tokens.tolist()
        self.types = self._numbers("token_type", "iu")
        self.model = metadata.get("tokenizer.ggml.model")
        self.pre_tokenizer = metadata.get("tokenizer.ggml.pre", "default")

    def _numbers(self, name: str, kinds: str) -> list | None:
        values = self.metadata.get(f"tokenizer.ggml.{name}")
        if values is None:
            return None
        if getattr(getattr(values, "dtype", None), "kind", "") not in kinds or len(values) != len(self.tokens):
            raise ModelFileError(self.file, f"tokenizer.ggml.{name}", values, f"{len(self.tokens)} numbers")
        return values.tolist()

    def scores(self) -> list[float] | None:
        return self._numbers("scores", "f")

    def merges(self) -> list[tuple[str, str]] | None:
        merges = self.metadata.get("tokenizer.ggml.merges")
        if merges is None:
            return None
        if not isinstance(merges, GgufStrings):
            raise ModelFileError(self.file, "tokenizer.ggml.merges", merges, "an array of strings")
        pairs = [tuple(merge.split(" ")) for merge in merges.tolist()]
        for index, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ModelFileError(self.file, f"tokenizer.ggml.merges[{index}]", " ".join(pair), "two pieces")
        return pairs

    def token_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileError(self.file, f"tokenizer.ggml.{name}", value, "a token id")
        return value if 0 <= value < len(self.tokens) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise ModelFileError(self.file, f"tokenizer.ggml.{name}", value, "a bool")
        return value

    @property
    def is_sentencepiece(self) -> bool:
        return self.model == "llama"

    def adds_bos(self) -> bool:
        """Whether encoding prepends the bos token; files that do not say follow llama.cpp's defaults."""
        return self.flag("add_bos_token", self.is_sentencepiece or self.pre_tokenizer in _WHOLE_WORDS_FIRST)

    def adds_eos(self) -> bool:
        return self.flag("add_eos_token", False)


def build_tokenizer(vocabulary: GgufVocabulary, source: TokenizerSource) -> Tokenizer:
    """The Tokenizer, without post-processor. ModelFileError for an unknown kind or an inconsistent vocabulary."""
    if vocabulary.model == "gpt2":
        with _no_garbage_collection():
            return _guarded(vocabulary, _byte_level_tokenizer)
    if vocabulary.model == "llama":
        return _cached_sentencepiece(vocabulary, source)
    raise ModelFileError(vocabulary.file, "tokenizer.ggml.model", vocabulary.model, "gpt2 or llama")


@contextmanager
def _no_garbage_collection():
    """Hundreds of thousands of tuples are made and none dies: collecting in between doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _guarded(vocabulary: GgufVocabulary, build: Any) -> Tokenizer:
    try:
        return build(vocabulary)
    except ModelFileError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelFileError(vocabulary.file, f"vocabulary is not consistent: {str(error)[:200]}") from None


def _byte_level_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = vocabulary.pre_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _WORD_PATTERNS)
    if name in _WORD_PATTERNS:
        words = pre_tokenizers.Split(Regex(_WORD_PATTERNS[name]), behavior="isolated")
        splitting = pre_tokenizers.Sequence([words, byte_level])
    elif name in _SINGLE_DIGITS:
        splitting = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name in _GPT2_WORDS:
        splitting = byte_level
    else:
        known = ", ".join([*_WORD_PATTERNS, *_SINGLE_DIGITS, *_GPT2_WORDS])
        raise ModelFileError(vocabulary.file, "tokenizer.ggml.pre", name, f"one of {known}")
    merges = vocabulary.merges()
    if merges is None:
        raise ModelFileError(vocabulary.file, "tokenizer.ggml.merges", None, "an array of strings")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    if name in _UNICODE_COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    _add_marked_tokens(tokenizer, vocabulary)
    return tokenizer


def _cached_sentencepiece(vocabulary: GgufVocabulary, source: TokenizerSource) -> Tokenizer:
    """Deriving a quarter million merges takes seconds, so the result is kept, keyed by the file it came from."""
    from tokenizers import Tokenizer

    path = cache_folder() / "tokenizers" / f"{source.key}-{_CACHE_LAYOUT}.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception:
            pass  # a damaged copy: built again below
    with _no_garbage_collection():
        tokenizer = _guarded(vocabulary, _sentencepiece_tokenizer)
    with suppress(OSError):  # a read-only home costs time at the next start, nothing else
        write_atomically(path, lambda temporary: tokenizer.save(str(temporary), pretty=False))
    return tokenizer


def _sentencepiece_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    has_prefix_space = vocabulary.flag("add_space_prefix", True)
    # Gemma files spell runs of spaces as spaces where the pieces of all others use the meta symbol.
    tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in vocabulary.tokens]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = vocabulary.merges()
    if merges is None:
        is_gemma = str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma")
        scores = None if is_gemma else vocabulary.scores()
        if scores is None and not is_gemma:
            raise ModelFileError(vocabulary.file, "tokenizer.ggml.scores", None, "one score per token")
        merges = implied_merges(tokens, ids, scores, vocabulary.types)
    unknown = vocabulary.token_id("unknown_token_id")
    if unknown is None and vocabulary.types is not None and _UNKNOWN in vocabulary.types:
        unknown = vocabulary.types.index(_UNKNOWN)
    unknown_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    )
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(decoding)
    _add_marked_tokens(tokenizer, vocabulary, tokens)
    return tokenizer


def implied_merges(
    tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float] | None, types: Sequence[int] | None
) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, best first: every way to make a piece of two others.

    A piece's merges rank by its score, highest first (scores None: by its id, lowest first), then by the lengths of
    the halves, longest first: the order that transformers' converters use.
    """
    left_out = (_CONTROL, _BYTE, _UNKNOWN, _UNUSED)
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in ids.items():
        if len(token) < 2 or (types is not None and types[token_id] in left_out):
            continue
        rank = token_id if scores is None else -scores[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((rank, -len(left), -len(right), left, right))
    ranked.sort(key=itemgetter(0, 1, 2))  # stable: equals stay in the order of their ids
    return [(left, right) for _, _, _, left, right in ranked]


def _add_marked_tokens(tokenizer: Tokenizer, vocabulary: GgufVocabulary, tokens: Iterable[str] | None = None) -> None:
    """Control tokens are special (skipped when decoding), user-defined ones are matched whole but are text."""
    from tokenizers import AddedToken

    if vocabulary.types is None:
        return
    tokens = vocabulary.tokens if tokens is None else list(tokens)
    special_types = (_CONTROL, _UNKNOWN) if vocabulary.is_sentencepiece else (_CONTROL,)
    marked = [(token, kind) for token, kind in zip(tokens, vocabulary.types) if kind != _NORMAL and token]
    control = [AddedToken(token, special=True, normalized=False) for token, kind in marked if kind in special_types]
    user_defined = [AddedToken(token, normalized=False) for token, kind in marked if kind == _USER_DEFINED]
    num_before = tokenizer.get_vocab_size(with_added_tokens=False)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)
    if tokenizer.get_vocab_size(with_added_tokens=True) != num_before:
        raise ModelFileError(vocabulary.file, "tokenizer.ggml.tokens", "control tokens twice", "each token once")
