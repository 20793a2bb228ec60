"""Pickles become safetensors, value for value, or one line. None of their code runs, and nothing is
half-written.

Hostile files are read in this process where they could only run code, and in the child where they take memory
or time.
"""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tightfit.__main__ import app
from tightfit.export import convert, unpickling
from tightfit.runtime.adapters import textual_inversion
from tightfit.runtime.cli.app import main
from tightfit.runtime.errors import TightfitError
from typer.testing import CliRunner


def called(*arguments) -> str:
    """What `tightfit convert` prints."""
    done = CliRunner().invoke(app(), ["convert", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def refusal(file: Path) -> str:
    """The line of a file that is refused. Nothing is left beside it."""
    before = sorted(file.parent.iterdir())
    with pytest.raises(TightfitError) as refused:
        convert.convert_file(file)
    assert sorted(file.parent.iterdir()) == before
    assert str(file.with_suffix("")) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


def refused_here(file: Path) -> str:
    """The same by the code of the child, in this process: without its limits."""
    return unpickling.answer(file, file.with_suffix(".partial"), None)["refused"]


def saved(file: Path, value: object) -> Path:
    torch.save(value, file)
    return file


def zipped(file: Path, data: bytes, **others: bytes) -> Path:
    """A file that torch.save might have written, with `data` as its pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **others}.items():
            archive.writestr(f"archive/{name}", content)
    return file


class Evil:
    """Calls what it is made with when it is unpickled."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


# ------------------------------------------------------------------------------------------ what is converted


def test_a_checkpoint_keeps_every_value(sd1, tmp_path):
    """The tiny U-Net as a trainer leaves it: many types, tied, turned and sliced tensors, positions, and
    leftovers. torch's own reader is the reference."""
    weights = load_file(next((sd1 / "unet").glob("*.safetensors")))
    names = [name for name, tensor in weights.items() if tensor.dim() == 2]
    state = {**weights, "positions": torch.arange(77).expand(1, -1), "one": torch.tensor(2.5)}
    state["half"], state["brain"] = weights[names[0]].half(), weights[names[1]].bfloat16()
    state["eighth"], state["mask"] = weights[names[2]].to(torch.float8_e4m3fn), weights[names[2]] > 0
    state["tied"], state["turned"], state["part"] = (
        weights[names[0]],
        weights[names[1]].t(),
        weights[names[2]][1:],
    )
    state["trained"], state["nothing"] = torch.nn.Parameter(weights[names[3]]), torch.empty(0, 4)
    file = saved(
        tmp_path / "old.ckpt",
        {
            "state_dict": state,
            "global_step": 7,
            "callbacks": {"a": {}},
            "optimizer_states": [{0: weights[names[0]]}],
        },
    )
    line = called(file)
    assert line.startswith(f"{tmp_path / 'old.safetensors'} · {len(state)} tensors · ")
    assert line.endswith("3 other values left out\n")
    written, reference = (
        load_file(tmp_path / "old.safetensors"),
        torch.load(file, weights_only=True)["state_dict"],
    )
    assert written.keys() == reference.keys()
    for name, tensor in reference.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name].float(), tensor.detach().float()), name
    assert torch.equal(written["turned"], written[names[1]].t())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.ckpt", "old.safetensors"]


def test_a_model_of_bin_files_is_cured(sd1_copy, capsys, monkeypatch):
    """By the command that its refusal names, under the name that is looked for."""
    from tightfit.runtime.models.hub import inspect

    weights = sd1_copy / "text_encoder" / "model.safetensors"
    before = load_file(weights)
    torch.save(before, sd1_copy / "text_encoder" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(TightfitError) as refused:
        inspect(str(sd1_copy))
    command = str(refused.value).split("tightfit convert ")[1].strip('"')
    monkeypatch.setattr(sys, "argv", ["tightfit", "convert", command])
    with pytest.raises(SystemExit) as done:
        main()
    assert (done.value.code, capsys.readouterr().err) == (0, "")
    assert inspect(str(sd1_copy)).text_encoders
    after = load_file(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict])
def test_an_embedding_is_read_back(kind, tmp_path):
    """As A1111 writes it, and as the first trainer did."""
    vectors = torch.randn(3, 32)
    entries = {"string_to_token": {"*": 265}, "string_to_param": kind({"*": torch.nn.Parameter(vectors)})}
    file = saved(tmp_path / "toy.pt", {**entries, "name": "my-toy", "step": 100, "sd_checkpoint": None})
    written = unpickling.convert(file, tmp_path / "toy.safetensors")
    assert written == unpickling.Written(1, 4, "my-toy")
    word = textual_inversion.read(tmp_path / "toy.safetensors")
    assert (word.token, word.tensors[0].shape) == ("toy", (3, 32))
    assert torch.equal(load_file(tmp_path / "toy.safetensors")["emb_params"], vectors)


