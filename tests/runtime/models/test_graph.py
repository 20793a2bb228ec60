"""Headers of ONNX files: what is broken, missing or elsewhere is one clear line, and no weight is read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import tightfit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.graph import read_graph

WEIGHT = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


def model(dtype=TensorProto.FLOAT):
    x = helper.make_tensor_value_info("x", dtype, ["batch", 64])
    y = helper.make_tensor_value_info("y", dtype, ["batch", 32])
    small = numpy_helper.from_array(np.array([1, 2], np.int64), "small")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [x],
        [y],
        [numpy_helper.from_array(WEIGHT, "w"), small],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture
def external(tmp_path):
    """A model whose weight is in a file beside it, as onnx itself writes it."""
    file = tmp_path / "unet" / "model.onnx"
    file.parent.mkdir()
    onnx.save(model(), file, save_as_external_data=True, location="model.onnx_data", size_threshold=1000)
    return file


def rewritten(file, **place):
    proto = onnx.load(file, load_external_data=False)
    weight = next(each for each in proto.graph.initializer if each.name == "w")
    kept = {each.key: each.value for each in weight.external_data} | {
        key: str(value) for key, value in place.items()
    }
    del weight.external_data[:]
    for key, value in kept.items():
        weight.external_data.add(key=key, value=value)
    file.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("inside", [True, False])
def test_weights_are_found_where_they_are(tmp_path, external, inside):
    file = external
    if inside:
        file = tmp_path / "inside.onnx"
        onnx.save(model(), file)
    graph = read_graph(file)
    assert (graph.opset, graph.compute, graph.precision) == (20, "fp32", "fp32")
    assert graph.inputs == {"x": (TensorProto.FLOAT, ("batch", 64))}
    (tensor,) = graph.tensors.values()
    assert (tensor.dtype, tensor.shape, tensor.file.name) == (
        "F32",
        (64, 32),
        file.name if inside else "model.onnx_data",
    )
    read = np.zeros_like(WEIGHT)
    tensor.read_into(read.view(np.uint8).data)
    np.testing.assert_array_equal(read, WEIGHT)
    assert len(graph.model.SerializeToString()) < 1000


@pytest.mark.parametrize(
    "place",
    ["../other", "/etc/passwd", "a/../../b", "C:\\secrets", "\\\\host\\share", "..\\up", ""],
    ids=lambda p: p or "empty",
)
def test_weights_outside_of_the_folder_are_refused(external, place):
    rewritten(external, location=place)
    with pytest.raises(TightfitError, match="outside of its folder"):
        read_graph(external)


def test_truncated_and_missing_weights(external):
    data = external.with_name("model.onnx_data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(
        TightfitError, match=r"model.onnx_data is truncated: it has 8191 bytes of at least 8192"
    ):
        read_graph(external)
    data.rename(data.with_name("renamed"))
    with pytest.raises(
        TightfitError, match=r"model.onnx_data is missing, .*: rename renamed, which is there, or copy"
    ):
        read_graph(external)


@pytest.mark.parametrize("place", [{"length": 4}, {"offset": -8}, {"offset": "x"}, {"offset": 4096}])
def test_places_that_cannot_be(external, place):
    rewritten(external, **place)
    with pytest.raises(TightfitError, match="copy or export"):
        read_graph(external)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ({"location": "nowhere/at/all"}, "all is missing"),
        ({"location": "a\0b"}, "outside of its folder"),
        ({"location": "a\x1b[2Jb"}, "outside of its folder"),
        ({"location": "x" * 5000}, "is missing"),
        ({"location": f"{'x' * 5000}/y"}, "is missing"),
        ({"location": "."}, "is no file"),
        ({"location": "circle"}, "is missing"),
        ({"offset": 10**30}, "is truncated"),
        ({"offset": "9" * 5000}, "no place for w"),
        ({"length": 10**30}, "its shape needs 8192"),
    ],
)
def test_places_that_are_none(external, place, why):
    """In one line, though the system has errors of its own for each."""
    (external.parent / "circle").symlink_to("circle")
    rewritten(external, **place)
    with pytest.raises(TightfitError, match=why) as caught:
        read_graph(external)
    assert str(caught.value).isprintable() and str(caught.value).startswith(str(external.parent))


def initializer(proto, **fields):
    """The weight of `model`, with other fields."""
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(proto.graph.initializer[0], name)[:]
            getattr(proto.graph.initializer[0], name).extend(value)
        else:
            setattr(proto.graph.initializer[0], name, value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "'w' twice"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[1]), "'small' twice"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "'y' twice"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "'x' twice"),
        (lambda m: initializer(m, dims=[-64, -32]), "w in a shape that cannot be"),
        (lambda m: initializer(m, dims=[2**62] * 900), "w in a shape that cannot be, of 900 sides"),
        (lambda m: initializer(m, dims=[2**62, 4]), "its shape needs"),
        (lambda m: initializer(m, name="w\x1b]0;"), "a name that is none"),
        (lambda m: initializer(m, data_type=999), "a type"),
        (lambda m: setattr(m.graph.node[0], "op_type", "x" * 2000), "a name that is none"),
        (lambda m: m.functions.add(), "functions of its own"),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "x" * 5000),
            "an input or output described in",
        ),
    ],
)
def test_graphs_that_contradict_themselves(tmp_path, change, why):
    proto = model()
    change(proto)
    file = tmp_path / "model.onnx"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(TightfitError, match=why) as caught:
        read_graph(file)
    assert str(caught.value).isprintable()


def field(number, content):
    length = len(content)
    varint = bytes([length >> 7 * i & 127 | 128 for i in range(4)]) + bytes([length >> 28])
    return bytes([number << 3 | 2]) + varint + content


EMPTY = 2**20  # each of two bytes


@pytest.mark.parametrize(
    "content",
    [
        field(7, b"\x0a\x00" * EMPTY),
        field(7, b"\x2a\x00" * EMPTY),
        field(7, b"\x6a\x00" * EMPTY),
        b"\x42\x00" * EMPTY,
        field(7, field(1, b"\x2a\x00" * EMPTY)),
        field(7, field(1, field(5, field(6, b"\x0a\x00" * EMPTY)))),
        field(7, field(1, field(5, field(5, b"\x08\x01" * EMPTY)))),
        field(7, field(5, b"\x08\x01" * EMPTY)),
        field(7, field(5, field(1, b"\x01\x01" * 10 * EMPTY))),
        field(7, field(11, field(2, b"\x0a\x00" * EMPTY))),
        field(7, field(1, field(3, b"xx" * 10 * EMPTY))),
        field(7, field(5, b"\x0a\x00" * 400) * 30_000),
    ],
    ids=(
        "nodes", "initializers", "inferred shapes", "opsets", "attributes", "a graph of a node",
        "sides of a constant",
        "sides of a weight", "packed sides", "a type's sides", "a name", "many small weights",
    ),
)  # fmt: skip
def test_bombs_are_refused_before_protobuf_has_them(tmp_path, content, monkeypatch):
    """Millions of fields of two bytes, of each of which protobuf would make up to 150: they do not reach
    it."""
    file, seen = tmp_path / "model.onnx", []
    file.write_bytes(b"\x08\x09" + content)
    parse = onnx.load_from_string
    monkeypatch.setattr(onnx, "load_from_string", lambda text: seen.append(len(text)) or parse(text))
    try:
        read_graph(file)
    except TightfitError as error:
        assert "no graph of Stable Diffusion has" in str(error)
        assert seen == []
    else:
        assert seen < [1000]  # what nobody reads is not kept


def test_what_nobody_reads_is_not_kept(tmp_path):
    """Inferred shapes, text, what was measured: as much as the rest in what torch's exporter writes."""
    proto, file = model(), tmp_path / "model.onnx"
    proto.graph.value_info.append(proto.graph.output[0])
    proto.graph.doc_string = proto.graph.node[0].doc_string = proto.producer_name = "text"
    proto.graph.node[0].metadata_props.add(key="a", value="b")
    file.write_bytes(proto.SerializeToString())
    graph = read_graph(file).model.graph
    assert (
        len(graph.value_info),
        graph.doc_string,
        graph.node[0].doc_string,
        len(graph.node[0].metadata_props),
    ) == (0, "", "", 0)
    assert (graph.node[0].op_type, *graph.node[0].input) == ("MatMul", "x", "w")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_broken_files_never_raise_anything_else(tmp_path, data):
    whole = bytearray(model().SerializeToString())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, min(len(whole) - 1, 200)))] = data.draw(st.integers(0, 255))
    file = tmp_path / "broken.onnx"
    file.write_bytes(whole)
    try:
        read_graph(file)
    except TightfitError as error:
        assert str(error).count("\n") == 0


