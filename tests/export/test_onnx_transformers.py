"""Transformers as ONNX: their graphs take what Optimum's do, and answer what diffusers' networks answer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from tightfit.export import onnx_graph, onnx_model, onnx_networks, random_model
from tightfit.export.torch_model import default_scheme
from tightfit.runtime.backends.onnx.backend import OnnxBackend
from tightfit.runtime.backends.onnx.call import input_shapes
from tightfit.runtime.backends.torch.networks import current_name
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.families.flux2_klein import Flux2Klein
from tightfit.runtime.models.layouts.optimum import read_network
from tightfit.runtime.placement import Placement

NOISE = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return NOISE.standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def flux(made_once):
    """Flux.1 with a block of each kind: its transformer is traced in a third of the others' time."""
    one = {"num_layers": 1, "num_single_layers": 1}
    tiny = random_model.TINY["flux1-schnell"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_model.TINY, "flux1-schnell", tiny | {"transformer": tiny["transformer"] | one})
        write = functools.partial(random_model.write, "flux1-schnell", tiny=True, precision="fp32")
        return tightfit.inspect(str(made_once("models/flux1-schnell-of-one", write)))


@pytest.fixture(scope="module")
def exported(flux, tmp_path_factory):
    """Called with a precision: the transformer's graph, traced once, and how far it is from torch."""
    denoiser = flux.denoiser
    subject = onnx_networks.subject(flux, denoiser)
    traced = onnx_networks.trace(subject, torch.float32)

    def write(precision: str):
        scheme = onnx_model.Scheme({})
        if precision != "fp32":
            scheme = default_scheme(denoiser.network, denoiser.tensors, precision)
        job = onnx_model.Job(
            (denoiser,), (), "fp32", frozenset(), current_name, lambda: None, lambda *_: None
        )
        stored = onnx_model._stored(subject, denoiser.tensors, scheme.formats, current_name)
        folder = tmp_path_factory.mktemp(precision) / "transformer"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_networks, "trace", lambda *_: (traced[0].clone(), traced[1]))
            entry = onnx_model._Writing(folder, stored, scheme, job).write(subject)
        return replace(
            denoiser,
            tensors={},
            graph=read_network(denoiser.network, denoiser.config, folder / "model.onnx"),
        ), entry

    return functools.cache(write)


@pytest.fixture(scope="module")
def session(exported):
    component, _ = exported("fp32")
    placed = Placement("onnx", "fp32", "fp32", "resident", "sdpa", "whole", provider="CPUExecutionProvider")
    session = OnnxBackend("cpu").load(component, placed)
    yield session
    session.close()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 96), (2, 112, 48)])
def test_it_answers_what_diffusers_answers(flux, session, batch, height, width):
    """Of latents that diffusers' pipeline packs, at sizes other than it was traced at."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    shapes = flux.inputs(flux.denoiser, batch, height, width)
    arrays = {name: noise(*shape) for name, shape in shapes.items()} | {"timestep": np.float32(731.5)}
    (got,) = session(**arrays)
    latents = torch.from_numpy(arrays["sample"])
    _, channels, down, across = latents.shape
    model: Any = FluxTransformer2DModel.from_pretrained(flux.denoiser.folder)
    with torch.inference_mode():
        expected = model(
            FluxPipeline._pack_latents(latents, batch, channels, down, across),
            encoder_hidden_states=torch.from_numpy(arrays["hidden"]),
            pooled_projections=torch.from_numpy(arrays["pooled"]),
            timestep=torch.full((batch,), 0.7315),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, down // 2, across // 2, "cpu", torch.float32
            ),
            txt_ids=torch.zeros(shapes["hidden"][1], 3),
            return_dict=False,
        )[0]
    expected = FluxPipeline._unpack_latents(expected, height, width, flux.downsampling)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-5)


def test_a_graph_is_optimums(exported):
    """Names and sides as optimum-onnx 0.1.0's FluxTransformerOnnxConfig has them. Heads are split for norms
    and turns alone, and no answer is written into an array."""
    graph = exported("fp32")[0].graph
    assert {name: len(sides) for name, (_, sides) in graph.inputs.items()} == {
        "hidden_states": 3, "encoder_hidden_states": 3, "pooled_projections": 2, "timestep": 1, "img_ids": 2,
        "txt_ids": 2,
    }  # fmt: skip
    assert [*graph.outputs] == ["out_hidden_states"]
    kinds = [node.op_type for node in graph.model.graph.node]
    assert kinds.count("Attention") == 2
    assert not {"ScatterND", "Loop", "If", "Transpose"} & {*kinds}


def test_weights_in_4_bits_mean_what_they_mean_in_torch(exported):
    """As the check after an export finds, which runs torch with the same values."""
    component, entry = exported("int4")
    assert entry["error"] < 1e-5
    assert {"int4-g64", "int8"} & {*entry["formats"].values()}
    assert component.graph.precision == "int4"
    assert component.graph.stored_bytes < 0.5 * exported("fp32")[0].graph.stored_bytes


def test_what_a_call_takes_is_known(flux, exported):
    component, _ = exported("fp32")
    shapes = dict(input_shapes(flux, component, Extent(2, 64, 96)))
    assert shapes["hidden_states"] == (2, 24, 64)
    assert shapes["img_ids"] == (24, 3)


def test_reference_pictures_are_more_tokens():
    """Of klein, whose graph takes any number of them, as diffusers' pipeline lays them out."""
    from diffusers import Flux2KleinPipeline as Theirs

    (graph,) = (one.graph for one in Flux2Klein.networks if one.name == "transformer")
    sample, first, second = noise(2, 8, 4, 6), noise(1, 8, 2, 5), noise(1, 8, 3, 3)
    taken = graph.named(
        {"sample": sample, "timestep": np.float32(500), "hidden": noise(2, 7, 16)}
        | {"reference_0": first, "reference_1": second}
    )
    pictures = [torch.from_numpy(array) for array in (sample, first, second)]
    ids = torch.cat([Theirs._prepare_latent_ids(pictures[0])[:1], Theirs._prepare_image_ids(pictures[1:])], 1)
    tokens = torch.cat([Theirs._pack_latents(one).expand(2, -1, -1) for one in pictures], 1)
    np.testing.assert_array_equal(taken["hidden_states"], tokens.numpy())
    np.testing.assert_array_equal(taken["img_ids"], ids[0].numpy())
    text = Theirs._prepare_text_ids(torch.zeros(1, 7, 16))[0]
    np.testing.assert_array_equal(taken["txt_ids"], text.numpy())
    assert taken["timestep"].tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(graph.gives(taken["hidden_states"], {"sample": sample}), sample)


