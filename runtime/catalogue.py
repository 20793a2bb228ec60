"""What is in folders of models: of each file what it is, and what it would run as on this machine. No weight
is read, but for hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from .adapters import textual_inversion
from .errors import TightfitError
from .files import SINGLE, parsed, read_json
from .kept import Hashes, Kept
from .machine.hardware import Hardware
from .models import upscalers
from .models.cures import of_pickle
from .models.families import known_by
from .models.layouts import foreign
from .models.layouts.library import Entry, Kind
from .models.layouts.weights import read_file
from .models.reading import read_model
from .models.schedulers import KINDS
from .models.spec import ModelSpec
from .models.tensors import Tensor
from .planner import choose as planner
from .planner.plan import Plan, Verdict
from .planner.wishes import Wishes
from .request import Request

UNKNOWN = "unknown"
_TRIGGERS, _LONGEST = 3, 40  # words of a LoRA that are named, and letters of one
# Of what is inside no file, by what trainers write into the metadata, and how that begins.
_TRAINED = ("modelspec.architecture", "ss_base_model_version")
_SPELLINGS = (
    (re.compile(r"stable-diffusion-xl|sdxl"), "SDXL"),
    (re.compile(r"stable-diffusion-v2|sd_v2"), "SD 2.x"),
    (re.compile(r"stable-diffusion-v1|sd_v1"), "SD 1.x"),
)
_READS_TEXTS = re.compile(
    r".*attn2[._](?:processor\.)?to_[kv](?:_lora)?"
    r"\.(?:weight|(?:lora[._])?down\.weight|lora_A(?:\.\w+)?\.weight|hada_w1_b)"
    r"|ip_adapter\.\d+\.to_k_ip\.weight"
)
_CLASSES = {
    "AutoencoderKL": Kind.VAE,
    "AutoencoderTiny": Kind.VAE,
    "ControlNetModel": Kind.CONTROLNET,
    "T2IAdapter": Kind.CONTROLNET,
}


@dataclass(frozen=True)
class Model:
    """One file or folder. `plan` is the best that there is for it here, `problem` why there is none, or what
    is wrong with the file."""

    entry: Entry
    kind: str
    family: str = ""
    stored_bytes: int = 0
    triggers: tuple[str, ...] = ()
    spec: ModelSpec | None = None
    plan: Plan | None = None
    problem: str = ""

    @property
    def brief(self) -> str:
        """The problem without the file's path and without its cure, as a row has room for."""
        names = (str(self.entry.path), str(self.entry.path.absolute()))
        said = self.problem
        for name in names:
            said = said.removeprefix(f"{name} ")
        return said.split(": ")[0]


def row(model: Model, hashes: Hashes) -> dict[str, Any]:
    """A model as JSON. Its hash is there if it is known: nothing is read."""
    return {
        "name": model.entry.name,
        "path": str(model.entry.path),
        "kind": model.kind,
        "family": model.family or None,
        "bytes": model.stored_bytes,
        "sha256": hashes.get(model.entry.path) or None,
        "trigger_words": list(model.triggers),
        "plan": model.plan.to_json() if model.plan else None,
        "problem": model.problem or None,
    }


def described(entry: Entry) -> Model:
    """What a file or folder is. One that is broken is described, too."""
    shelf = entry.shelf.value if entry.shelf else UNKNOWN
    try:
        stored_bytes = entry.path.stat().st_size if entry.path.is_file() else 0
        model = Model(entry, shelf, stored_bytes=stored_bytes)
        try:
            return _opened(entry, model)
        except TightfitError as error:
            return replace(model, problem=str(error))
    except OSError as error:
        return Model(entry, shelf, problem=f"{entry.path} cannot be read ({error.strerror}): allow it")


def _opened(entry: Entry, model: Model) -> Model:
    if entry.is_pickle:
        raise TightfitError(f"{entry.path} is a pickle: {of_pickle(entry.path)}")
    if entry.path.suffix.lower() in SINGLE and entry.path.is_file():
        tensors, metadata = read_file(entry.path)
        kind = foreign.kind_of(tensors) or (Kind.EMBEDDING if textual_inversion.claims(tensors) else None)
        if Kind.UPSCALER in (kind, entry.shelf):
            family = upscalers.described(upscalers.read_upscaler(entry.path))
            return replace(model, kind=Kind.UPSCALER.value, family=family)
        if kind:
            family, words = _family(kind, tensors, metadata), _triggers(metadata)
            return replace(model, kind=kind.value, family=family, triggers=words)
    elif entry.path.is_dir() and not (entry.path / "model_index.json").exists():
        return _network(entry, model)
    model = replace(model, kind=UNKNOWN)
    try:
        spec = read_model(entry.path)
    except TightfitError as error:
        return replace(model, problem=str(error))
    stored_bytes = model.stored_bytes or sum(c.stored_bytes for c in spec.components.values())
    kind = "diffusers folder" if entry.path.is_dir() else "checkpoint"
    family = spec.design.title or spec.family
    return replace(model, kind=kind, family=family, stored_bytes=stored_bytes, spec=spec)


def _network(entry: Entry, model: Model) -> Model:
    """The folder of one network, by the class that its config names."""
    config = read_json(entry.path / "config.json")
    kind = _CLASSES.get(str(config.get("_class_name")))
    stored_bytes = sum(file.stat().st_size for file in entry.path.glob("*.safetensors"))
    width = config.get("cross_attention_dim") if kind is Kind.CONTROLNET else None
    family = known_by(width) if isinstance(width, int) else ""
    return replace(model, kind=kind.value if kind else UNKNOWN, family=family, stored_bytes=stored_bytes)


