"""The child process of `tightfit convert`: the tensors of a pickle, written as safetensors.

The pickle is read by torch's weights_only unpickler, in a process whose address space is limited where the
system has such limits. `python -m tightfit.export.unpickling TASK` takes a task as JSON (file, partial,
memory_bytes) and answers with one line of JSON: what was written, or why it was refused.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import psutil
import torch

from ..runtime.errors import first_line, out_of_memory
from ..runtime.files import JSON_BYTES, shortened
from ..runtime.units import shown
from .safetensors_file import NAMES, SafetensorsFile

AGAIN = "copy or download it again"
_TENSORS = 10_000  # at most, as many as a safetensors file may have (runtime/models/layouts/safetensors.py)
_SHARES = 4  # tensors may share storage, so that together they take more than the file, but not much more
# torch's readers below this could be made to corrupt memory, weights_only or not (CVE-2026-24747).
_TORCH = "2.10"
# What trainers call the dictionary of tensors. BasicSR writes averages beside what was trained: those count.
_STATES = ("state_dict", "params_ema", "params")
# What trainers' files hold beside tensors. The unpickler builds a StandIn for each, never the thing itself.
_STOOD_FOR = (
    "torch.nn.modules.container.ParameterDict",  # string_to_param of the first embeddings
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # of the first Stable Diffusion
    "numpy.core.multiarray.scalar",  # Lightning's best score
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


class RefusedError(Exception):
    """Why a file is not converted, as 'it …'."""


class StandIn:
    """Takes whatever a pickle passes to the class or function that it stands for, and does nothing."""

    state: Any = None

    def __new__(cls, *_: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class Written:
    """What a conversion wrote, and how many values of the dictionary it left out, as they are no weights."""

    tensors: int
    left_out: int
    word: str | None
    """Of an A1111 embedding: what its trainer called it."""


def convert(file: Path, partial: Path) -> Written:
    """Write the tensors of `file` to `partial`. Raises RefusedError, or what torch does for bad pickles."""
    size = file.stat().st_size
    check_zip(file, size)
    entries = load(file)
    word = entries.get("name") if "string_to_param" in entries else None
    tensors, left_out = weights(entries)
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if total > _SHARES * size:
        raise RefusedError(f"its tensors take {shown(total)}, and the file has {shown(size)}: {AGAIN}")
    # Values of more bytes come first, so that each begins at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda named: -named[1].itemsize)
    try:
        with SafetensorsFile(partial, {name: (t.dtype, t.shape) for name, t in ordered}) as stream:
            for name, tensor in ordered:
                stream.write(name, tensor)
    except OSError as error:
        raise RefusedError(
            f"it cannot be written ({error.strerror}): make room, or name another place with -o"
        ) from None
    return Written(len(tensors), left_out, word if isinstance(word, str) else None)


def check_zip(file: Path, size: int) -> None:
    """Refuse a zip that torch.save did not write: compressed, larger inside than outside, or of code."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
    except (BadZipFile, EOFError, NotImplementedError, ValueError):
        raise RefusedError(
            f"it is truncated or damaged, as its list of contents cannot be read: {AGAIN}"
        ) from None
    if _named(entries, "constants.pkl"):
        raise RefusedError(
            "it is TorchScript, which is a program: save the model's state_dict in a place you trust"
        )
    inside = sum(entry.file_size for entry in entries)
    if inside > size or any(entry.compress_type for entry in entries):
        raise RefusedError(
            f"it is compressed or unpacks to more than it has ({shown(inside)} of {shown(size)}), "
            f"and torch.save does neither: {AGAIN}"
        )
    pickles = _named(entries, "data.pkl")
    if len(pickles) != 1:
        raise RefusedError(
            "it is a zip file without a data.pkl, so torch.save did not write it: name another"
        )
    if pickles[0].file_size > JSON_BYTES:
        raise RefusedError(f"its pickle alone has {shown(pickles[0].file_size)}, as no model's has: {AGAIN}")


def _named(entries: list[ZipInfo], name: str) -> list[ZipInfo]:
    return [entry for entry in entries if entry.filename.split("/", 1)[-1] == name]