def test_the_table_of_places_is_cut_in_the_graph(tiny_model):
    """Of SD 3.5, as diffusers cuts it."""
    from diffusers import SD3Transformer2DModel
    from tightfit.runtime.models.families import sd3

    spec = tightfit.inspect(str(tiny_model("sd3")))
    with torch.device("meta"):
        module = sd3._build_traced(spec.denoiser)
    theirs: Any = SD3Transformer2DModel.from_pretrained(spec.denoiser.folder).pos_embed
    module.pos_embed.pos_embed = torch.nn.Parameter(theirs.pos_embed, requires_grad=False)
    for rows, columns in ((5, 8), (24, 3)):
        cut = sd3._cropped(module, rows, columns)
        torch.testing.assert_close(cut, theirs.cropped_pos_embed(2 * rows, 2 * columns), rtol=0, atol=0)


def test_tokens_that_pad_are_marked_for_torch_alone(tiny_model):
    tokens = np.array([[5, 1, ~0, ~0]])
    t5 = tightfit.inspect(str(tiny_model("sd3"))).text_encoders[2].network.graph
    assert {name: array.tolist() for name, array in t5.named({"tokens": tokens}).items()} == {
        "input_ids": [[5, 1, 0, 0]]
    }
    (qwen,) = (one.graph for one in Flux2Klein.networks if one.name == "text_encoder")
    assert {name: array.tolist() for name, array in qwen.named({"tokens": tokens}).items()} == {
        "input_ids": [[5, 1, 0, 0]],
        "attention_mask": [[1, 1, 0, 0]],
    }


def test_what_is_traced_drops_nothing(tiny_model):
    """T5 is built to be trained, where a tenth of its states are dropped: a check would be chance."""
    spec = tightfit.inspect(str(tiny_model("sd3")))
    assert not onnx_networks.subject(spec, spec.text_encoders[2]).module.training


def test_attention_whose_heads_are_turned_last_stays_as_it_is():
    import onnx_ir as ir

    x = [ir.Value(name=name, shape=ir.Shape([1, 2, 3, 4])) for name in "qkv"]
    node = ir.Node("", "Attention", x)
    graph = ir.Graph(x, node.outputs, nodes=[node], opset_imports={"": 23})
    onnx_graph.merge_heads(graph)
    assert [one.op_type for one in graph] == ["Attention"]


def test_z_image_is_refused_by_name(tiny_model, tmp_path):
    """Before anything is traced: torch's exporter knows no complex numbers."""
    with pytest.raises(TightfitError, match=r"Z-Image, whose .* cannot be written as ONNX: leave out --to"):
        tightfit.export_model(tiny_model("z-image"), tmp_path / "out", "fp32", to="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # minutes each: all networks are traced
@pytest.mark.parametrize("family", ["sd3", "flux1-dev", "flux2-klein"])
def test_pictures_are_torchs(tiny_model, tmp_path, family):
    tightfit.export_model(tiny_model(family), tmp_path / "onnx", "fp32", to="onnx")
    wish = {"seed": 3, "num_inference_steps": 3, "width": 96, "height": 64}
    with tightfit.load(str(tiny_model(family)), device="cpu", precision="fp32") as pipe:
        expected = np.asarray(pipe("a red heart", **wish), float)
    with tightfit.load(str(tmp_path / "onnx"), device="cpu") as pipe:
        got = np.asarray(pipe("a red heart", **wish), float)
    assert 10 * np.log10(255**2 / np.square(got - expected).mean()) > 75
