"""Tables of rules: what must not be, and the message for where it is. The first rule that is broken
speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rule(Generic[T]):
    """`broken` looks at a case; `message` is the text, or makes it of the case where that has to be named."""

    broken: Callable[[T], object]
    message: str | Callable[[T], str]


def first_broken(rules: Iterable[Rule[T]], case: T) -> str | None:
    """The message of the first rule that the case breaks, or None. Rules after that one are not asked."""
    for rule in rules:
        if rule.broken(case):
            return rule.message if isinstance(rule.message, str) else rule.message(case)
    return None
