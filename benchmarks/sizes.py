"""Bytes of a model in every precision, on disk and loaded, against bitsandbytes, which only quantises
linears.

    python -m tightfit.benchmarks.sizes sd15 sd15-int8 sd15-int4 sdxl sdxl-int8 sdxl-int4

Models are diffusers folders, plain or from `tightfit export`; plain ones stand for fp16. "Loaded" is what a
session holds to compute in fp16: weights, and the quantised layers' shared buffer. bitsandbytes' bytes follow
from the layers' shapes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from .. import inspect
from ..runtime.backends.torch import loading as weights
from ..runtime.backends.torch import networks
from ..runtime.models.spec import Component, ModelSpec
from ..runtime.placement import Placement
from .record import record


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("models", nargs="+")
    rows = []
    for model in parse.parse_args().models:
        spec = inspect(model)
        precision = spec.precision or "fp16"
        ours = {name: sizes(part, precision) for name, part in spec.components.items()}
        rows.append(row(spec, precision, ours))
        if spec.precision is None:
            for kind in ("int8", "nf4"):
                component_bytes = {name: bitsandbytes(part, kind) for name, part in spec.components.items()}
                rows.append(
                    row(
                        spec,
                        f"bitsandbytes {kind}",
                        {name: (size, size) for name, size in component_bytes.items()},
                    )
                )
    for result in rows:
        print("  ".join(f"{name} {value}" for name, value in result.items()))
    record("sizes", rows)


def row(spec: ModelSpec, precision: str, component_bytes: dict[str, tuple[int, int]]) -> dict[str, object]:
    """Decimal gigabytes of the U-Net and of everything, on disk and loaded."""
    disk, loaded = (sum(pair[i] for pair in component_bytes.values()) for i in (0, 1))
    unet = component_bytes[spec.denoiser.name]
    names = {"unet disk": unet[0], "unet loaded": unet[1], "all disk": disk, "all loaded": loaded}
    return {
        "model": Path(spec.name).name,
        "precision": precision,
        **{name: round(count / 1e9, 3) for name, count in names.items()},
    }


def sizes(component: Component, precision: str) -> tuple[int, int]:
    """Bytes on disk (a plain model counts two per value, however it is stored) and loaded."""
    module = _module(component, precision)
    on_disk = component.stored_bytes if component.formats else 2 * sum(p.numel() for p in module.parameters())
    return on_disk, sum(weights.held(module, torch.float16)) + sum(weights.beside(module, torch.float16))


def bitsandbytes(component: Component, kind: str) -> int:
    """int8: one byte per weight and an fp32 scale per output. nf4: half a byte, and an fp32 scale per 64
    weights."""
    total = 0
    module = _module(component, "fp16")
    for path, parameter in module.named_parameters():
        linear = path.endswith(".weight") and isinstance(
            module.get_submodule(path.removesuffix(".weight")), torch.nn.Linear
        )
        bytes_per_value = (
            {"int8": 1 + 4 / math.prod(parameter.shape[1:]), "nf4": 0.5 + 4 / 64}[kind] if linear else 2.0
        )
        total += round(parameter.numel() * bytes_per_value)
    return total


def _module(component: Component, precision: str) -> torch.nn.Module:
    return networks.build(component, Placement("torch", precision, "fp16", "staged", "sdpa", "whole"), "cuda")


if __name__ == "__main__":
    main()
