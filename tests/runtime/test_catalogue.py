"""`tightfit models`: thirty files, bad ones among them, each with what it is and would run as."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.__main__ import app
from tightfit.export import random_model
from tightfit.runtime import catalogue, kept
from tightfit.runtime.adapters import written
from tightfit.runtime.adapters.prompt import from_words
from tightfit.runtime.catalogue import described
from tightfit.runtime.kept import Hashes
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.layouts.library import scan
from tightfit.runtime.planner.wishes import Wishes
from typer.testing import CliRunner

SINGLE = runpy.run_path(str(Path(__file__).parent / "models/conftest.py"))


def layer(width: int, spelling: str) -> dict[str, torch.Tensor]:
    """A LoRA of what reads texts `width` wide."""
    down, up = torch.zeros(4, width), torch.zeros(320, 4)
    names = {
        "kohya": ("lora_unet_x_attn2_to_k.lora_down.weight", "lora_unet_x_attn2_to_k.lora_up.weight"),
        "peft": ("unet.x.attn2.to_k.lora_A.weight", "unet.x.attn2.to_k.lora_B.weight"),
        "old": ("unet.x.attn2.processor.to_k_lora.down.weight", "unet.x.attn2.processor.to_k_lora.up.weight"),
        "hada": ("lora_unet_x_attn2_to_v.hada_w1_b", "lora_unet_x_attn2_to_v.hada_w1_a"),
    }[spelling]
    return dict(zip(names, (down, up), strict=True))


def sparse(file: Path, shapes: dict[str, tuple[int, ...]], missing: int = 0) -> None:
    """A file of these tensors in fp32, which takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end - missing)


TAGS = {"10_pxl": {"pxl": 9, "pixel art": 30, " cat": 2}, "5_pxl": {"pxl": 40, "dog": 1}}
SMALL = {  # tensors, metadata, and what is expected: kind, family, trigger words
    "Lora/pixel": (layer(768, "kohya"), {"ss_tag_frequency": json.dumps(TAGS)},
                   "LoRA", "SD 1.x", ["pxl", "pixel art", "cat"]),
    "Lora/sd2": (layer(1024, "peft"), {"ss_tag_frequency": "{"}, "LoRA", "SD 2.x", []),
    "Lora/xl": (layer(2048, "old"), {"modelspec.trigger_phrase": " ohwx man ", "ss_tag_frequency": "[3]"},
                "LoRA", "SDXL", ["ohwx man"]),
    "Lora/loha": (layer(2048, "hada"), None, "LoRA", "SDXL", []),
    "Lora/text": ({"lora_te1_x.lora_down.weight": torch.zeros(4, 768), "x.alpha": torch.ones(())},
                  {"ss_base_model_version": "sdxl_base_v1-0"}, "LoRA", "SDXL", []),
    "Lora/flux": ({"lora_unet_double_blocks_0.lora_down.weight": torch.zeros(4, 9)},
                  {"ss_base_model_version": "flux1", "ss_tag_frequency": '{"a": {"b": "x", "c": 2}, "d": 3}'},
                  "LoRA", "flux1", ["c", "b"]),
    "VAE/mse": ({"decoder.conv_in.weight": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(1)}, None,
                "VAE", "", []),
    "VAE/taesd": ({"decoder.layers.0.weight": torch.zeros(1)}, None, "VAE", "", []),
    "VAE/taesd_decoder": ({"1.weight": torch.zeros(1), "3.conv.0.bias": torch.zeros(1)}, None, "VAE", "", []),
    "embeddings/easy": ({"emb_params": torch.zeros(8, 768)}, None, "embedding", "SD 1.x", []),
    "embeddings/xl": ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, None,
                      "embedding", "SDXL", []),
    "embeddings/scalar": ({"clip_l": torch.zeros(()), "clip_g": torch.zeros(1280)}, None,
                          "embedding", "SDXL's refiner", []),
    "embeddings/cat": ({"<cat>": torch.zeros(1024)}, None, "embedding", "SD 2.x", []),
    "ControlNet/canny": ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1),
                          "down_blocks.0.attentions.0.attn2.to_k.weight": torch.zeros(320, 768)}, None,
                         "ControlNet", "SD 1.x", []),
    "ControlNet/ip-adapter_sd15": ({"ip_adapter.1.to_k_ip.weight": torch.zeros(320, 768),
                                    "image_proj.proj.weight": torch.zeros(1)}, None,
                                   "IP-Adapter", "SD 1.x", []),
    "Stable-diffusion/flux": ({"double_blocks.0.img_attn.qkv.bias": torch.zeros(1), "x": torch.zeros(1)},
                              None, "unknown", "", []),
    "Stable-diffusion/a_lora": (layer(768, "kohya"), None, "LoRA", "SD 1.x", []),
}  # fmt: skip
BAD = {  # bytes, and a word of what is wrong
    "Lora/page": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "Lora/pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "VAE/zip": (b"PK\x03\x04" + bytes(90), "pickle"),
    "VAE/empty": (b"", "not a whole safetensors file"),
    "Lora/header": (struct.pack("<Q", 4) + b"[{}]", "broken safetensors header"),
}


