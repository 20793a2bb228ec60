"""A1111's options: settings that all later requests have, which one request may override."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.vae import Vae
from ...asking import request_of
from ...errors import TightfitError
from ...files import parsed, read_bytes, replacing, shortened
from ...models.hub import BUILT_IN
from ...models.layouts.library import Kind
from .lists import Shelf, without_hash

_FILE = "a1111.json"
MODEL, VAE, HASH = "sd_model_checkpoint", "sd_vae", "sd_checkpoint_hash"
PREVIEWS, PREVIEW_EVERY = "live_previews_enable", "show_progress_every_n_steps"
ETA, ETA_DDIM = "eta_ancestral", "eta_ddim"
NO_VAE = ("Automatic", "None", "", None)
_ZERO_SNR = "Zero Terminal SNR"


@dataclass(frozen=True)
class Option:
    """Its value at first, and the field of a request that it becomes, by `convert`. fixed: why it has no
    other value here."""

    default: Any
    field: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    fixed: str = ""


def _words(text: str) -> str:
    return text.lower().replace(" ", "-")


_ONE_SIZE = "pictures are answered as PNG, one by one"
_NO_FACES = "there is no face restoration"
_NO_TOKENS = "tokens are not merged"
_WHOLE = "the model's own VAE, or that of sd_vae, does both"
# Those of A1111's many (its modules/shared_options.py) that say something here.
OPTIONS: Mapping[str, Option] = {
    MODEL: Option(""),
    HASH: Option(""),
    VAE: Option("Automatic"),
    "CLIP_stop_at_last_layers": Option(1, "clip_skip"),
    "randn_source": Option("CPU", "noise_source", str.lower),
    "eta_noise_seed_delta": Option(0, "ensd"),
    "emphasis": Option("Original", "emphasis", _words),
    "sd_noise_schedule": Option("Default", "zero_snr", lambda name: name == _ZERO_SNR),
    "skip_early_cond": Option(0.0, "guidance_start"),
    ETA: Option(1.0),
    ETA_DDIM: Option(0.0),
    "s_churn": Option(0.0, "s_churn"),
    "s_noise": Option(1.0, "s_noise"),
    PREVIEWS: Option(True),
    PREVIEW_EVERY: Option(10),
    "s_tmin": Option(0.0, fixed="noise is added in all steps"),
    "s_tmax": Option(0.0, fixed="noise is added in all steps"),
    "s_min_uncond": Option(0.0, fixed="skip_early_cond and guidance_end are there"),
    "face_restoration": Option(False, fixed=_NO_FACES),
    "face_restoration_model": Option(None, fixed=_NO_FACES),
    "tiling": Option(False, fixed="pictures do not tile"),
    "samples_format": Option("png", fixed=_ONE_SIZE),
    "return_grid": Option(False, fixed=_ONE_SIZE),
    "enable_pnginfo": Option(True, fixed="pictures carry how they were made"),
    "control_net_no_detectmap": Option(True, fixed="answers have no maps: ask /controlnet/detect"),
    "initial_noise_multiplier": Option(1.0, fixed="the noise is as the schedule has it"),
    "img2img_extra_noise": Option(0.0, fixed="the noise is as the schedule has it"),
    "img2img_color_correction": Option(False, fixed="colours stay as they are painted"),
    "img2img_fix_steps": Option(False, fixed="the strength says how many steps are taken"),
    "inpainting_mask_weight": Option(1.0, fixed="the mask counts wholly"),
    "sd_vae_encode_method": Option("Full", fixed=_WHOLE),
    "sd_vae_decode_method": Option("Full", fixed=_WHOLE),
    "sd_unet": Option("Automatic", fixed="it is the checkpoint's"),
    "sd_hypernetwork": Option("None", fixed="there are no hypernetworks"),
    "token_merging_ratio": Option(0.0, fixed=_NO_TOKENS),
    "token_merging_ratio_img2img": Option(0.0, fixed=_NO_TOKENS),
    "token_merging_ratio_hr": Option(0.0, fixed=_NO_TOKENS),
    "upscaler_for_img2img": Option(None, fixed="pictures are fitted by Lanczos' filter"),
}  # fmt: skip


class Options:
    """The options of one server, kept in `folder` if there is one. Safe to use from threads."""

    def __init__(self, shelf: Shelf, model: str, folder: Path | None) -> None:
        """`model` is the one at first. One that does not ship was asked for, so it comes before what was
        kept."""
        self._shelf, self._lock = shelf, threading.Lock()
        self._file = folder / _FILE if folder else None
        self._changed = {MODEL: model, **self._kept()}
        if model not in BUILT_IN:
            self._changed[MODEL] = model

    def all(self) -> dict[str, Any]:
        """By A1111's names, as it shows them."""
        values = self.values({})
        item = self._model(values[MODEL])
        return values | ({MODEL: item.title, HASH: item.digest} if item else {})

    def values(self, override: Mapping[str, Any]) -> dict[str, Any]:
        """With what one request has otherwise. Raises TightfitError for what there is not."""
        with self._lock:
            changed = dict(self._changed)
        defaults = {name: option.default for name, option in OPTIONS.items()}
        return defaults | changed | self._checked(override)

    def change(self, given: Mapping[str, Any]) -> None:
        """For all later requests. Raises TightfitError, and changes nothing then."""
        checked = self._checked(given)
        request_of({"prompt": "", **fields_of(self.values(checked))}, self._shelf.shelves)
        with self._lock:
            self._changed |= checked
            self._keep()

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those that say something new, by the names that things have here."""
        values = {}
        for name, value in given.items():
            if not (option := OPTIONS.get(name)):
                raise TightfitError(
                    f"there is no option {shortened(name)} here: GET /sdapi/v1/options lists those that are"
                )
            if value is not None and name != HASH:
                values[name] = _typed(name, value, option)
        if MODEL in values:
            values[MODEL] = self._shelf.checkpoint(values[MODEL]).name
        if values.get(VAE) not in NO_VAE:
            values[VAE] = without_hash(values[VAE])
            self._shelf.shelves.path(values[VAE], Kind.VAE)
        return values

    def _model(self, name: str) -> Any:
        try:
            return self._shelf.checkpoint(name)
        except TightfitError:  # it was removed: a request will say so
            return None

    def _kept(self) -> dict[str, Any]:
        """What an earlier process kept, as far as it can be read."""
        if not self._file:
            return {}
        try:
            values = parsed(read_bytes(self._file))
            return {name: _typed(name, value, OPTIONS[name]) for name, value in values.items()}
        except (OSError, ValueError, KeyError, AttributeError, TightfitError):
            return {}

    def _keep(self) -> None:
        if not self._file:
            return
        try:
            with replacing(self._file) as partial:
                partial.write_text(json.dumps(self._changed), encoding="utf-8")
        except OSError as error:
            raise TightfitError(
                f"the options cannot be kept ({error.strerror}): they last until the service ends"
            ) from None


def _typed(name: str, value: Any, option: Option) -> Any:
    """A value of the type that the option has. Raises TightfitError."""
    default = option.default
    if option.fixed:
        if value != default:
            raise TightfitError(f"{name} is {json.dumps(default)} here, as {option.fixed}: leave it out")
        return default
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and isinstance(default, int) and value.is_integer():
        value = int(value)
    if type(value) is not type(default):
        kind = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise TightfitError(f"{name} must be {kind}, not {shortened(value)}")
    return value


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request that these options mean, where they are not as at first."""
    fields = {
        option.field: option.convert(values[name])
        for name, option in OPTIONS.items()
        if option.field and values[name] != option.default
    }
    return fields if values[VAE] in NO_VAE else fields | {Vae.option: values[VAE]}
