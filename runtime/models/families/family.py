"""What a family of models is: its networks, and what they are to each other. Data and plain functions; no
engine is imported.

A new family is one file beside this one and one line in FAMILIES (docs/architecture.md has an example, which
a test runs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import Check

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

Shape = tuple[int, ...]


class Role(Enum):
    """What a network does. It decides the stage it runs in and how often it is called; there is no role for
    'all others'."""

    TEXT = "text"
    ENCODER = "encoder"
    CONTROL = "control"
    DENOISER = "denoiser"
    PREVIEW = "preview"
    DECODER = "decoder"

    @property
    def stage(self) -> str:
        return _STAGES[self]


_STAGES = {
    Role.TEXT: "encode",
    Role.ENCODER: "encode",
    Role.CONTROL: "denoise",
    Role.DENOISER: "denoise",
    Role.PREVIEW: "denoise",
    Role.DECODER: "decode",
}
IN_EVERY_PLAN = frozenset({Role.TEXT, Role.DENOISER, Role.DECODER})  # no picture is made without them
STEPPING = frozenset(
    {Role.CONTROL, Role.DENOISER, Role.PREVIEW}
)  # called in turn between the first step and the last, so all are loaded meanwhile
RESIDUAL = "residual_"
"""How inputs of a denoiser are called that its control networks answer: these never leave the device."""
FEATURE = "feature_"
"""How inputs of a denoiser are called that are answered once for a picture to follow."""
REFERENCE = "reference_"
"""How inputs of a denoiser are called that are latents of pictures, which it reads beside its own."""
KEPT = "kept"
"""How the input of a shallow call of a denoiser is called that a full one has answered: it never leaves the
device."""
SHARED = "shared_"
"""How inputs of a denoiser are called that are alike in all rows of a batch: there is one row of them."""
CACHES = FULL, SHALLOW = "full", "shallow"
"""How a denoiser that caches steps is called: all of it, which answers what is kept, or around that."""


class Extent(NamedTuple):
    """What the inputs of one call depend on: rows of a batch, the picture's height and width in pixels, and
    how many times a text encoder's length the texts are. `cache`: of CACHES, where steps are cached.
    `references`: height and width in pixels of each picture that the denoiser reads beside its latents."""

    batch: int
    height: int
    width: int
    chunks: int = 1
    cache: str = ""
    references: tuple[tuple[int, int], ...] = ()


class Latents(NamedTuple):
    """What a denoiser takes the noise out of: its channels, and pixels of the picture along one side of one.
    The picture's sides are multiples of `multiple` pixels."""

    channels: int
    pixels: int
    multiple: int


@dataclass(frozen=True)
class Reading:
    """How a language model reads a text, which CLIP's encoders take in chunks, with a weight for each word.

    The text goes between what `around` has, as a message to the model; its tokens are cut to `most`, and
    padded to a multiple of `length`. A token that pads is ~id, as its place is masked. open_tokenizer: of a
    folder whose files were looked at, with these arguments in place of what they name; the only place that
    imports its class. listed: what model_index.json may say that it is made by. width: of what is answered
    for a token. closed: whether a text that is cut keeps its last tokens, those after the text.
    in_pieces: whether its tokenizer may lie there as pieces of words alone: see layouts/pieces.py.
    """

    around: tuple[str, str]
    length: int
    most: int
    open_tokenizer: Callable[..., Any]
    listed: str
    width: Callable[[Mapping[str, Any]], int]
    closed: bool = False
    in_pieces: bool = False

    @property
    def varies(self) -> bool:
        """Whether longer texts have more tokens."""
        return self.most > self.length