@pytest.fixture(scope="module")
def store(made_once, tiny_models) -> Path:
    """A1111's folders with thirty files and a diffusers folder; tests must not change them."""
    return made_once("store/webui", lambda root: fill(root, tiny_models["sd1"]))


def fill(root: Path, folder: Path) -> None:
    models = root / "models"
    for place in ("Stable-diffusion/sub", "Lora", "VAE", "ControlNet"):
        (models / place).mkdir(parents=True)
    (root / "embeddings").mkdir()
    for name, (tensors, metadata, *_) in SMALL.items():
        save_file(tensors, f"{root if 'embeddings' in name else models}/{name}.safetensors", metadata)
    for name, (content, _) in BAD.items():
        (models / f"{name}.safetensors").write_bytes(content)
    (models / "Stable-diffusion/old.ckpt").write_bytes(b"PK\x03\x04")
    (models / "Stable-diffusion/folder").symlink_to(folder)
    (models / "Stable-diffusion/copy").mkdir()
    for part in folder.rglob("*"):
        if part.is_file():
            target = models / "Stable-diffusion/copy" / part.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            os.link(part, target)
    checkpoints(root, models / "Stable-diffusion")


def checkpoints(root: Path, place: Path) -> None:
    for family, names in {"sd1": ("one", "two", "sub/three", "cut"), "sdxl": ("big", "bigger")}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(random_model.TINY, family, SINGLE["narrow"](family))
            SINGLE["written"](family, source := root.parent / f"{root.name}-{family}")
        shapes = {name: tuple(t.shape) for name, t in SINGLE["original"](source, family).items()}
        for name in names:
            sparse(place / f"{name}.safetensors", shapes, missing=name == "cut")
    more = {f"double_blocks.{n}.img_attn.qkv.weight": (2**14, 2**14) for n in range(12)}
    for name in ("dev", "schnell", "fp32"):  # 12 GiB each, were they not sparse
        sparse(place / f"flux-{name}.safetensors", more)


