"""A1111's prompt syntax: which text a step has, and how much each piece of it counts. Plain text in and out.

Takes time in proportion to the prompt, whatever it holds: brackets inside one another are bounded.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TightfitError
from ..files import shortened

MOST_OPEN = 64  # brackets that may be open at once
MOST_WEIGHT = 100.0  # pictures are noise long before
MOST_TEXTS = 100  # that differ, of one prompt: a text encoder reads each once
MOST_CHANGES = 1000  # of [a:b:1] and [a|b] in one prompt
_MORE, _LESS = 1.1, 1 / 1.1

_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_PIECE = re.compile(
    r"(?P<escaped>\\[()\[\]\\]?)"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:[.\d]+(?:e[+-]?\d+)?|nan|inf(?:inity)?))\s*\)"
    r"|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:",
    re.IGNORECASE,
)
_BREAK = re.compile(r"\bBREAK\b")
_MARK = re.compile(r"[()\[\]\\<]|\bAND\b|\bBREAK\b")
_SHORT = 75  # tokens


def matters(text: str) -> bool:
    """Whether a text may be read in another way than as plain words that fit a text encoder."""
    return bool(_MARK.search(text)) or not fits(text, _SHORT)


def fits(text: str, room: int) -> bool:
    """Whether a text has at most `room` tokens, told without a tokenizer: a token is a byte at least, and
    lower case and composition make at most five of one that is not ASCII."""
    return len(text.encode()) * (1 if text.isascii() else 5) <= room


class Piece(NamedTuple):
    """Words that count alike."""

    text: str
    weight: float


@dataclass(frozen=True)
class Line:
    """One branch of a prompt: the text until call `ends[i]` of the denoiser is `texts[i]`. `weight` is what
    it counts beside the other branches. `notices` are of what never comes about."""

    texts: tuple[str, ...]
    ends: tuple[int, ...] = (0,)
    weight: float = 1.0
    notices: tuple[str, ...] = ()

    def at(self, call: int) -> str:
        """The text of a call, counted from 0. The first text has one call more than its end says, as in
        A1111."""
        return self.texts[min(bisect_left(self.ends, call), len(self.ends) - 1)]


def lines(prompt: str, calls: int) -> tuple[Line, ...]:
    """The branches of a prompt, which AND parts. Their schedules are for `calls` of the denoiser."""
    parts = _AND.split(prompt)
    if len(parts) == 1:
        return (line(prompt, calls),)
    weighted = [(part, _AND_WEIGHT.search(part)) for part in parts]
    return tuple(
        line(part[: match.start()], calls, _sound(float(match[1]), match[1])) if match else line(part, calls)
        for part, match in weighted
    )


def line(text: str, calls: int, weight: float = 1.0) -> Line:
    """One branch with its schedule: [from:to:when], [to:when], [from::when], [a|b]."""
    parser = _Parser(text, calls)
    parsed = parser.parsed()
    if parsed is None:
        return Line((text,), (calls,), weight, (_UNREAD,) if _CHANGES.search(text) else ())
    ends = sorted(parsed.ends() | {calls})
    texts = [parsed.at(end) for end in ends]
    if (count := len(set(texts))) > MOST_TEXTS:
        raise TightfitError(
            f"the prompt is {count} different texts over its steps, more than {MOST_TEXTS}: "
            "name fewer alternatives, or take fewer steps"
        )
    return Line(tuple(texts), tuple(ends), weight, tuple(parser.notices))


@dataclass
class _Group:
    """What is between two brackets: items, apart at each mark, and the marks."""

    opened: str
    cells: list[list[_Item]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def flat(self) -> Iterator[_Item]:
        """As it was written, without its closing bracket."""
        yield self.opened
        for mark, cell in zip(["", *self.marks], self.cells, strict=True):
            yield mark
            yield from cell


@dataclass(frozen=True)
class _Sequence:
    items: Sequence[_Item]

    def at(self, step: int) -> str:
        return "".join(item if isinstance(item, str) else item.at(step) for item in self.items)

    def ends(self) -> set[int]:
        parts = [item.ends() for item in self.items if not isinstance(item, str)]
        return set().union(*parts)


@dataclass(frozen=True)
class _Scheduled:
    before: _Sequence
    after: _Sequence
    when: int

    def at(self, step: int) -> str:
        return (self.before if step <= self.when else self.after).at(step)

    def ends(self) -> set[int]:
        own = {self.when} if self.when >= 1 else set()
        return own | self.before.ends() | self.after.ends()


@dataclass(frozen=True)
class _Alternate:
    choices: Sequence[_Sequence]
    calls: int

    def at(self, step: int) -> str:
        return self.choices[(step - 1) % len(self.choices)].at(step)

    def ends(self) -> set[int]:
        return set(range(1, self.calls + 1))


_Item = str | _Sequence | _Scheduled | _Alternate


class _Parser:
    """One pass over a text with a stack of open brackets.

    A bracket without its partner is a character, and so are all that are open around it then: in A1111's
    grammar a group has only whole groups in it.
    """

    def __init__(self, text: str, calls: int) -> None:
        self._text, self._calls = text, calls
        self._top: list[_Item] = []
        self._open: list[_Group] = []
        self._failed, self._changes = False, 0
        self.notices: list[str] = []

    def parsed(self) -> _Sequence | None:
        """None where A1111's grammar reads no schedule at all: a | outside of [ ], a last \\."""
        text, place = self._text, 0
        while place < len(text) and not self._failed:
            if plain := _PLAIN.match(text, place):
                self._items().append(plain[0])
                place = plain.end()
                continue
            self._character(text[place])
            place += 1
        self._as_written()
        return None if self._failed else _Sequence(self._top)

    def _character(self, character: str) -> None:
        if character in "([":
            check_open(self._open)
            self._open.append(_Group(character))
        elif character in ")]":
            self._close(character)
        elif character == "\\" or (character == "|" and not (self._open and self._open[-1].opened == "[")):
            self._failed = True
        elif self._open:
            self._open[-1].cells.append([])
            self._open[-1].marks.append(character)
        else:
            self._top.append(character)

    def _items(self) -> list[_Item]:
        return self._open[-1].cells[-1] if self._open else self._top

    def _close(self, bracket: str) -> None:
        if self._open and self._open[-1].opened + bracket in ("()", "[]"):
            closed = self._closed(self._open[-1], bracket)
            if closed is not None:
                self._open.pop()
                self._items().append(closed)
                return
        self._as_written()
        self._top.append(bracket)

    def _closed(self, group: _Group, bracket: str) -> _Item | None:
        colons, bars = group.marks.count(":"), group.marks.count("|")
        if not bars and colons <= (1 if bracket == ")" else 0):
            return _Sequence([*group.flat(), bracket])
        if bracket == ")":
            return None
        cells = [_Sequence(cell) for cell in group.cells]
        if not colons:
            self._changed()
            return _Alternate(cells, self._calls)
        last = "".join(item if isinstance(item, str) else ":" for item in group.cells[-1]).strip()
        if bars or colons > 2 or not _NUMBER.fullmatch(last):
            return None
        self._changed()
        *before, after, _ = cells
        return _Scheduled(before[0] if before else _Sequence(()), after, self._when(last))

    def _changed(self) -> None:
        self._changes += 1
        if self._changes > MOST_CHANGES:
            raise TightfitError(
                f"the prompt has more than {MOST_CHANGES} of [from:to:when] and [a|b]: use fewer"
            )

    def _when(self, written: str) -> int:
        """The call after which the text changes. With a point in it, it is a share of all calls."""
        value, most = float(written), 1.0 if "." in written else float(self._calls)
        nearest = max(min(value, most), 0.0)
        if value != nearest:
            unit = "of the way (1.0)" if "." in written else f"of {self._calls} steps"
            self.notices.append(
                f"a change of the prompt at {shortened(float(written))} is outside {unit}: taken as "
                f"{nearest:g}"
            )
        return int(nearest * self._calls / most)

    def _as_written(self) -> None:
        """What is open is open for good, so its brackets are characters."""
        for group in self._open:
            self._failed |= "|" in group.marks
            self._top += group.flat()
        self._open.clear()


