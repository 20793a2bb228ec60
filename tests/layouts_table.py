"""Every layout of every family: our picture beside diffusers' of the same values, and predicted peaks beside
measured ones.

    python tests/layouts_table.py [FAMILY…] > docs/layouts.md

Families are SD 1.x, SD 2.x and SDXL, and by name flux2-klein, z-image, flux1-dev, flux1-schnell and sd3, of
which files of ComfyUI are written.

Models are narrow and random; they are written with the tests' own writers.
"""

from __future__ import annotations

import math
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.benchmarks.record import envelope
from tightfit.export import random_model
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.runtime import adapters
from tightfit.runtime.cli.output import say
from tightfit.runtime.files import read_json
from tightfit.runtime.units import shown

HERE = Path(__file__).parent / "runtime/models"
_TESTS = (
    "test_gguf",
    "test_bitsandbytes",
    "test_single_file",
    "test_split_file",
    "test_z_image_files",
    "test_flux1_sd3_files",
)
NARROW, GGUF, BNB, SINGLE, SPLIT, Z_IMAGE, WIDE = (
    runpy.run_path(str(HERE / f"{name}.py")) for name in ("conftest", *_TESTS)
)
# By family: how its files are called and written, what these stand for, and GGUF's word for it.
SPLITS = {"flux2-klein": (SPLIT, "flux"), "z-image": (Z_IMAGE, "lumina2")}
FROM_NONE = {"z-image": 1.0}  # of guidance: what diffusers calls 0
TOKENS = {"flux1-schnell": {"max_sequence_length": 256}}  # which diffusers is told
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "width": 64, "height": 64, "guidance_scale": 6.0}
PRECISIONS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8", "compute": "bf16"},
    "int4": {"precision": "int4", "compute": "bf16"},
}
State = dict[str, torch.Tensor]
Parts = dict[str, State]
"""Values by the folder of a network and the name that diffusers has for them."""


@dataclass(frozen=True)
class Case:
    """One way in which a model lies on the disk, and diffusers' pipeline of the same values. `stored` is the
    one precision that it can run in."""

    model: Path
    theirs: Callable[[], Any]
    adapters: tuple[Any, ...] = ()
    stored: str = ""
    onnx: bool = False


def of_folder(folder: Path, values: Parts | None = None) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part, changed in (values or {}).items():
        module = getattr(pipe, part)
        state = module.state_dict()
        for name, tensor in changed.items():
            key = name if name in state else name.removeprefix("text_model.")
            state[key] = tensor.float().view(state[key].shape)
        module.load_state_dict(state)
    return pipe


def of_file(file: Path, family: str, folder: Path) -> Any:
    kind: Any = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    others = {} if family == "sdxl" else {"safety_checker": None}
    return kind.from_single_file(file, config=str(folder), local_files_only=True, **others)


