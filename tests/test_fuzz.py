"""Damaged and hostile models and pictures: a picture, or one line. No code of theirs runs, and nothing is
written elsewhere.

A mutant is a number and the seed, so it can be made again. The short run is of every build. The long one:

    FUZZ_MUTANTS=2000 FUZZ_WORKERS=2 pytest -s tests/test_fuzz.py

and mutant 17 alone, left in /tmp/mutant-17 to look at: FUZZ_FIRST=17 FUZZ_MUTANTS=1 FUZZ_KEEP=/tmp pytest -s
tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

# As many as KINDS has entries, so each at least once.
MUTANTS, FIRST = int(os.environ.get("FUZZ_MUTANTS", 19)), int(os.environ.get("FUZZ_FIRST", 0))
SEED, WORKERS = int(os.environ.get("FUZZ_SEED", 16)), int(os.environ.get("FUZZ_WORKERS", 1))
KEEP = os.environ.get("FUZZ_KEEP")
# A line of JSON for each mutant, as they end.
LOG = Path(os.environ["FUZZ_LOG"]) if "FUZZ_LOG" in os.environ else None
MOST_SECONDS = 5.0  # of the processor, of one mutant
MOST_CALIBRATING_SECONDS = 15.0  # which paints, and then each layer anew: 46 of the tiny model take 5
# That one mutant may take beside what the process has after it has painted with every base.
MOST_BYTES = 2**30
WATCHDOG_SECONDS = 60.0  # by the wall, on whatever machine: one that only waits takes no processor
SECRET = "what-no-export-may-copy"

# ----------------------------------------------------------------------------------------------------- values


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


TEXTS = (
    "", "evil", "../../victim/notes.json", "/etc/passwd", "..", "a\0b", "\x1b[31mred", "\ud800", "\u202eabc",
    "x" * 100_000, "None", "1", "true", "nan", "DDIMScheduler", "float16", "CLIPTextModel", "silu",
    "UNet2DConditionModel", "AutoencoderKL", "\n", "é" * 50, "gelu",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 63, 255, 1000, 10**5, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
    2**64, 10**40, 10**400, 0.0, -0.0, 0.5, 1e-40, 1e-300, 1e38, 1e39, 1e308, float("nan"), float("inf"),
    -float("inf"), 3.0, -7.5,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], [{}], [None, None], [1] * 5, [True], ["evil", "Evil"],
    ["diffusers", "evil"], {"a": {"b": 1}}, {"_class_name": "evil"}, ["x"] * 10_000, [0] * 100_000, [[[1]]],
    ["evil.evil", "Evil"], [10**9] * 4,
)  # fmt: skip


def some_value(rng: random.Random, old: Any = None) -> Any:
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.7:
        with contextlib.suppress(OverflowError):
            return rng.choice(
                (
                    old + 1,
                    old - 1,
                    old * 2,
                    -old,
                    old * 1000,
                    old / 2,
                    float(old),
                    str(old),
                    [old],
                    [old] * 3,
                    old // 2,
                )
            )
    if isinstance(old, bool) and rng.random() < 0.7:
        return not old
    if isinstance(old, list) and old and rng.random() < 0.5:
        return rng.choice(
            (
                old[:-1],
                old + old[-1:],
                old[::-1],
                old * 100,
                [old],
                old[0],
                dict.fromkeys(map(str, old)),
                [*old, None],
            )
        )
    if isinstance(old, str) and rng.random() < 0.4:
        return rng.choice(NAMES)
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice((old + "x", old.upper(), old[:-1], [old], old * 1000, old + "\0", {old: old}))
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


# What the libraries read of a config, whether or not it has it.
FIELDS = """
    class_embed_type addition_embed_type num_class_embeds encoder_hid_dim encoder_hid_dim_type
    dual_cross_attention attention_type time_embedding_type time_cond_proj_dim conv_in_kernel torch_dtype
    quantization_config auto_map _attn_implementation num_labels id2label dropout thresholding
    use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas use_flow_sigmas flow_shift
    shift timestep_spacing beta_schedule beta_start trained_betas rescale_betas_zero_snr sample_max_value
    algorithm_type solver_type solver_order final_sigmas_type variance_type clip_sample clip_sample_range
    lower_order_final euler_at_final interpolation_type sigma_min sigma_max dynamic_thresholding_ratio
    set_alpha_to_one skip_prk_steps steps_offset prediction_type lambda_min_clipped disable_corrector
    hidden_act attention_dropout output_hidden_states return_dict use_return_dict use_cache architectures
    model_type transformers_version num_attention_heads cross_attention_norm mid_block_type act_fn
    sample_size latents_mean shift_factor force_upcast _diffusers_version
""".split()  # noqa: SIM905
NAMES = """
    DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler
    EulerAncestralDiscreteScheduler TCDScheduler HeunDiscreteScheduler DPMSolverMultistepScheduler
    DPMSolverSinglestepScheduler DPMSolverSDEScheduler UniPCMultistepScheduler LCMScheduler
    DEISMultistepScheduler KDPM2DiscreteScheduler SASolverScheduler EDMEulerScheduler
    FlowMatchEulerDiscreteScheduler scaled_linear linear squaredcos_cap_v2 leading trailing linspace
    sample v_prediction flow_prediction dpmsolver++ sde-dpmsolver++ midpoint heun bh1 zero sigma_min
    fixed_small log_linear text_time text image projection simple_projection fourier gated timestep
    UNetMidBlock2DSimpleCrossAttn AttnDownBlock2D SimpleCrossAttnUpBlock2D KDownBlock2D
    ResnetDownsampleBlock2D scale_shift relu mish quick_gelu flash_attention_2
