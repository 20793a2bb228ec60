"""One picture by one engine in its own environment, `python programs.py ENGINE JOB`, without our packages.

JOB is {"model", "precision", "options", "steps", "size", "asks", "to"} as JSON; `asks` are pictures and what
to do with them, by diffusers' names; `to` is the picture, or an export's folder. The last line printed is
JSON: peak resident bytes of the process, seconds from its start to the picture, seconds per step (the median,
without the first), and versions.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT, GUIDANCE, SEED = "a red heart", 5.0, 0
Job = dict[str, Any]


class Clock:
    """When each step ended; and peaks of process and GPU for engines that reset the system's and torch's."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ends = steps, list[float]()
        self.peak_bytes = self.device_bytes = 0

    def __call__(self, *_: Any) -> dict[str, Any]:
        if cuda := cuda_is_used():
            cuda.synchronize()
        self.ends.append(time.perf_counter())
        return {}

    @property
    def step_seconds(self) -> float:
        ends = self.ends[: self.steps]  # stable-diffusion.cpp counts the VAE's tiles too
        return statistics.median(b - a for a, b in pairwise(ends))


def diffusers(job: Job, clock: Clock) -> list[str]:
    """As its documentation says; `options` name its ways to save memory or time."""
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(job["precision"], torch.float16)
    loading: dict[str, Any] = {"torch_dtype": dtype}
    if job["precision"] in ("nf4", "int8"):
        from diffusers import PipelineQuantizationConfig

        bits = "4bit" if job["precision"] == "nf4" else "8bit"
        how: dict[str, Any] = {f"load_in_{bits}": True}
        if bits == "4bit":
            how |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        loading["quantization_config"] = PipelineQuantizationConfig(
            f"bitsandbytes_{bits}", how, components_to_quantize=["unet"]
        )
    pipe: Any = DiffusionPipeline.from_pretrained(job["model"], **loading)
    options, device = set(job["options"]), "cuda" if torch.cuda.is_available() else "cpu"
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    asks = {name: _opened(name, value) for name, value in job["asks"].items()}
    pipe = _for_pictures(pipe, asks, dtype)
    pipe.set_progress_bar_config(disable=True)
    if "slicing" in options:
        pipe.enable_attention_slicing()
    if "tiling" in options:
        pipe.vae.enable_tiling()
    if "channels_last" in options:
        pipe.unet.to(memory_format=torch.channels_last)
    if "model_offload" in options:
        pipe.enable_model_cpu_offload()
    elif "group_offload" in options:
        pipe.enable_group_offload(
            onload_device=torch.device(device), offload_type="leaf_level", use_stream=True
        )
    else:
        pipe.to(device)
    sizes = {} if "strength" in asks else {"height": job["size"], "width": job["size"]}
    sizes |= {"num_inference_steps": job["steps"], "guidance_scale": GUIDANCE}
    generator = torch.Generator().manual_seed(SEED)
    pipe(PROMPT, **sizes, **asks, generator=generator, callback_on_step_end=clock).images[0].save(job["to"])
    return ["torch", "diffusers", "transformers"]


def _opened(name: str, value: Any) -> Any:
    from PIL import Image

    if isinstance(value, list):
        return [_opened(name, one) for one in value]
    return Image.open(value).convert("L" if "mask" in name else "RGB") if "image" in name else value


def _for_pictures(pipe: Any, asks: dict[str, Any], dtype: Any) -> Any:
    """The pipeline that takes what is asked for, of the same networks."""
    import diffusers as library

    if nets := asks.pop("controlnet", None):
        loaded = [library.ControlNetModel.from_pretrained(net, torch_dtype=dtype) for net in nets]
        asks["image"] = asks.pop("control_image")
        return library.AutoPipelineForText2Image.from_pipe(pipe, controlnet=loaded)
    if "mask_image" in asks:
        return library.AutoPipelineForInpainting.from_pipe(pipe)
    return library.AutoPipelineForImage2Image.from_pipe(pipe) if "image" in asks else pipe


def optimum(job: Job, clock: Clock) -> list[str]:
    """`model` is a folder exported by optimum-cli."""
    import torch
    from diffusers import EulerDiscreteScheduler
    from optimum.onnxruntime import ORTDiffusionPipeline  # pyright: ignore[reportMissingImports]

    pipe: Any = ORTDiffusionPipeline.from_pretrained(job["model"])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    sizes = {
        "height": job["size"],
        "width": job["size"],
        "num_inference_steps": job["steps"],
        "guidance_scale": GUIDANCE,
    }
    generator = torch.Generator().manual_seed(SEED)
    pipe(PROMPT, **sizes, generator=generator, callback_on_step_end=clock).images[0].save(job["to"])
    return ["optimum-onnx", "onnxruntime", "diffusers", "transformers"]


