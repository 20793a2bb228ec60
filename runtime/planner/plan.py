"""What a plan is: every decision about a run, what it will take, and whether and why it was chosen. Saved and
read as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..conditions import networks as networks_of_conditions
from ..errors import TightfitError
from ..files import read_bytes
from ..machine.hardware import DEVICES
from ..models.families import role_of
from ..models.families.family import IN_EVERY_PLAN, Role
from ..placement import CFG, CHOICES, QUANTISED, Placement
from ..request import MOST_CACHED
from ..units import shown

VERSION = 5
MOST_PER_CALL = 16
"""Pictures that go through the U-Net at once."""
_REFUSED = "is refused: "  # how the reason of a refused plan begins


class Verdict(Enum):
    """Whether a plan can be taken. The `reason` beside it is prose for people: no decision is read from
    that."""

    FITS = "fits"
    TOO_LARGE = "too large"  # a larger budget, or more of the host's memory, would do
    TOO_COARSE = "too coarse"  # below the floor of quality that was asked for
    REFUSED = "refused"  # an engine cannot run it, whatever the budget


@dataclass(frozen=True)
class Predicted:
    """What a plan will take: bytes that torch's allocator reserves on a GPU, or bytes of tensors alive on a
    CPU, at most in each of STAGES and in all; `context_bytes` of the same memory before any tensor (the CUDA
    context, or the process); `host_bytes` that wait in the host's memory; seconds of one request, of which
    `reading_seconds` load the weights but for `quantising_seconds`, and `compiling_seconds` compile blocks;
    decibels of PSNR against fp32 (99 is the same)."""

    peak_bytes: int
    stages: Mapping[str, int]
    context_bytes: int
    host_bytes: int
    seconds: float
    psnr: float
    reading_seconds: float = 0.0
    quantising_seconds: float = 0.0
    compiling_seconds: float = 0.0

    @property
    def painting_seconds(self) -> float:
        return self.seconds - self.reading_seconds - self.quantising_seconds - self.compiling_seconds


@dataclass(frozen=True)
class Plan:
    """One way to run a request for one model on one machine.

    `cfg` is batched or sequential, which decides nothing where steps are not `guided`. `budget_bytes` is what
    it had to fit in, context included. `verdict` says whether it can be taken, `reason` says why in words.
    `chosen` marks the best of those it was planned with. `images_per_call` is how many pictures of a request
    go through the U-Net at once, `images_per_decode` how many through the VAE. Of `step_cache` steps one is
    taken in full; 1: all are. `texts_known`: what the text encoders answer is kept from before, so that none
    is loaded; they are placed as they ran then.
    """

    model: str
    hardware: str
    device: str
    budget_bytes: int
    cfg: str
    placements: Mapping[str, Placement]
    predicted: Predicted
    verdict: Verdict
    chosen: bool
    reason: str
    version: int = VERSION
    images_per_call: int = 1
    images_per_decode: int = 1
    step_cache: int = 1
    texts_known: bool = False
    guided: bool = True

    @property
    def fits(self) -> bool:
        return self.verdict is Verdict.FITS

    @property
    def cause(self) -> str:
        """The reason, of a refused plan what the engine said alone."""
        return self.reason.removeprefix(_REFUSED)

    @property
    def loaded(self) -> Mapping[str, Placement]:
        """The placements of what is loaded: all networks but text encoders whose texts are known."""
        idle = {Role.TEXT} if self.texts_known else set[Role]()
        return {name: own for name, own in self.placements.items() if network_role(name) not in idle}

    @property
    def denoiser(self) -> Placement:
        return self._of_role(Role.DENOISER)

    @property
    def decoder(self) -> Placement:
        return self._of_role(Role.DECODER)

    def _of_role(self, role: Role) -> Placement:
        return next(placement for name, placement in self.placements.items() if network_role(name) is role)

    @property
    def precision(self) -> str:
        """The U-Net's, by which a plan is called."""
        return self.denoiser.precision

    def summary(self) -> str:
        """One phrase: 'torch bf16 on cpu, staged, batched CFG, sdpa, VAE whole'."""
        unet, vae = self.denoiser, self.decoder
        run_by = f"{unet.backend} {unet.arithmetic} on {self.device}"
        guidance = f"{self.cfg} CFG, " if self.guided else ""
        how = f"{run_by}, {self.residency}, {guidance}{unet.attention}"
        vaes = vae.tiling if vae.compute == unet.compute else f"{vae.compute} {vae.tiling}"
        at_once = f", {self.images_per_call} pictures a call" if self.images_per_call > 1 else ""
        at_once += f", {self.images_per_decode} decoded at once" if self.images_per_decode > 1 else ""
        packed = ", packed" if unet.packed else ""
        faster = (", blocks compiled" if unet.compiled else "") + (", CUDA graphs" if unet.captured else "")
        return f"{how}{packed}{faster}, VAE {vaes}{self.elsewhere}{at_once}{self.cached}{self.knowing}"

    @property
    def cached(self) -> str:
        """', 1 step of 3 in full', where steps are cached."""
        return f", 1 step of {self.step_cache} in full" if self.step_cache > 1 else ""

    @property
    def knowing(self) -> str:
        """', texts from the cache', where no text encoder is loaded."""
        return ", texts from the cache" if self.texts_known else ""

    @property
    def residency(self) -> str:
        """The denoiser's: 'streamed, keeps 1.20 GiB'; and that of text encoders that stream beside one that
        does not."""
        unet = self.denoiser
        if unet.kept_bytes:
            return f"{unet.residency}, keeps {shown(unet.kept_bytes)}"
        texts = (own for name, own in self.loaded.items() if network_role(name) is Role.TEXT)
        beside = unet.residency != "streamed" and any(own.residency == "streamed" for own in texts)
        return f"{unet.residency}, texts streamed" if beside else unet.residency

    @property
    def elsewhere(self) -> str:
        """What another engine runs than the U-Net's: ', text_encoder by onnx'."""
        own = self.denoiser.backend
        return "".join(
            f", {name} by {each.backend}" for name, each in self.placements.items() if each.backend != own
        )

    def beats(self, other: Plan) -> bool:
        """Better in something and worse in nothing; or fit to run, where the other is refused whatever the
        budget."""
        if self.fits and other.verdict is Verdict.REFUSED:
            return True
        a, b = self.predicted, other.predicted
        pairs = ((a.seconds, b.seconds), (a.peak_bytes, b.peak_bytes), (-a.psnr, -b.psnr))
        usable = self.fits or not other.fits
        return usable and all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    def to_json(self) -> dict[str, Any]:
        """Every field, and `fits`, which says the same as the verdict to readers that know no verdicts."""
        return asdict(self) | {"verdict": self.verdict.value, "fits": self.fits}

    @classmethod
    def read(cls, file: Path) -> Plan:
        """What `from_json` makes of a file; raises TightfitError that names it."""
        try:
            return cls.from_json(read_bytes(file).decode("utf-8"))
        except TightfitError as error:
            raise TightfitError(f"{file}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TightfitError(
                f"{file} cannot be read ({getattr(error, 'strerror', None) or 'not text'}): name another"
            ) from None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `json.dumps(plan.to_json())` saved, or the chosen one of what `tightfit plan --json`
        printed.

        A plan saved before there were verdicts has only `fits`. Raises TightfitError for anything else.
        """
        try:
            data = json.loads(text)
            if "plans" in data:
                data = next((each for each in data["plans"] if each["chosen"]), data["plans"][0])
            if data["version"] != VERSION:
                raise TightfitError(
                    f"this plan is of version {data['version']}, not {VERSION}: "
                    "make it again with 'tightfit plan'"
                )
            plan = _from_fields(data)
            if problem := _problem(plan):
                raise ValueError(problem)
            return plan
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise TightfitError(
                f"this is not a tightfit plan ({error}): make it again with 'tightfit plan'"
            ) from None


def network_role(name: str) -> Role:
    """Of a network of any family or condition."""
    known = networks_of_conditions()
    return known[name].role if name in known else role_of(name)


def refused(why: str) -> str:
    """The reason of a plan that an engine refuses, of what the engine says."""
    return _REFUSED + why


def _from_fields(data: Mapping[str, Any]) -> Plan:
    """Raises ValueError, TypeError or KeyError for what is no plan."""
    fits = data["fits"]
    verdict = Verdict(data["verdict"]) if "verdict" in data else Verdict.FITS if fits else Verdict.TOO_LARGE
    if bool(fits) != (verdict is Verdict.FITS):
        raise ValueError(f"its verdict is {verdict.value!r}, its fits is {fits!r}")
    fields = {name: value for name, value in data.items() if name != "fits"}
    placements = {name: Placement(**values) for name, values in data["placements"].items()}
    return Plan(
        **fields | {"verdict": verdict, "placements": placements, "predicted": Predicted(**data["predicted"])}
    )


def _problem(plan: Plan) -> str | None:
    """What a plan read from a file leaves open or cannot mean."""
    if (
        plan.cfg not in CFG
        or plan.device not in DEVICES
        or not {network_role(name) for name in plan.placements} >= IN_EVERY_PLAN
    ):
        return "it leaves open how something runs"
    of_parts = (found for placement in plan.placements.values() if (found := _problem_of(placement)))
    if problem := next(of_parts, None):
        return problem
    others = (one for one in plan.placements.values() if one is not plan.denoiser)
    if any(one.compiled or one.captured for one in others):
        return "it compiles, or captures, what is no denoiser"
    for count in (plan.images_per_call, plan.images_per_decode):
        if type(count) is not int or not 1 <= count <= MOST_PER_CALL:
            return f"it has {count!r} pictures a call"
    if type(plan.step_cache) is not int or not 1 <= plan.step_cache <= MOST_CACHED:
        return f"it has 1 step of {plan.step_cache!r} in full"
    for name in ("texts_known", "guided"):
        if type(value := getattr(plan, name)) is not bool:
            return f"it has {name} {value!r}"
    numbers = (
        plan.budget_bytes,
        plan.predicted.peak_bytes,
        plan.predicted.seconds,
        plan.predicted.reading_seconds,
        plan.predicted.quantising_seconds,
        plan.predicted.compiling_seconds,
        *plan.predicted.stages.values(),
    )
    return None if all(isinstance(number, int | float) for number in numbers) else "it has no figures"


def _problem_of(placement: Placement) -> str | None:
    """The same of a component's."""
    if placement.precision not in (*QUANTISED, placement.compute):
        return f"it computes in {placement.compute!r} with weights in {placement.precision!r}"
    for field, names in CHOICES.items():
        if getattr(placement, field) not in names:
            return f"it has the {field} {getattr(placement, field)!r}"
    kept = placement.kept_bytes
    streams = placement.residency == "streamed"
    if not isinstance(kept, int) or kept < 0 or (kept and not streams):
        return f"it keeps {kept!r} bytes of a component that is {placement.residency}"
    may_pack = (placement.backend, placement.precision) == ("torch", "fp32") and not streams
    if type(placement.packed) is not bool or (placement.packed and not may_pack):
        return f"packed of {placement.residency} {placement.precision} is {placement.packed!r}"
    for field in ("compiled", "captured"):
        if type(value := getattr(placement, field)) is not bool:
            return f"it has {field} {value!r}"
    if bool(placement.provider) != (placement.backend == "onnx"):
        return f"it has the provider {placement.provider!r} for {placement.backend}"
    return None
