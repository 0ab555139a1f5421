"""The one error of everything that reads a model's files."""

from __future__ import annotations

import os

_MAX_SHOWN_CHARS = 120  # a hostile file must not fill the log


def shown(value: object) -> str:
    """`value` as an error message shows it: its repr, cut to a line."""
    text = value if isinstance(value, str) and value.startswith("a ") else repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


class ModelFileError(ValueError):
    """A model file is missing, truncated, malformed, hostile or of a kind that is not supported.

    Attributes: `file` (path or name), `what` (the field, tensor or fact), `got` and `wanted` (None where the
    sentence `what` says all there is to say).
    """

    def __init__(self, file: str | os.PathLike, what: str, got: object = None, wanted: str | None = None) -> None:
        self.file = os.fspath(file)
        self.what = what
        self.got = got
        self.wanted = wanted
        message = f"{self.file}: {what}"
        if wanted is not None:
            message += f": got {shown(got)}, wanted {wanted}"
        super().__init__(message)
