"""What the model is, read from its configs and the headers of its safetensors files: never a weight, never a
pickle."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TightfitError
from ..placement import Placement
from ..recent import Recent
from .families.family import Extent, Family, Latents, Network, Role
from .graph import Graph
from .tensors import Patch, Tensor

T = TypeVar("T")
ZEROED = "force_zeros_for_empty_prompt"  # of model_index.json


@dataclass(frozen=True)
class Component:
    """One network of the model: the folder it lives in, its config and its tensors by their names in the
    safetensors files, none if it is there as ONNX alone; `graph` is that, and `unreadable` says why there is
    none though there is a file, or that nothing of it is there, and what to do.

    `words` are what a text encoder was taught besides its vocabulary: for each word its vectors (n, width).
    `formats` says in which of kernels/formats.py's each quantised layer is stored; None in a model that is
    not quantised. `pad` is the token that fills up the texts of an encoder of CLIP's own vocabulary; None
    where the model has a tokenizer in a folder: `tokenizer`, or where that is None, the model's own.
    """

    network: Network
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    formats: Mapping[str, str] | None = None
    graph: Graph | None = None
    unreadable: str = ""
    pad: str | None = None
    tokenizer: Path | None = None
    words: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The network's, by which plans place it."""
        return self.network.name

    @property
    def role(self) -> Role:
        return self.network.role

    @property
    def config_file(self) -> Path:
        """What says how it is built: the JSON in its folder, or the one file that it is in."""
        files = (path for path in (self.folder, self.folder.parent) if path.is_file())
        return next(files, self.folder / "config.json")

    @property
    def stored_bytes(self) -> int:
        """Of its weights in the safetensors files."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    def is_ordered(self, placement: Placement) -> bool:
        """Whether a CPU that can puts its plain weights into the order that oneDNN multiplies by: those that
        stay loaded while they are used many times."""
        is_plain = self.formats is None and self.role in (Role.DENOISER, Role.CONTROL)
        return is_plain and placement.ordered

    def adapts(self, other: Component) -> bool:
        """Whether it is the same as `other`, but for what adapters change in their tensors."""
        return self is other or (
            self.tensors.keys() == other.tensors.keys()
            and dataclasses.replace(self, tensors={}) == dataclasses.replace(other, tensors={})
        )

    @functools.cached_property
    def patches(self) -> tuple[Patch, ...]:
        """What adapters change in its tensors."""
        return tuple(
            patch for tensor in self.tensors.values() for patch in tensor.patches if not patch.decodes
        )

    def once(self, topic: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` answers of this component, which never changes: computed for the first who asks for
        the `topic`, and kept as long as the component is."""
        if topic not in self._computed:
            self._computed[topic] = compute()
        return self._computed[topic]

    @functools.cached_property
    def _computed(self) -> dict[Hashable, Any]:
        return {}

    @property
    def engines(self) -> tuple[str, ...]:
        """The backends that can read it."""
        return (*(["torch"] if self.tensors else []), *(["onnx"] if self.graph else []))

    def setting(self, field: str) -> Any:
        """A field of the config, or what the libraries take where it is missing."""
        return self.config.get(field)


