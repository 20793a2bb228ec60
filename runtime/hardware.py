"""What the machine is. The only place that probes one, and only when asked."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import psutil

from .errors import TightfitError, first_line
from .files import cache_folder, parsed, read_bytes
from .process import check_address_space, may_hold, resident

DEVICES = ("cuda", "xpu", "mps", "cpu")
PROFILES = Path(__file__).parents[1] / "profiles"
CLASSES = PROFILES / "classes.toml"  # of no card, but what cards of a kind share
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
# ROCm's, with what it loads: 430 to 470 MB beside what torch reserved, in the reports of optimum-benchmark's ROCm runs.
ROCM_CONTEXT = 460 * 2**20
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

# Cards with a TU116 or TU117, as TechPowerUp lists them: GTX 16; MX450 and MX550; T400 to T1200, and T1000 and T2000 with "Quadro"
# before them or not; CMP 30HX. T4 and the Quadro RTX are other chips. Their fp16 convolutions answer NaN (pytorch#58123, on a
# GTX 1660); cudnn.benchmark, which avoids it at times (AUTOMATIC1111#4407, not always: #9916), takes what memory is free, and
# halves what speed there is.
_BROKEN_HALVES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000)|CMP 30HX)\b")

# What the host takes to tell a GPU one operator, by the fastest steps published, divided by the operators of a U-Net as diffusers
# runs it (698 of SD 1.5's, 1708 of SDXL's): 35 us on an RTX 4090, 46 on an A100, 49 at most on an H100 (benchmarks/published.toml).
OPERATOR_SECONDS = 4e-5


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
    `workspaces` are bytes that libraries take through torch's allocator once and keep. `pinnable_bytes` is how much of the host's
    memory can be pinned for copies to a GPU. `efficiency` is the share of the roofline that is reached, by precision, and
    `operator_seconds` what the host takes to tell a GPU one operator of a network. `seconds_from` says in words what predicted
    seconds rest on. `calibrated` says that the rates were measured here, not read; `notes` what could not be found out;
    `passed_over` why a device that would have come first cannot be used.
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
    workspaces: tuple[int, ...] = ()
    pinnable_bytes: int = 2**62
    efficiency: Mapping[str, float] = field(default_factory=dict)
    operator_seconds: float = 0.0
    seconds_from: str = "the maker's rates, so they are what is possible at best"
    passed_over: tuple[str, ...] = ()

    def onnx_providers(self) -> tuple[str, ...]:
        """ONNX Runtime's, asked for now if they have not been."""
        return providers() if self.providers is None else self.providers

    @property
    def half_is_broken(self) -> bool:
        """Whether cuDNN's fp16 convolutions answer NaN here: on TU116 and TU117, by whatever name they are sold."""
        return half_is_broken(self.name, self.capability)

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
        check_address_space()
        notes: list[str] = []
        for name in DEVICES if device == "auto" else (device,):
            if name == "cpu" or _is_there(name, notes):
                found = {"cpu": _cpu, "mps": _mps}.get(name, _gpu)(name)
                return _with_origin(_calibrated(replace(found, notes=(*found.notes, *notes), passed_over=tuple(notes))))
        why = f" ({notes[0]})" if notes else ""
        raise TightfitError(f"no {device} device can be used here{why}: choose --device cpu, or install a build of torch for it")


