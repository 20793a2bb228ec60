"""`tightfit convert`: a pickle's tensors as safetensors, by way of a child process (unpickling.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime import interrupts
from ..runtime.cli.options import taking
from ..runtime.cli.output import say
from ..runtime.errors import TightfitError
from ..runtime.files import WEIGHTS_BYTES, adding, open_regular, replacing
from ..runtime.machine.process import cpu_memory
from ..runtime.models.layouts.safetensors import read_header
from ..runtime.units import shown

SECONDS, BYTES_PER_SECOND = 60.0, 2e7  # to import torch and read a pickle; of a slow disk, to copy tensors
_SLACK = 2**28  # bytes beside the mapped file: the pickle's objects, and a copy of the largest tensor
_AGAIN = "download it again"
# What a file is that is none of torch.save's, by how it begins.
_OTHERS = (
    (b"", "is empty: copy or download it again"),
    (b"<", f"is a web page, as a failed download leaves: {_AGAIN}"),
    (b"version https://git-lfs", f"is a Git LFS pointer, not the file itself: {_AGAIN}"),
    (b"GGUF", "is GGUF, which is no pickle: name it by --model or --unet as it is"),
    (
        b"\x80",
        "is a pickle in torch's old form, of before 1.6: save it anew with torch, in a place you trust",
    ),
)

app = typer.Typer(add_completion=False)

_File = typer.Argument(help="A .ckpt, .pt, .pth or .bin file.", metavar="FILE")
_Output = typer.Option("-o", "--output", help="Default: beside FILE, .safetensors.", metavar="OUT")
_Overwrite = typer.Option("--overwrite", help="Replace OUT if it is there.")


@dataclass(frozen=True)
class Arguments:
    """What is typed after `tightfit convert`."""

    file: Annotated[Path, _File]
    output: Annotated[Path | None, _Output] = None
    overwrite: Annotated[bool, _Overwrite] = False


@app.command()
@taking(Arguments)
def convert(typed: Arguments) -> None:
    """Write a pickled checkpoint or embedding as safetensors, without running any code that it holds."""
    output, written = convert_file(typed.file, typed.output, typed.overwrite)
    parts = [str(output), _counted(written["tensors"], "tensor"), shown(output.stat().st_size)]
    if written["word"]:
        parts.append(f"trained as the word {written['word']}")
    if written["left_out"]:
        parts.append(f"{_counted(written['left_out'], 'other value')} left out")
    say(" · ".join(parts))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def convert_file(
    file: Path, output: Path | None = None, overwrite: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Write the tensors of the pickle `file` to `output`: its path, and the child's answer (`Written`).

    Raises TightfitError for whatever is no plain pickle of tensors. Nothing is half-written, and nothing
    replaced unless told to.
    """
    size = _check_kind(file)
    output = output or file.with_name(f"{file.stem.removeprefix('pytorch_')}.safetensors")
    if output.suffix.lower() != ".safetensors":
        raise TightfitError(
            f"{output} does not end in .safetensors, which is what is written: name such a file"
        )
    interrupts.tidily()
    try:
        if output.exists() and not overwrite:
            raise TightfitError(f"{output} is there: --overwrite replaces it, -o names another")
        with _written(output, overwrite) as places:
            places[0].touch(exist_ok=False)
            answer = _ask(file, places[0], size)
            read_header(places[0])
    except OSError as error:
        raise TightfitError(f"{output} cannot be written ({error.strerror}): name another place") from None
    return places[-1], answer


@contextmanager
def _written(output: Path, overwrite: bool) -> Iterator[list[Path]]:
    """A list: the file to write to, and at the end where it is."""
    if not overwrite:
        with adding(output) as places:
            yield places
        return
    with replacing(output) as partial:
        yield (places := [partial])
    places.append(output)


def _check_kind(file: Path) -> int:
    """Size of a file that may be one of torch.save's. Raises TightfitError that says what it is instead."""
    try:
        with open_regular(file, WEIGHTS_BYTES) as stream:
            head, size = stream.read(64), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise TightfitError(f"{file} cannot be read ({error.strerror}): name another") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise TightfitError(f"{file} is safetensors already: use it as it is")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for begins, what in _OTHERS:
        if start.startswith(begins) if begins else not start:
            raise TightfitError(f"{file} {what}")
    if not head.startswith(b"PK\x03\x04"):
        raise TightfitError(f"{file} is no file of torch.save (it begins with {head[:8]!a}): name another")
    if file.suffix.lower() == ".safetensors":
        raise TightfitError(f"{file} is a pickle by another name: rename it {file.stem}.ckpt to convert it")
    return size


def _paths() -> list[str]:
    """Where the child imports from: as here, but for the current folder, unless this package is in it; last
    then, behind the libraries."""
    home = str(Path(__file__).resolve().parents[2])
    here = {str(Path.cwd()), home}
    return [*(path for path in (str(Path(entry).absolute()) for entry in sys.path) if path not in here), home]


def _ask(file: Path, partial: Path, size: int) -> dict[str, Any]:
    """The answer of the child process, which has written `partial`. Raises TightfitError if it refused the
    file, ended early or took too long."""
    # The file is mapped whole; beside that the child may hold as much again, if that is free.
    memory_bytes = size + min(cpu_memory()[1], size + _SLACK)
    seconds = SECONDS + size / BYTES_PER_SECOND
    task = {"file": str(file), "partial": str(partial), "memory_bytes": memory_bytes}
    paths = os.pathsep.join(_paths())
    try:
        done = subprocess.run(
            # -P: what lies in the current folder, which may be one of downloads, is not imported.
            [sys.executable, "-P", "-m", f"{__package__}.unpickling", json.dumps(task)],
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TightfitError(
            f"{file} is not converted: it was not read within {seconds:.0f} seconds, "
            "so it is no plain list of tensors, or its disk is very slow"
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise TightfitError(
            f"{file} is not converted: the process that read it ended with code {done.returncode}, "
            "as one without memory or with a damaged file does"
        ) from None
    if "refused" in answer:
        raise TightfitError(f"{file} is not converted: {answer['refused']}")
    return answer
