"""A plan from a file: whether it can run here, by tables of rules, and what it takes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import TightfitError
from ..machine.hardware import Hardware
from ..models.families.family import Role
from ..models.spec import ModelSpec
from ..placement import GRAPHS, Placement
from ..request import Job
from ..rules import Rule, first_broken
from .candidates import chosen_provider, of_stored, role_compute, ways, with_previews
from .estimate import ESTIMATOR
from .plan import Plan, network_role
from .wishes import Wishes

T = TypeVar("T")


@dataclass(frozen=True)
class _Saved:
    """A saved plan, beside what it is to run on and for."""

    plan: Plan
    hardware: Hardware
    spec: ModelSpec
    wishes: Wishes

    @property
    def unet(self) -> Placement:
        return self.plan.denoiser

    @property
    def vae(self) -> Placement:
        return self.plan.decoder

    @property
    def contradiction(self) -> tuple[str, str, str] | None:
        """A choice, what is asked for now, and what the plan says, where these differ."""
        chosen = {name: getattr(self.unet, name) for name in _OF_UNET} | {
            "tiling": self.vae.tiling,
            "cfg": self.plan.cfg,
        }
        faster = {"compile": self.unet.compiled, "cuda_graphs": self.unet.captured}
        chosen |= {name: has for name, has in faster.items() if getattr(self.wishes, name)}
        wished = {name: getattr(self.wishes, name) for name in chosen}
        pairs = ((name, wished[name], value) for name, value in chosen.items())
        return next(((name, wish, value) for name, wish, value in pairs if wish not in ("auto", value)), None)

    @property
    def overflows(self) -> str:
        """The network that fp16 has not the range for and that the plan runs in it, if one is."""
        roles = {name: component.role for name, component in self.spec.components.items()}
        halves = (
            name
            for name, placement in self.plan.placements.items()
            if name in roles and placement.backend not in GRAPHS and placement.compute == "fp16"
        )
        return next(
            (n for n in halves if role_compute(self.hardware, self.spec, roles[n], "fp16") != "fp16"), ""
        )

    @property
    def otherwise_stored(self) -> bool:
        """Whether the plan has weights in another precision than the files."""
        spec, unet = self.spec, self.unet
        return (
            bool(spec.precision)
            and unet.backend not in GRAPHS
            and unet.precision not in of_stored(spec.precision)
        )


@dataclass(frozen=True)
class _Part:
    """One component of a saved plan."""

    name: str
    saved: _Saved

    @property
    def placement(self) -> Placement:
        return self.saved.plan.placements[self.name]

    @property
    def provider_differs(self) -> bool:
        asked = self.saved.wishes.provider
        return asked != "auto" and self.placement.provider not in (
            "",
            chosen_provider(self.saved.hardware, asked),
        )


_OF_UNET = ("backend", "precision", "compute", "residency", "attention")
_AGAIN = "make one for it with 'tightfit plan'"
_LEAVE = "leave out one of them"


def _contradicted(saved: _Saved) -> str:
    name, wish, value = saved.contradiction or ("", "", "")
    return f"{name} {wish} is asked for, the plan says {value}: {_LEAVE}"


# Of each component, before anything else is asked of the plan.
_OF_PARTS: tuple[Rule[_Part], ...] = (
    Rule(
        lambda part: part.placement.backend not in part.saved.spec.components[part.name].engines,
        lambda part: (
            f"this plan runs the {part.name} on {part.placement.backend}, "
            f"{part.saved.spec.name} has it not for that: {_AGAIN}"
        ),
    ),
    Rule(
        lambda part: part.provider_differs,
        lambda part: (
            f"--provider {part.saved.wishes.provider} is asked for, "
            f"the plan says {part.placement.provider}: {_LEAVE}"
        ),
    ),
)
_OF_PLAN: tuple[Rule[_Saved], ...] = (
    Rule(lambda saved: saved.contradiction, _contradicted),
    Rule(
        lambda saved: saved.overflows,
        lambda saved: (
            f"this plan runs {saved.spec.name}'s {saved.overflows} in fp16, in which it overflows: {_AGAIN}"
        ),
    ),
    Rule(
        lambda saved: saved.otherwise_stored,
        lambda saved: (
            f"this plan is for weights in {saved.unet.precision}, "
            f"{saved.spec.name} is stored in {saved.spec.precision}: {_AGAIN}"
        ),
    ),
    Rule(
        lambda saved: saved.plan.device != saved.hardware.device,
        lambda saved: (
            f"this plan is for {saved.plan.hardware} ({saved.plan.device}), "
            f"this machine runs on {saved.hardware.device}: {_AGAIN}"
        ),
    ),
    Rule(
        lambda saved: saved.plan.model != saved.spec.name,
        lambda saved: f"this plan is for {saved.plan.model}, not for {saved.spec.name}: {_AGAIN}",
    ),
)


def checked(plan: Plan, hardware: Hardware, job: Job, wishes: Wishes) -> Plan:
    """A plan from a file, predicted anew for this machine and job. Raises TightfitError if it cannot run
    here."""
    if problem := _problem(_Saved(plan, hardware, job.spec, wishes)):
        raise TightfitError(problem)
    if plan.cfg == "batched" and not job.prompting.is_even:
        raise TightfitError(
            f"this plan is for a prompt as long as the negative one, and one is longer: {_AGAIN}"
        )
    estimate, budget_bytes = ESTIMATOR.estimate(hardware, job, wishes), _budget(plan, hardware, wishes)
    if not job.conditions and job.whole is job:
        estimate = replace(
            estimate,
            images_per_call=min(plan.images_per_call, job.num_images),
            images_per_decode=min(plan.images_per_decode, job.num_images),
        )
    painting = _painting(plan.placements)
    estimate = replace(estimate, step_cache=job.step_cache or wishes.cache_every or plan.step_cache)
    new = estimate.best(plan.cfg, with_previews(hardware, job.spec, painting), budget_bytes)
    if not new.fits:
        new = estimate.best(plan.cfg, painting, budget_bytes)
    if not new.fits:
        raise TightfitError(
            f"this plan, made for {plan.hardware}, does not run here: it {new.reason}; {_AGAIN}"
        )
    return _taken(new, plan)


def continued(plan: Plan, hardware: Hardware, job: Job, wishes: Wishes) -> list[Plan]:
    """A plan from a file for the pass that comes after the one it was made for: the same placement of each
    network that it has, and of others what goes with that. Nothing where none fits."""
    unet = plan.denoiser
    choices = {name: getattr(unet, name) for name in _OF_UNET}
    alike = replace(wishes, **choices, tiling=plan.decoder.tiling, cfg=plan.cfg)
    estimate, budget_bytes = ESTIMATOR.estimate(hardware, job, wishes), _budget(plan, hardware, wishes)
    found = [
        estimate.best(cfg, {name: plan.placements.get(name, own) for name, own in way.items()}, budget_bytes)
        for cfg, way in ways(hardware, job, alike)
    ]
    order = sorted(found, key=lambda new: (-len(new.placements), new.predicted.seconds))
    fitting = [new for new in order if new.fits]
    return [_taken(new, plan) for new in fitting[:1]]


def _budget(plan: Plan, hardware: Hardware, wishes: Wishes) -> int:
    return min(plan.budget_bytes if wishes.budget is None else wishes.budget, hardware.free_bytes)


def _painting(names: Mapping[str, T]) -> dict[str, T]:
    """Those that make pictures: what a plan has for previews is decided anew for each job."""
    return {name: value for name, value in names.items() if network_role(name) is not Role.PREVIEW}


def _taken(new: Plan, plan: Plan) -> Plan:
    return replace(new, chosen=True, reason=f"read from a file; made for {plan.hardware}")


def _problem(saved: _Saved) -> str | None:
    """Why the plan is not for this machine, model and request, or None."""
    if _painting(saved.plan.placements).keys() != _painting(saved.spec.components).keys():
        return f"this plan is for another kind of model than {saved.spec.name}: {_AGAIN}"
    for name in _painting(saved.plan.placements):
        if problem := first_broken(_OF_PARTS, _Part(name, saved)):
            return problem
    return first_broken(_OF_PLAN, saved)