""".split()  # noqa: SIM905


def places(value: Any, most: int = 20_000) -> list[tuple[Any, Any]]:
    """Every container of a JSON value and key in it."""
    found, waiting = [], [value]
    while waiting and len(found) < most:
        each = waiting.pop()
        keys = (
            list(each) if isinstance(each, dict) else list(range(len(each))) if isinstance(each, list) else []
        )
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


def mutate(rng: random.Random, value: Any) -> None:
    """One change somewhere in a JSON value, in place."""
    there = places(value)
    if not there:
        return
    container, key = rng.choice(there)
    way = rng.random()
    if way < 0.15:
        del container[key]
    elif way < 0.25 and isinstance(container, dict):
        told = some_value(rng) if rng.random() < 0.5 else rng.choice((*NAMES, True, 1, 0.5, 4))
        container[rng.choice(FIELDS)] = told
    elif way < 0.27 and isinstance(container, dict):
        container[
            rng.choice((*TEXTS, "tokenizer_x/../../../victim", "auto_map", "custom_pipeline", "unet"))
        ] = some_value(rng)
    elif way < 0.3 and isinstance(container, dict):
        container[str(key) + rng.choice(("x", "\0", " ", "_2"))] = container.pop(key)
    elif way < 0.4:
        other, name = rng.choice(there)
        with contextlib.suppress(KeyError, IndexError):
            container[key] = other[name] if other[name] is not container else None
    else:
        container[key] = some_value(rng, container[key])


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed without a thought of what they mean."""
    if not content:
        return b"x"
    at, length = rng.randrange(len(content)), rng.choice((1, 2, 8, 100, 5000))
    some = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length, content[:length]))
    ways = (
        lambda: content[:at],
        lambda: content[:at] + some + content[at:],
        lambda: content[:at] + some + content[at + length :],
        lambda: content[:at] + content[at + length :],
        lambda: b"".join((content[:at], bytes([content[at] ^ (1 << rng.randrange(8))]), content[at + 1 :])),
        lambda: content + some,
        lambda: content[at:],
    )
    return rng.choice(ways)()


# ----------------------------------------------------------------------------------------------------- folder


