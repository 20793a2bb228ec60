"""Folders of models: which files are there, what they are for, and which of them a name means."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import hub
from tightfit.runtime.models.layouts import library
from tightfit.runtime.models.layouts.library import Kind, find, folders, missing, scan


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def shelves(*roots: Path) -> dict[str, Kind | None]:
    return {entry.name: entry.shelf for entry in scan(roots).entries}


A1111 = {
    "models/Stable-diffusion/dreamshaper_8.safetensors": ("dreamshaper_8", Kind.MODEL),
    "models/Stable-diffusion/sdxl/pony.v6.safetensors": ("sdxl/pony.v6", Kind.MODEL),
    "models/Lora/pixel.safetensors": ("pixel", Kind.LORA),
    "models/VAE/mse.safetensors": ("mse", Kind.VAE),
    "models/ControlNet/canny.safetensors": ("canny", Kind.CONTROLNET),
    "models/ESRGAN/4x.pth": ("4x", Kind.UPSCALER),
    "embeddings/easynegative.pt": ("easynegative", Kind.EMBEDDING),
}
COMFY = {
    "models/checkpoints/dreamshaper_8.safetensors": ("dreamshaper_8", Kind.MODEL),
    "models/loras/a/pixel.safetensors": ("a/pixel", Kind.LORA),
    "models/vae/mse.safetensors": ("mse", Kind.VAE),
    "models/controlnet/canny.safetensors": ("canny", Kind.CONTROLNET),
    "models/embeddings/easynegative.safetensors": ("easynegative", Kind.EMBEDDING),
    "models/upscale_models/4x.safetensors": ("4x", Kind.UPSCALER),
    "models/ipadapter/plus.safetensors": ("plus", Kind.IP_ADAPTER),
    "models/clip/l.safetensors": ("l", Kind.TEXT_ENCODER),
}


@pytest.mark.parametrize("below", ["", "models"])
@pytest.mark.parametrize("layout", [A1111, COMFY], ids=["a1111", "comfyui"])
def test_layouts(layout, below, tmp_path):
    put(tmp_path, *layout, "outputs/grid.safetensors", "venv/lib/torch.bin", "models/Lora/pixel.json")
    assert shelves(tmp_path / below) == dict(layout.values())


def test_a_flat_folder_and_what_is_passed_over(tmp_path):
    put(
        tmp_path,
        "b.safetensors",
        "a.gguf",
        "old.ckpt",
        "notes.txt",
        "._b.safetensors",
        ".cache/c.safetensors",
    )
    put(tmp_path, "loras/x.safetensors", "sd/model_index.json", "sd/unet/diffusion_pytorch_model.safetensors")
    put(tmp_path, "taesd/config.json", "taesd/diffusion_pytorch_model.fp16.safetensors")
    known = dict.fromkeys(("a", "b", "old", "sd", "taesd")) | {"x": Kind.LORA}
    assert shelves(tmp_path) == known
    assert shelves(tmp_path / "sd") == {"sd": None}
    assert shelves(tmp_path / "loras") == {"x": Kind.LORA}
    assert shelves(tmp_path, tmp_path, tmp_path / "loras") == known  # each once


YAML = """
# a comment
comfyui:
    base_path: {base}
    is_default: true
    checkpoints: models/ck/
    loras: |
        models/Lora
        models/LyCORIS
    custom_nodes: custom_nodes/
    vae: {vae}
a111:
    checkpoints: gone/
    embeddings: emb
