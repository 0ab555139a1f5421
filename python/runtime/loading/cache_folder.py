"""Where downloaded and derived files are kept between starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """$PARTITA_CACHE, else $XDG_CACHE_HOME/partita, else ~/.cache/partita. Not created here."""
    if os.environ.get("PARTITA_CACHE"):
        return Path(os.environ["PARTITA_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "partita"
    return Path.home() / ".cache" / "partita"


def make_private_folder(folder: Path) -> Path:
    """Creates the folder for this user alone (what lies in it is trusted at the next start)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)`, then a rename: a reader sees the whole file or none, however many starts race."""
    import tempfile

    make_private_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    os.close(descriptor)
    try:
        write(Path(temporary))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
