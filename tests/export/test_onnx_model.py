"""Models as ONNX: the pictures are torch's, the layout is Optimum's, and what goes wrong leaves nothing
behind."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import pytest
import tightfit
import torch
from tightfit.export import onnx_check, onnx_graph
from tightfit.export import onnx_model as exporter
from tightfit.export import onnx_networks as onnx_trace
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.kernels.quantise import quantise
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.families.family import Role

UNEVEN = (
    50,
    38,
)  # latents of 25 x 19, of which the U-Net's lower level has 13 x 10: diffusers upsamples otherwise
CASES = [
    ("sd1", "fp32", UNEVEN, "euler"),
    ("sd1", "fp32", (64, 48), "dpmpp_2m_karras"),
    ("sd1", "int4", UNEVEN, "dpmpp_2m_karras"),
    ("sd1", "int8", (48, 38), "euler"),  # one side halves evenly
    ("sdxl", "fp16", UNEVEN, "euler"),
    # The linear projections of SD 2.x, and the activation of its text encoder, are SDXL's as well; tracing
    # them again takes 31 s.
    pytest.param("sd2", "int8", UNEVEN, "euler", marks=pytest.mark.slow),
]


def psnr(a, b) -> float:
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(("family", "precision", "size", "scheduler"), CASES)
def test_pictures_are_torchs(onnx_models, shallow_models, family, precision, size, scheduler):
    """Other sizes than the networks were traced with, and with both sides different."""
    wishes = (
        {"precision": precision, "compute": "fp32"} if precision.startswith("int") else {"precision": "fp32"}
    )
    request = {
        "seed": 3,
        "num_inference_steps": 3,
        "scheduler": scheduler,
        "width": size[0],
        "height": size[1],
        "guidance_scale": 3.0,
    }
    with tightfit.load(str(shallow_models[family]), device="cpu", **wishes) as pipe:
        expected = pipe("a red heart", **request)
    with tightfit.load(str(onnx_models(family, precision)), device="cpu") as pipe:
        result = pipe.generate(tightfit.Request("a red heart", **request))
    assert {placement.backend for placement in result.plan.placements.values()} == {"onnx"}
    assert result.plan.precision == precision
    assert psnr(result.images[0], expected) > (45 if precision == "fp16" else 60)


def test_an_upsampler_that_only_doubles_is_a_departure(onnx_models, shallow_models, tmp_path):
    """As tracing at an even size freezes it: found by the check after an export, which runs a size that
    halves unevenly."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(onnx_models("sd1", "fp32") / "unet", tmp_path / "unet")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"))
    spec = tightfit.inspect(str(shallow_models["sd1"]))
    subject = onnx_trace.subject(spec, spec.denoiser)
    room = onnx_check.Room(lambda: None, lambda: None)

    def check():
        weights = UNet2DConditionModel.from_pretrained(shallow_models["sd1"] / "unet").state_dict()
        subject.module.load_state_dict(weights, assign=True)
        return onnx_check.check(folder / "model.onnx", subject, None, torch.float32, room)

    assert check() < 1e-5
    for node in proto.graph.node:
        if node.op_type == "Resize":
            del node.input[1:]
            node.input.extend(["", "twice"])
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(onnx_check.DepartureError, match=r"unet cannot be run with .*\[1, 4, 20, 15\]"):
        check()


