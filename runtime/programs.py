"""What other programs write into their pictures, in A1111's words: ComfyUI, InvokeAI, NovelAI and Fooocus."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

from .files import parsed

# Limits of a graph that is followed: nodes, of which people's have some hundred, inputs of one, samplers,
# nodes that are searched for an input, and nodes that stand between an input and its value.
_MOST_NODES, _MOST_INPUTS, _MOST_SAMPLERS, _MOST_SEARCHED, _MOST_BETWEEN = 2000, 100, 20, 300, 5
_MOST_LORAS = 100


@dataclass(frozen=True)
class Word:
    """A LoRA as A1111 has it in a prompt."""

    name: str
    weight: float
    text_weight: float

    def __str__(self) -> str:
        numbers = (self.weight,) if self.weight == self.text_weight else (self.text_weight, self.weight)
        return f"<lora:{self.name}:{':'.join(f'{number:g}' for number in numbers)}>"


@dataclass(frozen=True)
class Said:
    """What a program says of a picture. `settings` are by A1111's names; `others` have no such name."""

    program: str
    prompt: str
    negative_prompt: str | None
    settings: Mapping[str, str]
    others: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[Word, ...] = ()


def read(texts: Mapping[str, str]) -> Said | None:
    """What the texts of a picture say, by their keywords in a PNG; None where no program is known. Raises
    ValueError for what is damaged."""
    for keyword, readers in _READERS.items():
        if (said := _object(texts.get(keyword, ""))) is None:
            continue
        for reader in readers:
            if answer := reader(said, texts):
                return answer
    return None


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, None for any other text."""
    if not text.lstrip().startswith("{"):
        return None
    value = parsed(text.encode())
    return value if isinstance(value, dict) else None


# ------------------------------------------------------------------------------------------------- samplers

# k-diffusion's functions, by which all four call their samplers, and A1111's names.
_SAMPLERS = {
    "euler": "Euler", "euler_a": "Euler a", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpm_2": "DPM2", "kdpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a", "dpm_2_a": "DPM2 a", "kdpm_2_a": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_2s": "DPM++ 2S", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE", "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "ddim": "DDIM",
    "ddpm": "DDPM", "plms": "PLMS", "pndm": "PLMS", "uni_pc": "UniPC", "uni_pc_bh2": "UniPC",
    "unipc": "UniPC", "deis": "DEIS", "lcm": "LCM", "tcd": "TCD", "restart": "Restart",
}  # fmt: skip
_SCHEDULES = {
    "normal": "Normal", "native": "Normal", "karras": "Karras", "exponential": "Exponential",
    "polyexponential": "Polyexponential", "sgm_uniform": "SGM Uniform", "simple": "Simple",
    "ddim_uniform": "DDIM", "beta": "Beta", "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps",
}  # fmt: skip


def _sampler(name: Any, schedule: Any) -> dict[str, Any]:
    """A sampler and its schedule in A1111's words. One that is not known keeps its name."""
    known = re.sub(r"^(k|sample)_|_(gpu|rf)$", "", _text(name).lower())
    if known.endswith("_k"):  # InvokeAI's way to say Karras
        known, schedule = known.removesuffix("_k"), "karras"
    return {
        "Sampler": _SAMPLERS.get(known, _text(name)),
        "Schedule type": _SCHEDULES.get(_text(schedule).lower(), _text(schedule)),
    }


# ------------------------------------------------------------------------------------------------- values


def _text(value: Any) -> str:
    """A text or a number as text, '' for anything else."""
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def bare_name(value: Any) -> str:
    """A model's name, as text or as an object that has one; without an ending, with folders as here."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("model_name")
    name = _text(value).replace("\\", "/")
    return re.sub(r"\.(safetensors|ckpt|pt|pth|bin|gguf)$", "", "" if name == "None" else name)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def _size(width: Any, height: Any) -> str:
    return f"{_text(width)}x{_text(height)}" if _text(width) and _text(height) else ""


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    """Those that say something, as texts."""
    return {name: _text(value) for name, value in values.items() if _text(value)}


def _rest(values: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Those of `names` that are set, as a notice names them."""
    empty = (None, "", 0, False, [], {}, "None", "[]")
    return {name: str(values[name])[:200] for name in names if values.get(name, None) not in empty}


def _word(name: Any, weight: Any, text_weight: Any = None) -> Word:
    strength = _number(weight, 1.0)
    return Word(bare_name(name), strength, _number(text_weight, strength))


# ------------------------------------------------------------------------------------------------- InvokeAI