@dataclass(frozen=True)
class GraphNames:
    """How a network is called as ONNX, in Optimum's words.

    `needed` and `optional` are names of inputs. `sides` are (value, count of sides, number of one of them,
    field of the config that says how long it is). `answers` picks from a graph's outputs those that a session
    answers with; it raises ValueError with what is missing. `names` are the graph's names for a session's
    arrays, where they differ. `zeros` are inputs that are added to something, and may be one zero. `takes`
    makes arrays of the graph's shapes of a session's, before they are renamed, and `gives` the session's
    first answer of the graph's and of those arrays, where these are not the same.
    """

    needed: frozenset[str]
    answers: Callable[[Sequence[str]], list[str]]
    optional: frozenset[str] = frozenset()
    sides: tuple[tuple[str, int, int, str], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    takes: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda arrays: arrays
    gives: Callable[[Any, Mapping[str, Any]], Any] = lambda answer, _arrays: answer

    def named(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """A session's arrays, as a graph takes them, by its names."""
        return {self.names.get(name, name): array for name, array in self.takes(arrays).items()}

    def shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of what `takes` makes of a session's arrays of these shapes."""
        import numpy as np

        arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        return {name: array.shape for name, array in self.takes(arrays).items()}


def _of_no_graph(_: Sequence[str]) -> list[str]:
    raise ValueError("a layout that tightfit knows")


NO_GRAPH = GraphNames(frozenset(), _of_no_graph)
"""Of what is not run as ONNX."""


@dataclass(frozen=True)
class Tracing:
    """How a network becomes a graph of Optimum's layout. Its inputs are those of a session, as GraphNames
    takes them.

    sides: for each of these, the names of its sides; "" for one whose length never varies. outputs: what the
    graph answers. size: lengths of named sides to trace at. checked: sizes at which the graph must answer
    what torch answers. "sequence_length" is the model's, where a size does not say it. tokens: inputs that
    are integers, below vocab_size. counts: inputs that are positive, and up to some hundreds. exact: inputs
    that are in fp32 whatever the rest computes in. multiples: of which number a side is a multiple. build:
    makes the module that is traced, where a session's is another. call: calls that module for all `outputs`,
    where a session's call is of other arrays or answers less. following: shapes of inputs that follow from
    the config and the lengths of named sides.
    """

    sides: Mapping[str, tuple[str, ...]]
    outputs: Callable[[Component], tuple[str, ...]]
    size: Mapping[str, int]
    checked: tuple[Mapping[str, int], ...]
    tokens: frozenset[str] = frozenset()
    counts: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    multiples: Mapping[str, int] = field(default_factory=dict)
    build: Callable[[Component], Any] | None = None
    call: Callable[..., tuple[Any, ...]] | None = None
    following: Callable[[Mapping[str, Any], Mapping[str, int]], Mapping[str, Shape]] = lambda *_: {}


@dataclass(frozen=True)
class Network:
    """One network of a family, for every engine and for the exporter alike.

    name: of the component and of its placement in a plan; a graph lies in the folder called so, or in
    graph_folder. folder: of its config and weights in a diffusers folder. listed: what model_index.json may
    say that it is made by, a library and a class, as a regular expression. fields and defaults: what a field
    of its config may be, and is where it is missing. layers: how many layers a config asks for, by the field
    that says so. prefixes: of the names of stored tensors, those that are used. uses: whether a stored tensor
    is, where not all are. decided_by: which field of the config decides whether there is a tensor, by a
    pattern of its name. inputs: shapes of one call, by a session's names. build: its torch module; called
    where tensors are made on meta, and the only place that imports a class of a library. call: calls that
    module with a session's arrays. tokenizer: the folder of a text
    encoder's. reading: None for one that reads as CLIP's do. vocabulary: the last name of the layer that has
    a vector for each token. in_strips: whether the torch engine can run it in strips of rows, as it can
    diffusers' AutoencoderKL; call_in_strips is how, of another module than that.
    least_bits: of its quantised weights, whatever a model is quantised to. tracing: None for what is not
    exported to ONNX. adds: shapes of the inputs that the denoiser has of it. skip: the network read so many
    layers from its end, 1 being the last. call_cached: calls the module of a denoiser that caches steps: it
    answers what is kept, too, or is handed that as KEPT; and that of a control network beside a shallow call.
    adapted_as: how names of its layers begin in adapters' files, beside its folder, and its number among text
    encoders. skips_layers: whether `call` can be told by `skipped`, from 0, to leave layers out.
    """

    name: str
    folder: str
    role: Role
    listed: str
    fields: Mapping[str, Check]
    defaults: Mapping[str, Any]
    layers: Callable[[Mapping[str, Any]], Mapping[str, int]]
    decided_by: Mapping[str, str]
    inputs: Callable[[ModelSpec, Extent], Mapping[str, Shape]]
    build: Callable[[Component], Any]
    call: Callable[..., tuple[Any, ...]]
    graph: GraphNames = NO_GRAPH
    graph_folder: str = ""
    prefixes: tuple[str, ...] = ("",)
    uses: Callable[[str], bool] = lambda _: True
    tokenizer: str = ""
    reading: Reading | None = None
    vocabulary: str = ""
    in_strips: bool = False
    call_in_strips: Callable[..., tuple[Any, ...]] | None = None
    least_bits: int = 4
    skip: Callable[[Component, int], Component] = lambda component, _: component
    tracing: Tracing | None = None
    adds: Callable[[ModelSpec, Extent], Mapping[str, Shape]] = lambda _spec, _extent: {}
    call_cached: Callable[..., tuple[Any, ...]] | None = None
    adapted_as: tuple[str, ...] = ()
    skips_layers: bool = False


class Family:
    """Which models belong to it, and how its networks work together. Stateless. What is not overridden is as
    most have it.

    name: in plans and in files. title: as people call it. reads: how wide the texts are that its published
    models read. networks: in the order in which a picture needs them. on_demand: those that a picture made
    from text alone does not need; each lies in a folder of `networks`. first_step_is_known: whether
    diffusers' pipeline tells the scheduler that it begins with the first step. needs_range: trained in bf16,
    whose range its values may need, so that fp16 is taken only where there is no bf16. takes: the adapters
    and conditions that are for its models, by their options; None is all. tiny_decoder: what files of such
    are called, as a regular expression. latent_rgb: of latents' channels, and a constant: red, green and blue
    in -1..1. align_your_steps: noise levels that were found best for it, if any were. reference_pixels: at
    most of each picture that its denoiser reads beside its latents; 0: it reads none.
    """

    name: str
    title: str = ""
    reads: int = 0
    networks: tuple[Network, ...] = ()
    on_demand: tuple[Network, ...] = ()
    first_step_is_known: bool = False
    needs_range: bool = False
    takes: frozenset[str] | None = None
    tiny_decoder: str = ""
    latent_rgb: tuple[tuple[float, ...], ...] = ()
    align_your_steps: tuple[float, ...] = ()
    reference_pixels: int = 0

    def claims(self, source: Source) -> bool:
        """Whether the model is of this family. The first of FAMILIES that claims it has it."""
        raise NotImplementedError

    @property
    def fuller(self) -> Family:
        """That of the same models with a text encoder more, which these were made to do without."""
        return self

    def check(self, spec: ModelSpec) -> None:
        """Raise TightfitError for networks that do not belong together, or do what is not run."""

    def is_taken(self, option: str) -> bool:
        """Whether an adapter or a condition is for its models, by its option."""
        if option == "reference":
            return self.reference_pixels > 0
        return self.takes is None or option in self.takes

    def default_guidance(self, spec: ModelSpec) -> float:
        raise NotImplementedError

    def default_steps(self, spec: ModelSpec) -> int:
        return 20

    def is_distilled(self, spec: ModelSpec) -> bool:
        """Whether the denoiser was distilled for its guidance, so that a step takes one prediction."""
        return False

    def is_told_guidance(self, spec: ModelSpec) -> bool:
        """Whether a denoiser that was distilled for its guidance reads how much is wanted."""
        return bool(spec.guidance_width)

    def corrects_configs(self, spec: ModelSpec) -> bool:
        """Whether diffusers' pipeline corrects configs of 2022 as it loads them."""
        return False

    def text_width(self, spec: ModelSpec) -> int:
        """Of the texts that the denoiser reads: all text encoders' side by side, unless they are joined
        otherwise."""
        readings = ((encoder.network.reading, encoder.config) for encoder in spec.text_encoders)
        return sum(one.width(config) if one else config["hidden_size"] for one, config in readings)

    def reads_plainly(self, spec: ModelSpec) -> bool:
        """Whether a text is plain words in one piece, without weights: a language model knows none."""
        return any(encoder.network.reading for encoder in spec.text_encoders)

    def latents(self, spec: ModelSpec) -> Latents:
        """What the denoiser takes the noise out of: the VAE's latents, unless it takes them otherwise."""
        pixels = 2 ** (len(spec.vae["block_out_channels"]) - 1)
        return Latents(spec.vae["latent_channels"], pixels, pixels)

    def latent_affine(self, spec: ModelSpec) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """What the decoder wants of the denoiser's latents, by channel: latents * first / second + third."""
        channels = spec.latents.channels
        return (1.0,) * channels, 1.0, (0.0,) * channels

    def overflows_in_half(self, spec: ModelSpec) -> frozenset[Role]:
        """Networks that answer infinities in fp16, so that they compute in another precision."""
        return frozenset()

    def levels(self, spec: ModelSpec, size: tuple[int, int], steps: int) -> np.ndarray | None:
        """Noise levels of a model trained by flow matching, for a picture of this height and width: `steps`
        sigmas in fp32, highest first and without the last, 0. None: as its scheduler alone has them."""
        return None

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        """The denoiser's inputs that stay the same over all steps, the unguided row of a batch first.

        `encoded` has what each text encoder answered, in their order, a row for each text.
        """
        raise NotImplementedError
