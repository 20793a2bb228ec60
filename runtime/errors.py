"""The one exception that means: what was asked cannot be done as asked, and here is the cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TightfitError(Exception):
    """Bad input or a bad file. Its text is one line a user can act on; the command line prints it and exits with 2."""


class OutOfMemoryError(TightfitError):
    """The device, or the budget, has no room for what is needed now; a plan that takes less may still run."""


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
        raise TightfitError(f"{problem} ({first_line(error)}): {cure}") from error