_CHANGES = re.compile(r"[:|]\s*[\d.]+\s*\]")
_UNREAD = (
    "the prompt has a | outside of [ ], or ends in \\, so its [from:to:when] are read as words, "
    "as A1111 does: leave that out"
)


def check_open(brackets: Sequence[object]) -> None:
    """Raise TightfitError where one bracket more may not be open."""
    if len(brackets) >= MOST_OPEN:
        raise TightfitError(
            f"the prompt opens more than {MOST_OPEN} brackets inside one another: close some, "
            "write them as \\( and \\[, or say --prompt-syntax plain"
        )


def sections(text: str) -> list[list[Piece]]:
    """The pieces of one text with their weights; BREAK begins a new section.

    A bracket that is never closed runs to the end, and round ones and square ones do not see each other, as
    in A1111.
    """
    words: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    brackets: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> None:
        for place in range(brackets[bracket].pop(), len(weights)):
            weights[place] *= factor

    def add(*texts: str | None) -> None:
        words.extend(texts)
        weights.extend([1.0] * len(texts))

    for match in _PIECE.finditer(text):
        piece, closes = match[0], {")": "(", "]": "["}.get(match["close"] or "", "")
        if match["escaped"]:
            add(piece[1:])
        elif match["open"]:
            check_open(brackets[piece])
            brackets[piece].append(len(weights))
        elif match["weight"] and brackets["("]:
            weigh("(", _weight(match["weight"]))
        elif closes and brackets[closes]:
            weigh(closes, _MORE if closes == "(" else _LESS)
        else:
            add(*_broken(piece))
    for bracket, factor in (("(", _MORE), ("[", _LESS)):
        while brackets[bracket]:
            weigh(bracket, factor)
    return _merged(words, weights)


