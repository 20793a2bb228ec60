"""What the denoiser predicts, said by a person where the model's files do not, or are wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import TightfitError
from ..files import shortened
from ..models.spec import ModelSpec

_KINDS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Prediction:
    """The model's scheduler config with another prediction_type: "epsilon" or "v_prediction"."""

    option: ClassVar = "prediction"

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with it, of the size that such models are trained at, where its files leave that open
        too. Raises TightfitError for a scheduler that has no prediction type."""
        if "FlowMatch" in str(spec.scheduler.get("_class_name")):
            raise TightfitError(
                f"{spec.name} was trained by flow matching, which predicts neither: leave out --prediction"
            )
        changed = replace(spec, scheduler={**spec.scheduler, "prediction_type": self.kind})
        if (side := spec.sides.get(self.kind)) in (None, spec.unet["sample_size"]):
            return changed
        denoiser = replace(spec.denoiser, config={**spec.unet, "sample_size": side})
        return changed.with_components([denoiser])


def written(text: str) -> Prediction:
    """ "epsilon", "eps", "v" or "v_prediction"."""
    if kind := _KINDS.get(text.strip().lower().replace("-", "_")):
        return Prediction(kind)
    raise TightfitError(f"a denoiser predicts epsilon or v, not {shortened(text)}: say --prediction v")
