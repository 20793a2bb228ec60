"""The prompt of a command: an argument, a file or standard input."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from ..errors import TightfitError
from ..units import shown

_MOST_BYTES = 2**20  # a text encoder reads some hundred, and what a pipe or a device holds may have no end


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt that was typed, or the text of `file`, or of standard input for "-". None where there is
    none: a line of standard input may be empty, and then so is the prompt."""
    if prompt is not None and file is not None:
        raise TightfitError("give the prompt as an argument or with --prompt-file, not both")
    if prompt != "-" and file is None:
        return prompt
    source = file or "standard input"
    try:
        data = _standard_input() if file is None else _content(file)
        if not data and file is None:  # what was to write it has failed, or it is closed
            return None
        if len(data) > _MOST_BYTES:
            raise TightfitError(f"{source} has more than {shown(_MOST_BYTES)}: no prompt is so long")
        return _text(data).strip()
    except UnicodeDecodeError:
        raise TightfitError(f"{source} is not UTF-8 text") from None
    except OSError as error:
        raise TightfitError(f"{source} cannot be read: {error.strerror}") from None


def _content(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_MOST_BYTES + 1)


def _standard_input() -> bytes:
    if sys.stdin is None:
        return b""
    stream = getattr(sys.stdin, "buffer", None)
    return stream.read(_MOST_BYTES + 1) if stream else sys.stdin.read(_MOST_BYTES + 1).encode()


def _text(data: bytes) -> str:
    """Text as editors and shells write it: UTF-8, or UTF-16 with its mark, as PowerShell 5 writes files.

    The mark is dropped.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8")
    return text.lstrip("\ufeff")  # PowerShell marks what it pipes, at times twice