def test_a_graph_of_another_network_is_refused(onnx_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    (folder / "tightfit.json").unlink()
    shutil.copyfile(folder / "vae_decoder" / "model.onnx", folder / "unet" / "model.onnx")
    shutil.copyfile(folder / "vae_decoder" / "model.onnx_data", folder / "unet" / "model.onnx_data")
    with pytest.raises(
        TightfitError,
        match=r"unet/model.onnx has the inputs latent_sample, a unet has encoder_hidden_states, sample",
    ):
        tightfit.inspect(str(folder))


def test_pickles_beside_a_graph_are_told_of(tiny_models, tmp_path):
    """A model for torch, with pickled weights and somebody's graph."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["sd1"], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin"
    )
    (folder / "safety_checker").mkdir(exist_ok=True)
    onnx.save(model(), folder / "safety_checker" / "model.onnx")
    with pytest.raises(TightfitError, match="pickle"):
        tightfit.inspect(str(folder))


def test_a_graph_of_another_export_is_refused(onnx_models, tmp_path):
    """Its weights would be read from wrong places of the file beside it."""
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    shutil.copyfile(
        onnx_models("sd1", "int4") / "text_encoder" / "model.onnx", folder / "text_encoder" / "model.onnx"
    )
    with pytest.raises(
        TightfitError, match=r"text_encoder/model.onnx is not the one that was exported into this folder"
    ):
        tightfit.inspect(str(folder))


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [("unet", "in_channels", "sample"), ("unet", "cross_attention_dim", "encoder_hidden_states"),
     ("vae_decoder", "latent_channels", "latent_sample"),
     ("text_encoder", "hidden_size", "last_hidden_state")],
)  # fmt: skip
def test_a_graph_of_another_width_is_refused(onnx_models, tmp_path, network, field, value):
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    config = folder / network / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: 9}))
    with pytest.raises(
        TightfitError, match=rf"{network}/model.onnx has {value} of .*, its config says {field} 9"
    ):
        tightfit.inspect(str(folder))


def test_a_missing_or_renamed_graph_is_named(onnx_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    (folder / "unet" / "model.onnx").rename(folder / "unet" / "unet.onnx")
    with pytest.raises(TightfitError, match=r"unet/model.onnx is missing: rename unet.onnx"):
        tightfit.inspect(str(folder))
    (folder / "unet" / "unet.onnx").rename(folder / "unet" / "model.onnx")
    shutil.rmtree(folder / "vae_decoder")
    with pytest.raises(TightfitError, match=r"vae_decoder is missing: copy or export the model again"):
        tightfit.inspect(str(folder))


def test_weights_as_numbers_count(tmp_path):
    """onnx's own helper writes them so: one field for each value, not bytes."""
    proto = model()
    proto.graph.initializer[0].CopyFrom(
        helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel())
    )
    assert not proto.graph.initializer[0].raw_data
    file = tmp_path / "model.onnx"
    onnx.save(proto, file)
    graph = read_graph(file)
    assert graph.stored_bytes == WEIGHT.nbytes
    assert graph.precision == "fp32"


