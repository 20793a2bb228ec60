"""What a person meant by an option in Python that tightfit does not have: another program's name for one, or
a slip of the hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from .errors import TightfitError


def _by_name(*rows: tuple[str, str]) -> dict[str, str]:
    return {name: meant for meant, names in rows for name in names.split()}


# Of `pipe(prompt, …)`: diffusers' names, then A1111's and others'.
OF_REQUESTS = _by_name(
    ("it is num_images", "num_images_per_prompt"),
    ("it is seed, a number: picture i has seed + i", "generator latents"),
    ("it is mask_padding", "padding_mask_crop"),
    ("it is refiner_start, beside refiner", "denoising_end denoising_start"),
    (
        "pipe.run(request, preview_every=1) tells of each step",
        "callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs",
    ),
    (
        "a prompt is text, and its words are weighed as (a red heart:1.2)",
        "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds",
    ),
    ("both text encoders read prompt and negative_prompt", "prompt_2 negative_prompt_2"),
    ("pictures are PIL's, and pipe.generate(request) answers all about a run", "output_type return_dict"),
    ('it is lora, such as "FILE:0.8"', "cross_attention_kwargs loras lora_scale"),
    ("it is schedule, by a name such as karras", "timesteps sigmas"),
    (
        "SDXL is told the picture's own size, uncropped",
        "original_size target_size crops_coords_top_left "
        "negative_original_size negative_target_size negative_crops_coords_top_left",
    ),
    (
        "refiners are told 6 with the prompt, 2.5 without it",
        "aesthetic_score negative_aesthetic_score",
    ),
    ("it is ip_adapter_image, a picture", "ip_adapter_image_embeds"),
    ("it is reference, a picture or a list of them", "image_reference reference_image reference_images"),
    ("it is mask_image, beside image", "masked_image_latents mask"),
    ("it is controlnet_conditioning_scale", "adapter_conditioning_scale"),
    ("it is control_guidance_end", "adapter_conditioning_factor"),
    ("it is num_images", "batch_size n_iter batch_count n"),
    ("it is num_inference_steps", "steps num_steps"),
    ("it is guidance_scale", "cfg cfg_scale guidance"),
    ("it is scheduler", "sampler sampler_name sampler_index"),
    ("it is strength", "denoise denoising_strength"),
    ("it is image", "init_image init_images"),
    ("it is hires, a factor such as 2", "hr_scale enable_hr"),
)
# Of `load(model, …)`.
OF_MODELS = _by_name(
    (
        "it is precision: fp32, bf16, fp16, int8 or int4",
        "torch_dtype dtype variant quantization_config quantize",
    ),
    ('it is budget, such as "4GiB"', "vram ram max_memory low_cpu_mem_usage lowvram medvram"),
    ("it is device, and residency for what stays there", "device_map offload"),
    ("it is adapters, each by tightfit.read_adapter(file, 0.8)", "lora loras vae unet embedding"),
    ("it is of a request: pipe(prompt, controlnet=…, control_image=…)", "controlnet"),
    ("it is of a request: pipe(prompt, scheduler=…)", "scheduler"),
    ("there is none: leave it out", "safety_checker requires_safety_checker feature_extractor"),
    ("nothing else is read: leave it out", "use_safetensors"),
)


_LONG = 100  # names are shorter, and to compare longer ones takes long


def unknown(name: str, known: Collection[str], theirs: Mapping[str, str]) -> TightfitError:
    """The error for an option that none of `known` is called; `theirs` says what others' names mean here."""
    said = meant(name, known, theirs) or f"choose {', '.join(known)}"
    return TightfitError(f"unknown option '{name}': {said}")


def meant(name: str, known: Collection[str], theirs: Mapping[str, str]) -> str | None:
    """What is said of the name beside "unknown option", if anything is near."""
    if name in theirs:
        return theirs[name]
    close = get_close_matches(name, known, 1) if len(name) < _LONG else ()
    return f"did you mean {close[0]}?" if close else None