def test_a_trainers_classes_are_stood_for_and_not_made(tmp_path):
    """Lightning's callback as a key, and a numpy scalar, as the first checkpoints have them."""
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R"
    dtype += b"(K\x03X\x01\x00\x00\x00<NNNJ" + b"\xff" * 4 + b"J" + b"\xff" * 4 + b"K\x00tb"
    score = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"X\x01\x00\x00\x00a\x86R"
    whole = zipfile.ZipFile(saved(tmp_path / "state.ckpt", {"w": torch.ones(2)}))
    tensors = {name.split("/", 1)[1]: whole.read(name) for name in whole.namelist()}
    state = tensors.pop("data.pkl")[2:-1]  # without PROTO and STOP
    text = b"X\x0a\x00\x00\x00state_dict"
    data = b"\x80\x02}" + text + state + b"sX\x09\x00\x00\x00callbacks}" + callback + score + b"ss."
    file = zipped(tmp_path / "first.ckpt", data, **tensors)
    assert unpickling.convert(file, tmp_path / "out.safetensors") == unpickling.Written(1, 1, None)
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1, 1]
    assert "pytorch_lightning" not in sys.modules


def test_nothing_is_replaced_unless_told(tmp_path):
    file = saved(tmp_path / "old.ckpt", {"w": torch.ones(2)})
    (tmp_path / "old.safetensors").write_text("mine")
    assert refusal(file).endswith("old.safetensors is there: --overwrite replaces it, -o names another")
    assert (tmp_path / "old.safetensors").read_text() == "mine"
    called(file, "-o", tmp_path / "old.safetensors", "--overwrite")
    assert load_file(tmp_path / "old.safetensors")["w"].tolist() == [1, 1]
    for output, words in (
        (tmp_path / "x.bin", "does not end in"),
        (tmp_path / "no/x.safetensors", "cannot be written"),
    ):
        with pytest.raises(TightfitError, match=words):
            convert.convert_file(file, output)


# -------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_pickle_is_named(tmp_path):
    """Before any process is started."""
    file = tmp_path / "old.ckpt"
    save_file({"w": torch.ones(2)}, file)
    assert "is safetensors already" in refusal(file)
    for content, words in (
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"GGUF\3\0\0\0", "is GGUF"),
        (pickle.dumps({"a": 1}), "in torch's old form"),
        (b"notes", "is no file of torch.save"),
    ):
        file.write_bytes(content)
        assert words in refusal(file)
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert "in torch's old form" in refusal(file)
    assert "is a folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none.ckpt")
    assert "a pickle by another name" in refusal(saved(tmp_path / "x.safetensors", {}))


def test_code_is_never_run(tmp_path):
    """By the command, in the child."""
    marker = tmp_path / "ran"
    file = saved(tmp_path / "evil.ckpt", {"w": torch.ones(2), "x": Evil(os.system, (f"echo > {marker}",))})
    assert f"it asks for '{os.name}.system', which could run code" in refusal(file)
    assert not marker.exists()
    pickle.loads(zipfile.ZipFile(saved(file, Evil(os.system, (f"echo > {marker}",)))).read("evil/data.pkl"))
    assert marker.exists()  # as it does elsewhere


@pytest.mark.parametrize(
    "call",
    [(eval, ("open('ran', 'w')",)), (exec, ("open('ran', 'w')",)), (Path.touch, (Path("ran"),)), (Evil, ())],
)
def test_code_deep_inside_is_never_run(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path / "evil.ckpt", {"state_dict": {"a": [({"b": Evil(*call)},)], "w": torch.ones(2)}})
    assert "it asks for" in refused_here(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02}", "it cannot be read (EOFError)"),  # no STOP
        (b"\x80\x02.", "it cannot be read"),  # nothing to return
        (b"", "it cannot be read (EOFError)"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "does what no list of tensors needs"),  # a persistent id
        (b"\x80\x02X\x06\x00\x00\x00moduleX\x01\x00\x00\x00a\x86Q.", "does what no list of tensors needs"),
        (
            b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",
            "it cannot be read",
        ),  # of a storage that is not described
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "does what no list of tensors needs"),  # STACK_GLOBAL
        (b"\x80\x02" + b"}" * 10 + b"cbuiltins\ngetattr\n.", "it asks for 'builtins.getattr'"),
        (b"\x80\x02h\x07.", "it cannot be read"),  # of the memo, where nothing is
        (b"\x80\x02(" + b"N" * 100_000 + b"t.", "it holds a tuple"),
        (b"\x80\x02K\x01.", "it holds a int"),
        (b"\x80\x02" + b")\x85" * 50_000 + b".", "it holds a tuple"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "it holds 0 tensors"),
        (b"\x80\x02}X\x01\x00\x00\x00a}s.", "a dictionary within its dictionary, 'a'"),
        (b"\x80\x02}X\x0f\x00\x00\x00string_to_param}s.", "an embedding of 0 words"),
        (b"\x80\x02}X\x0f\x00\x00\x00string_to_paramNs.", "an embedding of 0 words"),
    ],
)
def test_pickles_that_are_no_list_of_tensors(data, words, tmp_path):
    assert words in refused_here(zipped(tmp_path / "old.ckpt", data))
    assert "\n" not in refused_here(tmp_path / "old.ckpt")


