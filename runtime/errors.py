"""Errors that a user can act on, and the rules by which other exceptions become one."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

# C0 and C1 controls, which move a terminal's cursor, recolour or clear it; line separators; Unicode's
# bidirectional controls, which reorder text on the screen.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """`text` as one line that is safe to print: white space becomes spaces, control characters escapes such
    as \\x1b.

    For anything written by others: prompts, names of files and models, contents of pictures and configs.
    """
    return _UNSAFE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in "\t\n\r\v\f":
        return " "
    return f"\\x{ord(letter):02x}" if unicodedata.category(letter) == "Cc" else f"\\u{ord(letter):04x}"


class TightfitError(Exception):
    """Bad input or a bad file. Its text is one line that the user can act on; the command line prints it and
    exits with 2.

    The text may quote names and contents of files, so control characters are escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class OutOfMemoryError(TightfitError):
    """The device or the budget has no room for what is needed now; a smaller plan may still run.

    `complete`: the text says what to do. Otherwise it is a library's own, or only says what was needed.
    """

    def __init__(self, text: str = "", complete: bool = False) -> None:
        super().__init__(text)
        self.complete = complete


# How running out of memory reads in torch (CUDA, MPS and the CPU: c10's alloc_cpu.cpp, on Windows too), the
# C++ library, oneDNN (no room for code or scratchpad), threads that get no stack, the loader of a late
# library, and Python when a C function failed without room to say so.
_NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|bad_alloc|std::length_error"
    "|could not create a (primitive|memory)|could not execute a primitive|start new thread"
    "|Resource temporarily unavailable|failed to map segment|static TLS"
    "|without exception set|without setting an exception"
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one in its chain of causes, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError | OutOfMemoryError) or (
            isinstance(error, OSError) and error.errno == errno.ENOMEM
        ):
            return True
        # A locked file raises the same words as a thread without a stack.
        waits = isinstance(error, BlockingIOError)
        if (
            isinstance(error, RuntimeError | ImportError | OSError | SystemError)
            and not waits
            and _NO_MEMORY.search(str(error))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """First line of an exception's text, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explained(problem: str, cure: str) -> Iterator[None]:
    """Context manager: whatever a library raises becomes 'problem (its first line): cure'.

    For places where a file's contents reach a library that documents no exceptions.
    """
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemoryError(first_line(error)) from error
        raise TightfitError(f"{problem} ({first_line(error)}): {cure}") from error