def test_the_encoder_is_diffusers(shallow_models):
    """It is in no plan of a picture from text, and answers mean and log-variance as AutoencoderKL does."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    spec = tightfit.inspect(str(shallow_models["sdxl"]))
    (network,) = spec.design.on_demand
    assert network.role is Role.ENCODER and network.name not in spec.components
    component = replace(spec.decoder, network=network)
    stored = load_file(component.folder / "diffusion_pytorch_model.safetensors")
    module = network.build(component)
    module.load_state_dict({k: v for k, v in stored.items() if k.startswith(network.prefixes)})
    pixels = torch.randn(
        spec.inputs(component, 1, 48, 64)["pixels"], generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = AutoencoderKL.from_pretrained(component.folder).encode(pixels).latent_dist.parameters
        (moments,) = network.call(module, pixels)
    torch.testing.assert_close(moments, expected)


def test_a_network_that_is_not_traced_is_refused(shallow_models):
    spec = tightfit.inspect(str(shallow_models["sd1"]))
    component = replace(spec.denoiser, network=replace(spec.denoiser.network, tracing=None))
    with pytest.raises(TightfitError, match="whose unet cannot be written as ONNX: leave out --to onnx"):
        onnx_trace.subject(spec, component)


def test_layout_is_optimums(onnx_models, shallow_models):
    """Names of files, inputs and outputs as optimum-onnx 0.1.0's model configs have them; checked by onnx's
    own checker."""
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    folder = onnx_models("sd1", "fp32")
    for name, (inputs, outputs) in names.items():
        onnx.checker.check_model(folder / name / "model.onnx")
        graph = onnx.load(folder / name / "model.onnx", load_external_data=False).graph
        assert ([value.name for value in graph.input], [value.name for value in graph.output]) == (
            inputs,
            outputs,
        )
        assert {p.name for p in (folder / name).iterdir()} == {"model.onnx", "model.onnx_data", "config.json"}
    assert json.loads((folder / "model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DConditionModel",
    ]
    assert (folder / "tokenizer" / "vocab.json").exists() and (
        folder / "scheduler" / "scheduler_config.json"
    ).exists()
    assert not (folder / "vae").exists()


def test_operators_stay_whole_and_no_path_leaves_this_machine(onnx_models, shallow_models):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(shallow_models["sd1"] / "unet")
    norms = sum(isinstance(part, torch.nn.GroupNorm) for part in unet.modules())
    file = onnx_models("sd1", "fp32") / "unet" / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    count = Counter(node.op_type for node in graph.graph.node)
    assert (count["Attention"], count["GroupNormalization"]) == (len(unet.attn_processors), norms)
    # Into and out of each transformer, none of a weight or a head.
    assert count["Transpose"] <= 2 * len(unet.attn_processors)
    assert graph.opset_import[0].version == 23
    assert b"/" not in b"".join(p.value.encode() for node in graph.graph.node for p in node.metadata_props)
    assert str(shallow_models["sd1"].parent).encode() not in file.read_bytes()


@pytest.mark.parametrize("form", ["int8", "int8-g64", "int4-g64", "int4-g32"])
@pytest.mark.parametrize("shape", [(24, 96), (16, 64, 3, 3), (8, 4, 3, 3), (8, 72, 1, 1), (24, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_stored_weights_mean_the_same_in_onnx(form, shape, turned):
    """The operators that a quantised weight becomes, run by onnx's own reference, give what
    kernels/formats.py says."""
    import onnx_ir as ir

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = quantise(weight, FORMATS[form])
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    turned = turned and len(shape) == 2  # as linears' weights are
    turns = [ir.Node("", "Transpose", [w], [ir.AttrInt64s("perm", [1, 0])])] if turned else []
    layer = ir.Node("", "Conv", [x, turns[0].outputs[0] if turns else w])
    graph = ir.Graph([x], [x], nodes=[*turns, layer], initializers=[w], opset_imports={"": 23})
    layout = onnx_graph.quantise_weight(graph, "w", FORMATS[form], shape, ir.DataType.FLOAT)
    made = layer.inputs[1]
    assert made is not None
    # In one order, by which they are written: that of a set made two exports of one model differ.
    assert [*layout.stored(parts)] == [*layout.kinds()]
    graph.remove(layer, safe=True)
    graph.outputs[0] = made
    for part, array in layout.stored(parts).items():
        value = graph.initializers[f"w_{part}"]
        tensor = onnx.helper.make_tensor(
            f"w_{part}", int(value.dtype), value.shape.numpy(), array.tobytes(), raw=True
        )
        value.const_value = ir.from_proto(tensor)
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(layout.sides)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    (got,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_allclose(
        got.T if turned else got, dequantise(parts, FORMATS[form], shape).numpy(), rtol=1e-5, atol=1e-6
    )


def test_departure_names_the_operator(shallow_models, tmp_path, monkeypatch, call_export):
    """One weight is written wrong: the export fails, says where, and leaves nothing."""
    right = exporter._arrays

    def wrong(stored, *rest):
        values, arrays = right(stored, *rest)
        if stored.layer == "down_blocks.0.resnets.0.conv2":
            arrays = {part: array * np.float32(1.5) for part, array in arrays.items()}
        return values, arrays

    monkeypatch.setattr(exporter, "_arrays", wrong)
    with pytest.raises(
        TightfitError, match=r"unet is .* from torch, 1e-04 is allowed; it departs at Conv \(conv2d_2"
    ):
        call_export(shallow_models["sd1"], "fp32", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def call_export(traced_once):
    def call(model, precision, out, **options):
        tightfit.export_model(model, out, precision, to="onnx", **options)

    return call


def test_a_quantised_folder_is_carried_over(shallow_models, tmp_path, call_export):
    """With the values that it has: one weight is changed in it, as a calibration would choose other codes."""
    from safetensors.torch import load_file, save_file

    small, graph = tmp_path / "small", tmp_path / "graph"
    tightfit.export_model(shallow_models["sd1"], small, "int4")
    file = small / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("packed") and tensors[key].dtype == torch.uint8)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, {"format": "pt"})
    call_export(small, "int4", graph, compute="fp32")
    request = {"seed": 3, "num_inference_steps": 2, "width": 32, "height": 32}
    pictures = []
    for model, wishes in (
        (small, {"compute": "fp32"}),
        (graph, {}),
        (shallow_models["sd1"], {"precision": "int4", "compute": "fp32"}),
    ):
        with tightfit.load(str(model), device="cpu", **wishes) as pipe:
            pictures.append(pipe("a red heart", **request))
    assert psnr(pictures[0], pictures[1]) > 60 > psnr(pictures[0], pictures[2])
    with pytest.raises(TightfitError, match="stored in int4 already"):
        call_export(small, "int8", tmp_path / "other")


def test_wrong_options_are_refused(shallow_models, tmp_path, call_export):
    for precision, options, cure in (
        ("bf16", {}, "--to onnx in fp32, fp16, int8, int4"),
        ("fp32", {"compute": "fp16"}, "--compute"),
        ("int8", {"compute": "bf16"}, "--compute"),
        ("fp16", {"calibrate": 2}, "--calibrate"),
    ):
        with pytest.raises(TightfitError, match=cure):
            call_export(shallow_models["sd1"], precision, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_onnx_only_is_not_exported_again(onnx_models, tmp_path, call_export):
    with pytest.raises(TightfitError, match="as ONNX only: export the model that it was made from"):
        call_export(onnx_models("sd1", "fp32"), "int8", tmp_path / "out")


def test_weights_that_do_not_fit(shallow_models, tmp_path, call_export):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(shallow_models["sd1"], model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(TightfitError, match=r"weights of unet in .* lack 1, such as conv_in.weight: "):
        call_export(model, "fp32", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_of_another_shape(shallow_models, tmp_path, call_export):
    """As many values, the other way round."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(shallow_models["sd1"], model)
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("fc1.weight"))
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, file)
    with pytest.raises(
        TightfitError,
        match=r"fc1\.weight of shape \[32, 64\], its config says \[64, 32\]: .*copy or download",
    ):
        call_export(model, "fp32", tmp_path / "out")


def test_a_full_disk_leaves_nothing(shallow_models, tmp_path, monkeypatch, call_export):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.Data, "add", full)
    with pytest.raises(TightfitError, match="No space left on device"):
        call_export(shallow_models["sd1"], "fp32", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tolerances_are_of_the_answers():
    assert onnx_check._relative(np.array([1.0, np.nan]), np.array([1.0, 1.0])) == float("inf")
    assert onnx_check._relative(np.ones(2), np.ones(3)) == float("inf")
    assert onnx_check._relative(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
