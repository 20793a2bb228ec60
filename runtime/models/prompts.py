"""A request's two prompts, read for one model: the text of each branch in each step, and how long it is."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..errors import TightfitError
from . import tokens
from .prompt_syntax import Line, fits, line, lines
from .tokens import Chunks, Tokens

if TYPE_CHECKING:
    import numpy as np

    from .spec import ModelSpec

SYNTAXES = ("a1111", "plain")
EMPHASES = ("original", "no-norm", "ignore")
PROMPT, NEGATIVE = "prompt", "negative prompt"
MOST_PARTS = 32
MOST_CHUNKS = 64  # of one text: 4800 tokens
_NETWORK = re.compile(r"<\w{1,20}:[^<>]+>")  # <lora:…> whose file was not found, <hypernet:…>


class Wanted(NamedTuple):
    """What a request says of its prompts. `guided`: the denoiser is told what not to paint too."""

    prompt: str
    negative: str | None
    guided: bool
    plain: bool


@dataclass(frozen=True)
class Prompting:
    """What the denoiser is guided by: a line for each branch, the unguided one first where there is one.

    `named` are the two prompts as they were given, by what they are called.
    """

    spec: ModelSpec = field(repr=False)
    lines: tuple[Line, ...]
    named: Mapping[str, str]
    plain: bool

    @property
    def said(self) -> tuple[tuple[str, ...], ...]:
        """Each branch's texts: prompts that say the same are encoded alike, whatever the steps."""
        return tuple(branch.texts for branch in self.lines)

    @property
    def is_steady(self) -> bool:
        """Whether all steps are guided by one text, beside the negative one, from the first to the last."""
        parts = len(self.lines) - (NEGATIVE in self.named)
        return parts == 1 and all(len(branch.texts) == 1 for branch in self.lines)

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """All that are encoded, once each."""
        return tuple(dict.fromkeys(text for branch in self.lines for text in branch.texts))

    @functools.cached_property
    def read(self) -> Mapping[str, Mapping[str, Chunks]]:
        """The chunks of each text, by text encoder. Raises TightfitError for what no encoder can read."""
        if self.plain:
            return self._in_one()
        encoders = self.spec.text_encoders
        texts = (*self.texts, "")  # which fills up the shorter texts of a schedule
        read = {encoder.name: tokens.chunked(self.spec, encoder, texts) for encoder in encoders}
        for counts in zip(
            *([len(chunks.ids) for chunks in one.values()] for one in read.values()), strict=True
        ):
            if len({*counts}) > 1:
                raise TightfitError(
                    f"{self.spec.folder} has tokenizers that split a text differently: "
                    "copy or download it again"
                )
            if counts[0] > MOST_CHUNKS:
                raise TightfitError(
                    f"the prompt fills {counts[0]} times the length of a text encoder, "
                    f"and at most {MOST_CHUNKS} can be read: shorten it"
                )
        return read

    @functools.cached_property
    def _whole(self) -> Mapping[str, Tokens]:
        """The named texts, each in one piece, by text encoder."""
        encoders = self.spec.text_encoders
        return {encoder.name: tokens.tokenize(self.spec, encoder, self.named) for encoder in encoders}

    def _in_one(self) -> Mapping[str, Mapping[str, Chunks]]:
        import numpy as np

        return {
            encoder: {
                text: Chunks(ids[None], np.ones((1, len(ids)), np.float32))
                for text, ids in zip(self.named.values(), whole.ids, strict=True)
            }
            for encoder, whole in self._whole.items()
        }

    def counts(self, branch: Line) -> int:
        """Chunks of the longest text of a branch, to which the others are filled up."""
        return max(self._count(text) for text in branch.texts)

    @functools.cached_property
    def _varies(self) -> bool:
        """Whether a language model reads the texts, each as long as it is."""
        readings = (encoder.network.reading for encoder in self.spec.text_encoders)
        return any(reading and reading.varies for reading in readings)

    def _count(self, text: str) -> int:
        taught = any(encoder.words for encoder in self.spec.text_encoders)
        short = fits(text, self.spec.text_length - 2) and "BREAK" not in text
        if not self._varies and (self.plain or (short and not taught)):
            return 1
        return next(iter(self.read.values()))[text].ids.size // self.spec.text_length

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """In chunks, of each branch. CLIP's are as long as one another: a shorter one is repeated, which
        cross-attention does not see."""
        counts = [self.counts(branch) for branch in self.lines]
        return tuple(counts) if self._varies else (math.lcm(*counts),) * len(counts)

    @property
    def chunks(self) -> int:
        """Of the longest branch."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all branches are as long as one another, so that they go into one call."""
        return len({*self.lengths}) == 1

    @functools.cached_property
    def encodings(self) -> int:
        """Calls of each text encoder: each text once, and an empty one that fills up."""
        if self.plain:
            return len(self.texts)
        counts = {text: self._count(text) for text in self.texts}
        return sum(counts.values()) + (self._fills_up and "" not in counts)

    @property
    def _fills_up(self) -> bool:
        """Whether the empty text is encoded, as a text of a branch is shorter than another."""
        return any(self._count(text) < self.counts(branch) for branch in self.lines for text in branch.texts)

    @functools.cached_property
    def rows(self) -> Mapping[str, tuple[np.ndarray, ...]]:
        """The tokens (length,) of each call of a text encoder, by its name; some may come twice. Raises
        TightfitError as `read`."""
        texts = (*self.texts, *([""] if self._fills_up else []))
        return {
            name: tuple(row for text in texts for row in read[text].ids) for name, read in self.read.items()
        }

    def notices(self) -> Iterator[str]:
        """What of the prompts does nothing, or is read otherwise than it was meant."""
        if self.plain:
            yield from tokens.painted_as_words(self.named)
            yield from self._ends()
        yield from tokens.unused_words(self.spec, self.named)
        for branch in () if self.plain else self.lines:
            yield from branch.notices
        for name, text in {} if self.plain else self.named.items():
            if names := _NETWORK.findall(text):
                yield _unloaded(name, names[0])

    def _ends(self) -> Iterator[str]:
        cut: dict[tuple[str, str], list[str]] = {}
        for encoder, whole in self._whole.items():
            for name_and_end in whole.cut.items():
                cut.setdefault(name_and_end, []).append(encoder)
        for (name, end), encoders in cut.items():
            where = "" if len(encoders) == len(self._whole) else f" for {' and '.join(encoders)}"
            yield f"the {name} is too long{where}; this end of it was cut: {end}"


