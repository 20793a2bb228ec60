"""Step caching of U-Nets (Ma, Fang and Wang 2023, "DeepCache", arXiv 2312.00858): what is deep inside changes
little from one step to the next, so a full step keeps it, and a shallow one runs the outermost layers around
that: the first convolution, the last layer of the last block, and what makes the prediction of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .family import FEATURE, KEPT, RESIDUAL, Shape

if TYPE_CHECKING:
    from ..spec import ModelSpec

_VIEW = "_outermost"


def kept_shape(spec: ModelSpec, batch: int, height: int, width: int) -> Shape:
    """What is kept: the maps between the last two layers. `height` and `width` are of the latents."""
    return batch, spec.unet["block_out_channels"][0], height, width


def predict(call: Any, module: Any, sample: Any, timestep: Any, **others: Any) -> tuple[Any, ...]:
    """The prediction, and what is to be kept, of a full call; of one that is handed KEPT the prediction.
    `call` calls the module."""
    if KEPT not in others:
        with _keeping(module) as kept:
            return *call(module, sample, timestep, **others), *kept
    view = _of_unet(module)
    view.mid_block.maps = others.pop(KEPT)
    near = {name: value for name, value in others.items() if not name.startswith((RESIDUAL, FEATURE))}
    if (added := others.get(f"{RESIDUAL}0")) is not None:  # that of the middle is in what was kept
        near |= {f"{RESIDUAL}0": added, f"{RESIDUAL}1": sample.new_zeros(())}
    try:
        return call(view, sample, timestep, **near)
    finally:
        view.mid_block.maps = None


def control(call: Any, module: Any, sample: Any, timestep: Any, **others: Any) -> tuple[Any, ...]:
    """What a ControlNet answers for a shallow call of the U-Net, which reads the first of its answers alone.
    Another ControlNet's before it is added."""
    before = others.pop(f"{RESIDUAL}0", None)
    answer, _ = call(_of_controlnet(module), sample, timestep, **others)
    return (answer if before is None else before + answer,)


@contextmanager
def _keeping(module: Any) -> Iterator[list[Any]]:
    """While this lasts, the maps that are to be kept are noted."""
    last, kept = module.up_blocks[-1], []
    before_last = (getattr(last, "attentions", None) or last.resnets)[-2]
    hook = before_last.register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        yield kept
    finally:
        hook.remove()


def _of_unet(module: Any) -> Any:
    """The U-Net with its outermost layers alone, and in their middle what was kept."""
    if _VIEW not in vars(module):
        from torch import nn

        class Kept(nn.Module):
            maps: Any = None

            def forward(self, *_: Any) -> Any:
                return self.maps

        last = module.up_blocks[-1]
        layers = {name: nn.ModuleList([getattr(last, name)[-1]]) for name in ("resnets", "attentions")
                  if hasattr(last, name)}  # fmt: skip
        last = nn.ModuleList([_with(last, **layers)])
        view = _with(module, down_blocks=nn.ModuleList(), mid_block=Kept(), up_blocks=last)
        vars(module)[_VIEW] = view
    return vars(module)[_VIEW]


def _of_controlnet(module: Any) -> Any:
    """The ControlNet with what makes its first answer alone."""
    if _VIEW not in vars(module):
        from torch import nn

        parts: dict[str, Any] = {"down_blocks": nn.ModuleList(), "mid_block": None}
        vars(module)[_VIEW] = _with(module, **parts, controlnet_mid_block=nn.Identity())
    return vars(module)[_VIEW]


def _with(module: Any, **parts: Any) -> Any:
    """The same module, its hooks and weights, with other parts."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    vars(other).pop("forward", None)  # a dry run's, which is of all parts
    return other