# What changes a picture and has no name in A1111.
_INVOKE = (
    "generation_mode", "strength", "controlnets", "ipAdapters", "t2iAdapters", "refiner_model", "seamless_x",
    "seamless_y", "hrf_enabled", "regions", "positive_style_prompt", "negative_style_prompt",
)  # fmt: skip
_COMPEL = re.compile(r"[\w)][+-]+(?=[\s,.]|$)|\)\d|\)\.(blend|and|swap)\(")


def _invoke(said: Mapping[str, Any], _texts: Mapping[str, str]) -> Said:
    """InvokeAI 3 and later, whose `clip_skip` counts the layers that are left out."""
    skipped = int(_number(said.get("clip_skip"), 0))
    device = _text(said.get("rand_device")) or "cpu"
    settings = {
        "Steps": said.get("steps"),
        **_sampler(said.get("scheduler"), ""),
        "CFG scale": said.get("cfg_scale"),
        "Seed": said.get("seed"),
        "Size": _size(said.get("width"), said.get("height")),
        "Model": bare_name(said.get("model")),
        "VAE": bare_name(said.get("vae")),
        "RNG": "CPU" if device == "cpu" else "",
        "Clip skip": skipped + 1 if skipped else "",
        "CFG rescale": said.get("cfg_rescale_multiplier") or "",
    }
    loras = said.get("loras")
    words = [
        _word(lora.get("model") or lora.get("lora"), lora.get("weight"))
        for lora in (loras if isinstance(loras, list) else [])[:_MOST_LORAS]
        if isinstance(lora, dict)
    ]
    prompts = _text(said.get("positive_prompt")), _text(said.get("negative_prompt"))
    others = {name: text for name, text in _rest(said, _INVOKE).items() if text != "txt2img"}
    if any(map(_COMPEL.search, prompts)):
        others["weights of words"] = "as compel has them"
    return Said("InvokeAI", *prompts, _plain(settings), others, tuple(words))


def _old_invoke(said: Mapping[str, Any], _texts: Mapping[str, str]) -> Said | None:
    """InvokeAI 2, where what is in brackets is the negative prompt."""
    if not isinstance(image := said.get("image"), dict):
        return None
    prompt = image.get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    text = _text(first.get("prompt") if isinstance(first, dict) else first)
    settings = {
        "Steps": image.get("steps"),
        **_sampler(image.get("sampler"), ""),
        "CFG scale": image.get("cfg_scale"),
        "Seed": image.get("seed"),
        "Size": _size(image.get("width"), image.get("height")),
        "Model": bare_name(said.get("model_weights")),
        "RNG": "CPU",
    }
    negative = ", ".join(re.findall(r"\[([^\[\]]*)\]", text))
    others = _rest(image, ("perlin", "threshold", "variations", "type"))
    others = {name: value for name, value in others.items() if value != "txt2img"}
    return Said("InvokeAI", re.sub(r"\[[^\[\]]*\]", "", text).strip(), negative, _plain(settings), others)


# ------------------------------------------------------------------------------------------------- NovelAI

_NOVEL = ("sm", "sm_dyn", "dynamic_thresholding", "skip_cfg_above_sigma", "strength", "noise")


def _novel(said: Mapping[str, Any], texts: Mapping[str, str]) -> Said | None:
    """NovelAI, whose braces and brackets weigh words by 1.05."""
    if "uc" not in said or "sampler" not in said:
        return None
    settings = {
        "Steps": said.get("steps"),
        **_sampler(said.get("sampler"), said.get("noise_schedule")),
        "CFG scale": said.get("scale"),
        "Seed": said.get("seed"),
        "Size": _size(said.get("width"), said.get("height")),
        "Model": texts.get("Source", ""),
        "CFG rescale": said.get("cfg_rescale") or "",
    }
    prompt = _text(said.get("prompt")) or texts.get("Description", "").strip()
    others = _rest(said, _NOVEL)
    return Said("NovelAI", _weighed(prompt), _weighed(_text(said.get("uc"))), _plain(settings), others)


def _weighed(prompt: str) -> str:
    """NovelAI's weights as A1111 writes them."""
    marks = {"(": r"\(", ")": r"\)", "{": "(", "}": ":1.05)", "[": "(", "]": ":0.952381)"}
    return prompt.translate(str.maketrans(marks))


# ------------------------------------------------------------------------------------------------- Fooocus

_FOOOCUS = (
    "styles", "sharpness", "adm_guidance", "refiner_model", "freeu", "inpaint_engine_version",
    "prompt_expansion",
)  # fmt: skip


