"""What the machine is. The only place that probes one, and only when asked."""

from __future__ import annotations

import functools
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from .errors import TightfitError, first_line
from .files import cache_folder
from .process import resident

DEVICES = ("cuda", "xpu", "mps", "cpu")
PROFILES = Path(__file__).parents[1] / "profiles"
GIB = 2**30
CPU_PROVIDER = "CPUExecutionProvider"
# ONNX Runtime's providers for each device, the one to prefer first.
PROVIDERS = {
    "cuda": ("CUDAExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider"),
    "xpu": ("OpenVINOExecutionProvider", "DmlExecutionProvider"),
    "mps": ("CoreMLExecutionProvider",),
    "cpu": (CPU_PROVIDER,),
}
_AMD = {"MIGraphXExecutionProvider", "ROCMExecutionProvider"}
# The packages onnxruntime-… that have them.
PACKAGES = {"cuda": "gpu", "migraphx": "migraphx", "rocm": "rocm", "dml": "directml", "openvino": "openvino"}

# A CUDA context with torch's lazily loaded kernels: 287,047,680 bytes measured in pytorch#86509 (636 MiB without lazy loading).
CUDA_CONTEXT = 274 * 2**20
# Held by an idle desktop: 400 to 600 MB after a fresh boot of Windows 11 with three displays (techtactician.com, "hidden VRAM
# hogs"); 74 to 141 MiB under X.Org (nvidia-docker#1264, #1663). A card that is not here is taken to drive a desktop.
DESKTOP = 500 * 10**6
# Metal's recommendedMaxWorkingSetSize: two thirds of the memory, 5461.34 MB of 8 GiB (chatglm.cpp#76, magicoder#19).
METAL_SHARE = 2 / 3
# What the system and a desktop hold of a memory that they share with the model: an assumption, printed with every such plan.
SYSTEM = 2 * GIB
# Python with torch, diffusers and transformers, what oneDNN keeps, and the holes in the heap: what the process held beyond its
# tensors was 399 to 598 MiB in first runs of emoji and of SD 1.5 at 256 and 512, in bf16 and int4 (`tightfit … --json`,
# process_bytes less peak_bytes; 2 cores, torch 2.13).
PROCESS = 600 * 2**20


@dataclass(frozen=True)
class Hardware:
    """A device that can run a model: detected, read from a profile, or built by hand in a test.

    `precisions` are those the device computes in natively, the one to prefer first; `total_bytes` and `free_bytes` are of the
    memory the weights would live in, `host_bytes` what is free of the host's for weights that wait there. `context_bytes` is
    what running at all takes, before any tensor: the CUDA context, or Python and its libraries. Rates are FLOP/s by
    precision (a multiplication and an addition are two); `bandwidth` and `bus` bytes/s of the memory and from the host; `read`
    bytes/s from files that the system has in its cache; `call_seconds` is what starting one operator takes, and `starts` what
    one of a kind does, where that is more (memory.Operation).
    `attention_rates` are FLOP/s by 'precision/kind', where they were measured. `fused_attention`: torch has a kernel here that
    never stores the scores.
    `providers` are ONNX Runtime's; None where they have not been asked for yet, as that takes time. `host_rate` is FLOP/s of the
    host's processor beside a GPU, in fp32.
    `calibrated` says that the rates were measured here, not read; `notes` what could not be found out.
    """

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    precisions: tuple[str, ...]
    capability: tuple[int, int] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float = 50e9
    bus: float = 12e9
    host_bytes: int = 8 * GIB
    context_bytes: int = 0
    fused_attention: bool = True
    unified: bool = False
    read: float = 2e9
    call_seconds: float = 1e-5
    starts: Mapping[str, float] = field(default_factory=dict)
    attention_rates: Mapping[str, float] = field(default_factory=dict)
    calibrated: bool = False
    notes: tuple[str, ...] = ()
    providers: tuple[str, ...] | None = None
    host_rate: float = 1e11

    def onnx_providers(self) -> tuple[str, ...]:
        """ONNX Runtime's, asked for now if they have not been."""
        return providers() if self.providers is None else self.providers

    def rate(self, precision: str) -> float:
        """FLOP/s in `precision`; one that is not native runs in fp32."""
        return self.rates.get(precision, self.rates.get("fp32", 1e12))

    def start(self, kind: str) -> float:
        """Seconds that an operator of this kind takes beside its work."""
        return self.starts.get(kind, self.call_seconds)

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """The named device, or with "auto" the first of DEVICES that is there. Raises TightfitError if it is not."""
        if device not in ("auto", *DEVICES):
            raise TightfitError(f"unknown device '{device}': choose auto, {', '.join(DEVICES)}")
        notes: list[str] = []
        for name in DEVICES if device == "auto" else (device,):
            if name == "cpu" or _is_there(name, notes):
                found = {"cpu": _cpu, "mps": _mps}.get(name, _gpu)(name)
                return _calibrated(replace(found, notes=(*found.notes, *notes)))
        why = f" ({notes[0]})" if notes else ""
        raise TightfitError(f"no {device} device can be used here{why}: choose --device cpu, or install a build of torch for it")


