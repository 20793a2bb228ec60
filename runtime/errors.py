"""The one exception that means: what was asked cannot be done as asked, and here is the cure."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

# C0 and C1 controls, by which text moves the cursor, recolours or clears a terminal; line separators;
# Unicode's bidirectional controls, which show text in another order than it has.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """`text` as one line that a terminal only shows: white space as spaces, control characters as escapes
    such as \\x1b.

    For whatever was written by others: prompts, names of files and models, what pictures and configs say.
    """
    return _UNSAFE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in "\t\n\r\v\f":
        return " "
    return f"\\x{ord(letter):02x}" if unicodedata.category(letter) == "Cc" else f"\\u{ord(letter):04x}"


class TightfitError(Exception):
    """Bad input or a bad file. Its text is one line a user can act on; the command line prints it and exits
    with 2.

    Names and contents of files are part of it: control characters in them are written as escapes.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class OutOfMemoryError(TightfitError):
    """The device, or the budget, has no room for what is needed now; a plan that takes less may still run.

    `complete` where the text says what to do; else it is a library's, or what was needed, alone.
    """

    def __init__(self, text: str = "", complete: bool = False) -> None:
        super().__init__(text)
        self.complete = complete


# torch's words for CUDA, MPS and the CPU (c10's alloc_cpu.cpp; on Windows too), the C++ library's, oneDNN's
# where it has no room for its code or its scratchpad, threads' that get no stack, the loader's of a library
# that comes late, and Python's of a C function that failed and had no room to say so.
_NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|bad_alloc|std::length_error"
    "|could not create a (primitive|memory)|could not execute a primitive|start new thread"
    "|Resource temporarily unavailable|failed to map segment|static TLS"
    "|without exception set|without setting an exception"
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError | OutOfMemoryError) or (
            isinstance(error, OSError) and error.errno == errno.ENOMEM
        ):
            return True
        # A file that another holds has the words of a thread without a stack.
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
    """The first line of an exception's text, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explained(problem: str, cure: str) -> Iterator[None]:
    """Turn whatever a library raises inside into 'problem (its first line): cure'.

    For the places where a file's content reaches a library that promises no particular exception.
    """
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemoryError(first_line(error)) from error
        raise TightfitError(f"{problem} ({first_line(error)}): {cure}") from error
