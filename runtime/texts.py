"""What text encoders answered, kept between processes: a text that is known needs no encoder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .costs import known
from .errors import TightfitError
from .files import cache_folder, read_bytes, replacing
from .models.families.family import Role
from .models.spec import Component
from .models.tensors import Tensor
from .placement import Placement
from .units import parse_bytes
from .versions import installed

if TYPE_CHECKING:
    import numpy as np

    from .machine.hardware import Hardware
    from .planner.plan import Plan
    from .request import Job

ENVIRONMENT = "TIGHTFIT_TEXT_CACHE"
MOST_BYTES = 256 * 2**20  # 1,000 texts of SD 1.5 in fp32, 400 of SDXL
_FILE_BYTES = 2**26  # limit; 512 tokens of three layers of Qwen3-4B are 15 MiB in fp32
_ENGINES = ("onnxruntime", "openvino", "bitsandbytes")  # besides torch's, which known.versions has

Answers = tuple[Any, ...]
"""What a text encoder answers for one chunk of tokens: float32 arrays, its states first."""
Known = frozenset[tuple[str, str]]
"""Text encoders, each with an arithmetic in which all texts of a job are known."""


class Chunk(NamedTuple):
    """A chunk of tokens (length,), the text encoder that reads it, and the machine: what an answer depends on
    besides the arithmetic."""

    encoder: Component
    machine: tuple[Any, ...]
    ids: np.ndarray


class Texts:
    """Answers by their chunk and arithmetic: a file in the cache folder for each.

    Nothing is read or written before `keep`, which commands call, or unless TIGHTFIT_TEXT_CACHE says how many
    bytes there may be; what was used last stays. Names are digests and files hold numbers alone, both for the
    eyes of their user. What is damaged is as if it were not there. Safe to use from threads and processes.
    """

    def __init__(self) -> None:
        self._asked: bool | None = None
        self._bad: set[str] = set()  # of files that were no answers, where they could not be removed

    def keep(self, asked: bool = True) -> None:
        """From here on, or not at all. Raises TightfitError for an environment that says no amount."""
        self._asked = asked
        _ = self.most_bytes

    @property
    def most_bytes(self) -> int:
        """Of all files, 0 where none are kept."""
        said = os.environ.get(ENVIRONMENT, "").strip()
        if self._asked is False or said == "0":
            return 0
        return parse_bytes(said, ENVIRONMENT) if said else MOST_BYTES if self._asked else 0

    def known(self, job: Job, hardware: Hardware) -> Known:
        """In which arithmetics all texts of `job` are known on that machine, by text encoder."""
        if not self.most_bytes or not (there := self._listed()):
            return frozenset()
        own, result = machine(hardware.device, hardware.name), set[tuple[str, str]]()
        for name, rows in _rows(job).items():
            chunks = (Chunk(job.spec.components[name], own, row) for row in rows)
            every = [there.get(_digest(chunk) or "", set()) for chunk in chunks]
            result.update((name, how) for how in set.intersection(*every))
        return frozenset(result)

    def read(self, job: Job, plan: Plan) -> dict[tuple[str, bytes], Answers] | None:
        """The answers for all texts of `job` by encoder and tokens, as the plan has them encoded; None where
        one is not there any more."""
        own, answers = machine(plan.device, plan.hardware), dict[tuple[str, bytes], Answers]()
        for name, rows in _rows(job).items():
            for row in rows:
                chunk = Chunk(job.spec.components[name], own, row)
                if (answer := self.get(chunk, plan.placements[name])) is None:
                    return None
                answers[name, row.tobytes()] = answer
        return answers

    def get(self, chunk: Chunk, placement: Placement) -> Answers | None:
        """The answer, if it is known."""
        if not self.most_bytes or not (path := self._path(chunk, placement)) or path.name in self._bad:
            return None
        try:
            answers = _decoded(path.name, read_bytes(path, _FILE_BYTES), chunk.ids)
        except (OSError, ValueError, LookupError, TightfitError):
            if os.path.lexists(path):  # a link to nowhere, too
                self._bad.add(path.name)
                with suppress(OSError):
                    path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return answers

    def put(self, chunk: Chunk, placement: Placement, answers: Answers) -> None:
        """Keep an answer, in place of those that were used longest ago where there are too many."""
        if not (most := self.most_bytes) or not (path := self._path(chunk, placement)):
            return
        with suppress(OSError):  # then it is encoded again
            if path.exists() and path.name not in self._bad:
                os.utime(path)
                return
            content = _encoded(path.name, answers)
            if not _private(path.parent) or len(content) > min(most, _FILE_BYTES):
                return
            with replacing(path) as partial:
                partial.touch(mode=0o600)
                partial.write_bytes(content)
            self._bad.discard(path.name)
            _bound(path.parent, most)

    @staticmethod
    def _folder() -> Path:
        return cache_folder() / "texts"

    def _path(self, chunk: Chunk, placement: Placement) -> Path | None:
        digest = _digest(chunk)
        return self._folder() / f"{digest}.{arithmetic(placement)}" if digest else None

    def _listed(self) -> Mapping[str, set[str]]:
        """The arithmetics that there are of each digest."""
        there: defaultdict[str, set[str]] = defaultdict(set)
        with suppress(OSError):
            for name in {path.name for path in self._folder().iterdir()} - self._bad:
                digest, _, how = name.partition(".")
                there[digest].add(how)
        return there


TEXTS = Texts()  # those of this process


_CHOSEN_BY = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"


def machine(device: str, name: str) -> tuple[Any, ...]:
    """What of a machine changes the last bits of an answer: how many threads share a sum, and which kernels
    libraries choose, as far as the environment says."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return device, name, count, *map(os.environ.get, _CHOSEN_BY)