def _fooocus(said: Mapping[str, Any], _texts: Mapping[str, str]) -> Said | None:
    if "base_model" not in said:
        return None
    loras = said.get("loras")
    words = [
        _word(*lora[:2])
        for lora in (loras if isinstance(loras, list) else [])[:_MOST_LORAS]
        if isinstance(lora, list) and len(lora) > 1
    ]
    vae = bare_name(said.get("vae"))
    settings = {
        "Steps": said.get("steps"),
        **_sampler(said.get("sampler"), said.get("scheduler")),
        "CFG scale": said.get("guidance_scale"),
        "Seed": said.get("seed"),
        "Size": "x".join(re.findall(r"\d+", _text(said.get("resolution")))[:2]),
        "Model hash": said.get("base_model_hash"),
        "Model": bare_name(said.get("base_model")),
        "VAE": "" if vae.startswith("Default") else vae,
        "RNG": "CPU",
    }
    prompts = _text(said.get("prompt")), _text(said.get("negative_prompt"))
    return Said("Fooocus", *prompts, _plain(settings), _rest(said, _FOOOCUS), tuple(words))


# ------------------------------------------------------------------------------------------------- ComfyUI

_TEXTS = ("text", "text_g", "text_l", "prompt", "string", "value", "wildcard_text", "populated_text")
_PROMPTS = ("positive", "conditioning"), ("negative",)
_MODELS = ("ckpt_name", "unet_name", "base_ckpt_name", "model_name")
# Nodes between a sampler and its checkpoint whose work is read from their inputs.
_LOADERS = re.compile("checkpoint|lora|unet|clip|vae|primitive|reroute|string|int|float|seed", re.IGNORECASE)


class _Graph:
    """ComfyUI's graph of a prompt: nodes by their ids, whose inputs are values, or links [id, output].

    A graph is somebody else's: links may go in circles, or to nowhere.
    """

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.inputs = {
            name: dict(islice(node["inputs"].items(), _MOST_INPUTS))
            for name, node in islice(nodes.items(), _MOST_NODES)
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        }
        self.classes = {name: _text(nodes[name].get("class_type")) for name in self.inputs}
        self.links = {
            name: {
                key: other
                for key, value in inputs.items()
                if isinstance(value, list) and value and (other := _text(value[0])) in self.inputs
            }
            for name, inputs in self.inputs.items()
        }

    def upstream(self, start: str, but: str = "") -> Iterator[str]:
        """The node, if there is one, and those that it depends on, nearest first. Links of the input `but`
        are not followed."""
        waiting, seen = deque([start] if start else []), {start}
        while waiting:
            yield (name := waiting.popleft())
            linked = dict.fromkeys(other for key, other in self.links[name].items() if key != but)
            fresh = [other for other in linked if other not in seen]
            seen.update(fresh)
            waiting += fresh

    def value(self, start: str, names: Collection[str], kinds: Any, but: str = "") -> Any:
        """The nearest input of one of these names and kinds, or what a link of that name leads to; None for
        none."""
        for name in islice(self.upstream(start, but), _MOST_SEARCHED):
            for key in names:
                nodes = islice(self.upstream(self.links[name].get(key, "")), _MOST_BETWEEN)
                led_to = (value for node in nodes for value in self.inputs[node].values())
                for value in chain([self.inputs[name].get(key)], led_to):
                    if isinstance(value, kinds) and not isinstance(value, bool):
                        return value
        return None

    def linked(self, start: str, names: Collection[str]) -> str:
        """The node that the nearest input of one of these names is a link to, '' for none."""
        links = (self.links[name].get(key, "") for name in self.upstream(start) for key in names)
        return next(filter(None, links), "")

    def latents(self, sampler: str) -> str:
        """The node that a sampler has its latents from."""
        return self.links[sampler].get("latent_image", "")

    @cached_property
    def samplers(self) -> list[str]:
        """The sampling nodes, those first that begin with noise alone."""
        found = [name for name in self.inputs if self.latents(name)][:_MOST_SAMPLERS]
        return sorted(found, key=lambda name: len({*self.upstream(self.latents(name))} & {*found}))