def test_shapes_may_be_left_open(tmp_path):
    """Or a side be written as -1; and weights may be constants, so that nothing is known of what they are
    held in."""
    proto = model()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0]))
    del proto.graph.initializer[0]
    onnx.save(proto, tmp_path / "model.onnx")
    graph = read_graph(tmp_path / "model.onnx")
    assert graph.outputs == {"y": (TensorProto.FLOAT, ())}
    assert graph.inputs == {"x": (TensorProto.FLOAT, ("", 64))}
    assert (graph.stored_bytes, graph.precision) == (0, "fp32")


@pytest.mark.parametrize("bits", [4, 8])
def test_precision_of_onnx_runtimes_own_quantiser(tmp_path, bits):
    """Its weights are bytes that have one value or two."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    proto = model()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.tile(WEIGHT, (1, 4)), "w"))
    quantiser = MatMulNBitsQuantizer(proto, bits=bits, block_size=32, is_symmetric=True)
    quantiser.process()
    file = tmp_path / "model.onnx"
    onnx.save(quantiser.model.model, file)
    assert read_graph(file).precision == f"int{bits}"


def test_precision_of_dynamic_quantisation(tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(model(), tmp_path / "whole.onnx")
    quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "model.onnx", weight_type=QuantType.QUInt8)
    assert read_graph(tmp_path / "model.onnx").precision == "int8"
