"""What the machine is. The only place that probes one, and only when asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .providers import providers

DEVICES = ("cuda", "xpu", "mps", "cpu")
GIB = 2**30
_AMD = {"MIGraphXExecutionProvider", "ROCMExecutionProvider"}

# A CUDA context with torch's lazily loaded kernels: 287,047,680 bytes measured in pytorch#86509 (636 MiB
# without lazy loading).
CUDA_CONTEXT = 274 * 2**20
# ROCm's, with what it loads: 430 to 470 MB beside what torch reserved, in the reports of optimum-benchmark's
# ROCm runs.
ROCM_CONTEXT = 460 * 2**20
# Held by an idle desktop: 400 to 600 MB after a fresh boot of Windows 11 with three displays
# (techtactician.com, "hidden VRAM hogs"); 74 to 141 MiB under X.Org (nvidia-docker#1264, #1663). A card that
# is not here is taken to drive a desktop.
DESKTOP = 500 * 10**6
# Metal's recommendedMaxWorkingSetSize: two thirds of the memory, 5461.34 MB of 8 GiB (chatglm.cpp#76,
# magicoder#19).
METAL_SHARE = 2 / 3
# What the system and a desktop hold of a memory that they share with the model: an assumption, printed with
# every such plan.
SYSTEM = 2 * GIB

# Cards with a TU116 or TU117, as TechPowerUp lists them: GTX 16; MX450 and MX550; T400 to T1200, and T1000
# and T2000 with "Quadro" before them or not; CMP 30HX. T4 and the Quadro RTX are other chips. Their fp16
# convolutions answer NaN (pytorch#58123, on a GTX 1660); cudnn.benchmark, which avoids it at times
# (AUTOMATIC1111#4407, not always: #9916), takes what memory is free, and halves what speed there is.
_BROKEN_HALVES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000)|CMP 30HX)\b")


@dataclass(frozen=True)
class Hardware:
    """A device that can run a model: detected, read from a profile, or built by hand in a test.

    `precisions` are those the device computes in natively, the one to prefer first; `total_bytes` and
    `free_bytes` are of the memory the weights would live in, `host_bytes` what is free of the host's for
    weights that wait there. `context_bytes` is what running at all takes, before any tensor: the CUDA
    context, or Python and its libraries. Rates are FLOP/s by precision (a multiplication and an addition are
    two); `bandwidth` and `bus` bytes/s of the memory and from the host; `read` bytes/s from files that the
    system has in its cache; `call_seconds` is what starting one operator takes, and `starts` what one of a
    kind does, where that is more (Operation.kind). `attention_rates` are FLOP/s by 'precision/kind', where
    they were measured. `fused_attention`: torch has a kernel here that never stores the scores. `providers`
    are ONNX Runtime's; None where they have not been asked for yet, as that takes time. `host_rate` is FLOP/s
    of the host's processor beside a GPU, in fp32. `workspaces` are bytes that libraries take through torch's
    allocator once and keep. `pinnable_bytes` is how much of the host's memory can be pinned for copies to a
    GPU. `efficiency` is the share of the roofline that is reached, by precision, and `operator_seconds` what
    the host takes to tell a GPU one operator of a network. `seconds_from` says in words what predicted
    seconds rest on. `calibrated` says that the rates were measured here, not read; `notes` what could not be
    found out; `passed_over` why a device that would have come first cannot be used.
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
        """Whether cuDNN's fp16 convolutions answer NaN here: on TU116 and TU117, by whatever name they are
        sold."""
        return half_is_broken(self.name, self.capability)

    def rate(self, precision: str) -> float:
        """FLOP/s in `precision`; one that is not native runs in fp32."""
        return self.rates.get(precision, self.rates.get("fp32", 1e12))

    def start(self, kind: str) -> float:
        """Seconds that an operator of this kind takes beside its work."""
        return self.starts.get(kind, self.call_seconds)

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """The named device, or with "auto" the first of DEVICES that is there. Raises TightfitError if it is
        not."""
        from .detect import detect

        return detect(device)


def half_is_broken(name: str, capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN's fp16 convolutions answer NaN on the card that calls itself so."""
    return capability == (7, 5) and bool(_BROKEN_HALVES.search(name))


def workspaces_of(capability: tuple[int, int] | None, rocm: bool) -> tuple[int, ...]:
    """Bytes that cuBLAS or hipBLAS takes of torch's allocator at its first product, and keeps, by torch's own
    rule.

    ATen's CublasHandlePool.cpp: ":4096:2:16:8" KiB, and 32 MiB on Hopper; on Blackwell too in some of torch's
    versions (pytorch#175344, #182669), so the larger there. cuBLASLt uses the same one where torch is of 2026
    (#168175); before, it kept 1 MiB of its own (#156495), which is left out. ROCm: 32 MiB; but 128 on gfx94
    and gfx95, and 76 more of hipBLASLt's where torch prefers that (CUDAHooks.cpp: gfx90a, gfx942, gfx950,
    gfx12), and no profile is of one of these. All of it comes from the caching allocator.
    """
    if rocm:
        return (32 * 2**20,)
    return (32 * 2**20,) if capability and capability[0] in (9, 10, 12) else (8_519_680,)
