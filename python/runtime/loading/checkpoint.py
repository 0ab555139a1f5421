"""One view of a model's files, whatever their format: config, tensors by canonical name, tokenizer, chat template."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.loading.errors import ModelFileError
from runtime.loading.gguf_formats import SUPPORTED_FORMATS, row_bytes
from runtime.loading.gguf_reader import GgufFile, GgufStrings
from runtime.loading.safetensors_reader import SafetensorsFile
from runtime.loading.tensor_names import canonical_of_gguf, canonical_of_hf, expected_shapes
from runtime.model_config import ModelConfig, with_frequency_factors

MAX_JSON_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 16384  # of the tensor data, in a checkpoint's key
# Control tokens that end a turn in published chat formats. GGUF files often name only one of a model's two or three.
_END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as the file holds it; `data` borrows the mapping."""

    name: str  # in the file
    file: str
    data: np.ndarray  # 1-D uint8, read-only
    format: str  # one of SUPPORTED_FORMATS
    shape: tuple[int, ...]  # (out, in) or (n,)
    row_order: np.ndarray | None = None  # int32 [out]: row i is row row_order[i] of the file; None: as filed


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where the tokenizer comes from: a Hugging Face folder, or a GGUF file's own vocabulary."""

    kind: str  # "hf" | "gguf"
    path: Path  # the folder or the GGUF file
    key: str  # as Checkpoint.key
    metadata: Mapping[str, Any] = field(default_factory=dict)  # GGUF key-value pairs
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json


@dataclass(slots=True)
class Checkpoint:
    """An open model. Tensors stay valid for as long as the Checkpoint or any of their arrays live."""

    path: Path
    name: str  # for people: the folder's or file's name
    key: str  # hex; differs when the files differ (headers, sizes, times, samples of the data)
    config: ModelConfig
    tensors: dict[str, RawTensor]  # canonical name -> tensor, as tensor_names.expected_shapes lists them
    tokenizer_source: TokenizerSource
    chat_template: str | None
    generation_config: dict[str, Any]
    mappings: tuple[mmap.mmap, ...] = ()  # of the weight files
    norm_offset: float = 0.0  # Hugging Face's Gemma files hold w where the norm multiplies by 1 + w

    def vector(self, name: str) -> np.ndarray:
        """A norm weight or bias as a new fp32 array [n], in the model's row order, norm_offset added."""
        tensor = self.tensors[name]
        if len(tensor.shape) != 1:
            raise ModelFileError(tensor.file, f"tensor {tensor.name!r} shape", tensor.shape, "one dimension")
        values = _float_values(tensor)
        if tensor.row_order is not None:
            values = values[tensor.row_order]
        if self.norm_offset and name.endswith("_norm"):
            values = values + np.float32(self.norm_offset)
        return np.ascontiguousarray(values)

    def release_pages(self) -> None:
        """Takes the files' pages out of resident memory; what is read later comes back from the page cache or disk."""
        for mapping in self.mappings:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapping.madvise(mmap.MADV_DONTNEED)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a GGUF file, or a folder with config.json and *.safetensors (or with exactly one GGUF file).

    Raises ModelFileError naming the file, field or tensor, what it holds and what was wanted.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _open_folder(path)
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) == 1:
            return _open_gguf(gguf_files[0])
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ModelFileError(path, "files", f"a folder with {found}", "config.json, or one .gguf file")
    if not path.exists():
        raise ModelFileError(path, "no such file or folder")
    return _open_gguf(path)


def open_tokenizer_source(path: str | os.PathLike) -> TokenizerSource:
    """The tokenizer of a folder with tokenizer.json, or of a GGUF file, without looking at weights."""
    path = Path(path)
    if path.is_dir():
        return TokenizerSource("hf", path, "", config=_read_optional_object(path / "tokenizer_config.json"))
    if path.name == "tokenizer.json":
        return open_tokenizer_source(path.parent)
    file = GgufFile(path)
    return TokenizerSource("gguf", path, _files_key([(path, file.buffer, file.data_offset)]), metadata=file.metadata)


