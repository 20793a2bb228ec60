"""What the denoiser is guided by: what text encoders answered, weighed, put together for each call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .models.families.family import SHARED
from .models.prompt_syntax import Line
from .models.tokens import Chunks
from .request import Job

Answers = tuple[np.ndarray, ...]
Encode = Callable[[np.ndarray], Answers]
"""Tokens of one chunk → what a text encoder answers: its states first (1, length, width)."""


class Conditioning:
    """The denoiser's inputs that depend on texts, a row for each branch; the same arrays as long as the
    texts stay the same, so that an engine finds them on its device."""

    def __init__(self, job: Job, encoded: Sequence[Mapping[tuple[Line, str], Answers]]) -> None:
        """`encoded` has each branch's texts, by text encoder."""
        self._job, self._encoded = job, encoded
        self._texts: tuple[str, ...] | None = None
        self._parts: dict[str, Sequence[Mapping[str, np.ndarray]]] = {}

    def of(self, cfg: str, call: int) -> Sequence[Mapping[str, np.ndarray]]:
        """The inputs of each part of one call, counted from 0."""
        lines = self._job.prompting.lines
        texts = tuple(line.at(call) for line in lines)
        if texts != self._texts:
            self._texts, self._parts = texts, self._parted([*zip(lines, texts, strict=True)])
        return self._parts[cfg]

    def given(self, call: int) -> Sequence[Mapping[str, np.ndarray]]:
        """The inputs of the parts of a call without guidance: the prompt's."""
        parts = self.of("sequential", call)
        return [parts[row] for row in self._job.prompted]

    def _parted(self, texts: Sequence[tuple[Line, str]]) -> dict[str, Sequence[Mapping[str, np.ndarray]]]:
        """Branches of different lengths go into no call together."""
        if self._job.prompting.is_even:
            return _parts(self._joined(texts))
        return {"sequential": [self._joined([text]) for text in texts]}

    def _joined(self, texts: Sequence[tuple[Line, str]]) -> dict[str, np.ndarray]:
        """A row for each branch, all as long as the longest has to be."""
        rows = []
        for encoder in self._encoded:
            states = [encoder[text][0] for text in texts]
            length = math.lcm(*(one.shape[1] for one in states))
            whole = np.concatenate([np.tile(one, (1, length // one.shape[1], 1)) for one in states])
            others = zip(*(encoder[text][1:] for text in texts), strict=True)
            rows.append((whole, *map(np.concatenate, others)))
        arrays = self._job.spec.design.condition(self._job, rows)
        more = len(self._job.scales)
        return {
            name: array if _is_shared(name) else np.concatenate([array, *[array[:1]] * more])
            for name, array in arrays.items()
        }

    def again(self, job: Job) -> Conditioning:
        """Of another job, whose prompts say the same."""
        lines = dict(zip(self._job.prompting.lines, job.prompting.lines, strict=True))
        known = [
            {(lines[line], text): answers for (line, text), answers in one.items()} for one in self._encoded
        ]
        return Conditioning(job, known)


class Together:
    """The inputs of several pictures in one call: the same arrays as long as theirs stay the same."""

    def __init__(self) -> None:
        self._known: dict[
            tuple[int, ...], tuple[Sequence[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
        ] = {}

    def of(self, parts: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """One picture's rows after another's."""
        if len(parts) == 1:
            return parts[0]
        key = tuple(map(id, parts))  # of objects that are kept beside
        if key not in self._known:
            while len(self._known) >= _MOST_TOGETHER:
                del self._known[next(iter(self._known))]
            rows = {
                name: one if _is_shared(name) else np.concatenate([part[name] for part in parts])
                for name, one in parts[0].items()
            }
            self._known[key] = parts, rows
        return self._known[key][1]


_MOST_TOGETHER = 8  # parts of a call, one for each branch


def _is_shared(name: str) -> bool:
    """Whether an input is one row for all."""
    return name.startswith(SHARED)


def _parts(arrays: Mapping[str, np.ndarray]) -> dict[str, Sequence[Mapping[str, np.ndarray]]]:
    rows = range(max((len(array) for array in arrays.values()), default=0))
    sequential = [
        {name: array if _is_shared(name) else array[i : i + 1] for name, array in arrays.items()}
        for i in rows
    ]
    return {"batched": [arrays], "sequential": sequential}


def encoded(job: Job, chunks: Mapping[str, Chunks], encode: Encode) -> dict[tuple[Line, str], Answers]:
    """What one text encoder answers for the texts of each branch, each as long as the branch's longest.

    One chunk at a time, as diffusers encodes texts one by one, for the same last bits. `encode` is asked for
    the same chunk again: see `remembering`.
    """
    result: dict[tuple[Line, str], Answers] = {}
    for line in job.prompting.lines:
        count = job.prompting.counts(line)
        texts = list(dict.fromkeys(line.texts))
        read = [chunks[text] for text in texts]
        if not job.prompting.plain:
            read = [_filled(one, count, chunks) for one in read]
        states = np.stack([np.stack([encode(ids)[0][0] for ids in one.ids]) for one in read])
        shares = np.array([line.texts.count(text) for text in texts])
        weighed = emphasised(states, np.stack([one.weights for one in read]), shares, job.emphasis)
        for text, one, rows in zip(texts, read, weighed, strict=True):
            result[line, text] = (np.concatenate(rows)[None], *encode(one.ids[0])[1:])
    return result


def remembering(encode: Encode) -> Encode:
    """The same, which encodes each chunk once."""
    known: dict[bytes, Answers] = {}

    def answers(ids: np.ndarray) -> Answers:
        if (key := ids.tobytes()) not in known:
            known[key] = encode(ids)
        return known[key]

    return answers


def _filled(text: Chunks, count: int, chunks: Mapping[str, Chunks]) -> Chunks:
    """A text in so many chunks: the empty text's come after its own, as in A1111."""
    if not (more := count - len(text.ids)):
        return text
    empty = chunks[""]
    return Chunks(
        np.concatenate([text.ids, *[empty.ids] * more]),
        np.concatenate([text.weights, *[empty.weights] * more]),
    )


def emphasised(states: np.ndarray, weights: np.ndarray, shares: np.ndarray, kind: str) -> np.ndarray:
    """States (texts, chunks, length, width) of one schedule, each multiplied by its token's weight.

    "original" restores the mean of each chunk, over all texts of the schedule by their share of its entries,
    as A1111 does. Without weights nothing changes, to the last bit.
    """
    if kind == "ignore" or (weights == 1).all():
        return states
    weighed = states * weights[..., None]
    if kind == "no-norm":
        return weighed
    before, after = (
        np.average(values.mean(axis=(2, 3), dtype=np.float64), axis=0, weights=shares)
        for values in (states, weighed)
    )
    ratio = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    return weighed * ratio.astype(np.float32)[None, :, None, None]
