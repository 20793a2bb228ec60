"""What this machine is. The only place that probes it, and only when asked."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..errors import TightfitError, first_line
from ..files import cache_folder, parsed, read_bytes
from .hardware import CUDA_CONTEXT, DEVICES, GIB, ROCM_CONTEXT, Hardware, half_is_broken, workspaces_of
from .process import check_address_space, cpu_memory, process_context, resident
from .profiles import (
    OPERATOR_SECONDS,
    PROFILES,
    card_class,
    cards,
    read_profile,
    with_efficiency,
    with_int8,
    with_origin,
)


def detect(device: str = "auto") -> Hardware:
    """The named device, or with "auto" the first of DEVICES that is there. Raises TightfitError if it is
    not."""
    if device not in ("auto", *DEVICES):
        raise TightfitError(f"unknown device '{device}': choose auto, {', '.join(DEVICES)}")
    check_address_space()
    notes: list[str] = []
    for name in DEVICES if device == "auto" else (device,):
        if name == "cpu" or _is_there(name, notes):
            found = {"cpu": _cpu, "mps": _mps}.get(name, _gpu)(name)
            return with_origin(
                _calibrated(replace(found, notes=(*found.notes, *notes), passed_over=tuple(notes)))
            )
    why = f" ({notes[0]})" if notes else ""
    raise TightfitError(
        f"no {device} device can be used here{why}: choose --device cpu, or install a build of torch for it"
    )


# torch's allocator, the driver, cuBLAS and cuDNN when there is no room for a handle, a workspace or a
# kernel's code
_FULL = re.compile("out of memory|ALLOC_FAILED|STATUS_NOT_INITIALIZED")


def _is_there(device: str, notes: list[str]) -> bool:
    """Whether torch can use it; a driver that fails, or a build without kernels for the card, is noted, not
    raised."""
    import torch

    try:
        here = torch.backends.mps.is_available() if device == "mps" else getattr(torch, device).is_available()
        if here and device != "mps":
            getattr(torch, device).mem_get_info()
            _workspaces_kept(device)
    except (RuntimeError, AssertionError, AttributeError) as error:
        lacks = _lacks_kernels(device)
        if not lacks and _FULL.search(str(error)):  # for now: the planner says what is free
            return True
        notes.append(f"torch could not use {device}: {lacks or first_line(error)}")
        return False
    return here


def _lacks_kernels(device: str) -> str | None:
    """What to install where torch was built without kernels for NVIDIA's card that is here; None where it has
    some.

    A build's sm_80 runs on 8.0 to 8.9, its compute_90 is compiled by the driver for whatever is newer.
    """
    import torch

    if device != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    try:
        name, capability, built = (
            torch.cuda.get_device_name(),
            torch.cuda.get_device_capability(),
            torch.cuda.get_arch_list(),
        )
    except (RuntimeError, AssertionError):  # the driver does not even tell that; its first error is told
        return None
    if not built:
        return None
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        if (int(major), int(minor)) <= capability and (kind == "compute" or int(major) == capability[0]):
            return None
    cure = "install a newer one"
    if capability < (7, 5):
        how = "uv pip install --reinstall 'torch<2.14' --torch-backend=cu126"  # those of torch 2.15 have none
        cure = f"install its build for CUDA 12.6 ({how}, or that choice on pytorch.org)"
    if capability < (5, 0):
        cure = "no build has, so use --device cpu"
    return (
        f"torch {torch.__version__} has no kernels for {name}, "
        f"of compute capability {'{}.{}'.format(*capability)}: {cure}"
    )


def empty_cache(device: str) -> None:
    """Have torch's allocator give back to the device what nothing uses: libraries' workspaces, which are made
    again when they are needed, and blocks that were freed."""
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device == "cuda" and clear:
        clear()
    getattr(torch, device).empty_cache()


def _workspaces_kept(device: str) -> tuple[int, ...]:
    """Bytes that libraries keep of the device's memory after a small operation of each kind that networks
    have, each of which has run then. Raises what torch raises where it cannot."""
    import torch

    module: Any = getattr(torch, device)
    empty_cache(device)
    x, image, weight = (
        torch.ones(shape, device=device) for shape in ((64, 64), (1, 8, 16, 16), (8, 8, 3, 3))
    )
    kinds: tuple[Callable[[], object], ...] = (
        lambda: x @ x,
        lambda: torch.nn.functional.linear(x, x, x[0]),  # by cuBLASLt, or hipBLASLt
        lambda: torch.nn.functional.conv2d(image, weight, padding=1),
    )
    kept = []
    for run in kinds:
        before = module.memory_allocated()
        run()
        module.synchronize()
        kept.append(module.memory_allocated() - before)
    return tuple(count for count in kept if count > 0)


def _gpu(device: str) -> Hardware:
    """The current CUDA, ROCm or Intel GPU. Its context exists from here on, so what that takes is not among
    the free bytes any more and is added to them again: it has its own line."""
    import torch

    module: Any = getattr(torch, device)
    name = module.get_device_name()
    rocm = device == "cuda" and torch.version.hip is not None
    capability = module.get_device_capability() if device == "cuda" and not rocm else None
    try:
        workspaces = _workspaces_kept(device)
    except RuntimeError:  # no memory for it, as it has run before
        workspaces = workspaces_of(capability, rocm) if device == "cuda" else ()
    empty_cache(device)
    free, total = module.mem_get_info()
    usual = ROCM_CONTEXT if rocm else CUDA_CONTEXT
    own = _own_context(device, module.memory_reserved()) or usual
    host = cpu_memory()[1]
    like: dict[str, Any] | None = _like(name, total)
    rates = (
        {p: value * 1e12 for p, value in like["tflops"].items()}
        if like
        else _estimated_rates(module, capability)
    )
    notes = [] if like else [f"{name} has no profile: its rates are estimated, run 'tightfit calibrate'"]
    bf16 = capability >= (8, 0) if capability else True  # it came with Ampere
    halves = () if half_is_broken(name, capability) else ("fp16", "bf16") if bf16 else ("fp16",)
    made = Hardware(
        device=device,
        name=name,
        total_bytes=total,
        free_bytes=min(total, free + own),
        context_bytes=max(own, usual),  # kernels that run later are loaded then
        workspaces=workspaces,
        unified=like["unified"] if like else bool(getattr(_properties(module), "is_integrated", False)),
        precisions=(*halves, "fp32"),
        capability=capability,
        rates=with_int8(rates, capability if importlib.util.find_spec("triton") else None),
        bandwidth=like["bandwidth_gb_s"] * 1e9 if like else 300e9,
        bus=like["bus_gb_s"] * 1e9 if like else 12e9,
        host_bytes=host,
        pinnable_bytes=pinnable(host),
        fused_attention=like["fused_attention"] if like else not rocm,
        notes=(
            *notes,
            *_other_allocator(module),
            *_other_processes(device, total - free - module.memory_reserved()),
        ),
    )
    return with_efficiency(made, like)


def _properties(module: Any) -> Any:
    """Of the device that torch uses now, which need not be its first."""
    return module.get_device_properties(module.current_device())


def pinnable(host: int) -> int:
    """Bytes that can be pinned of `host` free ones. WSL2 has refused more than 500 MB (microsoft/WSL#14078)
    and more than 0.75 to 1 GiB (FlashML-org/FreeToken#233), whatever is free. Windows takes half of the
    memory at most for what GPUs share with it, to which pinned memory counts."""
    if "microsoft" in platform.uname().release.lower():
        return min(host, GIB // 2)
    return min(host, psutil.virtual_memory().total // 2) if sys.platform == "win32" else host


# What makes torch's allocator round, split or reserve otherwise than runtime/costs/allocator.py knows.
_OTHER_RULES = (
    "expandable_segments:true",
    "roundup_power2_divisions",
    "max_split_size_mb",
    "large_segment_size_mb",
)


def _other_allocator(module: Any) -> list[str]:
    """A note where torch's allocator is not its own with its defaults, for which memory is predicted."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    settings = ",".join(os.environ.get(name, "") for name in names).lower().replace(" ", "")
    other = [rule for rule in _OTHER_RULES if rule in settings]
    if (kind := getattr(module, "get_allocator_backend", lambda: "native")()) != "native":
        other.insert(0, kind)
    if not other:
        return []
    return [
        f"torch's allocator is set to {', '.join(other)}: memory is predicted for its defaults, so may differ"
    ]


def _estimated_rates(module: Any, capability: tuple[int, int] | None) -> dict[str, float]:
    """From multiprocessors and clock, by the class of the card; of those without one with 128 fp32 lanes
    each, and halves twice as fast where there are tensor cores, which is what the maker leaves GeForce cards
    since the RTX 30."""
    properties, shared = _properties(module), card_class(module.get_device_name(), capability)
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    fp32 = 2.0 * shared.get("lanes", 128) * getattr(properties, "multi_processor_count", 20) * clock
    half = fp32 * shared.get("halves", 2 if capability and capability >= (7, 0) else 1)
    return {"fp32": fp32, "fp16": half, "bf16": half}


def _like(name: str, total: int) -> dict[str, Any] | None:
    """The profile of the card that calls itself so and has about as much memory."""
    profiles = (read_profile(PROFILES / f"{stem}.toml") for stem in cards())
    return next(
        (p for p in profiles if p["name"] == name and abs(p["memory_gib"] * GIB - total) < 0.6 * GIB), None
    )


def driver(device: str, ask: Callable[[Any, Any], float]) -> float | str:
    """What `ask` makes of nvidia-ml-py's module and its handle of torch's current card; in words, why the
    driver cannot tell."""
    import torch

    if device != "cuda" or torch.version.hip:
        return "it is no NVIDIA card"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = _properties(torch.cuda).uuid  # indices differ by CUDA_VISIBLE_DEVICES
        return ask(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:
        return first_line(error)


def _own_context(device: str, reserved: int) -> int:
    """Bytes of this process on the card beside the `reserved` ones of torch's allocator; 0 where the driver
    does not tell them, as on Windows, and in a container, where processes have other numbers."""
    used = driver(
        device,
        lambda nvml, card: sum(
            each.usedGpuMemory or 0
            for each in nvml.nvmlDeviceGetComputeRunningProcesses(card)
            if each.pid == os.getpid()
        ),
    )
    return 0 if isinstance(used, str) else max(0, int(used) - reserved)


def _other_processes(device: str, others: int) -> list[str]:
    """What others hold of the card, and where nvidia-ml-py can tell, how many they are."""
    import torch

    held = [f"{others / GIB:.2f} GiB of it are held by the context and by others"]
    if device != "cuda" or torch.version.hip:
        return held
    count = driver(device, lambda nvml, card: len(nvml.nvmlDeviceGetComputeRunningProcesses(card)))
    if isinstance(count, str):
        return [*held, f"how many programs share the card cannot be told: {count}"]
    return [*held, f"{count} processes compute on it, this one included"]


def _mps(_: str) -> Hardware:
    import torch

    most = torch.mps.recommended_max_memory()
    free = cpu_memory()[1]
    like = _like("Apple M1", 8 * GIB) or {"tflops": {"fp32": 2.6, "fp16": 2.6}, "bandwidth_gb_s": 68.25}
    return Hardware(
        device="mps",
        name=platform.processor() or "Apple GPU",
        total_bytes=psutil.virtual_memory().total,
        free_bytes=min(most, free),
        precisions=("fp16", "fp32"),
        rates={p: value * 1e12 for p, value in like["tflops"].items()},
        bandwidth=like["bandwidth_gb_s"] * 1e9,
        bus=like["bandwidth_gb_s"] * 1e9,
        host_bytes=free,
        fused_attention=False,
        unified=True,
        operator_seconds=OPERATOR_SECONDS,
        seconds_from="the rates of an M1, so they are what is possible at best: run 'tightfit calibrate'",
    )


def _cpu(_: str) -> Hardware:
    total, free = cpu_memory()
    flags, cores = cpu_flags(), psutil.cpu_count(logical=False) or 1
    wide = "avx512f" in flags
    # Two units of 16, 8 or 4 lanes, 2.5 GHz.
    fp32 = cores * 2.5e9 * (64 if wide else 32 if "avx2" in flags else 16)
    half, whole = (
        bool({"amx_bf16", "avx512_bf16"} & flags),
        bool({"amx_int8", "avx512_vnni", "avx_vnni"} & flags),
    )
    own = resident()
    return Hardware(
        device="cpu",
        name=cpu_name(),
        total_bytes=total,
        free_bytes=min(total, free + own),
        precisions=("bf16", "fp32") if half else ("fp32",),
        rates={"fp32": fp32, **({"bf16": 2 * fp32} if half else {}), **({"int8": 4 * fp32} if whole else {})},
        bandwidth=20e9,  # one channel of DDR4-2400
        bus=20e9,
        starts={"product": 4e-5, "int8": 25e-5, "unpack": 5e-5},
        host_bytes=free,
        context_bytes=process_context(own),
        unified=True,
        seconds_from="rates estimated from its cores and instructions: run 'tightfit calibrate'",
    )


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def _calibrated(found: Hardware) -> Hardware:
    """With the rates that `tightfit calibrate` measured here, if it did."""
    try:
        known = parsed(read_bytes(calibration_file())).get(f"{found.device} {found.name}")
        if not known:
            return found
        notes = tuple(note for note in found.notes if "tightfit calibrate" not in note)
        measured = {kind: rate for kind, rate in known.get("rates", {}).items() if kind in found.rates}
        # Than was estimated, so the others too.
        faster = measured["fp32"] / found.rates["fp32"] if "fp32" in measured else 1.0
        known["rates"] = {kind: measured.get(kind, rate * faster) for kind, rate in found.rates.items()}
        origin = {"efficiency": {}, "seconds_from": "rates measured here"}
        return replace(found, **known | origin, calibrated=True, notes=notes)
    except FileNotFoundError:
        return found
    except (OSError, TightfitError, ValueError, TypeError, AttributeError) as error:
        note = f"{calibration_file()} cannot be read ({first_line(error)}): run 'tightfit calibrate' again"
        return replace(found, notes=(*found.notes, note))


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