def arithmetic(placement: Placement) -> str:
    """What of a placement changes the last bits of an answer."""
    return "-".join(
        filter(None, (placement.backend, placement.provider, placement.precision, placement.compute))
    )


def _rows(job: Job) -> dict[str, list[np.ndarray]]:
    """What each text encoder is called with for all pictures of a job, once each."""
    rows: defaultdict[str, dict[bytes, np.ndarray]] = defaultdict(dict)
    for one in job.pictures or (job,):
        for name, read in one.prompting.rows.items():
            rows[name] |= {row.tobytes(): row for row in read}
    return {name: list(read.values()) for name, read in rows.items()}


def _digest(chunk: Chunk) -> str | None:
    if not (encoder := _identity(chunk.encoder)):
        return None
    said = (_computed_by(), chunk.machine, encoder, chunk.ids.shape, chunk.ids.dtype.str)
    return hashlib.sha256(repr(said).encode() + chunk.ids.tobytes()).hexdigest()


@cache
def _computed_by() -> str:
    """A digest of this package's version and of the libraries'."""
    return hashlib.sha256(repr((known.versions(), *map(installed, _ENGINES))).encode()).hexdigest()


def _identity(encoder: Component) -> str | None:
    """What an encoder is: its config, its tensors with what adapters change in them, the words that it was
    taught, and its files' size and times. None for what is not kept: another program's network, or one whose
    files are not there."""
    said = encoder.once("identity", lambda: _described(encoder))
    if not said:
        return None
    try:
        stats = [path.stat() for path in encoder.once("files", lambda: _files(encoder))]
    except OSError:
        return None
    # The time of its inode too, as images of containers give all files one time.
    return repr((said, [(one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats]))


def _described(encoder: Component) -> str:
    """A digest; "" for what texts cannot tell apart."""
    if encoder.role is not Role.TEXT or not known.is_own(encoder.network):
        return ""
    graph = encoder.graph
    said = repr(
        (
            encoder.name,
            json.dumps(dict(encoder.config), sort_keys=True, default=str),
            sorted((encoder.formats or {}).items()),
            sorted(encoder.tensors.items()),
            list(encoder.words.items()),
            graph and (graph.file, sorted(graph.tensors.items())),
        )
    )
    return "" if " at 0x" in said else hashlib.sha256(said.encode("utf-8", "backslashreplace")).hexdigest()


def _files(encoder: Component) -> list[Path]:
    graph = encoder.graph
    tensors = [*encoder.tensors.values(), *encoder.words.values(), *(graph.tensors.values() if graph else ())]
    files = {file for tensor in tensors for file in _files_of(tensor)}
    return sorted(files | ({graph.file} if graph else set()))


def _files_of(tensor: Tensor) -> Iterator[Path]:
    yield tensor.file
    for patch in tensor.patches:
        for part in patch.tensors:
            yield from _files_of(part)
    for part in tensor.encoding.tensors if tensor.encoding else ():
        yield from _files_of(part)


def _encoded(name: str, answers: Answers) -> bytes:
    """The arrays in the fewest bits that have their values, and a digest."""
    from safetensors.numpy import save

    arrays = [_narrow(array) for array in answers]
    content = save({f"{place}.{kind}": array for place, (kind, array) in enumerate(arrays)})
    return hashlib.sha256(name.encode() + content).digest() + content


def _decoded(name: str, stored: bytes, ids: np.ndarray) -> Answers:
    """Raises TightfitError, ValueError or LookupError for what is no such file, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(name.encode() + content).digest() != digest:
        raise TightfitError(f"{name} is damaged")
    try:
        arrays = sorted((key.partition("."), array) for key, array in load(content).items())
    except SafetensorError as error:
        raise TightfitError(f"{name} is none of ours: {error}") from None
    answers = tuple(_widened(kind, array) for (_, _, kind), array in arrays)
    if answers[0].shape[:2] != (1, len(ids)):
        raise TightfitError(f"{name} is of another length")
    return answers


def _widened(kind: str, array: np.ndarray) -> np.ndarray:
    import numpy as np

    if kind == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _narrow(array: np.ndarray) -> tuple[str, np.ndarray]:
    """A float32 array, and what it is stored as: half of each value where the other half is zero (bf16), or
    as fp16 where that has all of it."""
    import numpy as np

    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "bf16", (bits >> 16).astype(np.uint16)
    with np.errstate(all="ignore"):
        half = array.astype(np.float16)
    if (half.astype(np.float32).view(np.uint32) == bits).all():
        return "fp16", half
    return "fp32", array


def _private(folder: Path) -> bool:
    """Whether it is a folder that this user alone can use: made, or made so, if it can be."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    user = getattr(os, "getuid", lambda: status.st_uid)()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
        return False
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return True


def _bound(folder: Path, most_bytes: int) -> None:
    """Remove what was used longest ago, or was left half-written, until the rest fits."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process removes some too
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
