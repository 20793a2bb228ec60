"""Detects this machine. The only module that probes it, and only on request."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..errors import TightfitError, first_line
from ..files import cache_folder, parsed, read_bytes
from .hardware import CUDA_CONTEXT, DEVICES, GIB, ROCM_CONTEXT, Hardware, half_is_broken, workspaces_of
from .process import (
    check_address_space,
    cores,
    cpu_flags,
    cpu_memory,
    cpu_name,
    process_context,
    resident,
)
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
from .remembered import TORCH


def detect(device: str = "auto") -> Hardware:
    """The named device, or with "auto" the first of DEVICES that works. Raises TightfitError if there is
    none."""
    if device not in ("auto", *DEVICES):
        raise TightfitError(f"unknown device '{device}': choose auto, {', '.join(DEVICES)}")
    check_address_space()
    notes: list[str] = []
    for name in DEVICES if device == "auto" else (device,):
        if name == "cpu" or _is_there(name, notes):
            hardware = {"cpu": _cpu, "mps": _mps}.get(name, _gpu)(name)
            return with_origin(
                _calibrated(replace(hardware, notes=(*hardware.notes, *notes), passed_over=tuple(notes)))
            )
    why = f" ({notes[0]})" if notes else ""
    raise TightfitError(
        f"no {device} device can be used here{why}: choose --device cpu, or install a build of torch for it"
    )


# Out of memory in the words of torch's allocator, the driver, cuBLAS and cuDNN (no room for a handle, a
# workspace or a kernel's code).
_FULL = re.compile("out of memory|ALLOC_FAILED|STATUS_NOT_INITIALIZED")


def _is_there(device: str, notes: list[str]) -> bool:
    """Whether torch can use the device. A failing driver, or a build without kernels for the card, is noted,
    not raised."""
    if TORCH.only_cpu:
        return False
    import torch

    try:
        usable = (
            torch.backends.mps.is_available() if device == "mps" else getattr(torch, device).is_available()
        )
        if usable and device != "mps":
            getattr(torch, device).mem_get_info()
            _workspaces_kept(device)
    except (RuntimeError, AssertionError, AttributeError) as error:
        lacks = _lacks_kernels(device)
        if not lacks and _FULL.search(str(error)):  # full for now: the planner reports what is free
            return True
        notes.append(f"torch could not use {device}: {lacks or first_line(error)}")
        return False
    return usable


def _lacks_kernels(device: str) -> str | None:
    """What to install if torch was built without kernels for this NVIDIA card, else None.

    A build's sm_80 runs on 8.0 to 8.9. Its compute_90 is compiled by the driver for anything newer.
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
    except (RuntimeError, AssertionError):  # the driver does not say; its first error is reported
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
    """Have torch's allocator return unused memory to the device: freed blocks, and libraries' workspaces,
    which are allocated again when needed."""
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device == "cuda" and clear:
        clear()
    getattr(torch, device).empty_cache()