def half_is_broken(name: str, capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN's fp16 convolutions answer NaN on the card that calls itself so."""
    return capability == (7, 5) and bool(_BROKEN_HALVES.search(name))


def workspaces_of(capability: tuple[int, int] | None, rocm: bool) -> tuple[int, ...]:
    """Bytes that cuBLAS or hipBLAS takes of torch's allocator at its first product, and keeps, by torch's own rule.

    ATen's CublasHandlePool.cpp: ":4096:2:16:8" KiB, and 32 MiB on Hopper; on Blackwell too in some of torch's versions
    (pytorch#175344, #182669), so the larger there. cuBLASLt uses the same one where torch is of 2026 (#168175); before, it kept
    1 MiB of its own (#156495), which is left out. ROCm: 32 MiB; but 128 on gfx94 and gfx95, and 76 more of hipBLASLt's where torch
    prefers that (CUDAHooks.cpp: gfx90a, gfx942, gfx950, gfx12), and no profile is of one of these. All of it comes from the caching
    allocator.
    """
    if rocm:
        return (32 * 2**20,)
    return (32 * 2**20,) if capability and capability[0] in (9, 10, 12) else (8_519_680,)


def cards() -> tuple[str, ...]:
    """The names that `profile` takes, sorted."""
    return tuple(sorted(file.stem for file in PROFILES.glob("*.toml") if file != CLASSES))


def profile(name: str) -> Hardware:
    """The card or machine of `profiles/NAME.toml`, with a desktop running on it. Raises TightfitError for an unknown one."""
    if name.lower() not in cards():
        same = [card for card in cards() if name and card.startswith(name.lower())]  # rtx-3060 is sold with two memories
        close = same or get_close_matches(name.lower(), cards(), 1)
        meant = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise TightfitError(f"unknown hardware '{name}'{meant}: choose {', '.join(cards())}")
    data = read_profile(PROFILES / f"{name.lower()}.toml")
    total, unified, device = int(data["memory_gib"] * GIB), data["unified"], data["device"]
    of_amd = device == "cuda" and "capability" not in data  # torch calls AMD's cards cuda too
    context = PROCESS if device == "cpu" else 0 if unified and device == "mps" else ROCM_CONTEXT if of_amd else CUDA_CONTEXT
    taken = SYSTEM if unified else DESKTOP
    rates = {precision: teraflops * 1e12 for precision, teraflops in data["tflops"].items()}
    gpu, capability = device != "cpu", tuple(data["capability"]) if "capability" in data else None
    halves = () if not gpu or half_is_broken(data["name"], capability) else ("fp16", "bf16")
    others = _AMD if device == "cuda" and not of_amd else {"CUDAExecutionProvider"}
    there = (*(each for each in PROVIDERS[device] if gpu and each not in others), CPU_PROVIDER)
    made = Hardware(
        providers=there,
        device=device,
        name=data["name"],
        total_bytes=total,
        free_bytes=int(total * METAL_SHARE) if device == "mps" else total - taken,
        precisions=(*(p for p in halves if p in rates), "fp32"),
        capability=capability,
        rates=_with_int8(rates, tuple(data.get("capability", ()))),
        bandwidth=data["bandwidth_gb_s"] * 1e9,
        bus=data["bus_gb_s"] * 1e9,
        host_bytes=total - taken if unified else 12 * GIB,
        context_bytes=context,
        workspaces=workspaces_of(capability, of_amd) if device == "cuda" else (),
        fused_attention=data["fused_attention"],
        unified=unified,
        notes=(
            f"the system is taken to hold {SYSTEM / GIB:.0f} GiB of the memory"
            if unified
            else "a desktop is taken to hold 0.5 GB of the card, and 12 GiB of the host's memory to be free",
        ),
    )
    return _with_origin(_with_efficiency(made, data))


def read_profile(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with file.open("rb") as stream:
        return tomllib.load(stream)


@functools.cache
def _classes() -> tuple[dict[str, Any], ...]:
    return tuple(read_profile(CLASSES)["classes"])


def card_class(name: str, capability: tuple[int, int] | None) -> dict[str, Any]:
    """What NVIDIA's cards of this kind share, from profiles/classes.toml; empty where no run of one is published."""
    broken = half_is_broken(name, capability)
    same = (each for each in _classes() if capability and list(capability) == each["capability"])
    return next((each for each in same if each.get("half_is_broken", False) == broken), {})


def _with_efficiency(made: Hardware, known: Mapping[str, Any] | None) -> Hardware:
    """With the share of its rates that published runs reach on it, or on cards of its class; `known` is its profile."""
    efficiency = card_class(made.name, made.capability).get("efficiency", {}) | (known or {}).get("efficiency", {})
    rates = "the maker's rates" if known else "rates estimated from its multiprocessors and clock"
    how = "scaled by published runs of such cards" if efficiency else "so they are what is possible at best"
    told = 0.0 if made.device == "cpu" else OPERATOR_SECONDS
    return replace(made, efficiency=efficiency, operator_seconds=told, seconds_from=f"{rates}, {how}")


def _with_origin(made: Hardware) -> Hardware:
    """With a note of what its seconds rest on."""
    return replace(made, notes=(f"seconds come from {made.seconds_from}", *made.notes))


# torch's allocator, the driver, cuBLAS and cuDNN when there is no room for a handle, a workspace or a kernel's code
_FULL = re.compile("out of memory|ALLOC_FAILED|STATUS_NOT_INITIALIZED")


def _is_there(device: str, notes: list[str]) -> bool:
    """Whether torch can use it; a driver that fails, or a build without kernels for the card, is noted, not raised."""
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
    """What to install where torch was built without kernels for NVIDIA's card that is here; None where it has some.

    A build's sm_80 runs on 8.0 to 8.9, its compute_90 is compiled by the driver for whatever is newer.
    """
    import torch

    if device != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    try:
        name, capability, built = torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
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
    return f"torch {torch.__version__} has no kernels for {name}, of compute capability {'{}.{}'.format(*capability)}: {cure}"


def empty_cache(device: str) -> None:
    """Have torch's allocator give back to the device what nothing uses: libraries' workspaces, which are made again when they are
    needed, and blocks that were freed."""
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device == "cuda" and clear:
        clear()
    getattr(torch, device).empty_cache()


def _workspaces_kept(device: str) -> tuple[int, ...]:
    """Bytes that libraries keep of the device's memory after a small operation of each kind that networks have, each of which
    has run then. Raises what torch raises where it cannot."""
    import torch

    module: Any = getattr(torch, device)
    empty_cache(device)
    x, image, weight = (torch.ones(shape, device=device) for shape in ((64, 64), (1, 8, 16, 16), (8, 8, 3, 3)))
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
    """The current CUDA, ROCm or Intel GPU. Its context exists from here on, so what that takes is not among the free bytes any
    more and is added to them again: it has its own line."""
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
    host = _cpu_memory()[1]
    like: dict[str, Any] | None = _like(name, total)
    rates = {p: value * 1e12 for p, value in like["tflops"].items()} if like else _estimated_rates(module, capability)
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
        rates=_with_int8(rates, capability if importlib.util.find_spec("triton") else None),
        bandwidth=like["bandwidth_gb_s"] * 1e9 if like else 300e9,
        bus=like["bus_gb_s"] * 1e9 if like else 12e9,
        host_bytes=host,
        pinnable_bytes=pinnable(host),
        fused_attention=like["fused_attention"] if like else not rocm,
        notes=(*notes, *_other_allocator(module), *_other_processes(device, total - free - module.memory_reserved())),
    )
    return _with_efficiency(made, like)


def _properties(module: Any) -> Any:
    """Of the device that torch uses now, which need not be its first."""
    return module.get_device_properties(module.current_device())


def pinnable(host: int) -> int:
    """Bytes that can be pinned of `host` free ones. WSL2 has refused more than 500 MB (microsoft/WSL#14078) and more than 0.75 to
    1 GiB (FlashML-org/FreeToken#233), whatever is free. Windows takes half of the memory at most for what GPUs share with it, to
    which pinned memory counts."""
    if "microsoft" in platform.uname().release.lower():
        return min(host, GIB // 2)
    return min(host, psutil.virtual_memory().total // 2) if sys.platform == "win32" else host


# What makes torch's allocator round, split or reserve otherwise than runtime/allocator.py knows.
_OTHER_RULES = ("expandable_segments:true", "roundup_power2_divisions", "max_split_size_mb", "large_segment_size_mb")


def _other_allocator(module: Any) -> list[str]:
    """A note where torch's allocator is not its own with its defaults, for which memory is predicted."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    settings = ",".join(os.environ.get(name, "") for name in names).lower().replace(" ", "")
    other = [rule for rule in _OTHER_RULES if rule in settings]
    if (kind := getattr(module, "get_allocator_backend", lambda: "native")()) != "native":
        other.insert(0, kind)
    if not other:
        return []
    return [f"torch's allocator is set to {', '.join(other)}: memory is predicted for its defaults, so may differ"]


def _with_int8(rates: Mapping[str, float], capability: tuple[int, ...] | None) -> Mapping[str, float]:
    """Where tightfit can use it, the rate of 8-bit whole numbers: on tensor cores since Ampere (kernels/triton_int8.py), which
    multiply twice as many as fp16 where no other rate is known (NVIDIA's GA102 whitepaper, version 2)."""
    able = capability is not None and capability >= (8, 0)
    known = {"int8": 2 * rates["fp16"], **rates} if able else rates
    return {kind: rate for kind, rate in known.items() if able or kind != "int8"}


def _estimated_rates(module: Any, capability: tuple[int, int] | None) -> dict[str, float]:
    """From multiprocessors and clock, by the class of the card; of those without one with 128 fp32 lanes each, and halves twice as
    fast where there are tensor cores, which is what the maker leaves GeForce cards since the RTX 30."""
    properties, shared = _properties(module), card_class(module.get_device_name(), capability)
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    fp32 = 2.0 * shared.get("lanes", 128) * getattr(properties, "multi_processor_count", 20) * clock
    half = fp32 * shared.get("halves", 2 if capability and capability >= (7, 0) else 1)
    return {"fp32": fp32, "fp16": half, "bf16": half}


def _like(name: str, total: int) -> dict[str, Any] | None:
    """The profile of the card that calls itself so and has about as much memory."""
    profiles = (read_profile(PROFILES / f"{stem}.toml") for stem in cards())
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
        uuid = _properties(torch.cuda).uuid  # indices differ by CUDA_VISIBLE_DEVICES
        return ask(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:
        return first_line(error)


def _own_context(device: str, reserved: int) -> int:
    """Bytes of this process on the card beside the `reserved` ones of torch's allocator; 0 where the driver does not tell them, as
    on Windows, and in a container, where processes have other numbers."""
    used = driver(
        device,
        lambda nvml, card: sum(
            each.usedGpuMemory or 0 for each in nvml.nvmlDeviceGetComputeRunningProcesses(card) if each.pid == os.getpid()
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
        operator_seconds=OPERATOR_SECONDS,
        seconds_from="the rates of an M1, so they are what is possible at best: run 'tightfit calibrate'",
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
        context_bytes=process_context(own),
        unified=True,
        seconds_from="rates estimated from its cores and instructions: run 'tightfit calibrate'",
    )


def process_context(own: int | None = None) -> int:
    """Bytes that this process takes before any tensor, from those that it holds now: 100 MiB more for the holes in its heap."""
    return max(PROCESS, (resident() if own is None else own) + 100 * 2**20)


def _cpu_memory() -> tuple[int, int]:
    """Total and available bytes of RAM, as far as the container may use them."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    own = may_hold() - resident()  # by RLIMIT_AS
    if limit is None or limit >= memory.total:
        return memory.total, int(max(0, min(memory.available, own)))
    return limit, int(max(0, min(memory.available, limit - used, own)))


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
    """ONNX Runtime's execution providers that run here; none if it is not installed or cannot be imported. Asked apart, as that
    takes time."""
    return tuple(name for name, problem in provider_problems().items() if problem is None)


@functools.cache
def provider_problems() -> Mapping[str, str | None]:
    """Each provider that ONNX Runtime lists, and in one line why it does not run here, or None if it does.

    It lists those that it was built with, and computes on the CPU where it cannot load one: those for GPUs are tried.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    there = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in there and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):  # where it says what it does not find
            onnxruntime.preload_dlls()  # of CUDA and cuDNN, from torch's folder or NVIDIA's packages
    on_gpu = {name for names in PROVIDERS.values() for name in names} - {CPU_PROVIDER}
    return {name: _provider_problem(onnxruntime, name) if name in on_gpu else None for name in there}


# y = x, of one float: opset 13, version 8 of the format.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def _provider_problem(onnxruntime: Any, name: str) -> str | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[name], enable_fallback=0)
    except Exception as error:  # its classes are not public
        return first_line(error)
    return None if name in session.get_providers() else "its libraries cannot be loaded"


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
        faster = measured["fp32"] / found.rates["fp32"] if "fp32" in measured else 1.0  # than was estimated, so the others too
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