@dataclass(frozen=True)
class ModelSpec:
    """A model: what it is made of, and how that works together, which its `design` knows. `scheduler` is its
    scheduler config, and `pipeline` the class that its model_index.json names.

    `components` are its networks by name, in the order a picture needs them. `defaults` are what the folder's
    tightfit.json, if it has one, says of requests that leave something open, `precision` (int8 or int4) what
    it says the weights are stored in, and `source` of which model it was exported. `notes` are what its files
    leave open, and what was taken for it. `sides` are those of the latents of such models, by what they
    predict, where the files leave that open. `spare` reads a network of its files that not every picture
    needs. `settings` are what its model_index.json says besides its parts.
    """

    name: str
    folder: Path
    design: Family
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any]
    precision: str | None = None
    source: str | None = None
    pipeline: str = "StableDiffusionPipeline"
    notes: tuple[str, ...] = ()
    sides: Mapping[str, int] = field(default_factory=dict)
    spare: Callable[[Network], Component] | None = field(default=None, compare=False, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Its family's name."""
        return self.design.name

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        return self.of_role(Role.TEXT)

    @property
    def force_zeros(self) -> bool:
        """Whether a negative prompt that is not given is zeros, where the family has a choice."""
        return bool(self.settings.get(ZEROED))

    @property
    def denoiser(self) -> Component:
        return self.of_role(Role.DENOISER)[0]

    @property
    def decoder(self) -> Component:
        return self.of_role(Role.DECODER)[0]

    def with_components(self, components: Sequence[Component]) -> ModelSpec:
        """This model with these networks besides its own, in the order of their roles: the same object for
        the same networks."""
        return _EXTENDED.get((), lambda: self._with(components), self, *components) if components else self

    def _with(self, components: Sequence[Component]) -> ModelSpec:
        every = {**self.components, **{component.name: component for component in components}}
        order = sorted(every.values(), key=lambda component: [*Role].index(component.role))
        return replace(self, components={component.name: component for component in order})

    def on_demand(self, network: Network) -> Component:
        """One of the networks that not every picture needs, as its family has it, by this one's name: the
        same object for the same model. Raises TightfitError for a model that has it not."""
        place, spare = (network.folder, network.role), self.spare
        own = next((n for n in self.design.on_demand if (n.folder, n.role) == place), None)
        if spare is None or own is None:
            raise TightfitError(f"{self.name} has no {network.name}: use the model it was made from")
        return _SPARE.get(network.name, lambda: spare(replace(own, name=network.name)), self)

    def of_role(self, role: Role) -> tuple[Component, ...]:
        """Its networks that do this, in order."""
        return tuple(component for component in self.components.values() if component.role is role)

    @property
    def unet(self) -> Mapping[str, Any]:
        """The denoiser's config."""
        return self.denoiser.config

    @property
    def vae(self) -> Mapping[str, Any]:
        """The decoder's config."""
        return self.decoder.config

    @property
    def latents(self) -> Latents:
        """What the denoiser takes the noise out of."""
        return self.design.latents(self)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent."""
        return self.latents.pixels

    @property
    def channels_beside(self) -> int:
        """Of the denoiser's input, how many there are beside the latents: of a picture, or of that and its
        mask."""
        return self.inputs(self.denoiser, 1, *self.some_size)["sample"][1] - self.latents.channels

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures the model was trained on. Raises TightfitError if its
        config says none."""
        size = self.unet["sample_size"]
        if size is None:
            raise TightfitError(
                f"{self.denoiser.folder / 'config.json'} has no sample_size: "
                "say --width and --height, or add it"
            )
        if self.corrected and isinstance(size, int) and _before_0_9(self.unet.get("_diffusers_version")):
            size = max(size, 64)  # as StableDiffusionPipeline corrects the configs of 2022
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.downsampling, width * self.downsampling

    @property
    def some_size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture to try the networks with: the native size, if the config
        says one."""
        side = 64 * self.downsampling
        return (side, side) if self.unet["sample_size"] is None else self.native_size

    @property
    def corrected(self) -> bool:
        """Whether diffusers' pipeline corrects older configs as it loads them."""
        return self.design.corrects_configs(self)

    @property
    def latent_consistency(self) -> bool:
        """Whether its pipeline is that of latent consistency models: diffusers', its image to image kin's, or
        Optimum's."""
        return "LatentConsistencyModel" in self.pipeline

    @property
    def consistent(self) -> bool:
        """Whether it was distilled to take few steps, by its pipeline or its U-Net."""
        return self.latent_consistency or bool(self.guidance_width)

    @property
    def default_guidance(self) -> float:
        """What the model's own manifest says, else diffusers' defaults: 7.5, 5.0 for SDXL, 8.5 for latent
        consistency models."""
        return self.defaults.get("guidance_scale", self.design.default_guidance(self))

    @property
    def default_steps(self) -> int:
        return self.design.default_steps(self)

    @property
    def is_distilled(self) -> bool:
        """Whether it was distilled for its guidance, so that a step takes one prediction."""
        return self.design.is_distilled(self)

    def check_takes(self, option: str) -> None:
        """Raise TightfitError for an adapter or a condition that is not for models of this family, by its
        option."""
        if not self.design.is_taken(option):
            what = f"--{option.replace('_', '-')}"
            raise TightfitError(f"{what} is not for {self.design.title}, which {self.name} is: leave it out")

    @property
    def takes_no_guidance(self) -> bool:
        """Whether it is told nothing of a guidance scale either, as some distilled models are."""
        return self.is_distilled and not self.design.is_told_guidance(self)

    @property
    def latent_affine(self) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """What the VAE wants of the U-Net's latents, by channel: latents * first / second + third."""
        return self.design.latent_affine(self)

    def latent_shape(self, extent: Extent) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""
        channels, pixels, _ = self.latents
        return channels, extent.height // pixels, extent.width // pixels

    @property
    def text_length(self) -> int:
        """Tokens of a chunk of text, padded."""
        return min(map(self.length_of, self.text_encoders))

    @staticmethod
    def length_of(encoder: Component) -> int:
        """Tokens of a chunk that this text encoder reads."""
        reading = encoder.network.reading
        return reading.length if reading else encoder.setting("max_position_embeddings")

    @property
    def text_width(self) -> int:
        """Of the texts that the denoiser reads."""
        return self.design.text_width(self)

    @property
    def guidance_width(self) -> int | None:
        """Channels of the guidance embedding that distilled U-Nets (LCM) take in place of classifier-free
        guidance."""
        return self.unet.get("time_cond_proj_dim")

    def inputs(self, component: Component, *extent: Any) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a session is called with, by their names there, for what an Extent has."""
        return component.network.inputs(self, Extent(*extent))


_EXTENDED: Recent[ModelSpec] = Recent(16)
_SPARE: Recent[Component] = Recent(16)


def _before_0_9(version: Any) -> bool:
    parts = re.match(r"v?(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return bool(parts) and (int(parts[1]), int(parts[2] or 0)) < (0, 9)