def _workspaces_kept(device: str) -> tuple[int, ...]:
    """Bytes that libraries keep on the device after one small operation of each kind that networks have. Also
    checks that each kind runs: raises what torch raises if not."""
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
    """The current CUDA, ROCm or Intel GPU. Its context exists from now on and is no longer among the free
    bytes. It is added to them again, because plans list it separately."""
    import torch

    module: Any = getattr(torch, device)
    name = module.get_device_name()
    rocm = device == "cuda" and torch.version.hip is not None
    capability = module.get_device_capability() if device == "cuda" and not rocm else None
    try:
        workspaces = _workspaces_kept(device)
    except RuntimeError:  # out of memory: it has run before
        workspaces = workspaces_of(capability, rocm) if device == "cuda" else ()
    empty_cache(device)
    free, total = module.mem_get_info()
    usual = ROCM_CONTEXT if rocm else CUDA_CONTEXT
    context = _own_context(device, module.memory_reserved()) or usual
    host = cpu_memory()[1]
    like: dict[str, Any] | None = _like(name, total)
    rates = (
        {p: value * 1e12 for p, value in like["tflops"].items()}
        if like
        else _estimated_rates(module, capability)
    )
    notes = [] if like else [f"{name} has no profile: its rates are estimated, run 'tightfit calibrate'"]
    bf16 = capability >= (8, 0) if capability else True  # since Ampere
    halves = () if half_is_broken(name, capability) else ("fp16", "bf16") if bf16 else ("fp16",)
    made = Hardware(
        device=device,
        name=name,
        total_bytes=total,
        free_bytes=min(total, free + context),
        context_bytes=max(context, usual),  # later kernels are loaded lazily
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
    """Properties of torch's current device, which need not be the first."""
    return module.get_device_properties(module.current_device())


def pinnable(host: int) -> int:
    """How many of `host` free bytes can be pinned. WSL2 has refused more than 500 MB (microsoft/WSL#14078)
    and more than 0.75 to 1 GiB (FlashML-org/FreeToken#233), whatever was free. Windows lets GPUs share at
    most half of the memory, pinned memory included."""
    if "microsoft" in platform.uname().release.lower():
        return min(host, GIB // 2)
    return min(host, psutil.virtual_memory().total // 2) if sys.platform == "win32" else host


# Settings by which torch's allocator rounds, splits or reserves differently from runtime/costs/allocator.py.
_OTHER_RULES = (
    "expandable_segments:true",
    "roundup_power2_divisions",
    "max_split_size_mb",
    "large_segment_size_mb",
)


def _other_allocator(module: Any) -> list[str]:
    """A note if torch's allocator is not the default one, for which memory is predicted."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    settings = ",".join(os.environ.get(name, "") for name in names).lower().replace(" ", "")
    changed = [rule for rule in _OTHER_RULES if rule in settings]
    if (kind := getattr(module, "get_allocator_backend", lambda: "native")()) != "native":
        changed.insert(0, kind)
    if not changed:
        return []
    return [
        f"torch's allocator is set to {', '.join(changed)}: predictions assume its defaults and may be off"
    ]


def _estimated_rates(module: Any, capability: tuple[int, int] | None) -> dict[str, float]:
    """FLOP/s from multiprocessors and clock, by the card's class. A card without a class counts 128 fp32
    lanes per multiprocessor, and halves at twice the rate if it has tensor cores, as GeForce cards since the
    RTX 30."""
    properties, shared = _properties(module), card_class(module.get_device_name(), capability)
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    fp32 = 2.0 * shared.get("lanes", 128) * getattr(properties, "multi_processor_count", 20) * clock
    half = fp32 * shared.get("halves", 2 if capability and capability >= (7, 0) else 1)
    return {"fp32": fp32, "fp16": half, "bf16": half}


def _like(name: str, total: int) -> dict[str, Any] | None:
    """The profile of the card with this name and about this much memory."""
    profiles = (read_profile(PROFILES / f"{stem}.toml") for stem in cards())
    return next(
        (p for p in profiles if p["name"] == name and abs(p["memory_gib"] * GIB - total) < 0.6 * GIB), None
    )


def driver(device: str, ask: Callable[[Any, Any], float]) -> float | str:
    """`ask(pynvml, handle of torch's current card)`, or the reason why the driver cannot tell."""
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
    """Bytes of this process on the card beyond the `reserved` bytes of torch's allocator. 0 if the driver
    does not report them, as on Windows, or in a container, where process ids differ."""
    used = driver(
        device,
        lambda nvml, card: sum(
            process.usedGpuMemory or 0
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(card)
            if process.pid == os.getpid()
        ),
    )
    return 0 if isinstance(used, str) else max(0, int(used) - reserved)


def _other_processes(device: str, others_bytes: int) -> list[str]:
    """Notes: how much of the card others hold and, if nvidia-ml-py can tell, how many processes there are."""
    import torch

    notes = [f"{others_bytes / GIB:.2f} GiB of it are held by the context and by others"]
    if device != "cuda" or torch.version.hip:
        return notes
    count = driver(device, lambda nvml, card: len(nvml.nvmlDeviceGetComputeRunningProcesses(card)))
    if isinstance(count, str):
        return [*notes, f"the number of programs on the card is unknown: {count}"]
    return [*notes, f"{count} processes compute on it, this one included"]


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
        seconds_from="the rates of an M1, so they are a lower bound: run 'tightfit calibrate'",
    )


# Of a CPU that was not calibrated, for each core: as measured on an AMD EPYC with AVX-512
# (benchmarks/seconds.py).
_CORE = 1.65e9
_UNPACKING = {"unpack": 2.4e9, "unpack4": 1.1e9}
_MOVES = {
    "fresh": 1.5e9,
    "bf16/order": 3e9,
    "fp32/order": 3e9,
    "bf16": 7e8,
    "fp32": 2e9,
    "bf16/light": 5e9,
    "fp32/light": 8e9,
    "int8/quantise": 1.65e8,
    "int4/quantise": 2.8e7,
}
_STARTS = {"": 1.5e-5, "product": 6e-5, "int8": 4e-4, "unpack": 1e-4}
_STARTS |= {"bf16/plain": 2e-4, "fp32/plain": 1e-4, "fp32/product": 2e-5}
_STARTS |= {"bf16/sdpa": 2e-4, "bf16/sliced": 1e-3, "fp32/sdpa": 2e-4, "fp32/sliced": 5e-3}
# FLOP/s of attentions and of products, of fp32's. AMX was measured on a Xeon of the fifth generation, where
# torch's fused attention takes half of the time that `sliced` does.
_ATTENTIONS = {"bf16/sdpa": 0.73, "bf16/sliced": 1.0, "fp32/sdpa": 0.57, "fp32/sliced": 0.41}
_AMX_ATTENTIONS = _ATTENTIONS | {"bf16/sdpa": 1.8, "bf16/sliced": 0.9}
_PRODUCTS, _AMX_PRODUCTS = {"bf16": 2, "int8": 4}, {"bf16": 6, "int8": 8}


def _cpu(_: str) -> Hardware:
    total, free = cpu_memory()
    flags = cpu_flags()
    wide = "avx512f" in flags
    # Two units of 16, 8 or 4 lanes at 2.5 GHz, of which products of matrices reach two thirds.
    fp32 = cores() * _CORE * (64 if wide else 32 if "avx2" in flags else 16)
    half, int8 = (
        bool({"amx_bf16", "avx512_bf16"} & flags),
        bool({"amx_int8", "avx512_vnni", "avx_vnni"} & flags),
    )
    tiles = "amx_bf16" in flags
    products = _AMX_PRODUCTS if tiles else _PRODUCTS
    attentions = _AMX_ATTENTIONS if tiles else _ATTENTIONS
    resident_bytes = resident()
    return Hardware(
        device="cpu",
        name=cpu_name(),
        total_bytes=total,
        free_bytes=min(total, free + resident_bytes),
        precisions=("bf16", "fp32") if half else ("fp32",),
        rates={
            "fp32": fp32,
            **({"bf16": products["bf16"] * fp32} if half else {}),
            **({"int8": products["int8"] * fp32} if int8 else {}),
            **{kind: cores() * rate for kind, rate in _UNPACKING.items()},
        },
        bandwidth=20e9,  # one channel of DDR4-2400
        bus=20e9,
        starts=_STARTS,
        attention_rates={kind: share * fp32 for kind, share in attentions.items()},
        moves={kind: cores() * rate for kind, rate in _MOVES.items()},
        host_bytes=free,
        context_bytes=process_context(resident_bytes),
        unified=True,
        seconds_from="rates estimated from its cores and instructions: run 'tightfit calibrate'",
    )


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def _calibrated(hardware: Hardware) -> Hardware:
    """`hardware` with the rates that `tightfit calibrate` measured here, if any."""
    try:
        fields = parsed(read_bytes(calibration_file())).get(f"{hardware.device} {hardware.name}")
        return with_rates(hardware, fields) if fields else hardware
    except FileNotFoundError:
        return hardware
    except NotADirectoryError:
        file = next(path for path in calibration_file().parents if path.exists())
        note = (
            f"{file} is no folder, so nothing is remembered there: give XDG_CACHE_HOME another, or remove it"
        )
        return replace(hardware, notes=(*hardware.notes, note))
    except (OSError, TightfitError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        note = f"{calibration_file()} cannot be read ({first_line(error)}): run 'tightfit calibrate' again"
        return replace(hardware, notes=(*hardware.notes, note))


def with_rates(hardware: Hardware, fields: Mapping[str, Any]) -> Hardware:
    """`hardware` with what `calibrate` measured, on as many cores as this process has now."""
    fields = dict(fields)
    notes = tuple(note for note in hardware.notes if "tightfit calibrate" not in note)
    if hardware.device == "cpu" and "fp32/module" not in fields.get("starts", {}):
        notes += ("calibrated by an older tightfit: run 'tightfit calibrate' again",)
    known = fields.get("rates", {}).items()
    measured = {kind: rate for kind, rate in known if kind.partition("/")[0] in hardware.rates}
    # Rates that were not measured scale with fp32's ratio of measured to estimated.
    faster = measured["fp32"] / hardware.rates["fp32"] if "fp32" in measured else 1.0
    fields["rates"] = {kind: rate * faster for kind, rate in hardware.rates.items()} | measured
    _scale(fields, cores() / fields.pop("cores", cores()))
    origin = {"efficiency": {}, "seconds_from": "rates measured here"}
    return replace(hardware, **fields | origin, calibrated=True, notes=notes)


def _scale(fields: dict[str, Any], share: float) -> None:
    """Rates that were measured with more cores, or fewer, than this process has now."""
    for name in fields.keys() & {"rates", "attention_rates", "moves"}:
        fields[name] = {kind: rate * share for kind, rate in fields[name].items()}