def profile(name: str) -> Hardware:
    """The card or machine of `profiles/NAME.toml`, with a desktop running on it. Raises TightfitError for an unknown one."""
    known = sorted(file.stem for file in PROFILES.glob("*.toml"))
    if name.lower() not in known:
        raise TightfitError(f"unknown hardware '{name}': choose {', '.join(known)}")
    data = read_profile(PROFILES / f"{name.lower()}.toml")
    total, unified, device = int(data["memory_gib"] * GIB), data["unified"], data["device"]
    context = PROCESS if device == "cpu" else 0 if unified and device == "mps" else CUDA_CONTEXT
    taken = SYSTEM if unified else DESKTOP
    rates = {precision: teraflops * 1e12 for precision, teraflops in data["tflops"].items()}
    gpu = device != "cpu"
    of_amd = device == "cuda" and "capability" not in data  # torch calls AMD's cards cuda too
    others = _AMD if device == "cuda" and not of_amd else {"CUDAExecutionProvider"}
    there = (*(each for each in PROVIDERS[device] if gpu and each not in others), CPU_PROVIDER)
    return Hardware(
        providers=there,
        device=device,
        name=data["name"],
        total_bytes=total,
        free_bytes=int(total * METAL_SHARE) if device == "mps" else total - taken,
        precisions=(*(p for p in ("fp16", "bf16") if p in rates and gpu), "fp32"),
        capability=tuple(data["capability"]) if "capability" in data else None,
        rates=_with_int8(rates, tuple(data.get("capability", ()))),
        bandwidth=data["bandwidth_gb_s"] * 1e9,
        bus=data["bus_gb_s"] * 1e9,
        host_bytes=total - taken if unified else 12 * GIB,
        context_bytes=context,
        fused_attention=data["fused_attention"],
        unified=unified,
        notes=(
            "rates are the maker's, so seconds are what is possible at best",
            f"the system is taken to hold {SYSTEM / GIB:.0f} GiB of the memory"
            if unified
            else "a desktop is taken to hold 0.5 GB of the card, and 12 GiB of the host's memory to be free",
        ),
    )


def read_profile(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with file.open("rb") as stream:
        return tomllib.load(stream)


def _is_there(device: str, notes: list[str]) -> bool:
    """Whether torch can use it; a driver that fails is noted, not raised."""
    import torch

    try:
        here = torch.backends.mps.is_available() if device == "mps" else getattr(torch, device).is_available()
        if here and device != "mps":
            getattr(torch, device).mem_get_info()
    except (RuntimeError, AssertionError, AttributeError) as error:
        notes.append(f"torch could not use {device}: {first_line(error)}")
        return False
    return here


def _gpu(device: str) -> Hardware:
    """The current CUDA, ROCm or Intel GPU. Its context exists from here on, so what that takes is not among the free bytes any
    more and is added to them again: it has its own line."""
    import torch

    module: Any = getattr(torch, device)
    free, total = module.mem_get_info()
    name = module.get_device_name()
    rocm = device == "cuda" and torch.version.hip is not None
    capability = module.get_device_capability() if device == "cuda" and not rocm else None
    like: dict[str, Any] | None = _like(name, total)
    rates = {p: value * 1e12 for p, value in like["tflops"].items()} if like else _estimated_rates(module, capability)
    notes = [] if like else [f"{name} has no profile: its rates are estimated, run 'tightfit calibrate'"]
    bf16 = capability >= (8, 0) if capability else True  # it came with Ampere
    return Hardware(
        device=device,
        name=name,
        total_bytes=total,
        free_bytes=min(total, free + CUDA_CONTEXT),
        context_bytes=CUDA_CONTEXT,
        unified=like["unified"] if like else bool(getattr(module.get_device_properties(0), "is_integrated", False)),
        precisions=("fp16", *(["bf16"] if bf16 else []), "fp32"),
        capability=capability,
        rates=_with_int8(rates, capability if importlib.util.find_spec("triton") else None),
        bandwidth=like["bandwidth_gb_s"] * 1e9 if like else 300e9,
        bus=like["bus_gb_s"] * 1e9 if like else 12e9,
        host_bytes=_cpu_memory()[1],
        fused_attention=like["fused_attention"] if like else not rocm,
        notes=(*notes, *_other_processes(device, total - free - module.memory_reserved())),
    )


def _with_int8(rates: Mapping[str, float], capability: tuple[int, ...] | None) -> Mapping[str, float]:
    """Where tightfit can use it, the rate of 8-bit whole numbers: on tensor cores since Ampere (kernels/triton_int8.py), which
    multiply twice as many as fp16 where no other rate is known (NVIDIA's GA102 whitepaper, version 2)."""
    able = capability is not None and capability >= (8, 0)
    known = {"int8": 2 * rates["fp16"], **rates} if able else rates
    return {kind: rate for kind, rate in known.items() if able or kind != "int8"}


def _estimated_rates(module: Any, capability: tuple[int, int] | None) -> dict[str, float]:
    """From multiprocessors and clock: 128 fp32 lanes each (64 on Turing); tensor cores do four times as much in fp16."""
    properties = module.get_device_properties(module.current_device())
    lanes = 64 if capability and capability[0] == 7 else 128
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    fp32 = 2.0 * lanes * getattr(properties, "multi_processor_count", 20) * clock
    return {"fp32": fp32, "fp16": 4 * fp32 if capability and capability >= (7, 0) else fp32, "bf16": 4 * fp32}


def _like(name: str, total: int) -> dict[str, Any] | None:
    """The profile of the card that calls itself so and has about as much memory."""
    profiles = (read_profile(file) for file in sorted(PROFILES.glob("*.toml")))
    return next((p for p in profiles if p["name"] == name and abs(p["memory_gib"] * GIB - total) < 0.6 * GIB), None)


def driver(device: str, ask: Callable[[Any, Any], float]) -> float | str:
    """What `ask` makes of nvidia-ml-py's module and its handle of torch's current card; in words, why the driver cannot tell."""
    import torch

    if device != "cuda" or torch.version.hip:
        return "it is no NVIDIA card"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid  # indices differ by CUDA_VISIBLE_DEVICES
        return ask(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:
        return first_line(error)


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
    free = _cpu_memory()[1]
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
        notes=("its rates are those of an M1: run 'tightfit calibrate'",),
    )


def _cpu(_: str) -> Hardware:
    total, free = _cpu_memory()
    flags, cores = cpu_flags(), psutil.cpu_count(logical=False) or 1
    wide = "avx512f" in flags
    fp32 = cores * 2.5e9 * (64 if wide else 32 if "avx2" in flags else 16)  # two units of 16, 8 or 4 lanes, 2.5 GHz
    half, whole = bool({"amx_bf16", "avx512_bf16"} & flags), bool({"amx_int8", "avx512_vnni", "avx_vnni"} & flags)
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
        context_bytes=max(PROCESS, own + 100 * 2**20),  # of which 100 MiB for the holes
        unified=True,
        notes=("its rates are estimated from its cores and instructions: run 'tightfit calibrate'",),
    )


