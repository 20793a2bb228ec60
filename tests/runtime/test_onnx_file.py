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
from tightfit.runtime.onnx_file import read_graph

WEIGHT = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


def model(dtype=TensorProto.FLOAT):
    x = helper.make_tensor_value_info("x", dtype, ["batch", 64])
    y = helper.make_tensor_value_info("y", dtype, ["batch", 32])
    small = numpy_helper.from_array(np.array([1, 2], np.int64), "small")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [numpy_helper.from_array(WEIGHT, "w"), small]
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
    kept = {each.key: each.value for each in weight.external_data} | {key: str(value) for key, value in place.items()}
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
    assert (tensor.dtype, tensor.shape, tensor.file.name) == ("F32", (64, 32), file.name if inside else "model.onnx_data")
    read = np.zeros_like(WEIGHT)
    tensor.read_into(read.view(np.uint8).data)
    np.testing.assert_array_equal(read, WEIGHT)
    assert len(graph.model.SerializeToString()) < 1000


@pytest.mark.parametrize(
    "place", ["../other", "/etc/passwd", "a/../../b", "C:\\secrets", "\\\\host\\share", "..\\up", ""], ids=lambda p: p or "empty"
)
def test_weights_outside_of_the_folder_are_refused(external, place):
    rewritten(external, location=place)
    with pytest.raises(TightfitError, match="outside of its folder"):
        read_graph(external)


def test_truncated_and_missing_weights(external):
    data = external.with_name("model.onnx_data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(TightfitError, match=r"model.onnx_data is truncated: it has 8191 bytes of at least 8192"):
        read_graph(external)
    data.rename(data.with_name("renamed"))
    with pytest.raises(TightfitError, match=r"model.onnx_data is missing, .*: rename renamed, which is there, or copy"):
        read_graph(external)


@pytest.mark.parametrize("place", [{"length": 4}, {"offset": -8}, {"offset": "x"}, {"offset": 4096}])
def test_places_that_cannot_be(external, place):
    rewritten(external, **place)
    with pytest.raises(TightfitError, match="copy or export"):
        read_graph(external)


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
        TightfitError, match=r"unet/model.onnx has the inputs latent_sample, a unet has encoder_hidden_states, sample"
    ):
        tightfit.inspect(str(folder))


def test_pickles_beside_a_graph_are_told_of(tiny_models, tmp_path):
    """A model for torch, with pickled weights and somebody's graph."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["sd1"], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "safety_checker").mkdir(exist_ok=True)
    onnx.save(model(), folder / "safety_checker" / "model.onnx")
    with pytest.raises(TightfitError, match="pickle"):
        tightfit.inspect(str(folder))


def test_a_graph_of_another_export_is_refused(onnx_models, tmp_path):
    """Its weights would be read from wrong places of the file beside it."""
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    shutil.copyfile(onnx_models("sd1", "fp16") / "text_encoder" / "model.onnx", folder / "text_encoder" / "model.onnx")
    with pytest.raises(TightfitError, match=r"text_encoder/model.onnx is not the one that was exported into this folder"):
        tightfit.inspect(str(folder))


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [("unet", "in_channels", "sample"), ("unet", "cross_attention_dim", "encoder_hidden_states"),
     ("vae_decoder", "latent_channels", "latent_sample"), ("text_encoder", "hidden_size", "last_hidden_state")],
)  # fmt: skip
def test_a_graph_of_another_width_is_refused(onnx_models, tmp_path, network, field, value):
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    config = folder / network / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: 9}))
    with pytest.raises(TightfitError, match=rf"{network}/model.onnx has {value} of .*, its config says {field} 9"):
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
    proto.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel()))
    assert not proto.graph.initializer[0].raw_data
    file = tmp_path / "model.onnx"
    onnx.save(proto, file)
    graph = read_graph(file)
    assert graph.stored_bytes == WEIGHT.nbytes
    assert graph.precision == "fp32"


def test_shapes_may_be_left_open(tmp_path):
    """Or a side be written as -1; and weights may be constants, so that nothing is known of what they are held in."""
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