def put(file: Path, content: bytes) -> None:
    """In its place: files of the copy are the base's own until then."""
    if file.is_symlink() or file.is_file():
        file.unlink()
    if file.is_dir():
        shutil.rmtree(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(
        file
        for pattern in patterns
        for file in folder.rglob(pattern)
        if file.is_file() and not file.is_symlink()
    )


MODEL = "*.json", "*.txt", "*.safetensors", "*.onnx*"  # not what is planted


def json_fields(rng: random.Random, model: Path) -> str:
    """Fields of a config, of which there are the more the larger it is; vocabularies have a kind of their
    own."""
    there = [file for file in files(model, "*.json") if file.name not in ("vocab.json", "tokenizer.json")]
    file = rng.choice(
        [file for file in there if file.name == rng.choice(("model_index.json", "config.json"))] or there
    )
    value = json.loads(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        mutate(rng, value)
    put(file, json.dumps(value).encode())
    return str(file.relative_to(model))


def json_texts(rng: random.Random, model: Path) -> str:
    file = rng.choice(files(model, "*.json"))
    content = file.read_bytes()
    first = content.replace(b"{", b'{"_class_name": 1, "_class_name": ["evil", "Evil"], ', 1)
    ways = (
        lambda: damaged(rng, content), lambda: b"", lambda: b"[]", lambda: b'"x"', lambda: b"null",
        lambda: b"{}", lambda: first, lambda: deep(100_000).encode(),
        lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000, lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode().encode("utf-16"), lambda: rng.randbytes(1000), lambda: b"9" * 100_000,
        lambda: content + content, lambda: b'{"a": ' + b"9" * 10_000 + b"}", lambda: b" " * 2**25,
        lambda: b'{"x": "' + b"y" * 2**23 + b'"}', lambda: b"\0" * 4096,
        lambda: content.replace(b"[", deep(300)[:300].encode(), 1),
        lambda: content.replace(b"}", b', "\\ud800": "\\udfff"}', 1),
    )  # fmt: skip
    put(file, rng.choice(ways)())
    return str(file.relative_to(model))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def headers(rng: random.Random, model: Path) -> str:
    """Headers of safetensors that contradict themselves, or their configs."""
    file = rng.choice(files(model, "*.safetensors"))
    content = file.read_bytes()
    header, data = split(content)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    way = rng.randrange(16)
    if way < 4:
        mutate(rng, header)
    elif way < 6:
        mutate(rng, entry)
    elif way == 6:
        entry["shape"] = (
            entry["shape"][::-1] if rng.random() < 0.5 else [1] * rng.choice((1, 8, 300)) + entry["shape"]
        )
    elif way == 7:
        entry["dtype"] = rng.choice(
            ("I32", "U32", "F64", "BF16", "I8", "F8_E4M3", "F8_E8M0", "C64", "evil", "I64")
        )
    elif way == 8:  # as many bytes by another type: only the config can tell
        entry["dtype"], entry["shape"] = (
            "BF16",
            [2 * entry["shape"][0], *entry["shape"][1:]] if entry["shape"] else [2],
        )
    elif way == 9:
        header[rng.choice((*TEXTS[:14], name + ".evil", "model." + name))] = header.pop(name)
    elif way == 10:
        other = rng.choice(list(header))
        header[name], header[other] = header[other], header[name]
    elif way == 11:
        count = rng.choice((1, 1000, 150_000))
        header |= {
            f"{name}.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)
        }
    elif way == 12:
        header["extra"] = {"dtype": "U8", "shape": [4096], "data_offsets": [len(data), len(data) + 4096]}
        data += bytes(4096)
    elif way == 13:
        header["__metadata__"] = some_value(rng)
    if way == 14:
        put(
            file,
            struct.pack("<Q", rng.choice((0, 1, 7, 2**24, 2**25, 2**31, 2**63, 2**64 - 1, len(content) - 8)))
            + content[8:],
        )
    elif way == 15:
        put(file, damaged(rng, content[: 8 + len(content) - len(data)]) + data)
    else:
        put(file, joined(header, data))
    return f"{file.relative_to(model)} {way}"


def weights(rng: random.Random, model: Path) -> str:
    """Values that are no picture's, pickles in another's clothes, and files that end early."""
    file = rng.choice(files(model, "*.safetensors"))
    header, data = split(file.read_bytes())
    patterns = (
        b"\xff",
        b"\x00\x00\x80\x7f",
        b"\x00\x00\xc0\x7f",
        b"\xff\xff\x7f\x7f",
        b"\0",
        rng.randbytes(4096),
    )
    pattern = rng.choice(patterns)
    filled = (pattern * (len(data) // len(pattern) + 1))[: len(data)]
    half = len(data) // 2
    found = (
        filled,
        data[:half] + filled[half:],
        damaged(rng, data),
        data[:half],
        data + b"x",
        pickle.dumps(Evil(model.parent / "ran")),
    )
    way = rng.randrange(len(found))
    put(file, found[way] if way == 5 else joined(header, found[way]))
    return f"{file.relative_to(model)} {way}"


def indices(rng: random.Random, model: Path) -> str:
    """A file of weights becomes shards, and their index is changed."""
    file = rng.choice(files(model, "*.safetensors"))
    header, data = split(file.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    shards = [f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index: dict[str, Any] = {"metadata": {"total_size": len(data)}, "weight_map": {}}
    for i, shard in enumerate(shards):
        part, bytes_ = {}, b""
        for name in names[i::2]:
            begin, end = header[name]["data_offsets"]
            part[name] = {**header[name], "data_offsets": [len(bytes_), len(bytes_) + end - begin]}
            bytes_ += data[begin:end]
            index["weight_map"][name] = shard
        put(file.parent / shard, joined(part, bytes_))
    if rng.random() < 0.9:
        file.unlink()
    way = rng.randrange(9)
    if way == 0:
        (file.parent / shards[1]).unlink()
    elif way == 1:
        index["weight_map"] = some_value(rng)
    elif way == 2:
        index["weight_map"] = dict.fromkeys(
            names, rng.choice(("../../victim/model.safetensors", "/etc/passwd", "a\0b", "", ".", ".."))
        )
    elif way == 3:
        index["weight_map"] = {name: f"{i}.safetensors" for i, name in enumerate(names * 1)}
    elif way == 4:
        shutil.copy(file.parent / shards[0], file.parent / "copy.safetensors")
        index["weight_map"][names[1]] = "copy.safetensors"
    elif way == 5:
        link(file.parent / shards[0], rng, model)
    elif way > 5:
        mutate(rng, index)
    variant = rng.choice(("", "", ".fp16"))
    put(file.parent / f"{file.stem}.safetensors.index{variant}.json", json.dumps(index).encode())
    return f"{file.relative_to(model)} {way}{variant}"


def tokenizers(rng: random.Random, model: Path) -> str:
    file = rng.choice(files(model / "tokenizer", "*.json", "*.txt"))
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.6:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 3))):
            mutate(rng, value)
        put(file, json.dumps(value).encode())
    elif rng.random() < 0.3:
        told = {
            "tokenizer_class": some_value(rng),
            "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
            "model_max_length": some_value(rng),
        }
        told |= {
            "added_tokens_decoder": some_value(rng),
            "vocab_file": "/etc/passwd",
            "bos_token": some_value(rng),
            "errors": "evil",
        }
        told = {key: told[key] for key in rng.sample(sorted(told), rng.randrange(1, 5))}
        name = rng.choice(("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"))
        put(file.parent / name, json.dumps(told).encode())
    else:
        some = (
            damaged(rng, content),
            b"",
            b"a b\n" * 500_000,
            b"a\n",
            b"\xff\xfe" * 50,
            b"#version: 0.2\n\n\n",
            b"a b c\n",
            b"\0\n",
        )
        put(file, rng.choice(some))
    return str(file.relative_to(model))


def links(rng: random.Random, model: Path) -> str:
    """What is no file of its folder, or is no file at all."""
    there = [
        *files(model, *MODEL),
        *(folder for folder in model.iterdir() if folder.is_dir() and not folder.is_symlink()),
    ]
    place = rng.choice(there)
    way = rng.randrange(12)
    if way < 6:
        link(place, rng, model)
        return f"{place.relative_to(model)} link"
    content = place.read_bytes() if place.is_file() else b""
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if way == 6:
        os.mkfifo(place)
    elif way == 7:
        place.mkdir()
    elif way == 8:
        with place.open("wb") as stream:  # sparse: it takes no room
            stream.truncate(rng.choice((2**24 + 1, 2**33, 2**40 + 1)))
    elif way == 9:
        put(place.parent / place.name.upper(), content)
    elif way == 10:
        put(place, content)
        for name in ("-rf", "a\nb", "é" * 60, ".hidden", " ", "con", "x" * 200, "\x1b[31m"):
            put(place.parent / name, b"{}")
        Path(os.fsdecode(os.fsencode(place.parent) + b"/\xff\xfe.json")).write_text("{}")
    return f"{place.relative_to(model)} {way}"


def link(place: Path, rng: random.Random, model: Path) -> None:
    """Put a link in a place, to what leaves the folder, does not end or is not there. What it leads to
    elsewhere has a secret."""
    outside = model.parent / "victim" / place.name
    if place.is_dir():
        shutil.copytree(place, outside, dirs_exist_ok=True)
        for file in files(outside, "*.json"):
            _secret(file)
        shutil.rmtree(place)
    else:
        shutil.copy(place, outside)
        _secret(outside)
        place.unlink()
    beside = rng.choice(files(model, *MODEL))
    choices = (
        outside,
        outside,
        outside,
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        place,
        "no-such-file",
        beside,
        "/dev/stdin",
    )
    place.symlink_to(rng.choice(choices))


def _secret(file: Path) -> None:
    if file.suffix == ".json":
        with contextlib.suppress(ValueError):
            value = json.loads(file.read_bytes())
            file.unlink()
            file.write_text(json.dumps({**value, "_secret": SECRET}))


def manifests(rng: random.Random, model: Path) -> str:
    file = model / "tightfit.json"
    value = (
        json.loads(file.read_bytes())
        if file.exists()
        else {"version": 1, "defaults": {"guidance_scale": 3.0}, "source": "x"}
    )
    for _ in range(rng.choice((1, 2, 4))):
        mutate(rng, value)
    if rng.random() < 0.3:
        value["defaults"] = {
            rng.choice(("guidance_scale", "num_inference_steps", "scheduler", "width", "prompt")): some_value(
                rng
            )
        }
    put(file, json.dumps(value).encode())
    return file.name


# ------------------------------------------------------------------------------------------------------- onnx


def onnx_bytes(rng: random.Random, model: Path) -> str:
    file = rng.choice(files(model, "*.onnx"))
    content = file.read_bytes()
    for _ in range(rng.choice((1, 1, 5))):
        content = damaged(rng, content)
    ways = (
        content,
        content,
        content,
        content,
        b"",
        b"\n\0" * 2**20,
        b":\xff\xff\xff\xff\x7f",
        content + b"\x3a\x00" * 10**6,
    )
    put(file, rng.choice(ways))
    return str(file.relative_to(model))


def onnx_data(rng: random.Random, model: Path) -> str:
    """The weights beside a graph."""
    there = [file for file in files(model, "*.onnx*", "weights.pb") if file.suffix != ".onnx"]
    if not there:
        return onnx_bytes(rng, model)
    file = rng.choice(there)
    way = rng.randrange(6)
    if way == 0:
        link(file, rng, model)
    elif way == 1:
        file.unlink()
    elif way == 2:
        file.unlink()
        os.mkfifo(file)
    else:
        put(file, (damaged(rng, file.read_bytes()), b"", b"\xff" * file.stat().st_size)[way - 3])
    return f"{file.relative_to(model)} {way}"


def onnx_graphs(rng: random.Random, model: Path) -> str:
    """A graph that protobuf reads and that means something else."""
    import onnx

    file = rng.choice(files(model, "*.onnx"))
    proto = onnx.load(file, load_external_data=False)
    told = []
    for _ in range(rng.choice((1, 1, 2))):
        if proto.graph.node and proto.graph.initializer and (proto.graph.input or proto.graph.output):
            told.append(_of_a_graph(rng, proto))
    put(file, proto.SerializeToString())
    return f"{file.relative_to(model)} {'+'.join(told)}"


def _of_a_graph(rng: random.Random, proto: Any) -> str:
    from onnx import TensorProto, helper

    graph = proto.graph
    node = rng.choice(graph.node)
    initializer = rng.choice(graph.initializer)
    value = rng.choice([*graph.input, *graph.output])
    side = lambda: rng.choice((0, -1, 1, 2, 40_000, 2**31, 2**62, -(2**63)))  # noqa: E731

    def external() -> None:
        there = [each for each in graph.initializer if each.external_data] or [initializer]
        tensor = rng.choice(there)
        tensor.data_location = TensorProto.EXTERNAL
        key = rng.choice(("location", "offset", "length", "checksum", "evil"))
        text = rng.choice(
            (
                *(each for each in TEXTS if each != "\ud800"),
                "-1",
                "0",
                "4",
                str(2**63),
                str(2**70),
                "1e3",
                "no/such/data",
                "7.5",
            )
        )
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
        if rng.random() < 0.5:
            for each in tensor.external_data:
                if each.key == key:
                    each.value = text

    def dims() -> None:
        initializer.dims[:] = [side() for _ in range(rng.choice((0, 1, 2, 4, 9, 100)))]

    def dims_alike() -> None:
        initializer.dims[:] = rng.choice(
            (
                list(initializer.dims)[::-1],
                [*initializer.dims, 1],
                [1, *initializer.dims],
                initializer.dims[:-1],
            )
        )

    def bomb() -> None:
        """Much out of nothing, before what there is."""
        name, answer = f"bomb{rng.random()}", f"answer{rng.random()}"
        kinds = {
            "ConstantOfShape": [[40_000, 40_000]], "Range": [0, 2 * 10**9, 1], "Tile": [[1.0], [2**40]],
            "Expand": [[1.0], [2**20, 2**20]], "Pad": [[1.0], [0, 2**40]], "Resize": [], "EyeLike": [[[1.0]]],
            "OneHot": [[1], 2**40, [0, 1]], "Concat": [[1]], "Loop": [2**62],
        }  # fmt: skip
        kind = rng.choice(sorted(kinds))
        ins = []
        for i, given in enumerate(kinds[kind]):
            import numpy as np

            graph.initializer.append(onnx_array(np.array(given), f"{name}{i}"))
            ins.append(f"{name}{i}")
        attributes = (
            {"body": graph.__class__()} if kind == "Loop" else {"axis": 0} if kind == "Concat" else {}
        )
        graph.node.insert(
            0, helper.make_node(kind, ins * (2000 if kind == "Concat" else 1), [answer], **attributes)
        )
        if rng.random() < 0.5 and node.input:
            node.input[0] = answer

    def attributes() -> None:
        for each in list(node.attribute) or [helper.make_attribute("evil", 1)]:
            each.i, each.f, each.s = rng.choice((0, -1, 2**62, 7)), 1e38, b"evil"
            each.ints[:] = [side() for _ in range(rng.choice((0, 1, 4, 40)))]
            each.type = rng.choice((each.type, each.type, 1, 2, 3, 7, 99))

    def rename() -> None:
        names = [name for each in graph.node for name in (*each.input, *each.output)]
        which = node.input if rng.random() < 0.5 else node.output
        if which:
            which[rng.randrange(len(which))] = rng.choice((*TEXTS[:5], rng.choice(names), "no-such-value"))

    def raw() -> None:
        initializer.raw_data = rng.choice((b"", b"x", rng.randbytes(7), b"\xff" * 4096))
        initializer.data_location = TensorProto.DEFAULT

    def shape() -> None:
        sides = value.type.tensor_type.shape.dim
        if sides and rng.random() < 0.7:
            sides[rng.randrange(len(sides))].dim_value = side()
        else:
            value.type.tensor_type.ClearField("shape")

    ways: dict[str, Callable[[], Any]] = {
        "external": external, "dims": dims, "dims alike": dims_alike, "bomb": bomb, "attributes": attributes,
        "rename": rename,
        "raw": raw, "shape": shape,
        "data type": lambda: setattr(initializer, "data_type",
            rng.choice((0, 1, 2, 6, 7, 8, 10, 16, 22, 23, 99, -1))),
        "twice": lambda: graph.initializer.append(initializer), "drop node": lambda: graph.node.remove(node),
        "node twice": lambda: graph.node.append(node),
        "drop weight": lambda: graph.initializer.remove(initializer),
        "operator": lambda: setattr(node, "op_type",
            rng.choice(("Add", "Loop", "If", "evil", "", "Reshape", "Shape", "Sin"))),
        "domain": lambda: setattr(node, "domain", rng.choice(("evil", "com.microsoft", "ai.onnx.ml", ""))),
        "opset": lambda: setattr(rng.choice(proto.opset_import), "version",
            rng.choice((0, 1, 7, 11, 13, 26, 999, -1, 2**62))),
        "no opset": lambda: proto.ClearField("opset_import"),
        "ir": lambda: setattr(proto, "ir_version", rng.choice((0, 1, 3, 99, 2**62))),
        "value": lambda: setattr(value, "name", rng.choice(("evil", "", "x" * 10_000, "sample", "\x1b[31m"))),
        "kind": lambda: setattr(value.type.tensor_type, "elem_type", rng.choice((0, 1, 7, 8, 10, 16, 99))),
        "order": lambda: graph.node.reverse(), "functions": lambda: proto.functions.add(),
        "no outputs": lambda: graph.ClearField("output"), "no graph": lambda: proto.ClearField("graph"),
        "more inputs": lambda: graph.input.append(value), "metadata": lambda: proto.metadata_props.add(),
    }  # fmt: skip
    way = rng.choice(sorted(ways))
    with contextlib.suppress(ValueError, TypeError):  # what protobuf's own types do not take
        ways[way]()
    return way


def onnx_array(value: Any, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(value, name)


# ---------------------------------------------------------------------------------------------------- picture


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    place, found = 8, []
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        found.append((kind, content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]], wrong: int = -1) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for i, (kind, data) in enumerate(parts):
        out += (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data) ^ (i == wrong))
        )
    return out


def picture_chunks(rng: random.Random, picture: Path) -> str:
    content = picture.read_bytes()
    parts = chunks(content)
    at = rng.randrange(len(parts))
    text = next(data for kind, data in parts if kind == b"tEXt")
    word, said = text.split(b"\0", 1)
    bomb = zlib.compress(b"Steps: 1, " * 10**7, 1)
    ways = (
        lambda: png([*parts[:at], *parts[at + 1 :]]), lambda: png([*parts[:at], parts[at], *parts[at:]]),
        lambda: png(parts[::-1]), lambda: png(parts, at), lambda: content[: rng.randrange(len(content))],
        lambda: damaged(rng, content), lambda: b"",
        lambda: png([parts[0], (b"tEXt", b"other\0" + b"x" * 2**21), *parts[1:]]),
        lambda: png([parts[0], (b"zTXt", word + b"\0\0" + bomb)]),
        lambda: png([parts[0], (b"iTXt", word + b"\0\1\0\0\0" + bomb), *parts[1:]]),
        lambda: png([parts[0], (b"tEXt", word), *parts[1:]]),
        lambda: png([parts[0], (b"iTXt", word + b"\0\0\0\0\0" + said), *parts[1:]]),
        lambda: png([parts[0], (b"zTXt", word + b"\0\1" + said)]),
        lambda: png([(b"IHDR", rng.randbytes(13)), *parts[1:]]),
        lambda: png([(b"IHDR", struct.pack(">II", 2**31, 2**31)), *parts[1:]]),
        lambda: content.replace(b"tEXt", b"\xff\xff\xff\xff", 1),
        lambda: png([*parts[:-1], (b"tEXt", b"parameters\0x"), parts[-1]]),
        lambda: png([parts[0], *((b"tEXt", b"a\0b") for _ in range(50_000)), *parts[1:]]),
        lambda: b"\xff\xd8\xff" + content,
        lambda: png([parts[0], (b"iTXt", word + b"\0\0\0\0\0\xff\xfe")]),
        lambda: struct.pack(">I", 2**31).join(content.split(b"\0\0\0\r", 1)),
    )  # fmt: skip
    way = rng.randrange(len(ways))
    put(picture, ways[way]())
    return str(way)


def picture_texts(rng: random.Random, picture: Path) -> str:
    parts = chunks(picture.read_bytes())
    text = next(data for kind, data in parts if kind == b"tEXt").split(b"\0", 1)[1].decode("latin-1")
    start, quoted = text.rsplit("tightfit: ", 1)
    exact = json.loads(json.loads(quoted))
    way = rng.randrange(9)
    if way < 4:
        for _ in range(rng.choice((1, 1, 3))):
            mutate(rng, exact)
        said = f"{start}tightfit: {json.dumps(json.dumps(exact))}"
    elif way == 4:
        said = f"{start}tightfit: {json.dumps(deep(100_000))}"
    elif way == 5:
        said = damaged(rng, text.encode()).decode("latin-1")
    else:
        fields = [
            "Steps: 1",
            "Sampler: Euler a",
            "CFG scale: 7",
            "Seed: 5",
            "Size: 64x64",
            "Model: x",
            'Lora hashes: "a: b, c: d"',
        ]
        values = (
            *TEXTS[:12], "1e400", "9" * 5000, "-1", "0", "64x", "0x0", "9999999x9999999", "nan", "inf",
            "1" * 40, '"', '"\\', "\x1b[2J", "½",
        )  # fmt: skip
        i = rng.randrange(len(fields))
        fields[i] = f"{fields[i].split(':')[0]}: {rng.choice(values)}"
        words = (
            "a", "a" * 60_000, "(" * 5000, ":" * 60_000, ", " * 60_000, "\x1b]0;x\7", "BREAK " * 500,
            "[a:b:0.5]" * 300, '"' * 60_000, "\n" * 60_000,
        )  # fmt: skip
        after = rng.choice(("", f", {rng.choice(words)}"))
        said = f"{rng.choice(words)}\nNegative prompt: {rng.choice(words)}\n{', '.join(fields)}{after}"
    data = b"parameters\0\0\0\0\0" + said.encode("utf-8", "replace")
    put(picture, png([parts[0], (b"iTXt", data), *(part for part in parts[1:] if part[0] != b"tEXt")]))
    return str(way)


# ---------------------------------------------------------------------------------------------------- mutants

FOLDERS = {
    "json fields": json_fields, "json texts": json_texts, "headers": headers, "weights": weights,
    "indices": indices, "tokenizers": tokenizers, "links": links, "manifests": manifests,
}  # fmt: skip
GRAPHS = {"onnx bytes": onnx_bytes, "onnx data": onnx_data, "onnx graphs": onnx_graphs}
PICTURES = {"picture chunks": picture_chunks, "picture texts": picture_texts}
# By number, over and over: fields, headers and graphs have the most ways to be wrong.
KINDS = [
    *FOLDERS,
    *GRAPHS,
    *PICTURES,
    "json fields",
    "json fields",
    "headers",
    "onnx graphs",
    "onnx graphs",
    "picture texts",
]
FAST = ("--width", "64", "--height", "64")
STEPS = ("--steps", "2")  # of one step all 180 ways are costed before it is painted, not a few


class Evil:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


def linked(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


def plant(arena: Path, model: Path) -> None:
    """What would leave a trace if code of the folder ran, and siblings that nothing may touch."""
    code = (
        f"import os\nos.makedirs({str(arena / 'ran')!r}, exist_ok=True)\n"
        "class Evil: pass\nEvilPipeline = EvilUNet = Evil\n"
    )
    for place in (
        "evil.py",
        "__init__.py",
        "pipeline.py",
        "unet/evil.py",
        "unet/Evil.py",
        "text_encoder/evil.py",
        "tokenizer/evil.py",
    ):
        put(model / place, code.encode())
    for place in (
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
    ):
        put(model / place, pickle.dumps(Evil(arena / "ran")))
    put(arena / "victim" / "notes.json", json.dumps({"_secret": SECRET}).encode())
    put(arena / "victim.txt", b"mine")
    (arena / "out").mkdir()


def commands(rng: random.Random, kind: str, base: str) -> list[list[str]]:
    """What a person would run on it, in the folder `out` beside it."""
    model = ["--model", "../model"]
    engine = ["--backend", "onnx"] if kind in GRAPHS and rng.random() < 0.8 else []
    paint = ["a", *model, *STEPS, "--seed", "1", *FAST, "-o", "p.png", *engine]
    if kind in PICTURES:
        return [
            [
                "--from",
                "../model/picture.png",
                *model,
                "-o",
                "p.png",
                *(FAST if rng.random() < 0.5 else ()),
                *STEPS,
                "--num-images",
                "1",
            ]
        ]
    way = rng.random()
    if way < 0.3:
        return [["plan", *model, *FAST, *engine]]
    if kind not in GRAPHS and base != "int8" and way < 0.5:
        return [["export", "../model", "--precision", rng.choice(("int8", "int4")), "-o", "exported"]]
    if kind in ("json fields", "links", "tokenizers") and base == "sd1" and way < 0.53:
        effort = ["--calibrate", "1", "--steps", "1", "--size", "64"]
        return [["export", "../model", "--precision", "int8", "-o", "exported", *effort]]
    return [paint]


class Mutant:
    """Number `number` of a seed, in a folder of its own."""

    def __init__(self, seed: int, number: int, bases: dict[str, str], place: Path) -> None:
        rng = random.Random(f"{seed} {number}")
        self.kind = KINDS[number % len(KINDS)]
        self.base = rng.choice(["onnx"] if self.kind in GRAPHS else ["sd1", "sd1", "sdxl", "int8", "onnx"])
        if self.base == "onnx" and self.kind in ("headers", "weights", "indices"):
            self.base = "sdxl"
        self.arena = place / f"mutant-{number}"
        shutil.rmtree(self.arena, ignore_errors=True)
        model = self.arena / "model"
        # Nothing is copied but what is changed.
        shutil.copytree(bases[self.base], model, copy_function=linked)
        if self.kind in GRAPHS and rng.random() < 0.2:  # weights for torch beside them
            shutil.copytree(bases["sd1"], model, copy_function=linked, dirs_exist_ok=True)
        if self.kind in GRAPHS and rng.random() < 0.9:  # it says that a graph is not the one that was written
            (model / "tightfit.json").unlink(missing_ok=True)
        plant(self.arena, model)
        if self.kind in PICTURES:
            put(model / "picture.png", Path(bases["picture"]).read_bytes())
            self.told = PICTURES[self.kind](rng, model / "picture.png")
        else:
            self.told = ({**FOLDERS, **GRAPHS}[self.kind])(rng, model)
        self.commands = commands(rng, self.kind, self.base)


def listing(arena: Path) -> dict[str, tuple[Any, ...]]:
    """What is around the output, with what tells that it was written to."""
    found = {}
    for folder, folders, names in os.walk(arena):
        if Path(folder) == arena:
            folders.remove("out")
        for name in (*folders, *names):
            told = os.lstat(os.path.join(folder, name))  # noqa: PTH118  names that are no text, too
            found[os.path.join(folder, name)] = told.st_mode, told.st_ino, told.st_size, told.st_mtime_ns  # noqa: PTH118
    return found


# ----------------------------------------------------------------------------------------------------- worker


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def call(arguments: list[str]) -> tuple[int | str, str]:
    """Run the command in this process: its exit code, or what it raised instead of one; and what it said on
    standard error."""
    import traceback

    from tightfit.__main__ import app
    from tightfit.runtime.cli.app import main

    app()

    sys.argv = ["tightfit", *arguments]
    os.ftruncate(1, 0)
    os.ftruncate(2, 0)
    code: int | str
    try:
        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else f"SystemExit({done.code!r})"
    except BaseException:
        code = traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code, os.pread(2, 2**20, 0).decode("utf-8", "replace")


# Export tells of networks.
_OWN = re.compile(
    "tightfit: |note: |(text_encoder|text_encoder_2|unet|vae|calibrat\\w+|vae_\\w+|[0-9]+ of .*): "
)


def fault(arena: Path, code: int | str, said: str, before: dict[str, tuple[Any, ...]]) -> str:
    """What is wrong with how a mutant ended, or nothing."""
    lines = said.splitlines()
    own = [line for line in lines if line.startswith("tightfit: ")]
    if isinstance(code, str) or "Traceback" in said:
        return f"traceback: {code}"
    if code not in (0, 2):
        return f"exit code {code}"
    if any(not _OWN.match(line) for line in lines):
        return "words of a library on standard error"
    if code == 2 and (len(own) != 1 or len(own[0]) < 30):
        return "not one clear line"
    if "out of memory" in said:
        return "out of memory"
    if any(ord(letter) < 32 and letter != "\n" for letter in said):
        return "a control character on the terminal"
    if (arena / "ran").exists():
        return "CODE OF THE FOLDER RAN"
    after = listing(arena)
    if changed := sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    ):
        return f"WRITTEN OUTSIDE: {changed[:3]}"
    out = arena / "out"
    if left := sorted(each.name for each in out.iterdir() if each.name not in ("p.png", "exported")):
        return f"left behind: {left[:3]}"
    if any(SECRET.encode() in file.read_bytes() for file in out.rglob("*") if file.is_file()):
        return "A SECRET WAS COPIED"
    if code == 2 and any(out.iterdir()):
        return "something was written, though it was refused"
    return ""


def work(bases: dict[str, str], place: Path, seed: int, first: int, beyond: int, step: int) -> None:
    """Run every `step`th mutant from `first`, and write a line of JSON before and after each."""
    import resource

    tell = os.fdopen(os.dup(1), "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(
            os.open(place / f"said-{os.getpid()}-{descriptor}", os.O_RDWR | os.O_CREAT | os.O_APPEND),
            descriptor,
        )
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    for base in ("sd1", "sdxl", "int8", "onnx"):  # what is imported and cached once is nobody's fault
        code, said = call(
            [
                "a",
                "--model",
                bases[base],
                *STEPS,
                *FAST,
                "-o",
                str(place / f"warm-{os.getpid()}.png"),
                "--overwrite",
            ]
        )
        assert code == 0, (base, code, said)
    call(["plan", "--model", bases["onnx"], "--backend", "onnx", *FAST])
    base_bytes = memory("VmRSS")
    # A machine that shares its memory should not be filled: a mutant that asks for so much is told that there
    # is none.
    with contextlib.suppress(OSError, ValueError):
        data = memory("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (data + 6 * MOST_BYTES, data + 6 * MOST_BYTES))
    for number in range(first, beyond, step):
        tell.write(json.dumps({"begins": number}) + "\n")
        mutant = Mutant(seed, number, bases, place)
        os.chdir(mutant.arena / "out")
        for arguments in mutant.commands:
            before = listing(mutant.arena)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            began = time.process_time()
            code, said = call(arguments)
            seconds, grown = time.process_time() - began, memory("VmHWM") - base_bytes
            wrong = fault(mutant.arena, code, said, before)
            most = MOST_CALIBRATING_SECONDS if "--calibrate" in arguments else MOST_SECONDS
            if not wrong and seconds > most:
                wrong = f"{seconds:.1f} s of the processor"
            if not wrong and grown > MOST_BYTES:
                wrong = f"{grown >> 20} MiB more than before"
            told = {
                "number": number,
                "kind": mutant.kind,
                "base": mutant.base,
                "told": mutant.told,
                "command": " ".join(arguments),
            }
            told |= {"code": code if isinstance(code, int) else -1, "said": said[-600:], "wrong": wrong}
            told |= {"seconds": seconds, "grown": grown}
            tell.write(json.dumps(told) + "\n")
        os.chdir(place)
        if not KEEP:
            shutil.rmtree(mutant.arena, ignore_errors=True)


def watched(bases: dict[str, str], place: Path, first: int, step: int) -> list[dict[str, Any]]:
    """Run a worker to its end, and another after each that died or hung: what each mutant gave."""
    found: list[dict[str, Any]] = []
    environment = os.environ | {
        "HOME": str(place),
        "XDG_CACHE_HOME": str(place / "cache"),
        "TMPDIR": str(place),
    }
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    while first < FIRST + MUTANTS:
        given = json.dumps(bases), str(place), *map(str, (SEED, first, FIRST + MUTANTS, step))
        worker = subprocess.Popen(
            [sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert worker.stdout
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=pour, args=(worker.stdout, lines), daemon=True).start()
        at, why = -1, "died"
        try:
            # It imports what there is first.
            while line := lines.get(timeout=WATCHDOG_SECONDS * (5 if at < 0 else 1)):
                told = json.loads(line)
                at = told.get("begins", at)
                if "number" in told:
                    note(told, found)
        except queue.Empty:
            why = f"hung for {WATCHDOG_SECONDS:.0f} s"
            worker.kill()
        if (code := worker.wait()) == 0:
            break
        assert at >= 0, "a worker cannot even paint with what is whole"
        said = "".join(
            file.read_text(errors="replace")[-3000:] for file in place.glob(f"said-{worker.pid}-2")
        )
        told = {
            "number": at,
            "kind": KINDS[at % len(KINDS)],
            "base": "",
            "told": "",
            "command": "",
            "code": -1,
            "said": said,
        }
        note(told | {"wrong": f"{why} ({code})", "seconds": 0.0, "grown": 0}, found)
        first = at + step
    return found


def pour(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def note(told: dict[str, Any], found: list[dict[str, Any]]) -> None:
    found.append(told)
    if LOG:
        with LOG.open("a") as stream:
            stream.write(json.dumps(told) + "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="what a process took stands in Linux's /proc")
def test_mutants(shallow_models, onnx_models, made_once, tmp_path):
    from tightfit.__main__ import app
    from typer.testing import CliRunner

    def run(*arguments: str) -> None:
        CliRunner().invoke(app(), arguments, catch_exceptions=False)

    sd1 = str(shallow_models["sd1"])
    int8 = made_once("fuzz/int8", lambda folder: run("export", sd1, "--precision", "int8", "-o", str(folder)))
    picture = tmp_path / "picture.png"
    run("generate", "a", "--model", sd1, "--steps", "1", *FAST, "-o", str(picture))
    bases = {
        "sd1": sd1,
        "sdxl": str(shallow_models["sdxl"]),
        "int8": str(int8),
        "onnx": str(onnx_models("sd1", "fp32")),
    }
    bases["picture"] = str(picture)
    place = Path(KEEP) if KEEP else tmp_path
    workers = min(WORKERS, MUTANTS)
    with ThreadPoolExecutor(workers) as pool:
        found = [
            each
            for part in pool.map(lambda i: watched(bases, place, FIRST + i, workers), range(workers))
            for each in part
        ]
    report(found)
    assert {each["number"] for each in found} == set(range(FIRST, FIRST + MUTANTS))
    faults = [each for each in found if each["wrong"]]
    assert not faults, "\n".join(
        f"{SEED} {each['number']} {each['kind']} {each['told']}: {each['wrong']}" for each in faults
    )


def report(found: list[dict[str, Any]]) -> None:
    """By kind: how many, with which end; the slowest, and the one that took the most memory."""
    for kind in sorted({each["kind"] for each in found}):
        codes = Counter("fault" if each["wrong"] else each["code"] for each in found if each["kind"] == kind)
        line = (
            f"{kind:15} {sum(codes.values()):4}: exit 0 {codes[0]}, "
            f"exit 2 {codes[2]}, faults {codes['fault']}"
        )
        print(line)  # noqa: T201
    for field in ("seconds", "grown"):
        most = max(found, key=lambda each: each[field])
        print(f"most {field}: {most[field]:.4g}, mutant {most['number']} ({most['kind']}, {most['told']})")  # noqa: T201


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7]))