def _family(kind: Kind, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """By the width of the texts it is for, else by what was written into it; '' where nothing says."""
    if kind is Kind.EMBEDDING:
        named = [tensors[name] for name in ("clip_l", "clip_g", "emb_params") if name in tensors]
        width = sum(tensor.shape[-1] for tensor in named or [*tensors.values()][:1] if tensor.shape)
    else:
        reading = (t for name, t in tensors.items() if len(t.shape) > 1 and _READS_TEXTS.fullmatch(name))
        width = next((tensor.shape[1] for tensor in reading), 0)
    said = " ".join(metadata.get(field, "")[:100].lower() for field in _TRAINED)
    spelled = next((family for spelling, family in _SPELLINGS if spelling.search(said)), said.strip()[:20])
    return known_by(width) or spelled


def _triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words that call up what was trained: as its maker says, else the tags that were seen most often."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return (phrase[:_LONGEST],)
    try:
        folders = parsed(metadata.get("ss_tag_frequency", "{}").encode())
    except (ValueError, UnicodeError):
        return ()
    seen: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, times in tags.items() if isinstance(tags, dict) else ():
            seen[tag.strip()] += times if isinstance(times, int) else 0
    return tuple(tag[:_LONGEST] for tag, _ in seen.most_common(_TRIGGERS) if tag)


# ------------------------------------------------------------------------------------------ what it runs as


class Planner:
    """Plans models on one machine. Those that differ in their weights alone are planned once, and plans are
    kept in the cache folder: planning SD 1.5 and SDXL takes 15 s of one core here, reading them 0.2."""

    def __init__(self, machine: Hardware, wishes: Wishes | None = None) -> None:
        self._machine, self._wishes = machine, wishes or Wishes()
        # All of the memory: what is the fastest there is so wherever it fits, whatever is free in a minute.
        self._roomy = replace(machine, free_bytes=machine.total_bytes, host_bytes=2 * machine.host_bytes)
        self._kept = Kept("plans.json", 200)
        self._begin = _digest(
            repr(replace(machine, free_bytes=0, host_bytes=0)), repr(self._wishes), _program()
        )

    def planned(self, model: Model) -> Model:
        """With its plan at its native size, or what is in the way of one."""
        if not (spec := model.spec):
            return model
        key = _digest(self._begin, _shape(spec))
        plan = self._valid(self._kept.get(key))
        if plan is None:
            plan, machine = self._plan(spec, self._roomy), self._roomy
            if isinstance(plan, str) or not self._fits(plan):
                plan, machine = self._plan(spec, self._machine), self._machine
            if not any(component.graph for component in spec.components.values()):  # which are not compared
                said = {"problem": plan} if isinstance(plan, str) else plan.to_json()
                self._kept.put(key, {"memory": [machine.free_bytes, machine.host_bytes], "plan": said})
        if isinstance(plan, str):
            return replace(model, problem=plan)
        return replace(
            model,
            plan=replace(plan, model=spec.name, budget_bytes=planner.budget_of(self._machine, self._wishes)),
        )

    def _plan(self, spec: ModelSpec, machine: Hardware) -> Plan | str:
        # Others paint with a --scheduler, most of which call the U-Net once a step.
        sampler = None if spec.scheduler.get("_class_name") in KINDS else "euler"
        try:
            job = Request("a", scheduler=sampler).resolve(spec)
            planner.refuse_hopeless(machine, job, self._wishes)
            best = planner.plan(machine, spec, job, self._wishes)[0]
        except TightfitError as error:
            return str(error).removeprefix(f"{spec.name} ")
        if best.fits:
            return replace(best, reason="the fastest that fits")
        return f"does not fit: {best.reason}" if best.verdict is Verdict.TOO_LARGE else best.reason

    def _fits(self, plan: Plan) -> bool:
        """In what is free now."""
        predicted, machine = plan.predicted, self._machine
        needed_bytes = predicted.peak_bytes + predicted.context_bytes
        return needed_bytes <= machine.free_bytes and predicted.host_bytes <= machine.host_bytes

    def _valid(self, kept: Any) -> Plan | str | None:
        """The plan that was kept, or why there is none, if that is so with what is free now; else None. With
        more than it was planned with, another may be faster."""
        try:
            (free_bytes, host_bytes), said = kept["memory"], kept["plan"]
            if self._machine.free_bytes > free_bytes or self._machine.host_bytes > host_bytes:
                return None
            if "problem" in said:
                return str(said["problem"])
            plan = Plan.from_json(json.dumps(said))
        except (TightfitError, TypeError, ValueError, KeyError):
            return None
        return plan if self._fits(plan) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _program() -> str:
    """What plans, in the version that it has: another version may plan otherwise."""
    rooms = (Path(__file__).parent, Path(__file__).parents[1] / "kernels")
    changed = max(file.stat().st_mtime_ns for room in rooms for file in room.rglob("*.py"))
    return " ".join([__version__, str(changed), *map(version, ("torch", "diffusers", "transformers"))])


def _shape(spec: ModelSpec) -> str:
    """All of a model without graphs that its plans depend on: everything but its values, and where and how it
    is called."""
    components = [
        (
            name,
            component.config,
            component.formats,
            [
                (key, tensor.dtype, tensor.shape, tensor.transposed, len(tensor.patches))
                for key, tensor in sorted(component.tensors.items())
            ],
        )
        for name, component in spec.components.items()
    ]
    others = spec.family, spec.pipeline, spec.scheduler, spec.settings, spec.defaults, spec.precision
    return json.dumps([components, others], sort_keys=True, default=dict)