def _cpu_memory() -> tuple[int, int]:
    """Total and available bytes of RAM, as far as the container may use them."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, max(0, min(memory.available, limit - used))


def cgroup_memory(root: Path, own: Path) -> tuple[int | None, int]:
    """The memory limit of this process's control group (version 1 or 2), None without one, and what it uses of that.

    Pages of files that can be dropped do not count as used.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return None, 0
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in _CGROUP:
            folder = root / kinds
            own_group = folder / path.strip("/")
            groups = [own_group, *(p for p in own_group.parents if p == folder or folder in p.parents)]
            found = [limits for group in groups if (limits := _read_cgroup(group, *_CGROUP[kinds]))]
            if found:  # the tightest of the group and those it is in; inside a container its own folder is the root
                return min(found, key=lambda limits: limits[0] - limits[1])
    return None, 0


# The files that tell limit, use and pages that can be dropped: of version 2 and version 1, by the controllers' name.
_CGROUP = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _read_cgroup(place: Path, limit_file: str, used_file: str, inactive_name: str) -> tuple[int, int] | None:
    try:
        limit = (place / limit_file).read_text().strip()
        used = int((place / used_file).read_text())
        rows = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
        return None if limit == "max" else (int(limit), max(0, used - int(rows[inactive_name])))
    except (OSError, ValueError, KeyError):  # another version's files, or none here
        return None


def provider_name(provider: str) -> str:
    """As it is called for short: cuda for CUDAExecutionProvider."""
    return provider.lower().removesuffix("executionprovider")


@functools.cache
def providers() -> tuple[str, ...]:
    """ONNX Runtime's execution providers; none if it is not installed or cannot be imported. Asked apart, as that takes time."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def _calibrated(found: Hardware) -> Hardware:
    """With the rates that `tightfit calibrate` measured here, if it did."""
    try:
        known = json.loads(calibration_file().read_text()).get(f"{found.device} {found.name}")
        if not known:
            return found
        notes = tuple(note for note in found.notes if "tightfit calibrate" not in note)
        measured = {kind: rate for kind, rate in known.get("rates", {}).items() if kind in found.rates}
        faster = measured["fp32"] / found.rates["fp32"] if "fp32" in measured else 1.0  # than was estimated, so the others too
        known["rates"] = {kind: measured.get(kind, rate * faster) for kind, rate in found.rates.items()}
        return replace(found, **known, calibrated=True, notes=notes)
    except FileNotFoundError:
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
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