def _unloaded(name: str, word: str) -> str:
    if name != PROMPT:
        return f"{word} in the {name} is read as words, as in A1111: adapters are named in the prompt"
    return (
        f"{word} in the {name} is left out: a LoRA is found by its name in a folder of models, "
        "--models-dir or TIGHTFIT_LORAS, or given by --lora"
    )


def prompting(spec: ModelSpec, wanted: Wanted, calls: int) -> Prompting:
    """The prompts of one picture, whose denoiser is called so often. Raises TightfitError for a syntax that
    cannot be followed."""
    prompt = wanted.prompt
    plain = wanted.plain or spec.design.reads_plainly(spec)
    given = (Line((prompt,)),) if plain else lines(_NETWORK.sub("", prompt), calls)
    if len(given) > 1 and spec.is_distilled:
        raise TightfitError(f"{spec.name} takes one text, as it was distilled for it: leave AND out")
    named, first = {PROMPT: prompt}, ()
    if not spec.is_distilled and (wanted.guided or len(given) > 1):
        negative = wanted.negative or ""
        named = {NEGATIVE: negative, **named}
        first = (Line((negative,)) if plain else line(negative, calls),)
    if len(given) > MOST_PARTS:
        raise TightfitError(
            f"the prompt has {len(given)} parts by AND, and at most {MOST_PARTS} are read: fewer"
        )
    made = Prompting(spec, (*first, *given), named, plain)
    if made.chunks > MOST_CHUNKS:
        raise TightfitError(
            f"the parts of the prompt are of so different lengths that they go into {made.chunks} chunks, "
            f"and at most {MOST_CHUNKS} are read: make them as long as one another"
        )
    return made