def load(file: Path) -> dict[Any, Any]:
    """The dictionary in a pickle, its tensors mapped from the file and not yet read."""
    with torch.serialization.safe_globals([(StandIn, name) for name in _STOOD_FOR]):
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if unsafe:
            raise RefusedError(
                f"it asks for {shortened(min(unsafe))}, which could run code and is no part of a tensor: "
                "use it nowhere else either, unless you trust where it comes from"
            )
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise RefusedError(f"it holds a {type(loaded).__name__}, no dictionary of tensors: name another")
    return loaded


def weights(entries: dict[Any, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Tensors by their names, and the number of entries that are none.

    Known are a dictionary of tensors, one in `state_dict` or an upscaler's `params_ema` or `params` with a
    training's leftovers beside it, and an A1111 embedding. Raises RefusedError for any other.
    """
    if "string_to_param" in entries:
        vectors = [value for value in _plain(entries["string_to_param"]).values() if _is_tensor(value)]
        if len(vectors) != 1:
            raise RefusedError(f"it is an embedding of {len(vectors)} words, not of one: name another")
        return {"emb_params": checked("emb_params", vectors[0])}, len(entries) - 1
    state, beside = entries, 0
    if (inner := next((name for name in _STATES if isinstance(entries.get(name), dict)), None)) is not None:
        state, beside = entries[inner], len(entries) - 1
    if nested := next((key for key, value in state.items() if isinstance(value, dict)), None):
        raise RefusedError(
            f"it has a dictionary within its dictionary, {shortened(nested)}: "
            f"only one called {', '.join(_STATES)} is opened"
        )
    tensors = {key: checked(key, value) for key, value in state.items() if _is_tensor(value)}
    if not 0 < len(tensors) <= _TENSORS:
        raise RefusedError(f"it holds {len(tensors)} tensors, and a model has 1 to {_TENSORS}: name another")
    return tensors, beside + len(state) - len(tensors)


def _plain(value: Any) -> dict[Any, Any]:
    """A dictionary, or the one inside the stand-in for a ParameterDict."""
    state = value.state.get("_parameters") if isinstance(value, StandIn) and value.state else value
    return state if isinstance(state, dict) else {}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def checked(name: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor if it is one that safetensors can hold: named, dense, in memory, of a known type."""
    if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
        raise RefusedError(f"it has a tensor called {shortened(name)}, which is no name: {AGAIN}")
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.dtype not in NAMES:
        kind = tensor.layout if tensor.device.type == "cpu" else tensor.device.type
        raise RefusedError(
            f"its {shortened(name)} is of a kind that safetensors lacks ({tensor.dtype}, {kind}): "
            "name another"
        )
    return tensor.detach().resolve_neg()


def limit_memory(more_bytes: int) -> None:
    """Let this process map so many bytes more. Does nothing on Windows, and on systems that refuse."""
    try:
        import resource
    except ImportError:
        return
    with suppress(AttributeError, OSError, ValueError):  # macOS may refuse what it does not enforce
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        allowed = psutil.Process().memory_info().vms + more_bytes
        wanted = allowed if soft in (resource.RLIM_INFINITY, -1) else min(allowed, soft)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def answer(file: Path, partial: Path, memory_bytes: int | None) -> dict[str, Any]:
    """What `convert` wrote, as JSON, or {"refused": why}. `memory_bytes` of None sets no limit."""
    if torch.__version__ < _TORCH:
        return {
            "refused": f"torch {torch.__version__} reads pickles unsafely: install torch {_TORCH} or newer"
        }
    if memory_bytes is not None:
        limit_memory(memory_bytes)
    try:
        return asdict(convert(file, partial))
    except RefusedError as error:
        return {"refused": str(error)}
    except Exception as error:  # of torch, zipfile or the pickle itself, which document none
        if out_of_memory(error):
            return {
                "refused": "it needs more memory than a file of its size may take, or than there is: "
                "close what else uses it, or name another"
            }
        if isinstance(error, UnpicklingError):
            return {"refused": f"its pickle does what no list of tensors needs: {AGAIN}"}
        return {"refused": f"it cannot be read ({first_line(error)[:200]}): {AGAIN}"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    print(json.dumps(answer(Path(task["file"]), Path(task["partial"]), task["memory_bytes"])))
