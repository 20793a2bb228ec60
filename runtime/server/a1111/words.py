"""A1111's words for a picture to be painted, as a table, and the order that they become."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, create_model

from ...adapters.prompt import WORD
from ...conditions.handed import way_of
from ...errors import TightfitError
from ...files import shortened
from ...jobs import Order
from ...models.samplers.names import AUTOMATIC, SAMPLERS, of_a1111, schedule_of, split
from ...request import PLAIN, RANDOM_SEED, drawn
from ...service import Limits
from ...settings import idle
from .control import SCRIPT, controls
from .desk import Desk
from .lists import Item, Style
from .options import ETA, ETA_DDIM, MODEL, PREVIEW_EVERY, PREVIEWS, fields_of
from .route import LOG, AtMost, NotFoundError, Texts

_OFF = (None, False)
_NONE = (None, "", "None")
_MOST_LORAS = 100


@dataclass(frozen=True)
class Field:
    """One field of a request: its type, what it is where it is left out, the option of ours that it becomes
    unless None, and `only`, the values that are taken, where tightfit has nothing else."""

    kind: Any
    default: Any = None
    option: str = ""
    only: tuple[Any, ...] = ()


# modules/api/models.py makes them from modules/processing.py. What is None is as the model likes it, not 50
# steps at 512x512, which suit one family.
_COMMON = {
    "prompt": Field(str, ""),
    "negative_prompt": Field(str, ""),
    "styles": Field(Texts),
    "seed": Field(int, RANDOM_SEED, "seed"),
    "subseed": Field(int, RANDOM_SEED),
    "subseed_strength": Field(float, 0.0),
    "seed_resize_from_h": Field(int, -1),
    "seed_resize_from_w": Field(int, -1),
    "sampler_name": Field(str),
    "sampler_index": Field(str),
    "scheduler": Field(str),
    "batch_size": Field(int, 1),
    "n_iter": Field(int, 1),
    "steps": Field(int, None, "num_inference_steps"),
    "cfg_scale": Field(float, None, "guidance_scale"),
    "width": Field(int, None, "width"),
    "height": Field(int, None, "height"),
    "restore_faces": Field(bool, only=_OFF),
    "tiling": Field(bool, only=_OFF),
    "do_not_save_samples": Field(bool, False),
    "do_not_save_grid": Field(bool, False),
    "eta": Field(float),
    "denoising_strength": Field(float, 0.75),
    "s_min_uncond": Field(float, only=(None, 0)),
    "s_churn": Field(float, None, "s_churn"),
    "s_tmax": Field(float, only=(None, 0)),
    "s_tmin": Field(float, only=(None, 0)),
    "s_noise": Field(float, None, "s_noise"),
    "override_settings": Field(dict[str, Any]),
    "override_settings_restore_afterwards": Field(bool, True),
    "refiner_checkpoint": Field(str),
    "refiner_switch_at": Field(float, None, "refiner_start"),
    "disable_extra_networks": Field(bool, False, only=_OFF),
    "comments": Field(dict[str, Any]),
    "script_name": Field(str),
    "script_args": Field(Annotated[list[Any], AtMost], ()),
    "send_images": Field(bool, True),
    "save_images": Field(bool, False),
    "alwayson_scripts": Field(dict[str, Any]),
    "force_task_id": Field(str),
    "infotext": Field(str, only=(None, "")),
}
_HIRES = {
    "enable_hr": Field(bool, False),
    "firstphase_width": Field(int, 0),
    "firstphase_height": Field(int, 0),
    "hr_scale": Field(float, 2.0),
    "hr_upscaler": Field(str),
    "hr_second_pass_steps": Field(int, 0),
    "hr_resize_x": Field(int, 0),
    "hr_resize_y": Field(int, 0),
    "hr_checkpoint_name": Field(str, only=(*_NONE, "Use same checkpoint")),
    "hr_sampler_name": Field(str),
    "hr_scheduler": Field(str),
    "hr_prompt": Field(str, ""),
    "hr_negative_prompt": Field(str, ""),
}
_BEGUN = {
    "init_images": Field(Texts),
    "resize_mode": Field(int, 0),
    "image_cfg_scale": Field(float),
    "mask": Field(str),
    "mask_blur_x": Field(int, 4),
    "mask_blur_y": Field(int, 4),
    "mask_blur": Field(int),
    "inpainting_fill": Field(int, 0),
    "inpaint_full_res": Field(bool, True),
    "inpaint_full_res_padding": Field(int, 0),
    "inpainting_mask_invert": Field(int, 0),
    "initial_noise_multiplier": Field(float, only=(None, 1)),
    "latent_mask": Field(str, only=(None, "")),
    "include_init_images": Field(bool, False),
}
FIELDS: Mapping[str, Mapping[str, Field]] = {"txt2img": _COMMON | _HIRES, "img2img": _COMMON | _BEGUN}
_FILLS = ("fill", "original", "noise", "zeros")  # by A1111's numbers
_RESIZES = ("resize", "crop", "fill")
_SAME = (*_NONE, "Use same sampler", "Use same scheduler")


def _model(name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {
        name: (field.kind | None, field.default) for name, field in FIELDS[name].items()
    }
    config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())
    return create_model(name, __config__=config, **fields)


class TextToImage(_model("txt2img")):
    """A picture from text."""


class ImageToImage(_model("img2img")):
    """A picture from another, or a part of it."""


@dataclass(frozen=True)
class Asked:
    """A request: what it asks for, all its fields, none of which is unknown, and options of ours for which
    A1111 has no word."""

    what: str
    fields: Mapping[str, Any]
    ours: Mapping[str, Any]

    @classmethod
    def read(cls, what: str, body: BaseModel) -> Asked:
        """Raises TightfitError for a field that asks for what there is not."""
        extra = body.model_extra or {}
        ours = {name: value for name, value in extra.items() if name in PLAIN and value is not None}
        if others := ", ".join(name for name in extra if name not in PLAIN):
            LOG.info("fields of %s that are not A1111's: %s", what, shortened(others))
        known = FIELDS[what]
        fields = {name: getattr(body, name) for name in known}
        for name, field in known.items():
            if field.only and fields[name] not in field.only:
                said = f"{name} {shortened(fields[name])}"
                raise TightfitError(f"{said} is not there in tightfit: leave it out")
        return cls(what, fields, ours)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def count(self) -> int:
        """Pictures in all: batches follow one another."""
        return _number(self, "batch_size") * _number(self, "n_iter")

    @property
    def characters(self) -> int:
        """Of all its texts but pictures."""
        known = FIELDS[self.what].items()
        return sum(len(self[name] or "") for name, field in known if field.kind is str and name != "mask")

    @property
    def is_hires(self) -> bool:
        return self.what == "txt2img" and bool(self["enable_hr"])

    def given(self, *names: str) -> Any:
        """The first of these fields that has a value, or None."""
        return next((self[name] for name in names if self[name] not in _NONE), None)

    def echo(self) -> dict[str, Any]:
        """As A1111 answers it, without the pictures it was given."""
        left_out = (
            ("init_images", "mask") if self.what == "img2img" and not self["include_init_images"] else ()
        )
        return {name: None if name in left_out else value for name, value in self.fields.items()}


def _number(asked: Asked, name: str) -> int:
    value = 1 if asked[name] is None else asked[name]
    if value < 1:
        raise TightfitError(f"{name} must be 1 or more, not {value}")
    return value


def order_of(asked: Asked, desk: Desk, client: str) -> Order:
    """The order for a request. Raises TightfitError."""
    desk.service.limits.check_counts(characters=asked.characters)
    values = desk.options.values(asked["override_settings"] or {})
    item = desk.shelf.checkpoint(values[MODEL])
    _check_scripts(asked)
    begins = _begun(asked, desk) if asked.what == "img2img" else {}
    options = {
        **fields_of(values),
        **_plain(asked),
        **_texts(asked, desk, item),
        **_seeds(asked),
        **_sampling(asked, values),
        **begins,
        **(_hires(asked, desk) if asked.is_hires else {}),
        **_controls(asked, begins.get("image"), desk),
    }
    if asked.what == "img2img" and item.edits and asked["image_cfg_scale"] is not None:
        options["image_guidance_scale"] = asked["image_cfg_scale"]
    if refiner := asked.given("refiner_checkpoint"):
        options["refiner"] = desk.shelf.checkpoint(refiner).name
    for name in idle(options):  # A1111's clients send some of them whatever the sampler
        del options[name]
    options |= asked.ours
    every = values[PREVIEW_EVERY] if values[PREVIEWS] else 0
    note = {"job": f"scripts_{asked.what}"}
    return Order(item.name, options, client=client, preview_every=max(0, every), note=note)


def _plain(asked: Asked) -> dict[str, Any]:
    """What becomes an option as it is."""
    fields = FIELDS[asked.what].items()
    options = {field.option: asked[name] for name, field in fields if field.option}
    first = {
        side: asked[f"firstphase_{side}"]
        for side in ("width", "height")
        if asked.what == "txt2img" and asked[f"firstphase_{side}"]
    }
    given = {name: value for name, value in {**options, **first}.items() if value is not None}
    return given | {"num_images": asked.count}


def _styles(asked: Asked, desk: Desk) -> list[Style]:
    """Those that are named. Raises TightfitError for one that there is not."""
    names = asked["styles"] or ()
    known = desk.shelf.styles(names) if names else {}
    if unknown := [name for name in names if name not in known]:
        there = f"choose {', '.join(known)}" if known else "no folder of models has a styles.csv"
        raise TightfitError(f"there is no style {shortened(unknown[0])}: {there}")
    return [known[name] for name in names]


def _texts(asked: Asked, desk: Desk, item: Item) -> dict[str, Any]:
    """The prompts in their styles, the LoRAs that they name, and the embeddings whose words they have."""
    styles, limits = _styles(asked, desk), desk.service.limits
    negative = _styled(asked["negative_prompt"], [style.negative_prompt for style in styles], limits)
    ours = {"prompt": "prompt"} | ({"hr_prompt": "hires_prompt"} if asked.is_hires else {})
    named = {
        option: _styled(text, [style.prompt for style in styles], limits)
        for name, option in ours.items()
        if (text := asked.given(name)) or option == "prompt"
    }
    parted = {option: _parted(text, desk) for option, text in named.items()}
    (_, loras), *later = parted.values()
    if unknown := [lora for _, others in later for lora in others if lora not in loras]:
        raise TightfitError(
            f"hr_prompt names the LoRA {shortened(unknown[0])}, and prompt does not: both passes have the "
            "same, so name it in both, or in prompt alone"
        )
    texts: dict[str, Any] = {option: text for option, (text, _) in parted.items()}
    known, every = desk.shelf.words(item).items(), "\n".join((*texts.values(), negative))
    embeddings = [name for word, name in known if _has_word(every, word)]
    texts |= {"negative_prompt": negative} if negative else {}  # for SDXL an empty one is another
    texts |= {"lora": loras} if loras else {}
    return texts | ({"embedding": embeddings} if embeddings else {})


def _parted(prompt: str, desk: Desk) -> tuple[str, list[str]]:
    """A prompt without the words of LoRAs, and these."""
    words = WORD.findall(prompt)
    if len(words) > _MOST_LORAS:  # each of which is looked for
        raise TightfitError(f"a prompt names {len(words)} LoRAs, and {_MOST_LORAS} are taken: name fewer")
    loras = [_lora(desk.shelf.lora(name), weights) for name, weights in words]
    return (WORD.sub("", prompt).strip() if loras else prompt), loras


def _styled(prompt: str | None, styles: Sequence[str], limits: Limits) -> str:
    """As A1111 puts a prompt into styles, one after the other. Raises TightfitError where that would be too
    long: a style may hold {prompt} many times."""
    prompt = prompt or ""
    for style in styles:
        limits.check_counts(characters=len(style) + len(prompt) * max(1, style.count("{prompt}")))
        parts = filter(None, (prompt.strip(), style.strip()))
        prompt = style.replace("{prompt}", prompt) if "{prompt}" in style else ", ".join(parts)
    return prompt


def _lora(name: str, weights: str) -> str:
    """FILE:weight:weight of texts. A1111 has that of the texts first."""
    numbers = weights.split(":")[1:]
    return ":".join([name, *reversed(numbers)])


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _seeds(asked: Asked) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if asked["subseed_strength"]:
        subseed = asked["subseed"]
        options = {
            "subseed_strength": asked["subseed_strength"],
            "subseed": drawn(None if subseed in (None, RANDOM_SEED) else subseed),
        }
    width, height = (asked[f"seed_resize_from_{side}"] or 0 for side in "wh")
    if width > 0 and height > 0:  # rounded as A1111 does
        options["seed_resize"] = f"{width // 8 * 8}x{height // 8 * 8}"
    return options


def _sampling(asked: Asked, values: Mapping[str, Any]) -> dict[str, Any]:
    name, schedule = asked.given("sampler_name", "sampler_index"), asked.given("scheduler")
    if name is None:
        options = {"schedule": schedule_of(schedule)} if schedule else {}
    else:
        options = {"scheduler": sampler_of(name, schedule)}
    is_ddim = options.get("scheduler", "").startswith("ddim")
    # A1111's own, which need not be said: clients send 1 whatever the sampler.
    usual, eta = (0.0, values[ETA_DDIM]) if is_ddim else (1.0, values[ETA])
    eta = eta if asked["eta"] is None else asked["eta"]
    return options if eta == usual else options | {"eta": eta}


def sampler_of(name: str, schedule: str | None) -> str:
    """Ours for a sampler and a schedule. One that the sampler does not take is not taken, as with A1111's
    DDIM. Raises NotFoundError."""
    try:
        sampler, part = split(name)
    except TightfitError as error:
        raise NotFoundError(f"Sampler not found: {error}") from None
    wanted = schedule_of(schedule or AUTOMATIC)
    if part == AUTOMATIC and wanted not in SAMPLERS[sampler.name].schedules:
        wanted = AUTOMATIC
    return of_a1111(name, wanted)


def _hires(asked: Asked, desk: Desk) -> dict[str, Any]:
    if asked["hr_negative_prompt"] not in (*_NONE, asked["negative_prompt"]):
        raise TightfitError("hr_negative_prompt is not there in tightfit: both passes have one, leave it out")
    options = {"hires_strength": asked["denoising_strength"], "hires_steps": asked["hr_second_pass_steps"]}
    if name := asked["hr_upscaler"]:
        options["hires_upscaler"] = name if way_of(name) else desk.shelf.upscaler(name)
    name, schedule = (
        None if asked[field] in _SAME else asked[field] for field in ("hr_sampler_name", "hr_scheduler")
    )
    if name or schedule:
        first = asked.given("sampler_name", "sampler_index")
        if not (name or first):
            raise TightfitError("hr_scheduler is of a sampler: give hr_sampler_name, or sampler_name")
        options["hires_scheduler"] = sampler_of(name or first, schedule or asked.given("scheduler"))
    options |= _larger(asked)
    return {name: value for name, value in options.items() if value is not None}


def _larger(asked: Asked) -> dict[str, Any]:
    """How large the second pass is. Of one side alone the other follows."""
    wide, tall = (asked[name] or 0 for name in ("hr_resize_x", "hr_resize_y"))
    if not wide and not tall:
        return {"hires": asked["hr_scale"]}
    if not (wide and tall):
        width, height = (asked[f"firstphase_{side}"] or asked[side] or 0 for side in ("width", "height"))
        if width < 1 or height < 1:
            raise TightfitError("hr_resize_x or hr_resize_y alone needs width and height: give both")
        wide, tall = (wide, wide * height // width) if wide else (tall * width // height, tall)
    return {"hires_size": f"{wide // 8 * 8}x{tall // 8 * 8}"}


def _begun(asked: Asked, desk: Desk) -> dict[str, Any]:
    """What image to image begins with."""
    images = asked["init_images"]
    if not images:
        raise NotFoundError("Init image not found: give init_images, a list with one picture in base64")
    if len(images) > 1:
        raise TightfitError(f"{len(images)} init_images are given, and one is taken: ask for each alone")
    if not 0 <= (asked["resize_mode"] or 0) < len(_RESIZES):
        raise TightfitError(f"resize_mode {asked['resize_mode']} is not there in tightfit: give 0, 1 or 2")
    options = {"image": desk.picture(images[0], "init_images"), "resize": _RESIZES[asked["resize_mode"] or 0]}
    if asked["denoising_strength"] is not None:
        options["strength"] = asked["denoising_strength"]
    return options | _masked(asked, desk) if asked["mask"] else options


def _masked(asked: Asked, desk: Desk) -> dict[str, Any]:
    blur = asked["mask_blur"]
    if blur is None:
        blur = asked["mask_blur_x"]
        if blur != asked["mask_blur_y"]:
            raise TightfitError("mask_blur_x and mask_blur_y differ: give mask_blur")
    fill = asked["inpainting_fill"] or 0
    if not 0 <= fill < len(_FILLS):
        raise TightfitError(f"inpainting_fill must be 0, 1, 2 or 3, not {fill}")
    options = {"mask_image": _mask(desk.picture(asked["mask"], "mask")), "mask_content": _FILLS[fill]}
    options |= {} if blur is None else {"mask_blur": blur}
    if asked["inpaint_full_res"]:
        options["mask_padding"] = asked["inpaint_full_res_padding"] or 0
    return options | ({"invert_mask": True} if asked["inpainting_mask_invert"] else {})


def _mask(image: Image.Image) -> Image.Image:
    """White where to paint: what is opaque of a picture that is transparent elsewhere."""
    if image.mode == "RGBA" and image.getextrema()[-1] != (255, 255):
        return image.getchannel("A").point([0] * 129 + [255] * 127).convert("RGB")
    return image.convert("RGB")


def _check_scripts(asked: Asked) -> None:
    if name := asked.given("script_name"):
        raise TightfitError(f"Script {shortened(name)} not found: tightfit runs none, leave script_name out")
    for name, script in (asked["alwayson_scripts"] or {}).items():
        if name.lower() != SCRIPT and not _is_off(script):
            raise TightfitError(f"always on script {shortened(name)} not found: leave it out")


def _is_off(script: Any) -> bool:
    """Whether a script is told to do nothing, as clients tell those that they know."""
    args = script.get("args") if isinstance(script, Mapping) else None
    return not args or (isinstance(args, Sequence) and args[0] in (False, {}))


def _controls(asked: Asked, begins_with: Image.Image | None, desk: Desk) -> dict[str, Any]:
    scripts = (asked["alwayson_scripts"] or {}).items()
    script = next((script for name, script in scripts if name.lower() == SCRIPT), None)
    if script is None:
        return {}
    if not isinstance(script, Mapping):
        raise TightfitError("alwayson_scripts.controlnet must be an object with args, a list of units")
    return controls(script.get("args") or [], begins_with, asked.is_hires, desk)