def optimum_export(job: Job, _: Clock) -> list[str]:
    """What optimum-cli does."""
    from optimum.commands.optimum_cli import main as optimum_cli  # pyright: ignore[reportMissingImports]

    sys.argv = [
        "optimum-cli",
        "export",
        "onnx",
        "--model",
        job["model"],
        "--task",
        "text-to-image",
        job["to"],
    ]
    optimum_cli()
    return ["optimum-onnx", "onnxruntime", "diffusers", "transformers"]


def openvino(job: Job, clock: Clock) -> list[str]:
    """What openvino_export wrote, each network compiled for one shape; tokenizer, scheduler and noise are
    diffusers'. So does Optimum Intel, which needs torchvision. OpenVINO GenAI's pipeline takes what Optimum
    Intel has written."""
    import numpy as np
    import torch
    from diffusers import EulerDiscreteScheduler
    from diffusers.utils.torch_utils import randn_tensor
    from PIL import Image
    from transformers import CLIPTokenizer

    ov = quiet_openvino()
    folder, core = Path(job["model"]), ov.Core()
    # Weights in int8 are multiplied in what the processor prefers, as OpenVINO does unless told.
    precision = {"fp32": {"INFERENCE_PRECISION_HINT": "f32"}, "bf16": {"INFERENCE_PRECISION_HINT": "bf16"}}

    def compiled(name: str, *shapes: tuple[int, ...]) -> Any:
        network = core.read_model(folder / f"{name}.xml")
        network.reshape(dict(zip(network.inputs, map(ov.PartialShape, shapes), strict=True)))
        options = {"INFERENCE_NUM_THREADS": os.cpu_count(), **precision.get(job["precision"], {})}
        return core.compile_model(network, "CPU", options)

    tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(["", PROMPT], padding="max_length", truncation=True, return_tensors="np").input_ids
    text_encoder = compiled("text_encoder", tokens.shape)
    width = text_encoder.outputs[0].get_shape()[-1]
    shape = 4, job["size"] // 8, job["size"] // 8
    unet = compiled("unet", (2, *shape), (), (*tokens.shape, width))
    vae_decoder = compiled("vae_decoder", (1, *shape))
    hidden = text_encoder([tokens.astype(np.int64)])[0]
    scheduler: Any = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(job["steps"])
    latents: Any = randn_tensor((1, *shape), generator=torch.Generator().manual_seed(SEED))
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), t).numpy()
        free, asked = torch.from_numpy(unet([both, np.array(t, np.float32), hidden])[0]).chunk(2)
        latents = scheduler.step(free + GUIDANCE * (asked - free), t, latents).prev_sample
        clock()
    scale = json.loads((folder / "vae.json").read_text())["scaling_factor"]
    picture = vae_decoder([(latents / scale).numpy()])[0][0].transpose(1, 2, 0)
    Image.fromarray(((picture / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)).save(job["to"])
    return ["openvino", "torch", "diffusers", "transformers"]


def quiet_openvino() -> Any:
    """OpenVINO without its telemetry, which reports each import to Google Analytics."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    import openvino  # pyright: ignore[reportMissingImports]

    return openvino


def openvino_export(job: Job, _: Clock) -> list[str]:
    """OpenVINO's own conversion of the libraries' modules, with weights in fp16, as it saves them and as the
    models here have them; or in int8 by NNCF, which compresses weights alone."""
    import shutil

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    ov, model, to = quiet_openvino(), Path(job["model"]), Path(job["to"])
    to.mkdir()
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(model / part, to / part)
    shutil.copyfile(model / "vae" / "config.json", to / "vae.json")

    class Called(torch.nn.Module):
        """A module's call as a module, which is what is traced."""

        def __init__(self, module: Any, call: Any) -> None:
            super().__init__()
            self.module, self.call = module, call

        def forward(self, *inputs: Any) -> Any:
            return self.call(self.module, *inputs)

    def save(name: str, module: Any, call: Any, *inputs: Any) -> None:
        with torch.no_grad():
            network = ov.convert_model(Called(module.float().eval(), call), example_input=inputs)
        if "int8" in job["options"]:
            import nncf  # pyright: ignore[reportMissingImports]

            network = nncf.compress_weights(network)
        ov.save_model(network, to / f"{name}.xml")

    text: Any = CLIPTextModel.from_pretrained(model / "text_encoder", attn_implementation="sdpa")
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    save("text_encoder", text, lambda m, tokens: m(tokens)[0], tokens)
    hidden, latents = torch.zeros(2, 77, text.config.hidden_size), torch.zeros(2, 4, 64, 64)
    del text
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    save(
        "unet", unet, lambda m, x, t, h: m(x, t, h, return_dict=False)[0], latents, torch.tensor(1.0), hidden
    )
    del unet
    vae: Any = AutoencoderKL.from_pretrained(model / "vae")
    small = latents[:1, :, :16, :16]  # traced, whatever the size, in seconds; it took four minutes at 512x512
    save("vae_decoder", vae, lambda m, z: m.decode(z, return_dict=False)[0], small)
    return ["openvino", "torch", "diffusers", "transformers", *(["nncf"] if "int8" in job["options"] else [])]


def sdcpp(job: Job, clock: Clock) -> list[str]:
    """stable-diffusion.cpp, which quantises a diffusers folder at load."""
    from stable_diffusion_cpp import StableDiffusion  # pyright: ignore[reportMissingImports]

    options = set(job["options"])
    pipe: Any = StableDiffusion(
        model_path=job["model"],
        wtype=job["precision"],
        n_threads=os.cpu_count() or 1,  # its default is one per two hyperthreads
        diffusion_flash_attn="flash_attention" in options,
        vae_decode_only=True,
        verbose=False,
    )
    sizes = {"height": job["size"], "width": job["size"], "sample_steps": job["steps"], "cfg_scale": GUIDANCE}
    images = pipe.generate_image(
        PROMPT,
        **sizes,
        seed=SEED,
        sample_method="euler",
        vae_tiling="tiling" in options,
        progress_callback=clock,
    )
    images[0].save(job["to"])
    return ["stable-diffusion-cpp-python"]


def tightfit(job: Job, clock: Clock) -> list[str]:
    """Ours as the command line runs it; `options` are wishes, such as residency=staged."""
    from ... import Request, load  # pyright: ignore[reportMissingImports]
    from ...runtime.conditions import asked  # pyright: ignore[reportMissingImports]
    from ...runtime.events import Event  # pyright: ignore[reportMissingImports]

    wishes: dict[str, Any] = dict(option.split("=") for option in job["options"])
    sizes = {
        "height": job["size"],
        "width": job["size"],
        "num_inference_steps": job["steps"],
        "guidance_scale": GUIDANCE,
    }

    def on_event(event: Event) -> None:
        if event.stage == "denoise":
            clock()

    wish = Request(PROMPT, seed=SEED, scheduler="euler", conditions=asked(job["asks"]), **sizes)
    with load(job["model"], precision=job["precision"], requests=1, **wishes) as pipe:
        before = most_resident()
        result = pipe.generate(wish, on_event)
    result.images[0].save(job["to"])
    clock.peak_bytes = max(before, result.process_bytes)  # each stage resets the system's peak
    clock.device_bytes = result.peak_bytes  # and torch's
    others = {"onnx": ["onnxruntime"], "openvino": ["openvino"], "bitsandbytes": ["bitsandbytes"]}
    return ["torch", "diffusers", "transformers", *others.get(result.plan.denoiser.backend, [])]


def tightfit_export(job: Job, _: Clock) -> list[str]:
    """Ours; `options` are the command line's."""
    from ...__main__ import app  # pyright: ignore[reportMissingImports]
    from ...runtime.cli.app import main as tightfit_cli  # pyright: ignore[reportMissingImports]

    app()  # with the commands of all rooms
    sys.argv = ["tightfit", "export", job["model"], *job["options"], "-o", job["to"]]
    try:
        tightfit_cli()
    except SystemExit as end:  # it always raises this
        if end.code:
            raise
    return ["torch", "diffusers", "transformers"]


def cuda_is_used() -> Any:
    """torch's CUDA module if this process computes on it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def most_resident() -> int:
    """Peak resident bytes by Linux's count."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


ENGINES = {
    "diffusers": diffusers,
    "optimum": optimum,
    "optimum_export": optimum_export,
    "openvino": openvino,
    "openvino_export": openvino_export,
    "sdcpp": sdcpp,
    "tightfit": tightfit,
    "tightfit_export": tightfit_export,
}


def main() -> None:
    start, job = time.perf_counter(), json.loads(sys.argv[2])
    clock = Clock(job.get("steps", 0))
    packages = ENGINES[sys.argv[1]](job, clock)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    row["peak_bytes"] = max(clock.peak_bytes, most_resident())
    if cuda := cuda_is_used():
        row["device_bytes"] = clock.device_bytes or cuda.max_memory_reserved()
    if len(clock.ends) > 1:
        row["step_seconds"] = clock.step_seconds
    print(json.dumps(row | {"versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
