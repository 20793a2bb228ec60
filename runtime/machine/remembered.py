"""What torch says of this machine. Commands remember it, so that the next one plans without importing torch,
which takes longer than planning."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from ..errors import TightfitError
from ..files import cache_folder, parsed, read_bytes, replacing
from .process import cpu_flags, cpu_name

_MOST = 16  # circumstances that are remembered: other threads, other versions, other machines of one home
# What torch's answers depend on besides the machine, by the beginning of its name.
_SETTINGS = (
    *("ATEN_", "GOMP_", "KMP_", "MKL_", "OMP_", "DNNL_", "ONEDNN_", "PYTORCH_", "TORCH_", "LD_"),
    *("CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ONEAPI_", "SYCL_", "ZE_"),
)
# What asks torch: an answer is none to the question that another version of this package has.
_ASKING = Path(__file__), Path(__file__).parents[2] / "kernels/onednn.py"
# Where Linux shows an accelerator: NVIDIA's, its Jetsons', Windows' of WSL, AMD's, any GPU, NPUs.
_NODES = (
    *("dev/nvidia*", "proc/driver/nvidia*", "dev/nvhost*", "dev/nvmap", "dev/nvgpu*", "dev/dxg"),
    *("dev/kfd", "dev/dri/renderD*", "dev/accel/*"),
)
# A driver that makes these nodes when it is first asked leaves the device on the bus alone.
_VENDORS, _KINDS = ("0x10de", "0x1002", "0x8086"), ("0x03", "0x12")  # display controllers, accelerators


@dataclass(frozen=True)
class Said:
    """`version` of torch, how many `threads` it computes with, for which CPU its kernels are (`capability`),
    the precisions in which it `packs` weights there, and whether it can use no device but the CPU."""

    version: str
    threads: int
    capability: str
    packs: tuple[str, ...]
    only_cpu: bool


class Torch:
    """What torch says, for who asks and need not compute.

    Nothing is remembered before `keep`, which commands call. What it said is taken for the same circumstances
    alone: its build, who asks, the processor, the environment, and what looks like an accelerator. Where
    anything does, and torch is built for one, torch is asked.
    """

    def __init__(self) -> None:
        self._keeps = False
        self._here = ""

    def keep(self) -> None:
        """From here on, in the cache folder."""
        self._keeps = True

    def said(self) -> Said:
        """As remembered, or by torch, which is imported for it."""
        if self._remembered:
            return self._remembered
        said = _asked()
        if self._here:
            with suppress(OSError):  # then it is asked again
                _write(_file(), self._here, said)
            self._here = ""
        return said

    @property
    def only_cpu(self) -> bool:
        """Whether it is known without importing torch that it can use no device but the CPU."""
        return self._remembered is not None and self._remembered.only_cpu

    @cached_property
    def _remembered(self) -> Said | None:
        """What is remembered, once something asks: a help text does not."""
        if not self._keeps:
            return None
        with suppress(OSError, ValueError):  # where torch is not installed as a folder
            self._here = _circumstances()
        return _read(_file()).get(self._here)


TORCH = Torch()  # of this process


def _asked() -> Said:
    import torch

    from ...kernels import onednn

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Said(
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        tuple(name for name, dtype in kinds.items() if onednn.multiplies(dtype)),
        False,
    )


def _only_cpu() -> bool:
    """Whether this build of torch is for CPUs alone, or neither torch nor the system knows of more."""
    import torch

    built = torch.version
    may = built.cuda or built.hip or getattr(built, "xpu", None) or torch.backends.mps.is_built()
    if not may or any(_accelerators(Path("/"))):
        return not may
    with suppress(RuntimeError, AssertionError, AttributeError):  # as detection says
        return not (torch.cuda.is_available() or torch.xpu.is_available())
    return False


def _file() -> Path:
    return cache_folder() / "torch.json"


def _circumstances() -> str:
    """A digest of what torch's answers depend on."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin if spec and spec.origin else "").with_name("version.py")
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS))
    processor = cpu_name(), sorted(cpu_flags()), count, psutil.cpu_count(logical=False)
    build = str(version), version.stat().st_mtime_ns, version.read_bytes()
    asking = [file.read_bytes() for file in _ASKING]
    said = (build, asking, processor, settings, sorted(_accelerators(Path("/"))))
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _accelerators(root: Path) -> Iterator[str]:
    """What looks like one. On systems other than Linux, which show none in files, their name."""
    if sys.platform != "linux":
        yield sys.platform
    for node in _NODES:
        yield from map(str, root.glob(node))
    for device in root.glob("sys/bus/pci/devices/*"):
        with suppress(OSError):
            vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
            if vendor.startswith(_VENDORS) and kind.startswith(_KINDS):
                yield device.name


def _read(file: Path) -> dict[str, Said]:
    """By the circumstances; nothing of a file that is damaged."""
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, TightfitError):
        return {here: _said(stored) for here, stored in parsed(read_bytes(file)).items()}
    return {}


def _said(stored: Mapping[str, Any]) -> Said:
    said = Said(**{**stored, "packs": tuple(stored["packs"])})
    kinds = [type(value) for value in asdict(said).values()]
    if kinds != [str, int, str, tuple, bool]:
        raise TypeError(kinds)
    return said


def _write(file: Path, here: str, said: Said) -> None:
    known = {one: asdict(other) for one, other in _read(file).items() if one != here}
    known[here] = asdict(said) | {"only_cpu": _only_cpu()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(json.dumps(dict([*known.items()][-_MOST:])))