def listed(*arguments: object) -> dict:
    result = CliRunner().invoke(app(), ["models", *map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_thirty_files_and_what_each_is(store, monkeypatch):
    monkeypatch.setattr(catalogue.Planner, "_plan", lambda *_: "was planned")
    told = listed(store)
    files = [path for path in store.rglob("*.*") if path.suffix in (".safetensors", ".ckpt")]
    rows = {row["path"]: row for row in told["models"]}
    alone = [file for file in files if "copy" not in file.parts]
    assert len(alone) >= 30
    assert rows.keys() == {*map(str, alone), str(store / "models/Stable-diffusion/copy")}
    for name, (_, _, kind, family, words) in SMALL.items():
        row = rows[f"{store if 'embeddings' in name else store / 'models'}/{name}.safetensors"]
        assert (row["kind"], row["family"] or "", row["trigger_words"]) == (kind, family, words), name
        assert row["bytes"] == Path(row["path"]).stat().st_size
        assert row["plan"] is None
        assert bool(row["problem"]) == (kind == "unknown"), name
    for name, (_, word) in BAD.items():
        row = rows[f"{store}/models/{name}.safetensors"]
        assert word in row["problem"]
        assert row["kind"] == {"Lora": "LoRA", "VAE": "VAE"}[name.split("/")[0]]
    place = store / "models/Stable-diffusion"
    assert "truncated" in rows[f"{place}/cut.safetensors"]["problem"]
    assert "tightfit convert" in rows[f"{place}/old.ckpt"]["problem"]
    assert "is a part of Flux's transformer" in rows[f"{place}/flux-dev.safetensors"]["problem"]
    assert any(note.startswith(f"{place / 'folder'} leads out") for note in told["notes"])
    families = {name: rows[f"{place}/{name}.safetensors"] for name in ("one", "two", "sub/three", "big")}
    assert {name: (row["name"], row["kind"], row["problem"]) for name, row in families.items()} == {
        name: (name, "checkpoint", "was planned") for name in families
    }
    assert [row["family"] for row in families.values()] == ["SD 1.x", "SD 1.x", "SD 1.x", "SDXL"]
    assert rows[str(place / "copy")]["kind"] == "diffusers folder"


def test_plans_are_those_of_each_model_alone(store, tmp_path, monkeypatch):
    """Though models that differ in their weights alone are planned once, and plans are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine, calls = replace(tightfit.profile("cpu-8gb"), free_bytes=2**32, host_bytes=2**32), []
    plan = catalogue.Planner._plan
    monkeypatch.setattr(catalogue.Planner, "_plan", lambda *given: calls.append(given) or plan(*given))
    entries = [e for e in scan([store / "models/Stable-diffusion"]).entries if "big" not in e.name]

    def planned(*names: str, **free: int) -> dict[str, tightfit.Plan]:
        planner = catalogue.Planner(replace(machine, **free))
        rows = map(planner.planned, (described(e) for e in entries if not names or e.name in names))
        return {row.entry.name: row.plan for row in rows if row.plan}

    plans = planned()
    assert plans.keys() == {"one", "two", "sub/three", "copy"}
    assert len(calls) == 2
    for name in ("two", "copy"):
        alone = tightfit.plan(machine, tightfit.inspect(plans[name].model))[0]
        assert replace(alone, reason=plans[name].reason, chosen=True) == plans[name]
    least = max(plan.predicted.peak_bytes + plan.predicted.context_bytes for plan in plans.values())
    for free in (least, 2**32 + 2**20):  # with other programs beside, and without
        assert [p.predicted for p in planned(free_bytes=free).values()] == [
            p.predicted for p in plans.values()
        ]
    assert len(calls) == 2
    copy = plans["copy"].predicted
    planned("copy", free_bytes=copy.peak_bytes + copy.context_bytes - 1)
    assert len(calls) > 2  # what was kept does not fit
    calls.clear()
    for broken in ("", "{", "[]", '{"x": 3}'):
        (tmp_path / "tightfit/plans.json").write_text(broken)
        assert catalogue.Planner(machine)._kept.get("x") == (3 if "x" in broken else None)
    planned("copy")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "kept", [None, 3, [], {}, {"memory": [1], "plan": 3}, {"memory": [2**40, 2**40], "plan": {}}]
)
def test_what_is_kept_and_broken_is_planned_again(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalogue.Planner(tightfit.profile("cpu-8gb"))._valid(kept) is None


def test_the_table_says_what_json_says(store):
    folder = store / "models/Stable-diffusion/copy"
    (row,) = listed(folder)["models"]
    predicted, unet = row["plan"]["predicted"], row["plan"]["placements"]["unet"]
    assert (row["kind"], row["plan"]["fits"], row["problem"]) == ("diffusers folder", True, None)
    assert row["bytes"] == sum(
        component.stored_bytes for component in tightfit.inspect(folder).components.values()
    )
    said = CliRunner().invoke(app(), ["models", str(folder)], catch_exceptions=False).stdout
    for words in (
        f"{unet['precision']} {unet['residency']}, {predicted['seconds']:.1f} s",
        "diffusers folder",
    ):
        assert words in " ".join(said.split())


def test_what_a_card_that_is_not_here_would_run(store):
    folder = store / "models/Stable-diffusion/copy"
    told = listed(folder, "--hardware", "rtx-2060", "--vram", "700MiB")
    machine = tightfit.profile("rtx-2060")
    best = tightfit.plan(machine, tightfit.inspect(folder), wishes=Wishes(budget="700MiB"))[0]
    assert told["hardware"] == machine.name
    plan = told["models"][0]["plan"]
    assert plan["predicted"]["peak_bytes"] == best.predicted.peak_bytes
    assert plan["budget_bytes"] == 700 * 2**20
    more = listed(folder, "--hardware", "rtx-2060", "--vram", "100GiB")["models"][0]["plan"]
    assert more["budget_bytes"] == machine.free_bytes


def test_what_does_not_fit_is_said(store):
    machine = replace(tightfit.profile("rtx-2060"), free_bytes=300 * 2**20, total_bytes=300 * 2**20)
    (entry,) = (entry for entry in scan([store]).entries if entry.name == "two")
    row = catalogue.Planner(machine).planned(described(entry))
    assert row.plan is None
    assert "does not fit" in row.brief
    assert str(store) not in row.brief


def test_hashes_are_a1111s_and_are_kept(tmp_path, monkeypatch):
    """A1111's rule: the first ten digits of the SHA-256 of the whole file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "models/m.safetensors"
    file.parent.mkdir()
    save_file(layer(768, "kohya"), file)
    assert listed(file.parent)["models"][0]["sha256"] is None
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert listed(file.parent, "--hash")["models"][0]["sha256"] == expected
    result = CliRunner().invoke(app(), ["models", str(file.parent)], catch_exceptions=False)
    assert expected[:10] in result.stdout.split()
    monkeypatch.setattr(kept, "sha256", lambda path: pytest.fail("hashed again"))
    assert Hashes().compute(file) == expected
    os.utime(file, ns=(1, 1))
    assert Hashes().get(file) == ""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (cache,) = (tmp_path / "cache").rglob("hashes.json")
    for broken in ("", "[]", "{", json.dumps({str(file): 3}), json.dumps({str(file): [0, 1, "x"]})):
        cache.write_text(broken)
        assert Hashes().get(file) == ""
        assert Hashes().compute(file) == expected


def test_a_name_is_planned_like_its_path(store, monkeypatch):
    def planned(*arguments: object) -> dict:
        words = ["plan", *map(str, arguments), "--hardware", "rtx-2060", "--json"]
        return json.loads(CliRunner().invoke(app(), words, catch_exceptions=False).stdout)["plans"][0]

    path = store / "models/Stable-diffusion/sub/three.safetensors"
    by_path = planned("--model", path)
    assert planned("--model", "three", "--models-dir", store) == by_path
    monkeypatch.setenv("TIGHTFIT_MODELS", str(store))
    assert planned("--model", "sub/three.safetensors") == by_path
    assert by_path["model"] == str(path)


def test_adapters_by_name(store, monkeypatch):
    models = store / "models"
    given = {"lora": ["pixel:0.5", "Lora/xl:1:0.2"], "embedding": ["easy:word", "easy"], "vae": ["mse"]}
    paths = {
        "lora": [f"{models}/Lora/pixel.safetensors:0.5", f"{models}/Lora/xl.safetensors:1:0.2"],
        "embedding": [f"{store}/embeddings/easy.safetensors:word", f"{store}/embeddings/easy.safetensors"],
        "vae": [f"{models}/VAE/mse.safetensors"],
    }
    expected = written(paths)
    assert written(given, [store]) == written(paths, [store]) == expected
    prompt, named = from_words("a cat <lora:pixel:0.5>", [store])
    assert (prompt, named) == ("a cat", expected[:1])
    monkeypatch.setenv("TIGHTFIT_MODELS", str(store))
    assert written(given) == expected
    for option, text in {"lora": "pixl:0.5", "embedding": "esy:word", "vae": "ms"}.items():
        with pytest.raises(tightfit.TightfitError, match=r"did you mean"):
            written({option: [text]})


def test_a_picture_by_name_is_repeated(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def painted(*arguments: object) -> tightfit.Request:
        words = ["generate", *map(str, arguments), "--device", "cpu", "--json"]
        result = CliRunner().invoke(app(), words, catch_exceptions=False)
        return json.loads(result.stdout)

    size = ("--width", 64, "--height", 64, "--steps", 1)
    first = painted("a cat", "--model", "copy", "--models-dir", store, *size)
    assert first["plan"]["model"] == str(store / "models/Stable-diffusion/copy")
    again = painted("--from", first["image"])
    assert Path(again["image"]).read_bytes() == Path(first["image"]).read_bytes()


@pytest.mark.parametrize("arguments", [[], ["--models-dir", "/nowhere"], ["/nowhere"]])
def test_no_folder_is_one_line(arguments, capsys):
    with pytest.raises(tightfit.TightfitError) as error:
        CliRunner().invoke(app(), ["models", *arguments], catch_exceptions=False, standalone_mode=False)
    said = "no folder of models is set up: name one" if not arguments else "in /nowhere, which is no folder"
    assert said in str(error.value)


def test_an_empty_folder(tmp_path):
    assert listed(tmp_path)["models"] == []
    assert Hardware.detect("cpu").name


def test_weights_that_are_there_are_still_read(store):
    """The sparse files of this test are whole to whoever opens them."""
    assert load_file(store / "models/Stable-diffusion/one.safetensors")