def _broken(text: str) -> Iterator[str | None]:
    """A text with None for each BREAK, and without the spaces around it."""
    first, *others = _BREAK.split(text)
    yield first.rstrip() if others else first
    for number, part in enumerate(others, 1):
        yield None
        yield part.strip() if number < len(others) else part.lstrip()


def _merged(words: Sequence[str | None], weights: Sequence[float]) -> list[list[Piece]]:
    """Neighbours that count alike are one piece: a tokenizer reads them together."""
    merged: list[list[Piece]] = [[]]
    runs: list[tuple[list[str], float]] = []

    def ended() -> None:
        merged[-1] += [Piece("".join(texts), weight) for texts, weight in runs]
        runs.clear()

    for word, weight in zip(words, weights, strict=True):
        if word is None:
            ended()
            merged.append([])
        elif runs and runs[-1][1] == weight:
            runs[-1][0].append(word)
        else:
            runs.append(([word], _sound(weight, f"{weight:g}")))
    ended()
    return merged


def _weight(written: str) -> float:
    try:
        return _sound(float(written), written)
    except ValueError:
        raise TightfitError(
            f"the weight {shortened(written)} in the prompt is no number: say (word:1.2)"
        ) from None


def _sound(weight: float, written: str) -> float:
    if not abs(weight) <= MOST_WEIGHT:
        nearest = 1.0 if math.isnan(weight) else math.copysign(MOST_WEIGHT, weight)
        raise TightfitError(
            f"the weight {shortened(written)} in the prompt is not from {-MOST_WEIGHT:g} to "
            f"{MOST_WEIGHT:g}: the nearest is {nearest:g}"
        )
    return weight