def _float_values(tensor: RawTensor) -> np.ndarray:
    """fp32 values of an unquantised tensor, flat, in file order."""
    if tensor.format == "F32":
        return tensor.data.view("<f4").astype(np.float32)
    if tensor.format == "F16":
        return tensor.data.view("<f2").astype(np.float32)
    if tensor.format == "BF16":
        return (tensor.data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise ModelFileError(tensor.file, f"tensor {tensor.name!r} format", tensor.format, "F32, F16 or BF16 (a vector)")


def _checked(tensors: dict[str, RawTensor], config: ModelConfig, file: Path) -> dict[str, RawTensor]:
    """The tensors in the model's order, each with its expected shape, a supported format and the right byte count."""
    wanted = expected_shapes(config)
    for name in tensors:
        if name not in wanted:
            raise ModelFileError(
                tensors[name].file, f"tensor {tensors[name].name!r}", name, "no such tensor by the config"
            )
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelFileError(file, f"tensor {name!r}", "none", f"one of shape {shape}")
        if tensor.shape != shape:
            raise ModelFileError(tensor.file, f"shape of tensor {tensor.name!r} ({name})", tensor.shape, f"{shape}")
        if tensor.format not in SUPPORTED_FORMATS:
            wanted_formats = "one of " + ", ".join(SUPPORTED_FORMATS)
            raise ModelFileError(tensor.file, f"format of tensor {tensor.name!r}", tensor.format, wanted_formats)
        num_rows = shape[0] if len(shape) == 2 else 1
        if tensor.data.size != num_rows * row_bytes(tensor.format, shape[-1]):
            raise ModelFileError(
                tensor.file, f"bytes of tensor {tensor.name!r}", tensor.data.size, f"{shape} {tensor.format}"
            )
    return {name: tensors[name] for name in wanted}


def _files_key(files: Iterable[tuple[Path, Any, int]]) -> str:
    """A key of (path, mapping, start of data): header bytes, size, time, and samples spread over the data.

    Hashing everything would cost a second per gigabyte at every start; an edit that keeps size, time, header and all
    samples is not one that happens by accident.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, buffer, data_offset in files:
        stat = path.stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(buffer[:data_offset])
        stride = max((len(buffer) - data_offset) // _NUM_SAMPLES, _SAMPLE_BYTES)
        for offset in range(data_offset, len(buffer), stride):
            digest.update(buffer[offset : offset + _SAMPLE_BYTES])
    return digest.hexdigest()


# -- GGUF -----------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    metadata = file.metadata
    if isinstance(metadata.get("split.count"), int) and metadata["split.count"] > 1:
        raise ModelFileError(path, "split.count", metadata["split.count"], "1 (merge the parts into one file)")
    config = ModelConfig.from_gguf_metadata(metadata, frozenset(file.tensors), str(path))
    config = _with_rope_freqs(config, file)
    config = _with_end_tokens(config, metadata)

    orders: dict[int, np.ndarray] = {}

    def row_order(canonical: str) -> np.ndarray | None:
        short = canonical.rpartition(".")[2]
        if config.family != "llama" or short not in ("q", "k", "q_bias", "k_bias"):
            return None
        num_heads = config.num_q_heads if short.startswith("q") else config.num_kv_heads
        if num_heads not in orders:
            orders[num_heads] = interleaved_row_order(num_heads, config.head_dim, config.rotary_dim)
        return orders[num_heads]

    tensors: dict[str, RawTensor] = {}
    for name, tensor in file.tensors.items():
        canonical = canonical_of_gguf(name, config)
        if canonical is None:
            raise ModelFileError(path, f"tensor {name!r}", "a tensor", f"no such tensor in a {config.family} model")
        if canonical:
            # (n,) is filed as (n,) or, by some writers, as (1, n)
            shape = tensor.shape[-1:] if len(tensor.shape) > 1 and set(tensor.shape[:-1]) == {1} else tensor.shape
            tensors[canonical] = RawTensor(
                name, str(path), file.data(tensor), tensor.format, shape, row_order(canonical)
            )
    key = _files_key([(path, file.buffer, file.data_offset)])
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(path, "tokenizer.chat_template", template, "a string")
    name = metadata.get("general.name")
    return Checkpoint(
        path=path,
        name=name if isinstance(name, str) and name.strip() else path.stem,
        key=key,
        config=config,
        tensors=_checked(tensors, config, path),
        tokenizer_source=TokenizerSource("gguf", path, key, metadata=metadata),
        chat_template=template,
        generation_config=_gguf_generation_config(metadata),
        mappings=(file.buffer,),
    )


def interleaved_row_order(num_heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """int32 [num_heads * head_dim]: where the rows of a half-split (neox) q or k lie in a llama-arch GGUF file.

    llama.cpp rotates neighbours (2i, 2i + 1) in this architecture, so its converter files row i of the first half
    and row i of the second half of each head side by side.
    """
    head = np.arange(head_dim, dtype=np.int32)
    half = rotary_dim // 2
    head[:half] = np.arange(0, rotary_dim, 2)
    head[half:rotary_dim] = np.arange(1, rotary_dim, 2)
    return (np.arange(num_heads, dtype=np.int32)[:, None] * head_dim + head[None, :]).reshape(-1)


def _with_rope_freqs(config: ModelConfig, file: GgufFile) -> ModelConfig:
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in file.tensors:
            raise ModelFileError(
                file.path, f"tensor {name!r}", "longrope factors", "another rope scaling (unsupported)"
            )
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return config
    raw = RawTensor(tensor.name, str(file.path), file.data(tensor), tensor.format, tensor.shape)
    return with_frequency_factors(config, tuple(_float_values(raw).tolist()), str(file.path))


def _with_end_tokens(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    from dataclasses import replace

    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, GgufStrings) or types is None or len(types) != len(tokens):
        return config  # the tokenizer reports what is wrong with it
    names, ends = tokens.tolist(), list(config.eos_token_ids)
    control = np.flatnonzero(np.asarray(types) == 3).tolist()
    ends += [index for index in control if names[index] in _END_OF_TURN_TOKENS and index < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys(ends)))


def _gguf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


# -- Hugging Face folders -------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The parsed file. Raises ModelFileError if it is missing, too large or not JSON."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(path, "file size", path.stat().st_size, f"at most {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(path, f"is not JSON: {str(error)[:200]}") from None


def _read_optional_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise ModelFileError(path, "top level", values, "a JSON object")
    return values


def _open_folder(folder: Path) -> Checkpoint:
    generation_config = _read_optional_object(folder / "generation_config.json")
    tokenizer_config = _read_optional_object(folder / "tokenizer_config.json")
    config = ModelConfig.from_hf_config(
        read_json(folder / "config.json"), generation_config, str(folder / "config.json")
    )
    config = replace(config, default_sampling=_default_sampling(generation_config, folder))
    files = [SafetensorsFile(path) for path in _weight_files(folder)]
    tensors: dict[str, RawTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            canonical = canonical_of_hf(name, config)
            if canonical is None:
                raise ModelFileError(
                    file.path, f"tensor {name!r}", "a tensor", f"no such tensor in a {config.family} model"
                )
            if canonical in tensors:
                raise ModelFileError(file.path, f"tensor {name!r}", "it twice", f"{canonical} once")
            if canonical:
                tensors[canonical] = RawTensor(name, str(file.path), file.data(tensor), tensor.format, tensor.shape)
    key = _files_key((file.path, file.buffer, file.data_offset) for file in files)
    return Checkpoint(
        path=folder,
        name=folder.resolve().name,
        key=key,
        config=config,
        tensors=_checked(tensors, config, folder),
        tokenizer_source=TokenizerSource("hf", folder, key, config=tokenizer_config),
        chat_template=_folder_chat_template(folder, tokenizer_config),
        generation_config=generation_config,
        norm_offset=1.0 if config.family == "gemma3" else 0.0,
        mappings=tuple(file.buffer for file in files),
    )


def _default_sampling(generation_config: Mapping[str, Any], folder: Path) -> tuple[tuple[str, float], ...]:
    """What generation_config.json recommends for sampling; nothing where it asks for greedy search."""
    if not generation_config.get("do_sample"):
        return ()
    limits = {
        "temperature": (0, 10),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "top_k": (0, 1 << 22),
        "repetition_penalty": (0, 10),
    }
    found = []
    for name, (low, high) in limits.items():
        value = generation_config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ModelFileError(folder / "generation_config.json", name, value, f"a number from {low} to {high}")
        found.append((name, value))
    return tuple(found)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_optional_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(index, "weight_map", weight_map, "tensor name -> file name")
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            is_plain = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
            if not is_plain:
                raise ModelFileError(index, "weight_map", name, "the name of a .safetensors file beside the index")
            if not (folder / name).is_file():
                raise ModelFileError(folder / name, "is named by the index but missing")
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    names = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if names:
        return names
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    got = f"only {', '.join(pickles[:4])} (pickles can run code, so they are never opened)" if pickles else "none"
    raise ModelFileError(folder, "weights", got, "*.safetensors with Hugging Face tensor names")


def _folder_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ModelFileError(path, "file size", path.stat().st_size, f"at most {MAX_TEMPLATE_BYTES}")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError(path, f"cannot be read: {str(error)[:200]}") from None
    template = _read_optional_object(folder / "chat_template.json").get("chat_template")
    if template is None:
        template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(folder / "tokenizer_config.json", "chat_template", template, "a string")
    return template