def test_tensors_that_safetensors_lacks(tmp_path):
    square = torch.eye(3)
    for tensor, words in (
        (square.to_sparse(), "sparse_coo"),
        (square.to("meta"), "meta"),
        (square.to(torch.complex64), "complex64"),
    ):
        assert words in refused_here(saved(tmp_path / "old.ckpt", {"a": tensor}))
    for name in (3, "a\nb", "__metadata__"):
        assert "which is no name" in refused_here(saved(tmp_path / "old.ckpt", {name: square}))
    many = {str(number): square for number in range(10_001)}
    assert "it holds 10001 tensors" in refused_here(saved(tmp_path / "old.ckpt", many))


def test_tensors_larger_than_their_file(tmp_path):
    """One value that is shown a thousand million times, and a tensor that goes on behind its storage."""
    spread = saved(tmp_path / "spread.ckpt", {"w": torch.ones(1).expand(10**9)})
    assert "its tensors take 3.73 GiB" in refused_here(spread)
    whole = zipfile.ZipFile(saved(tmp_path / "whole.ckpt", {"w": torch.ones(8, 6)}))
    content = {name.split("/", 1)[1]: whole.read(name) for name in whole.namelist()}
    data = content.pop("data.pkl")
    assert data.count(b"K\x08K\x06\x86") == 1
    longer = zipped(tmp_path / "longer.ckpt", data.replace(b"K\x08K\x06\x86", b"K\xffK\x06\x86"), **content)
    assert "it cannot be read" in refused_here(longer)


def test_zips_that_torch_did_not_write(tmp_path):
    whole = saved(tmp_path / "whole.ckpt", {"w": torch.ones(64)})
    again = tmp_path / "again.ckpt"
    with zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    assert "it is compressed or unpacks to more" in refused_here(again)
    with zipfile.ZipFile(again, "w") as archive:
        archive.writestr("archive/data.pkl", b"}.")
        archive.filelist[0].file_size = 2**42  # as the list of contents will say, in zip64's fields
    assert "unpacks to more than it has (4096.00 GiB of" in refused_here(again)
    with zipfile.ZipFile(again, "w") as archive:
        archive.writestr("notes.txt", "x")
    assert "without a data.pkl" in refused_here(again)
    assert "it is TorchScript" in refused_here(zipped(again, b"}.", **{"constants.pkl": b")."}))
    assert "its pickle alone has" in refused_here(zipped(again, b"N" * (2**24 + 1)))
    content = whole.read_bytes()
    for end in (4, 100, len(content) // 2, len(content) - 1):
        again.write_bytes(content[:end])
        assert "it is truncated or damaged" in refused_here(again)


# ---------------------------------------------------------------------------------------- what takes too much


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced there")
def test_a_pickle_that_allocates_is_stopped(tmp_path):
    """A terabyte of zeros, which a system that promises memory freely would begin to give."""
    size = struct.pack("<Q", 2**40)[:6]
    file = zipped(tmp_path / "old.ckpt", b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + size + b"\x85R.")
    assert "it needs more memory than a file of its size may take" in refusal(file)


def test_a_pickle_that_takes_for_ever_is_stopped(tmp_path, monkeypatch):
    """The hash of a tuple of itself, 64 deep and twice in each."""
    file = zipped(tmp_path / "old.ckpt", b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 64 + b"Ns.")
    monkeypatch.setattr(convert, "SECONDS", 4.0)
    assert "it was not read within 4 seconds" in refusal(file)


@pytest.mark.skipif(not (FALSE := shutil.which("false")), reason="there is no such program")
def test_a_child_that_dies_is_said(tmp_path, monkeypatch):
    file = saved(tmp_path / "old.ckpt", {"w": torch.ones(2)})
    monkeypatch.setattr(convert.sys, "executable", FALSE)
    assert "the process that read it ended with code 1" in refusal(file)


def test_without_limits_and_with_an_old_torch(tmp_path, monkeypatch):
    """Windows has no `resource`, a Mac may refuse a limit. torch before 2.10 reads pickles unsafely."""
    file = saved(tmp_path / "old.ckpt", {"w": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "resource", None)
    assert unpickling.answer(file, tmp_path / "a", 2**20) == {"tensors": 1, "left_out": 0, "word": None}
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cpu"))
    assert "install torch 2.10 or newer" in refused_here(file)