"""


def test_extra_model_paths_of_comfyui(tmp_path):
    base, vae, comfy = tmp_path / "a 1", tmp_path / "vaes", tmp_path / "comfy"
    put(base, "models/ck/m.safetensors", "models/Lora/l.safetensors", "models/LyCORIS/c.safetensors")
    put(base, "custom_nodes/n.safetensors")
    put(vae, "v.safetensors")
    put(comfy, "models/checkpoints/own.safetensors", "emb/e.safetensors")
    (comfy / "extra_model_paths.yaml").write_text(YAML.format(base="../a 1/", vae=vae))
    named = {"m": Kind.MODEL, "l": Kind.LORA, "c": Kind.LORA, "v": Kind.VAE, "e": Kind.EMBEDDING}
    assert shelves(comfy) == named | {"own": Kind.MODEL}
    assert shelves(comfy / "extra_model_paths.yaml") == named


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "x: [",
        "\x00",
        "[" * 20_000,
        "x: " + "9" * 5000 + "\n",
        "x" * 70_000,
        "!!python/object/apply:os.abort []",
    ],
)
def test_a_broken_list_of_paths(text, tmp_path):
    put(tmp_path, "models/checkpoints/m.safetensors")
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(TightfitError, match=r"extra_model_paths\.yaml") as error:
        scan([tmp_path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [BOMB + "s: {base_path: *k, loras: *k}", "loras: x", "s:\n  loras: 3", "- x", ""]
)
def test_a_list_of_paths_that_names_none(text, tmp_path):
    put(tmp_path, "models/checkpoints/m.safetensors")
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    assert shelves(tmp_path) == {"m": Kind.MODEL}


# -------------------------------------------------------------------------- what a name means


@pytest.mark.parametrize(
    "name", ["m", "m.safetensors", "Stable-diffusion/m", "models/Stable-diffusion/m.safetensors"]
)
def test_a_name_with_and_without_folder_and_ending(name, tmp_path):
    put(tmp_path, "models/Stable-diffusion/m.safetensors", "models/Lora/m.safetensors")
    assert find(name, Kind.MODEL, [tmp_path]) == tmp_path / "models/Stable-diffusion/m.safetensors"
    lora = tmp_path / "models/Lora/m.safetensors"
    assert find(name, Kind.LORA, [tmp_path]) == (None if "Stable" in name else lora)
    assert find(name, Kind.VAE, [tmp_path]) is None


@pytest.mark.parametrize("name", ["sd_xl_base_1.0", "v1.5", "v1.5.safetensors", "a/v1.5"])
def test_dots_in_a_name_are_no_ending(name, tmp_path):
    put(tmp_path, "sd_xl_base_1.0.safetensors", "a/v1.5.safetensors", "v1.safetensors", "v1.5.txt")
    found = find(name, Kind.MODEL, [tmp_path])
    assert found == tmp_path / ("sd_xl_base_1.0.safetensors" if "xl" in name else "a/v1.5.safetensors")


def test_two_of_one_name(tmp_path):
    put(tmp_path, "a/m.safetensors", "b/m.safetensors", "c/m.safetensors", "a/m.ckpt")
    with pytest.raises(TightfitError) as error:
        find("m", Kind.LORA, [tmp_path])
    for word in (
        str(tmp_path / "a/m.safetensors"),
        str(tmp_path / "b/m.safetensors"),
        "1 more",
        "rename one",
    ):
        assert word in str(error.value)
    assert find("b/m", Kind.LORA, [tmp_path]) == tmp_path / "b/m.safetensors"
    assert find("a/m", Kind.LORA, [tmp_path]) == tmp_path / "a/m.safetensors"  # not the pickle beside it
    put(tmp_path, "loras/m.safetensors")
    assert find("m", Kind.LORA, [tmp_path]) == tmp_path / "loras/m.safetensors"


def test_what_is_missing_is_said_with_what_is_near(tmp_path):
    put(tmp_path, "models/checkpoints/dreamshaper_8.safetensors", "models/loras/pixel.safetensors")
    said = str(missing("dreamshper_8", Kind.MODEL, [tmp_path]))
    assert "'dreamshper_8' (did you mean dreamshaper_8?)" in said
    said = str(missing("pixel", Kind.MODEL, [tmp_path]))
    assert str(tmp_path / "models/loras/pixel.safetensors") in said
    assert "did you mean" not in str(missing("zzz", Kind.MODEL, [tmp_path]))


def test_where_a_model_is(tmp_path, monkeypatch):
    """A path that exists comes first, then folders of models, then the hub."""
    here, store = tmp_path / "here", put(tmp_path / "store", "m.safetensors", "owner/n.safetensors")
    here.mkdir()
    monkeypatch.chdir(here)
    assert hub.located("m") == "m"  # without folders of models all is as it was
    monkeypatch.setenv("TIGHTFIT_MODELS", str(store))
    assert hub.located("m") == str(store / "m.safetensors")
    assert hub.located("owner/n") == str(store / "owner/n.safetensors")
    for name in ("owner/other", "emoji", "", "/x/m", "./m", "~/m", "https://x.y/m"):
        assert hub.located(name) == name
    with pytest.raises(TightfitError, match=r"did you mean m\?"):
        hub.located("m_.safetensors")
    with pytest.raises(TightfitError, match=r"no model in .*other, .*store is called 'y'"):
        hub.located("y", [put(tmp_path / "other", "x.safetensors")])
    put(here, "m")
    assert hub.located("m") == "m"


# -------------------------------------------------------------------------- which folders


def test_folders_are_those_named_then_the_environments_then_the_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("TIGHTFIT_MODELS", os.pathsep.join(["/e", "", "~/f", "/n"]))
    (tmp_path / "tightfit").mkdir()
    (tmp_path / "tightfit/config.toml").write_text('models = ["/c", "/e"]\n')
    expected = (Path("/n"), Path("/e"), Path.home() / "f", Path("/c"))
    assert folders(["/n"]) == expected
    assert folders(["/n"], alone=True) == expected[:1]


@pytest.mark.parametrize(
    "text", ["models = [", "models = 3", "models = ['']", "model = ['/x']", "\udcff", "x = " + "[" * 9000]
)
def test_a_broken_config(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "tightfit").mkdir()
    (tmp_path / "tightfit/config.toml").write_text(text, errors="surrogateescape")
    with pytest.raises(TightfitError, match=r"config\.toml .*models = \[") as error:
        folders()
    assert "\n" not in str(error.value)


def test_what_is_no_folder(tmp_path):
    put(tmp_path, "m.safetensors")
    for name in ("gone", "m.safetensors"):
        with pytest.raises(TightfitError, match="which is no folder: --models-dir, TIGHTFIT_MODELS"):
            scan([tmp_path / name])


# -------------------------------------------------------------------------- hostile folders


def test_links_that_lead_out_are_not_followed(tmp_path):
    store, out = put(tmp_path / "store", "m.safetensors"), put(tmp_path / "out", "x.safetensors", "y.txt")
    for name, target in {
        "x.safetensors": out / "x.safetensors",
        "y.safetensors": out / "y.txt",
        "loras": out,
        "loop": store,
        "again.safetensors": store / "m.safetensors",
        "gone.safetensors": tmp_path / "gone",
    }.items():
        (store / name).symlink_to(target)
    found = scan([store])
    assert [entry.path.resolve() for entry in found.entries] == [store / "m.safetensors"]
    assert len(found.notes) == 4
    for note, name in zip(
        found.notes, ("gone.safetensors", "loras", "x.safetensors", "y.safetensors"), strict=True
    ):
        assert note.startswith(f"{store / name} leads out of the folder")
    assert str(out) in found.notes[1]
    for name, kind in (("loras", Kind.MODEL), ("x", Kind.LORA)):
        with pytest.raises(
            TightfitError, match=f"{store / name}.* leads out .*: --models-dir {out} adds that"
        ):
            library.located(name, kind, [store])
    both = scan([store, out])
    assert {entry.path.resolve().name for entry in both.entries} == {
        "m.safetensors",
        "x.safetensors",
        "y.txt",
    }


def test_walks_are_bounded(tmp_path, monkeypatch):
    put(tmp_path, "/".join(["d"] * 12) + "/deep.safetensors", "m.safetensors")
    found = scan([tmp_path])
    assert [entry.name for entry in found.entries] == ["m"]
    assert len(found.notes) == 1
    assert "is not looked into" in found.notes[0]
    put(tmp_path, *(f"many/{number}.safetensors" for number in range(30)))
    monkeypatch.setattr(library, "_MOST_FILES", 20)
    monkeypatch.setattr(library.Library, "_left", 20)
    assert "is not looked into" in scan([tmp_path]).notes[-1]


@pytest.mark.parametrize("where", ["listed", "looked into"])
def test_a_folder_that_may_not_be_read_is_a_note(where, tmp_path, monkeypatch):
    put(tmp_path, "a/m.safetensors", "b/n.safetensors")
    owner, name = (os, "scandir") if where == "listed" else (library, "_is_model")
    works = getattr(owner, name)

    def refusing(folder):
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return works(folder)

    monkeypatch.setattr(owner, name, refusing)
    found = scan([tmp_path])
    assert [entry.name for entry in found.entries] == ["b/n"]
    (note,) = found.notes
    assert note == f"{tmp_path / 'a'} cannot be read (Permission denied): allow it, or name another folder"
    with pytest.raises(TightfitError, match="Permission denied") if where != "listed" else nullcontext():
        scan([tmp_path / "a"])
