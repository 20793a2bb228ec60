"""What the machine is. The only place that probes one, and only when asked."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from .errors import TightfitError

DEVICES = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class Hardware:
    """A device that can run a model: detected here, or built by hand in a test.

    `precisions` are those the device computes in natively, the one to prefer first; bytes are those of the memory the
    weights would live in.
    """

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    precisions: tuple[str, ...]
    capability: tuple[int, int] | None = None

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """The named device, or with "auto" the first of DEVICES that is there. Raises TightfitError if it is not."""
        if device not in ("auto", *DEVICES):
            raise TightfitError(f"unknown device '{device}': choose auto, {', '.join(DEVICES)}")
        import torch

        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            if not torch.cuda.is_available():
                raise TightfitError("no CUDA device can be used here: choose --device cpu, or install a CUDA build of torch")
            return cls._cuda()
        memory = psutil.virtual_memory()
        if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
            if not torch.backends.mps.is_available():
                raise TightfitError("there is no Apple GPU (MPS) here: choose --device cpu")
            return cls("mps", platform.processor(), memory.total, memory.available, ("fp16", "fp32"))
        precisions = ("bf16", "fp32") if {"amx_bf16", "avx512_bf16"} & cpu_flags() else ("fp32",)
        return cls("cpu", cpu_name(), memory.total, memory.available, precisions)

    @classmethod
    def _cuda(cls) -> Hardware:
        import torch

        free, total = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        precisions = ("fp16", "bf16", "fp32") if capability >= (8, 0) else ("fp16", "fp32")  # bf16 came with Ampere
        return cls("cuda", torch.cuda.get_device_name(), total, free, precisions, capability)


def cpu_name() -> str:
    """What the processor calls itself, such as 'AMD EPYC'."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty on systems that do not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