def saved(state: State, file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def cases(family: str, folder: Path, root: Path) -> Iterator[tuple[str, Case]]:
    state = NARROW["original"](folder, family)
    single = partial(of_file, family=family, folder=folder)
    yield "diffusers folder, fp32", Case(folder, partial(of_folder, folder))
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        stored = {key: tensor.to(dtype) for key, tensor in state.items()}
        plain = saved(
            {key: tensor.float() for key, tensor in stored.items()}, root / f"{name}-plain.safetensors"
        )
        yield f"one file, {name}", Case(saved(stored, root / f"{name}.safetensors"), partial(single, plain))
    stored, meant = SINGLE["in_fp8"](state, torch.float8_e4m3fn, True)
    plain = saved(meant, root / "fp8-plain.safetensors")
    yield "one file, fp8 with scales", Case(saved(stored, root / "fp8.safetensors"), partial(single, plain))
    for kind in GGUF["KINDS"] if family == "sd1" else ("Q8_0", "Q4_0", "Q4_K", "Q6_K"):
        meant = GGUF["written"](root / f"{kind}.gguf", state, kind)
        plain = saved(meant, root / f"{kind}-plain.safetensors")
        yield f"GGUF, whole, {kind}", Case(root / f"{kind}.gguf", partial(single, plain))
    for kind in ("Q8_0", "Q4_K"):
        file = root / f"unet-{kind}.gguf"
        meant = state | GGUF["written"](file, state, kind, comfy=True)
        plain = saved(meant, root / f"unet-{kind}-plain.safetensors")
        unet = adapters.written({"unet": [str(file)]})
        yield f"GGUF, a U-Net alone, {kind}", Case(folder, partial(single, plain), adapters=unet)
    yield from quantised(family, folder, root)


def split_cases(family: str, folder: Path, root: Path) -> Iterator[tuple[str, Case]]:
    """Of a model that is published as files side by side."""
    own, arch = SPLITS[family]
    yield "diffusers folder, fp32", Case(folder, partial(of_folder, folder))
    parts = SPLIT["parts_of"](folder)
    state = own["published"](parts["transformer"])
    stored = {
        "fp32": (state, state),
        "bf16": SPLIT["in_bf16"](state),
        "fp8 with scales": own["in_fp8"](state),
    }
    yield from others_of_split(family, folder, parts, state, root)
    for name, (written, meant) in stored.items():
        file = SPLIT["write_comfy"](root / name, folder, written, own["NAMES"])
        theirs = partial(of_folder, folder, {"transformer": own["converted"](meant)})
        yield f"files of ComfyUI, {name}", Case(file, theirs)
    for kind in ("Q8_0", "Q4_K"):
        (place := root / kind).mkdir()
        meant, texts = SPLIT["gguf_files"](parts, place, kind, own["published"], arch)
        values = {"transformer": own["converted"](meant), "text_encoder": texts}
        options = {"text_encoder": [str(place / "qwen.gguf")], "vae": [str(root / "fp32/vae" / own["VAE"])]}
        shutil.copytree(folder / "tokenizer", place / "tokenizer")
        beside = adapters.written(options)
        yield (
            f"files of ComfyUI, GGUF, {kind}",
            Case(place / "denoiser.gguf", partial(of_folder, folder, values), beside),
        )


def wide_cases(family: str, folder: Path, root: Path) -> Iterator[tuple[str, Case]]:
    """Of a model with CLIP and T5 that is published as files side by side, or as one."""
    yield "diffusers folder, fp32", Case(folder, partial(of_folder, folder))
    plain, parts = WIDE["parts_of"](folder), WIDE["published_parts"](folder)
    t5, tokenizer = WIDE["T5"][family], WIDE["tokenizer_of"](family)
    state = parts["transformer"]
    ways = {
        "fp32": lambda state: (state, state),
        "bf16": SPLIT["in_bf16"],
        "fp8": WIDE["in_fp8_alone"],
        "fp8 with scales": SPLIT["in_fp8"],
        "bitsandbytes' nf4": WIDE["in_nf4"],
    }
    for name, way in ways.items():
        written, meant = way(state)
        file = WIDE["write_comfy"](root / name, folder, family, lambda _, written=written: written)
        values = {"transformer": WIDE["unpublished"](meant, plain["transformer"])}
        theirs = partial(of_folder, folder, values)
        yield f"files of ComfyUI, {name}", Case(file, theirs)
    for kind in ("Q8_0", "Q4_K"):
        (place := root / kind).mkdir()
        values = {
            "transformer": WIDE["denoiser_gguf"](folder, place / "denoiser.gguf", kind),
            t5: WIDE["t5_gguf"](parts[t5], place / "t5.gguf", kind),
        }
        others = [WIDE["file_of"](root / "fp32", family, part) for part in plain]
        texts = [str(file) for file in others if file.stem.startswith("clip")]
        vae = [str(file) for file in others if file.parent.name == "vae"]
        beside = adapters.written({"text_encoder": [*texts, str(place / "t5.gguf")], "vae": vae})
        shutil.copytree(folder / tokenizer, place / "t5_tokenizer")
        theirs = partial(of_folder, folder, values)
        yield f"files of ComfyUI, GGUF, {kind}", Case(place / "denoiser.gguf", theirs, beside)
    inside = (
        ("fp8", WIDE["in_fp8_alone"], SPLIT["in_bf16"], "vae."),
        ("nf4, T5 in fp8", WIDE["in_nf4"], WIDE["in_fp8_alone"], "vae."),
        ("bf16, T5 in fp8 with scales", SPLIT["in_bf16"], SPLIT["in_fp8"], "first_stage_model."),
    )
    (place := root / "inside").mkdir()
    shutil.copytree(folder / tokenizer, place / "t5_tokenizer")
    for name, way, of_texts, before in inside:
        stored, values = WIDE["in_one"](folder, family, way, of_texts, before)
        file = saved(stored, place / f"{name}.safetensors")
        yield f"checkpoint of ComfyUI, {name}", Case(file, partial(of_folder, folder, values))


def others_of_split(
    family: str, folder: Path, parts: Parts, state: State, root: Path
) -> Iterator[tuple[str, Case]]:
    """Checkpoints with all networks inside, and what bitsandbytes quantised."""
    own = SPLITS[family][0]
    (place := root / "inside").mkdir()
    shutil.copytree(folder / "tokenizer", place / "tokenizer")
    for name, way, before in (("bf16", "in_bf16", "vae."), ("fp8", "in_fp8", "first_stage_model.")):
        names = own["published"], own["converted"]
        stored, meant = SPLIT["in_one"](parts, SPLIT[way], before, names)
        file = saved(stored, place / f"{own['DENOISER'].split('.')[0]}-{name}.safetensors")
        yield f"checkpoint of ComfyUI, {name}", Case(file, partial(of_folder, folder, meant))
    for kind in ("nf4", "nf4-nested", "int8"):
        stored, meant = BNB["quantised"](state, kind, BNB["linears"](state))
        file = SPLIT["write_comfy"](root / kind, folder, stored, own["NAMES"])
        values = {"transformer": own["converted"](state | meant)}
        yield f"files of ComfyUI, bitsandbytes' {kind}", Case(file, partial(of_folder, folder, values))
    copy, values = Path(shutil.copytree(folder, root / "bnb-nf4")), {}
    for part in ("transformer", "text_encoder"):
        (file,) = (copy / part).glob("*.safetensors")
        tensors = load_file(file)
        layers = [layer for layer in BNB["linears"](tensors) if "embed" not in layer]
        stored, values[part] = BNB["quantised"](tensors, "nf4", layers)
        BNB["save"](file.parent, file.name, stored)
        BNB["configured"](file.parent, load_in_4bit=True)
    yield "bitsandbytes folder, nf4", Case(copy, partial(of_folder, folder, values))


def quantised(family: str, folder: Path, root: Path) -> Iterator[tuple[str, Case]]:
    parts = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    parts |= {"text_encoder_2": "model.safetensors"} if family == "sdxl" else {}
    for kind in BNB["KINDS"]:
        copy, values = Path(shutil.copytree(folder, root / f"bnb-{kind}")), {}
        for part, name in parts.items():
            tensors = load_file(copy / part / name)
            stored, values[part] = BNB["quantised"](tensors, kind, BNB["linears"](tensors))
            BNB["save"](copy / part, name, stored)
            BNB["configured"](copy / part, **{f"load_in_{8 if kind == 'int8' else 4}bit": True})
        yield f"bitsandbytes folder, {kind}", Case(copy, partial(of_folder, folder, values))
    for kind in ("int8", "int4"):
        out = tightfit.export_model(folder, root / f"ours-{kind}", kind)
        yield (
            f"tightfit folder, {kind}",
            Case(out, partial(of_folder, folder, exported(out, folder)), stored=kind),
        )
    for kind in ("fp32", "int8", "int4"):
        compute: dict[str, Any] = {} if kind == "fp32" else {"compute": "fp32"}
        out = tightfit.export_model(folder, root / f"onnx-{kind}", kind, to="onnx", **compute)
        values = exported(root / f"ours-{kind}", folder) if kind != "fp32" else None
        yield f"ONNX, {kind}", Case(out, partial(of_folder, folder, values), stored=kind, onnx=True)


def exported(folder: Path, original: Path) -> Parts:
    """The values of a folder that tightfit wrote."""
    made: Parts = {}
    for part, entry in read_json(folder / "tightfit.json")["components"].items():
        stored, plain = (load_file(next((root / part).glob("*.safetensors"))) for root in (folder, original))
        made[part] = {}
        for name, tensor in plain.items():
            layer = name.removesuffix(".weight")
            if layer == name or layer not in entry["formats"]:
                made[part][name] = stored[name]
                continue
            form = FORMATS[entry["formats"][layer]]
            parts = {piece: stored[f"{layer}.{piece}"] for piece in form.parts(tensor.shape)}
            made[part][name] = dequantise(parts, form, tensor.shape)
    return made


# ----------------------------------------------------------------------------------------------- measured


def painted(case: Case, **wishes: Any) -> tuple[np.ndarray, int, int]:
    """A picture of ours, and the predicted and measured peak of its denoising in bytes."""
    few = {} if case.onnx else {"attention": "sdpa", "tiling": "whole", "cfg": "batched"}  # to plan
    with tightfit.load(str(case.model), device="cpu", residency="staged", **few, **wishes) as pipe:
        request = tightfit.Request("a cat", seed=3, adapters=case.adapters, **OPTIONS)
        result = pipe.generate(request)
    predicted, measured = result.plan.predicted.stages["denoise"], result.stages["denoise"].peak_bytes
    return np.asarray(result.images[0], float), predicted, measured


def by_diffusers(case: Case, family: str) -> np.ndarray:
    pipe = case.theirs()
    pipe.set_progress_bar_config(disable=True)
    options = OPTIONS | {"guidance_scale": OPTIONS["guidance_scale"] - FROM_NONE.get(family, 0)}
    options |= {"generator": torch.Generator().manual_seed(3), **TOKENS.get(family, {})}
    answer = pipe(prompt="a cat", output_type="np", **options)
    return (answer.images[0] * 255).round().astype(float)


def row(name: str, family: str, case: Case) -> str:
    exact = {"precision": case.stored, "compute": "fp32"} if case.stored else PRECISIONS["fp32"]
    picture, *peaks = painted(case, **exact)
    error = np.square(picture - by_diffusers(case, family)).mean()
    cells = ["identical" if not error else f"{10 * math.log10(255**2 / error):.1f}"]
    for precision, wishes in PRECISIONS.items():
        if case.stored not in ("", precision):
            cells.append("")
            continue
        try:
            again = precision != "fp32" and not case.onnx  # else it has just been painted so
            predicted, measured = painted(case, **wishes)[1:] if again else peaks
        except tightfit.TightfitError as refused:
            cells.append(str(refused)[:40])
            continue
        off = round(100 * (predicted / measured - 1), 1) + 0  # no -0.0
        cells.append(f"{shown(predicted)}, {off:+.1f}")
    return f"| {name} | {family} | {' | '.join(cells)} |"


def lines(text: str) -> None:
    for line in text.splitlines():
        say(line)


def main() -> None:
    families = sys.argv[1:] or NARROW["FAMILIES"]
    diffusers.utils.logging.set_verbosity_error()
    facts = envelope("")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    command = " ".join(["python tests/layouts_table.py", *sys.argv[1:]])
    machine, date = facts["hardware"]["name"], facts["date"]
    lines(HEAD.format(command=command, machine=machine, date=date, versions=versions))
    with tempfile.TemporaryDirectory() as made, pytest.MonkeyPatch.context() as patch:
        for family in families:
            root = Path(made) / family
            folder = root / "folder"
            root.mkdir()
            if family in NARROW["FAMILIES"]:
                patch.setitem(random_model.TINY, family, NARROW["narrow"](family))
                NARROW["written"](family, folder)
                found = cases(family, folder, root)
            else:
                own, found = (WIDE, wide_cases) if family in WIDE["NAMES"] else (SPLIT, split_cases)
                own["write_folder"](folder, family)
                found = found(family, folder, root)
            for name, case in found:
                say(row(name, family, case))


HEAD = """# Every layout of every family

Decibels of PSNR in 8 bits between our picture and that of diffusers' pipeline in fp32, of narrow random
models with the same values; and for each precision the predicted peak of denoising, staged, with its error
in per cent of the measured one. 64x64 pixels, three steps. ONNX Runtime's peak is the growth of the
process, in which models as small as these are tens of MiB off (docs/export.md).

Made by `{command}` on {machine} (CPU, one thread),
{date}: {versions}.

| layout | family | dB | fp32 | bf16 | int8 | int4 |
|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    main()