def _comfy(said: Mapping[str, Any], _texts: Mapping[str, str]) -> Said | None:
    nodes = said.get("prompt") if isinstance(said.get("prompt"), dict) else said  # saved by other nodes
    graph = _Graph(nodes or {})
    if not graph.inputs:
        return None
    if not graph.samplers:
        raise ValueError("no node of its graph samples latents")
    sampler, *later = graph.samplers
    positive, negative = (graph.linked(sampler, names) for names in _PROMPTS)
    found = graph.value(positive, _TEXTS, str, but="negative")
    prompt = _unbracketed(_text(found))
    unwanted = _unbracketed(_text(graph.value(negative, _TEXTS, str, but="positive")))
    if graph.classes.get(negative) == "ConditioningZeroOut":
        unwanted = ""
    model = graph.linked(sampler, ("model",))
    others = _comfy_others(graph, sampler, later, model)
    if "(" in prompt.replace(r"\(", ""):
        others["weights of words"] = "as ComfyUI has them"
    if found is None:
        others["prompt"] = "its text is not in the graph"
    settings, loras = _comfy_settings(graph, sampler, positive, model), tuple(_comfy_loras(graph, model))
    return Said("ComfyUI", prompt, unwanted, settings, others, loras)


def _unbracketed(prompt: str) -> str:
    """ComfyUI's prompt as A1111 writes it: there brackets mean nothing, and embeddings have a prefix."""
    return re.sub(r"\bembedding:", "", re.sub(r"(?<!\\)([\[\]])", r"\\\1", prompt))


def _comfy_settings(graph: _Graph, sampler: str, positive: str, model: str) -> dict[str, str]:
    numbers, latents = (int, float), graph.latents(sampler)
    skip = graph.value(positive, ("stop_at_clip_layer",), numbers)
    settings = {
        "Steps": graph.value(sampler, ("steps",), numbers),
        **_sampler(graph.value(sampler, ("sampler_name",), str), graph.value(sampler, ("scheduler",), str)),
        "CFG scale": graph.value(sampler, ("cfg",), numbers),
        "Seed": graph.value(sampler, ("seed", "noise_seed"), numbers),
        "Size": _size(graph.value(latents, ("width",), numbers), graph.value(latents, ("height",), numbers)),
        "Model": bare_name(graph.value(model, _MODELS, str)),
        "VAE": bare_name(next((i["vae_name"] for i in graph.inputs.values() if "vae_name" in i), "")),
        "RNG": "CPU",
        "Clip skip": -skip if skip else "",
    }
    return _plain(settings)


def _comfy_loras(graph: _Graph, model: str) -> Iterator[Word]:
    """Those between a sampler and its checkpoint, in the order in which they are applied."""
    for name in [*graph.upstream(model)][::-1][:_MOST_LORAS]:
        inputs = graph.inputs[name]
        if isinstance(inputs.get("lora_name"), str):
            yield _word(inputs["lora_name"], inputs.get("strength_model"), inputs.get("strength_clip"))
        for given in inputs.values():  # of rgthree's loader of several
            if isinstance(given, dict) and given.get("lora") and given.get("on"):
                yield _word(given["lora"], given.get("strength"))


def _comfy_others(graph: _Graph, sampler: str, later: list[str], model: str) -> dict[str, str]:
    """What of a graph has no setting: other nodes, another pass, pictures that it begins with."""
    inputs = graph.inputs[sampler]
    between = [graph.classes[name] for name in graph.upstream(model)]
    unknown = dict.fromkeys(kind for kind in between if not _LOADERS.search(kind))
    pictures = [name for name in graph.upstream(graph.latents(sampler)) if "image" in graph.inputs[name]]
    controls = [i["control_net_name"] for i in graph.inputs.values() if "control_net_name" in i]
    denoise = graph.value(sampler, ("denoise",), (int, float))
    batch = graph.value(graph.latents(sampler), ("batch_size",), int)
    return _rest(
        {
            "nodes": ", ".join(unknown),
            "later samplers": ", ".join(f"{graph.classes[name]} {name}" for name in later),
            "input picture": _text(graph.inputs[pictures[0]]["image"]) or "yes" if pictures else "",
            "ControlNet": ", ".join(bare_name(name) for name in controls[:3]),
            "denoise": denoise if denoise != 1 else "",
            "batch of": batch if batch != 1 else "",
            "first step": inputs.get("start_at_step"),
        },
        ("nodes", "later samplers", "input picture", "ControlNet", "denoise", "batch of", "first step"),
    )


_Reader = Callable[[Mapping[str, Any], Mapping[str, str]], Said | None]
_READERS: dict[str, tuple[_Reader, ...]] = {
    "invokeai_metadata": (_invoke,),
    "sd-metadata": (_old_invoke,),
    "prompt": (_comfy,),
    "Comment": (_novel,),
    "parameters": (_fooocus, _novel, _comfy),
}
