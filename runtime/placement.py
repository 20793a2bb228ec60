"""The words that planner and engines share: how one network of a model runs."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("torch", "onnx", "openvino", "bitsandbytes")
GRAPHS = ("onnx", "openvino")  # those that run ONNX graphs
COMPUTES = ("fp32", "bf16", "fp16")
STORED = ("int8", "int4")  # what weights can be exported in
DYNAMIC = "int8-dynamic"
QUANTISED = ("int8", DYNAMIC, "int4")
PRECISIONS = (*COMPUTES, *QUANTISED)
RESIDENCIES = ("resident", "staged", "streamed")
ATTENTIONS = ("sdpa", "sliced", "chunked")
TILINGS = ("whole", "tiled")
CFG = ("batched", "sequential")
# What the fields of a Placement may be, but for its provider.
CHOICES = {
    "backend": BACKENDS,
    "precision": PRECISIONS,
    "compute": COMPUTES,
    "residency": RESIDENCIES,
    "attention": ATTENTIONS,
    "tiling": TILINGS,
}
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Placement:
    """How one component runs.

    precision: of the weights. compute: what it computes in, the same unless the weights are quantised.
    int8-dynamic: weights as in int8, multiplied in whole numbers by inputs that are quantised as they come.
    residency: `resident` (stays loaded), `staged` (loaded for its stage, freed after it) or `streamed` (its
    weights flow through it block by block, but for `kept_bytes` of its largest blocks, which are loaded for
    the stage). attention: torch's `sdpa`, or ours in kernels/attention.py. tiling, of the VAE: `whole`, or
    `tiled`, in strips of rows (kernels/strips.py). provider: ONNX Runtime's, empty for torch. packed: weights
    in fp32 lie as oneDNN multiplies by them on a CPU, which is faster and rounds otherwise than diffusers; in
    bf16 they always do, unless compiled. compiled: of the denoiser, blocks that repeat are compiled by torch,
    each kind once. captured: calls of the denoiser are CUDA graphs.
    """

    backend: str
    precision: str
    compute: str
    residency: str
    attention: str
    tiling: str
    provider: str = ""
    kept_bytes: int = 0
    packed: bool = False
    compiled: bool = False
    captured: bool = False

    @property
    def arithmetic(self) -> str:
        """'bf16', or, of quantised weights, 'int8 in bf16'."""
        return self.precision if self.precision == self.compute else f"{self.precision} in {self.compute}"

    @property
    def ordered(self) -> bool:
        """Whether plain weights that stay loaded lie as oneDNN multiplies by them, where a CPU calls them
        many times. The compiler takes no such weights."""
        is_plain = self.precision == self.compute and self.residency != "streamed"
        return is_plain and (self.packed or (self.compute == "bf16" and not self.compiled))
