"""A machine as data; `detect.py` and `profiles.py` make it."""

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
# ROCm's context and libraries: 430 to 470 MB beyond what torch reserved, in optimum-benchmark's reports of
# ROCm runs.
ROCM_CONTEXT = 460 * 2**20
# Held by an idle desktop: 400 to 600 MB after a fresh boot of Windows 11 with three displays
# (techtactician.com, "hidden VRAM hogs"); 74 to 141 MiB under X.Org (nvidia-docker#1264, #1663). A card from
# a profile is assumed to drive a desktop.
DESKTOP = 500 * 10**6
# Metal's recommendedMaxWorkingSetSize: two thirds of the memory, 5461.34 MB of 8 GiB (chatglm.cpp#76,
# magicoder#19).
METAL_SHARE = 2 / 3
# Held by the system and a desktop in memory shared with the model: assumed, and printed with every such plan.
SYSTEM = 2 * GIB

# Cards with a TU116 or TU117, by TechPowerUp's lists: GTX 16; MX450 and MX550; T400 to T1200, and T1000 and
# T2000 with or without "Quadro"; CMP 30HX. T4 and the Quadro RTX are other chips. fp16 convolutions return
# NaN on them (pytorch#58123, on a GTX 1660). cudnn.benchmark sometimes avoids that (AUTOMATIC1111#4407; not
# always: #9916), but takes all free memory and halves the speed.
_BROKEN_HALVES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000)|CMP 30HX)\b")


@dataclass(frozen=True)
class Hardware:
    """A device that can run a model: detected, read from a profile, or built by hand in a test.

    `precisions` are computed natively, the preferred one first. `total_bytes` and `free_bytes` are of the
    memory that holds the weights; `host_bytes` is free host memory for weights that wait there.
    `context_bytes` is needed before any tensor: the CUDA context, or Python and its libraries. `rates` are
    FLOP/s by precision (a multiply-add is two); 'bf16/plain' is of convolutions whose weights a CPU packs in
    each call, 'fp32/packed' of weights that are packed once; `unpack` and `unpack4` are values/s dequantised.
    `moves` are bytes/s of that packing ('bf16/order'), of norms and the like ('bf16/light') and of filling
    new memory (`fresh`), and values/s made another type while they are read (`bf16`) or quantised
    ('int8/quantise'). `bandwidth`, `bus` and `read` are bytes/s: of the memory, from the host, and from files
    in the page cache. `call_seconds` is the start of one operator, `starts` of the kinds (Operation.kind)
    that take longer, by what is computed in ('bf16/product'), of attentions ('bf16/sdpa'), and of what is
    done once for a network (costs/latency.py, _FIRSTS). `attention_rates` are measured FLOP/s by
    'precision/kind'. `fused_attention`: torch has a kernel here that never stores the scores. `providers` are
    ONNX Runtime's, or None until asked, which takes time. `host_rate` is FLOP/s in fp32 of the processor
    beside a GPU. `workspaces` are bytes that libraries take from torch's allocator once and keep.
    `pinnable_bytes` is host memory that can be pinned for copies to a GPU. `efficiency` is the share of the
    roofline that is reached, by precision; `operator_seconds` is the host's time to issue one operator of a
    network to a GPU. `seconds_from` says what predicted seconds rest on. `calibrated`: the rates were
    measured here. `notes` say what could not be found out, `passed_over` why a preferred device cannot be
    used.
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
    moves: Mapping[str, float] = field(default_factory=dict)
    seconds_from: str = "the maker's rates, so they are a lower bound"
    passed_over: tuple[str, ...] = ()

    def onnx_providers(self) -> tuple[str, ...]:
        """ONNX Runtime's providers, looked up now if they have not been."""
        return providers() if self.providers is None else self.providers

    @property
    def half_is_broken(self) -> bool:
        """Whether cuDNN's fp16 convolutions return NaN here: on TU116 and TU117, whatever their name."""
        return half_is_broken(self.name, self.capability)

    def rate(self, precision: str) -> float:
        """FLOP/s in `precision`, or in fp32 if it is not native."""
        return self.rates.get(precision, self.rates.get("fp32", 1e12))

    def start(self, kind: str) -> float:
        """Seconds that an operator of this kind takes beyond its work."""
        return self.starts.get(kind, self.call_seconds)

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """The named device, or with "auto" the first of DEVICES that works. Raises TightfitError if there is
        none."""
        from .detect import detect

        return detect(device)


def half_is_broken(name: str, capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN's fp16 convolutions return NaN on the card with this name."""
    return capability == (7, 5) and bool(_BROKEN_HALVES.search(name))


def workspaces_of(capability: tuple[int, int] | None, rocm: bool) -> tuple[int, ...]:
    """Bytes that cuBLAS or hipBLAS takes from torch's allocator at its first product and keeps, by torch's
    rule.

    ATen's CublasHandlePool.cpp: ":4096:2:16:8" KiB, and 32 MiB on Hopper. Some versions of torch use 32 MiB
    on Blackwell too (pytorch#175344, #182669), so the larger is assumed there. cuBLASLt shares it since 2026
    (#168175); before, it kept 1 MiB of its own (#156495), which is left out. ROCm: 32 MiB; on gfx94 and gfx95
    128 MiB, and 76 more for hipBLASLt where torch prefers it (CUDAHooks.cpp: gfx90a, gfx942, gfx950, gfx12),
    but no profile is of these. All of it comes from the caching allocator.
    """
    if rocm:
        return (32 * 2**20,)
    return (32 * 2**20,) if capability and capability[0] in (9, 10, 12) else (8_519_680,)
