"""The ONNX Runtime engine: shapes and bytes told beforehand, what is refused and why, and plans that mix
engines."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import tightfit
from onnx import TensorProto, helper, numpy_helper
from tightfit.runtime.backends.onnx import backend as engine
from tightfit.runtime.backends.onnx import call as onnx_call
from tightfit.runtime.backends.onnx import dryrun as onnx_trace
from tightfit.runtime.backends.onnx import footprint as onnx_footprint
from tightfit.runtime.costs.footprint import Footprint, Trace, peak
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.families.networks import UNET
from tightfit.runtime.models.graph import read_graph
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner import candidates, estimate
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.planner.wishes import Wishes

MIB = 2**20


@pytest.fixture(scope="module")
def here() -> Hardware:
    return Hardware.detect("cpu")


@pytest.mark.parametrize(("family", "precision"), [("sd1", "fp32"), ("sd1", "int4"), ("sdxl", "fp16")])
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_shapes_are_those_that_onnx_runtime_finds(onnx_models, family, precision, name):
    """Every value of the graph, at a size other than it was traced with."""
    spec = tightfit.inspect(str(onnx_models(family, precision)))
    component = spec.components[name]
    assert component.graph
    inputs = dict(engine.input_shapes(spec, component, (1, 48, 80)))
    shapes = onnx_trace.Shapes(component.graph.model, inputs)
    model = onnx.load(component.graph.file, load_external_data=False)
    outputs = [value for node in model.graph.node for value in node.output if value]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(component.graph.file.parent)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        value.name: np.ones(
            inputs[value.name], helper.tensor_dtype_to_np_dtype(component.graph.inputs[value.name][0])
        )
        for value in session.get_inputs()
    }
    for value, got in zip(outputs, session.run(outputs, feeds), strict=True):
        assert (value, shapes.shapes[value]) == (value, np.shape(got))
        if np.asarray(got).dtype.kind == "f":
            assert shapes.bytes(value) == np.asarray(got).nbytes


def chain():
    """x (256 KiB) → a (1 MiB) → b (1 MiB), the same reshaped → c (2 MiB); a is used once more at the end."""
    nodes = [
        helper.make_node("Concat", ["x", "x", "x", "x"], ["a"], axis=0),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "flat"], ["r"]),
        helper.make_node("Concat", ["r", "r"], ["c"], axis=0),
        helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0),
        helper.make_node("Add", ["a", "s"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(np.array([-1], np.int64), "flat")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_buffers_come_and_go_with_their_use():
    """By hand: a, b and c are alive together, r is b."""
    call = onnx_trace.trace(chain(), {"x": (256, 256)})
    assert peak("cpu", (), Footprint((), 0, call, (), 0)) == 4 * MIB
    call = onnx_trace.trace(
        chain(),
        {"x": (256, 256)},
        lambda node, _: onnx_trace.together(*[3 * MIB] * (node.op_type == "Sigmoid")),
    )
    assert peak("cpu", (), Footprint((), 0, call, (), 0)) == 5 * MIB


def test_arithmetic_is_counted():
    """Multiplications and additions of torch's own count for the same network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.Conv2d(8, 16, 3, padding=1, stride=2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(2, 8, 20, 12))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    weight = numpy_helper.from_array(layer.weight.detach().numpy(), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, strides=[2, 2])
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (operation,) = onnx_trace.trace(model, {"x": (2, 8, 20, 12)}).operations
    assert operation.flops == counter.get_total_flops()
    assert operation.bytes == 4 * (2 * 8 * 20 * 12 + 16 * 8 * 9 + 2 * 16 * 10 * 6)


def test_one_dequantised_weight_at_a_time(onnx_models):
    """What is alive in int4 beyond fp32 is at most twice the largest weight, which is dequantised, then
    lessened."""
    most = {}
    for precision in ("fp32", "int4"):
        spec = tightfit.inspect(str(onnx_models("sd1", precision)))
        unet = spec.components["unet"]
        assert unet.graph
        call = onnx_trace.trace(unet.graph.model, dict(engine.input_shapes(spec, unet, (1, 32, 32))))
        most[precision] = peak("cpu", (), Footprint((), 0, call, (), 0))
        if precision == "fp32":
            largest = max(tensor.stored_bytes for tensor in unet.graph.tensors.values())
    assert most["int4"] <= most["fp32"] + 2 * largest


def test_attention_keeps_no_scores(onnx_models):
    """It is rewritten for ONNX Runtime, but for text, whose attention has a mask."""
    spec = tightfit.inspect(str(onnx_models("sd1", "fp32")))
    for name, kind in (
        ("unet", "MultiHeadAttention"),
        ("vae_decoder", "MultiHeadAttention"),
        ("text_encoder", "Attention"),
    ):
        graph = spec.components[name].graph
        assert graph
        kinds = {node.op_type for node in onnx_call.runtime_model(graph).graph.node}
        assert kinds & {"Attention", "MultiHeadAttention"} == {kind}
        # The file's is left as it is.
        assert "MultiHeadAttention" not in {node.op_type for node in graph.model.graph.node}


def test_a_provider_that_is_not_here(onnx_models):
    folder = str(onnx_models("sd1", "fp32"))
    # It sends the model elsewhere.
    here = "tightfit does not run on ONNX Runtime's provider 'azure': choose cpu$"
    azure = (
        here if "AzureExecutionProvider" in onnxruntime.get_available_providers() else "no provider 'azure'"
    )
    for asked, cure in (
        ("cuda", "no provider 'cuda' for .*: choose cpu$"),
        ("dml", "no provider 'dml' for .*: choose cpu$"),
        ("azure", azure)
    ):  # fmt: skip
        with (
            tightfit.load(folder, device="cpu", provider=asked) as pipe,
            pytest.raises(TightfitError, match=cure),
        ):
            pipe("a")
    spec, card = tightfit.inspect(folder), replace(tightfit.profile("rtx-2060"), providers=None)
    with pytest.raises(
        TightfitError, match="pip install onnxruntime-gpu in place of onnxruntime, or choose cpu"
    ):
        tightfit.plan(card, spec, wishes=Wishes(provider="cuda"))


@pytest.mark.parametrize(
    ("card", "best", "others"),
    [
        ("rtx-2060", "CUDA", {"Dml", "CPU"}),
        ("rx-6600", "MIGraphX", {"ROCM", "Dml", "CPU"}),
        ("arc-a380", "OpenVINO", {"Dml", "CPU"}),
    ],
)
def test_each_maker_has_its_providers(onnx_models, card, best, others):
    hardware, spec = tightfit.profile(card), tightfit.inspect(str(onnx_models("sd1", "fp32")))
    assert {f"{each}ExecutionProvider" for each in {best, *others}} == {*(hardware.providers or ())}
    assert tightfit.plan(hardware, spec)[0].placements["unet"].provider == f"{best}ExecutionProvider"
    for each in others:
        assert (
            tightfit.plan(hardware, spec, wishes=Wishes(provider=each.lower()))[0]
            .placements["unet"]
            .provider.startswith(each)
        )


def test_a_graph_from_the_future(onnx_models, tmp_path, here):
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    file = folder / "unet" / "model.onnx"
    proto = onnx.load(file, load_external_data=False)
    proto.opset_import[0].version = engine.newest_opset() + 1
    (folder / "tightfit.json").unlink()
    file.write_bytes(proto.SerializeToString())
    cure = (
        rf"is of opset {engine.newest_opset() + 1}, "
        rf"ONNX Runtime .* knows opset {engine.newest_opset()}: install a newer one"
    )
    with tightfit.load(str(folder), device="cpu") as pipe, pytest.raises(TightfitError, match=cure):
        pipe("a")


def test_newest_opset_is_onnx_runtimes_own():
    for opset, works in ((engine.newest_opset(), True), (engine.newest_opset() + 1, False)):
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            found = True
        except Exception:
            found = False
        assert found == works


@pytest.mark.parametrize(
    ("wishes", "cure"),
    [
        ({"backend": "torch"}, "has no weights that torch reads"),
        (
            {"precision": "int4"},
            r"not int4: choose --precision auto, or export /.*sd1 with --to onnx --precision int4",
        ),
        (
            {"precision": "int8-dynamic"},
            r"choose --precision auto, or use /.*sd1, from which it was exported",
        ),
        (
            {"compute": "fp16"},
            r"not fp16: choose --compute auto, or export /.*sd1 with --to onnx --precision fp16",
        ),
        ({"compute": "bf16", "backend": "onnx"}, r"choose --compute auto, or use /.*sd1, from which"),
        ({"residency": "streamed"}, "cannot stream weights: leave out --residency streamed"),
        ({"attention": "sliced"}, "has its own attention: leave out --attention sliced"),
        ({"tiling": "tiled"}, "runs whole: leave out --tiling tiled"),
    ],
)
def test_what_a_graph_cannot_do(onnx_models, wishes, cure):
    with (
        tightfit.load(str(onnx_models("sd1", "fp32")), device="cpu", **wishes) as pipe,
        pytest.raises(TightfitError, match=cure),
    ):
        pipe("a")


def test_torch_models_have_no_graph(sd1):
    for option, value in (("backend", "onnx"), ("provider", "cpu")):
        with (
            tightfit.load(str(sd1), device="cpu", **{option: value}) as pipe,
            pytest.raises(TightfitError, match=f"export it with --to onnx, or leave out --{option}"),
        ):
            pipe("a")


@pytest.mark.parametrize(("batch", "cfg"), [(1, "sequential"), (2, "batched")])
def test_a_fixed_batch_is_kept_to(onnx_models, tmp_path, batch, cfg):
    """As exports for one shape have it; another size of picture is refused before it is painted."""
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)

    def fixed(model):
        for value in model.graph.input:
            for place, side in zip((0, 2, 3), (batch, 16, 16), strict=False):
                if value.name == "sample" or (place == 0 and value.name == "encoder_hidden_states"):
                    value.type.tensor_type.shape.dim[place].dim_value = side

    broken(folder, fixed)
    with tightfit.load(str(folder), device="cpu") as pipe:
        assert (
            pipe.generate(tightfit.Request("a", width=32, height=32, num_inference_steps=1)).plan.cfg == cfg
        )
        with pytest.raises(
            TightfitError, match=r"takes sample of .* only, not of .*: ask for what it was made for"
        ):
            pipe("a", width=64, height=32)


@pytest.fixture
def mixed(onnx_models, shallow_models, tmp_path):
    """A diffusers folder with the text encoder as ONNX beside it, as SDXL is published."""
    folder = tmp_path / "model"
    shutil.copytree(shallow_models["sd1"], folder)
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(onnx_models("sd1", "fp32") / "text_encoder" / name, folder / "text_encoder" / name)
    return folder


def test_mixed_plans(mixed, shallow_models, here, tmp_path):
    spec = tightfit.inspect(str(mixed))
    plans = planner.plan(here, spec, tightfit.Request("a"), Wishes(precision="fp32"))
    engines = {tuple(placement.backend for placement in plan.placements.values()) for plan in plans}
    assert engines == {("torch", "torch", "torch"), ("onnx", "torch", "torch")}
    request = {"seed": 1, "num_inference_steps": 2, "width": 32, "height": 32}
    with tightfit.load(str(mixed), device="cpu", backend="onnx", precision="fp32") as pipe:
        result = pipe.generate(tightfit.Request("a red heart", **request))
    assert result.plan.placements["text_encoder"].backend == "onnx"
    assert result.plan.summary().endswith("text_encoder by onnx")
    with tightfit.load(str(shallow_models["sd1"]), device="cpu", precision="fp32") as pipe:
        expected = pipe("a red heart", **request)
    assert np.abs(np.asarray(result.images[0], int) - np.asarray(expected, int)).max() <= 1
    saved = Plan.from_json(json.dumps(result.plan.to_json()))
    with tightfit.load(str(mixed), device="cpu", plan=saved) as pipe:
        assert pipe.generate(tightfit.Request("a", **request)).plan.placements == saved.placements


def kept(pipe, plan) -> int:
    """Bytes that ONNX Runtime holds; all else, and no more, is torch's to hold."""
    meters = {name: each.meter for name, each in pipe.loaded.backends.items()}
    assert meters["onnx"].held() > 0
    room = plan.budget_bytes - plan.predicted.context_bytes - sum(meter.held() for meter in meters.values())
    meters["torch"].hold(room)
    with pytest.raises(OutOfMemoryError):
        meters["torch"].hold(1)
    meters["torch"].hold(-room)
    return meters["onnx"].held()


def test_engines_share_a_budget(mixed, onnx_models):
    """What ONNX Runtime keeps loaded is no longer torch's to take; also when its arena has grown since."""
    request = {"seed": 1, "num_inference_steps": 1, "width": 32, "height": 32}
    wishes = {"backend": "onnx", "precision": "fp32", "residency": "resident", "budget": "2GiB"}
    with tightfit.load(str(mixed), device="cpu", **wishes) as pipe:
        kept(pipe, pipe.generate(tightfit.Request("a", **request)).plan)
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(onnx_models("sd1", "fp32") / "unet" / name, mixed / "unet" / name)
    with tightfit.load(str(mixed), device="cpu", **wishes) as pipe:
        small = kept(pipe, pipe.generate(tightfit.Request("a", **request)).plan)
        large = kept(
            pipe, pipe.generate(tightfit.Request("a", **request | {"width": 128, "height": 128})).plan
        )
        assert large > small
        assert kept(pipe, pipe.generate(tightfit.Request("a", **request)).plan) == small  # loaded anew


def test_residents_by_hand(onnx_models, monkeypatch):
    """Three components that stay: held 10, 20, 30; loading 7, 100, 5; kept of a call 1, 2, 3. Each is loaded
    beside those before it and called beside all others."""
    parts = {"text_encoder": (10, 7, 1), "unet": (20, 100, 2), "vae_decoder": (30, 5, 3)}

    def footprint(_, name, *__):
        held, loading, kept = parts[name]
        return Footprint((held,), loading, Trace(((1, kept),), (), ()), (), 0, kept=kept)

    monkeypatch.setattr(estimate.Estimate, "_footprint", footprint)
    monkeypatch.setattr(estimate.Estimate, "_calling_seconds", lambda *_: 1.0)
    monkeypatch.setattr(estimate.Estimate, "_preparing_seconds", lambda *_: (0.0, 0.0))
    spec, here = tightfit.inspect(str(onnx_models("sd1", "fp32"))), Hardware.detect("cpu")
    plans = planner.plan(here, spec, None, Wishes(residency="resident", cfg="batched"))
    everything = 10 + 20 + 30 + 1 + 2 + 3
    assert plans[0].predicted.stages == {
        "encode": everything,
        "denoise": 10 + 1 + 20 + 100,
        "decode": 10 + 1 + 20 + 2 + 30 + 5,
    }


def test_a_text_encoder_on_the_host_takes_nothing_of_the_gpu(mixed):
    """On a machine with a GPU and ONNX Runtime for the CPU only."""
    card = replace(tightfit.profile("rtx-2060"), providers=("CPUExecutionProvider",))
    wishes = Wishes(backend="onnx", precision="fp16", residency="staged")
    plans = planner.plan(card, tightfit.inspect(str(mixed)), tightfit.Request("a"), wishes)
    assert plans[0].placements["text_encoder"].provider == "CPUExecutionProvider"
    assert plans[0].placements["unet"].backend == "torch"
    nothing = peak("cuda", card.workspaces, Footprint((), 0, Trace((), (), ()), ()))
    assert plans[0].predicted.stages["encode"] == nothing
    graph = read_graph(mixed / "text_encoder" / "model.onnx")
    assert (
        graph.stored_bytes < plans[0].predicted.host_bytes - onnx_footprint._SESSION < 20 * graph.stored_bytes
    )


def test_no_room_is_said_before_it_is_taken(onnx_models):
    spec = tightfit.inspect(str(onnx_models("sd1", "fp32")))
    backend = engine.OnnxBackend("cpu")
    choice = candidates._Choice("fp32", "fp32", "staged", "sdpa", "whole")
    placement = candidates._on_onnx(Hardware.detect("cpu"), spec, "unet", Wishes(), choice)
    backend.meter.limit(MIB // 4)
    with pytest.raises(OutOfMemoryError):
        backend.load(spec.components["unet"], placement)
    held = sum(engine.weight_bytes(read_graph(spec.folder / "unet" / "model.onnx"), True))
    backend.meter.limit(3 * held)
    session = backend.load(spec.components["unet"], placement)
    large = dict(spec.inputs(spec.components["unet"], 2, 1024, 1024))
    with pytest.raises(OutOfMemoryError):
        session(**{name: np.zeros(shape, np.float32) for name, shape in large.items()})
    session.close()
    with pytest.raises(TightfitError, match="closed"):
        session()


_GROWTH = """
import sys
import numpy as np
from pathlib import Path
from tightfit.runtime.backends.onnx import backend as engine
from tightfit.runtime.backends.onnx.footprint import call_footprint
from tightfit.runtime.costs.footprint import peak
from tightfit.runtime.models.families.networks import UNET
from tightfit.runtime.models.graph import read_graph
from tightfit.runtime.machine.process import ProcessPeak, resident

graph = read_graph(Path(sys.argv[1]))
x = np.random.default_rng(0).normal(size=(1, 32, 384, 384)).astype(np.float32)
predicted = peak("cpu", (), call_footprint(graph, True, (("x", x.shape),)))
process, start = ProcessPeak(), resident()
process.reset()
session = engine.OnnxSession.__new__(engine.OnnxSession)
engine.answers = lambda graph, names: ["y"]
session.__init__(graph, "CPUExecutionProvider", engine.ProcessMeter(), UNET.graph)
session(x=x)
print(predicted, process.bytes() - start)
"""


def test_the_process_grows_as_predicted(tmp_path):
    """What the system says a process of its own took for a network with weights and buffers of hundreds of
    MB."""
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.normal(0, 0.1, (32, 32, 3, 3)).astype(np.float32) for i in range(3)}
    weights["m"] = random.normal(0, 0.01, (4096, 8192)).astype(np.float32)
    nodes, last = [], "x"
    for i in range(3):  # each answer is used once more, one layer later
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1] * 4))
        nodes.append(helper.make_node("Sigmoid", [f"c{i}"], [f"s{i}"]))
        nodes.append(helper.make_node("Mul", [f"c{i}", f"s{i}"], [f"a{i}"]))
        last = f"a{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["p"]),
        helper.make_node("Tile", ["p", "times"], ["t"]),
        helper.make_node("Reshape", ["t", "row"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["y"]),
    ]
    constants = {"times": np.array([1, 128, 1, 1], np.int64), "row": np.array([1, 4096], np.int64)}
    values = [
        helper.make_tensor_value_info("x", 1, ["b", 32, "h", "w"]),
        helper.make_tensor_value_info("y", 1, ["b", 8192]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights | constants).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], initializers),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    run = [sys.executable, "-c", _GROWTH, str(tmp_path / "model.onnx")]
    predicted, took = map(int, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert took > 250 * MIB
    assert predicted == pytest.approx(took, rel=0.1)


def test_operators_on_another_provider_are_counted(onnx_models):
    """As ONNX Runtime tells of its own: a session for the CPU, asked as if for another."""
    graph = read_graph(onnx_models("sd1", "fp32") / "vae_decoder" / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(graph.file, options, providers=["CPUExecutionProvider"])
    assigned = session.get_provider_graph_assignment_info()
    assert engine.elsewhere(assigned, "CPUExecutionProvider", graph) == ()
    (notice,) = engine.elsewhere(assigned, "CUDAExecutionProvider", graph)
    kinds = [node.op_type for node in graph.model.graph.node]
    assert f"{kinds.count('Conv')} Conv" in notice
    assert "operators of the vae_decoder run on the CPU, as CUDAExecutionProvider has none for them" in notice


def test_links_as_in_the_hubs_cache(onnx_models, tmp_path):
    """snapshots/…/unet/model.onnx and its weights are links to blobs/…; links to elsewhere are refused."""
    folder, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(p for p in onnx_models("sd1", "fp32").rglob("*") if p.is_file())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        link = folder / file.relative_to(onnx_models("sd1", "fp32"))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"{number:040x}")
    request = {"seed": 1, "num_inference_steps": 1, "width": 32, "height": 32}
    with tightfit.load(str(folder), device="cpu") as pipe:
        linked = pipe("a", **request)
    with tightfit.load(str(onnx_models("sd1", "fp32")), device="cpu") as pipe:
        assert np.array_equal(np.asarray(linked), np.asarray(pipe("a", **request)))
    data, elsewhere = folder / "unet" / "model.onnx_data", tmp_path / "elsewhere"
    data.resolve().rename(elsewhere)
    data.unlink()
    data.symlink_to(elsewhere)
    with pytest.raises(TightfitError, match="is a link to another place"):
        tightfit.inspect(str(folder))


def broken(folder, change):
    """The U-Net's graph of a copy, changed."""
    file = folder / "unet" / "model.onnx"
    proto = onnx.load(file, load_external_data=False)
    change(proto)
    (folder / "tightfit.json").unlink()  # which knows the whole one
    file.write_bytes(proto.SerializeToString())


def big(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([40000, 40000]), "big"))


def answer(model, node):
    """Another operator makes the answer, of what was it before."""
    last = next(each for each in model.graph.node if "out_sample" in each.output)
    last.output[0] = "before"
    model.graph.node.append(node)


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda m: m.graph.output.pop(), "answers nothing, not out_sample"),
        (lambda m: setattr(m.graph.node[5], "op_type", "Elephant"), "is no graph that can be followed"),
        (lambda m: m.graph.node[9].input.__setitem__(0, "nowhere"), "is no graph that can be followed"),
        (
            lambda m: m.graph.input.append(helper.make_tensor_value_info("time_ids", 1, ["b", 6])),
            "its config wants",
        ),
        (
            lambda m: m.graph.node.insert(0, helper.make_node("ConstantOfShape", ["big"], ["e"])) or big(m),
            "1600000000 values of",
        ),
        (lambda m: m.graph.node.extend(a_loop()), "it has Loop"),
        (
            lambda m: answer(m, helper.make_node("ReduceSum", ["before"], ["out_sample"], keepdims=0)),
            r"out_sample of \[\], not of",
        ),
        (
            lambda m: answer(m, helper.make_node("Shape", ["before"], ["out_sample"])),
            r"out_sample of \[4\], not of",
        ),
        (lambda m: m.graph.output[0].type.Clear(), "out_sample as no tensor"),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING),
            "has sample as string",
        ),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64),
            "has sample as int64",
        ),
        (
            lambda m: setattr(m.graph.input[0].type.sequence_type.elem_type.tensor_type, "elem_type", 1),
            "has sample as no tensor",
        ),
        (lambda m: m.graph.node[9].attribute.add(name="a", i=1, type=2), "Unrecognized attribute"),
    ],
    ids=(
        "no answers",
        "an unknown operator",
        "an unknown value",
        "inputs of SDXL",
        "a bomb",
        "a loop",
        "a scalar",
        "a shape",
        "no type",
        "text",
        "whole numbers",
        "a sequence",
        "an unknown attribute",
    ),
)
def test_graphs_that_cannot_be_run(onnx_models, shallow_models, tmp_path, change, cure):
    """One line where there is nothing else; torch's weights are used where there are."""
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    broken(folder, change)
    with tightfit.load(str(folder), device="cpu") as pipe, pytest.raises(TightfitError, match=cure):
        pipe("a")
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(shallow_models["sd1"] / "unet" / weights, folder / "unet" / weights)
    spec = tightfit.inspect(str(folder))
    plans = planner.plan(Hardware.detect("cpu"), spec, tightfit.Request("a"), Wishes(precision="fp32"))
    assert {plan.placements["unet"].backend for plan in plans} == {"torch"}


def doubles(model):
    """As a U-Net traced at a size that halves evenly has it, by Optimum too: what is upsampled is two times
    as large, always."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"))
    for node in model.graph.node:
        if node.op_type == "Resize":
            del node.input[1:]
            node.input.extend(["", "twice"])


def test_sizes_that_a_graph_was_not_made_for(onnx_models, shallow_models, tmp_path, here):
    """Latents of 25 x 19 in a graph that only doubles: one line in a plan and in painting, and torch runs
    them where it can."""
    folder = tmp_path / "model"
    shutil.copytree(onnx_models("sd1", "fp32"), folder)
    broken(folder, doubles)
    spec, cure = (
        tightfit.inspect(str(folder)),
        r"can do multiples of 4 pixels only, .*: ask for 48x40, or export the model again",
    )
    even, uneven = (
        tightfit.Request("a", num_inference_steps=1, width=w, height=h) for w, h in ((48, 40), (50, 38))
    )
    assert planner.plan(here, spec, even)[0].fits
    plans = planner.plan(here, spec, uneven)
    assert not any(plan.fits for plan in plans)
    with tightfit.load(str(folder), device="cpu") as pipe:
        with pytest.raises(TightfitError, match=cure):
            pipe.generate(uneven)
        pipe.generate(even)
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(shallow_models["sd1"] / "unet" / weights, folder / "unet" / weights)
    plans = planner.plan(here, tightfit.inspect(str(folder)), uneven, Wishes(precision="fp32"))
    assert plans[0].fits
    assert plans[0].placements["unet"].backend == "torch"


def test_what_is_known_of_a_graph_goes_with_it(onnx_models):
    """Calls of many sizes are kept no longer than the graph, and never more than 64 of them."""
    graph = read_graph(onnx_models("sd1", "fp32") / "vae_decoder" / "model.onnx")
    for side in range(8, 80):
        engine.call_footprint(graph, True, (("latent_sample", (1, 4, side, 8)),))
    assert len(graph.known) == 64
    alive = weakref.ref(graph)
    del graph
    gc.collect()
    assert alive() is None


def test_a_constant_of_whole_numbers():
    """As other exporters write shapes."""
    model = chain()
    model.graph.node[2].input[1] = "shape"
    model.graph.node.insert(0, helper.make_node("Constant", [], ["shape"], value_ints=[-1]))
    call = onnx_trace.trace(model, {"x": (256, 256)})
    assert peak("cpu", (), Footprint((), 0, call, (), 0)) == 4 * MIB


def tiny_graph(nodes, out="y"):
    """A graph of `nodes` from x (a, b) to `out`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", out)]
    graph = helper.make_graph([*nodes], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def whole(name, *values):
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64), "v")
    )


def scalar(name, value):
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64), "v")
    )


def a_loop():
    """Of 2**62 rounds."""
    values = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("c", 9), ("n", 9))]
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["n"])], "body", values[:2], values[2:])
    cond = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True), "v"))
    return [scalar("rounds", 2**62), cond, helper.make_node("Loop", ["rounds", "yes"], ["end"], body=body)]


def a_choice():
    branch = helper.make_graph([scalar("z", 1)], "branch", [], [helper.make_tensor_value_info("z", 7, [])])
    cond = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True), "v"))
    return [cond, helper.make_node("If", ["yes"], ["end"], then_branch=branch, else_branch=branch)]


def doubled(rounds, kind):
    """Values that are two times as many in each round, or have a side more."""
    double = {
        "Concat": lambda i: helper.make_node("Concat", [f"v{i}", f"v{i}"], [f"v{i + 1}"], axis=0),
        "Unsqueeze": lambda i: helper.make_node("Unsqueeze", [f"v{i}", "v0"], [f"v{i + 1}"]),
    }[kind]
    return [whole("v0", 0), *map(double, range(rounds))]


BOMBS = {
    "ConstantOfShape": [whole("s", 40000, 40000), helper.make_node("ConstantOfShape", ["s"], ["end"])],
    "Range": [scalar("a", 0), scalar("b", 2 * 10**9), scalar("c", 1),
              helper.make_node("Range", ["a", "b", "c"], ["end"])],
    "Expand": [whole("a", 1), whole("s", 40000, 40000), helper.make_node("Expand", ["a", "s"], ["end"])],
    "Tile": [whole("a", 1), whole("s", 2**40), helper.make_node("Tile", ["a", "s"], ["end"])],
    "OneHot": [whole("a", 1), scalar("d", 2**40), whole("v", 0, 1),
               helper.make_node("OneHot", ["a", "d", "v"], ["end"])],
    "Pad": [whole("a", 1), whole("p", 0, 2**40), helper.make_node("Pad", ["a", "p"], ["end"])],
    "RandomNormal": [helper.make_node("RandomNormal", [], ["end"], shape=[2**40])],
    "Split": [whole("a", 1, 2), helper.make_node("Split", ["a"], ["end"], axis=0, num_outputs=2**24)],
    "Loop": a_loop(),
    "If": a_choice(),
    "Concat": doubled(64, "Concat"),
    "STRING": [  # numpy has texts as Python's objects, and so whole numbers without an end: squared 45 times
        whole("k", 123456789), helper.make_node("Cast", ["k"], ["a0"], to=8),
        *(helper.make_node("Mul", [f"a{i}", f"a{i}"], [f"a{i + 1}"]) for i in range(45)),
    ],
    "Unsqueeze": doubled(40, "Unsqueeze"),
    "Div": [scalar("a", 1), scalar("b", 0), helper.make_node("Div", ["a", "b"], ["end"])],
    "broadcast": [
        whole("a", *range(2000)), whole("one", 1), whole("many", 1, 100),
        helper.make_node("Unsqueeze", ["a", "one"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Tile", ["c", "many"], ["end"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_planning_executes_nothing_that_grows(kind, monkeypatch):
    """Graphs of a few hundred bytes that would take gigabytes or years. No operator makes more than 4,096
    values here, and one that makes gigabytes of nothing, loops or chooses is refused."""
    made = []
    for name, compute in onnx_trace.VALUES.items():

        def watched(*given, compute=compute):
            out = compute(*given)
            made.append(0 if out is None else out.size)
            return out

        monkeypatch.setitem(onnx_trace.VALUES, name, watched)
    model = tiny_graph([*BOMBS[kind], helper.make_node("Identity", ["x"], ["y"])])
    tracemalloc.start()
    try:
        with pytest.raises((TightfitError, ArithmeticError, onnx.checker.ValidationError)):
            onnx_trace.trace(model, {"x": (2, 3)})
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert max(made, default=0) <= 4096


def test_only_operators_of_shapes_are_executed(monkeypatch):
    """Any other's answer is told by its shape, though its inputs are small and known."""
    import onnx.reference

    def never(*_):
        raise AssertionError("a graph was executed")

    monkeypatch.setattr(onnx.reference.ReferenceEvaluator, "run", never)
    nodes = [
        helper.make_node(
            "Constant", [], ["a"], value=numpy_helper.from_array(np.ones((4, 4), np.float32), "v")
        ),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("Softmax", ["b"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    shapes = onnx_trace.Shapes(tiny_graph(nodes), {"x": (4, 4)})
    assert shapes.shapes["y"] == (4, 4)
    assert "b" not in shapes.values


def values_of_shapes():
    """Operators of whole numbers and their inputs, as exporters make sizes with them."""
    i, f, b = (
        (lambda *v: np.array(v, np.int64)),
        (lambda *v: np.array(v, np.float32)),
        (lambda *v: np.array(v, bool)),
    )
    yield from (
        (name, {}, (i(-7, 7, 9), i(2, -2, 4)))
        for name in ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Less", "Greater")
    )
    yield from ((name, {}, (f(2.5, 0.25),)) for name in ("Neg", "Abs", "Floor", "Ceil", "Sqrt", "Reciprocal"))
    yield from ((name, {}, (b(True, False), b(True, True))) for name in ("And", "Or"))
    yield "Not", {}, (b(True, False),)
    yield "Where", {}, (b(True, False), i(1, 2), i(3, 4))
    yield "Mod", {"fmod": 1}, (i(-7, 7), i(3, 3))
    yield "Gather", {"axis": 0}, (i(5, 6, 7), np.array(-1))
    yield "Slice", {}, (np.arange(12).reshape(3, 4), i(0, 1), i(2, 2**62), i(0, -1), i(1, 2))
    yield "Slice", {}, (np.arange(6), i(-1), i(-(2**62)), i(0), i(-2))
    yield "Slice", {}, (np.arange(6), i(1), i(3))
    yield "Range", {}, (np.array(9), np.array(2), np.array(-3))
    yield "ConstantOfShape", {"value": numpy_helper.from_array(i(7), "v")}, (i(2, 3),)
    yield "ConstantOfShape", {}, (i(2),)
    yield "Expand", {}, (i(1, 2), i(3, 1))
    yield "Reshape", {}, (np.arange(6).reshape(2, 3), i(0, -1))
    yield "ReduceProd", {"keepdims": 0}, (i(2, 3, 4),)
    yield "Transpose", {"perm": [1, 0]}, (np.arange(6).reshape(2, 3),)
    yield "Size", {}, (np.arange(6).reshape(2, 3),)
    yield "Concat", {"axis": 0}, (i(1), i(2, 3), i())
    yield "Cast", {"to": TensorProto.FLOAT}, (i(1, 2),)
    yield "Squeeze", {}, (np.ones((1, 2, 1), np.int64), i(0))
    yield "Squeeze", {}, (np.ones((1, 2, 1), np.int64),)
    yield "Unsqueeze", {}, (i(1, 2), i(0, 2))


@pytest.mark.parametrize(("kind", "attributes", "given"), list(values_of_shapes()))
def test_values_are_onnx_runtimes(kind, attributes, given):
    """Of each operator that is executed here."""
    names = [f"i{n}" for n in range(len(given))]
    node = helper.make_node(kind, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, given, strict=True)
    ]
    got = onnx_trace.VALUES[kind](node, *given)
    kinds = [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(got.dtype), None)]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, kinds),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, dict(zip(names, given, strict=True)))
    np.testing.assert_array_equal(got, expected, strict=True)


def test_a_damaged_graph_beside_torchs_weights(mixed, here):
    """It is not needed, and when it is asked for the reason is told."""
    (mixed / "text_encoder" / "model.onnx_data").unlink()
    spec = tightfit.inspect(str(mixed))
    plans = planner.plan(here, spec, tightfit.Request("a"), Wishes(precision="fp32"))
    assert {each.backend for plan in plans for each in plan.placements.values()} == {"torch"}
    with pytest.raises(TightfitError, match=r"model.onnx_data is missing"):
        planner.plan(here, spec, tightfit.Request("a"), Wishes(backend="onnx"))


def test_engines_are_costed_apart(mixed, here):
    """In one planning run, where all that is computed is kept."""
    spec = tightfit.inspect(str(mixed))
    plans = planner.plan(
        here, spec, tightfit.Request("a"), Wishes(precision="fp32", residency="staged", cfg="batched")
    )
    encode = {plan.placements["text_encoder"].backend: plan.predicted.stages["encode"] for plan in plans}
    assert encode["onnx"] >= encode["torch"] + onnx_footprint._SESSION // 2


def test_a_saved_plan_whose_graph_is_gone(mixed, here):
    spec = tightfit.inspect(str(mixed))
    plan = planner.plan(here, spec, tightfit.Request("a"), Wishes(backend="onnx", precision="fp32"))[0]
    (mixed / "text_encoder" / "model.onnx").unlink()
    with (
        tightfit.load(str(mixed), device="cpu", plan=Plan.from_json(json.dumps(plan.to_json()))) as pipe,
        pytest.raises(TightfitError, match="this plan runs the text_encoder on onnx"),
    ):
        pipe("a")


def test_the_host_has_its_own_meter():
    """What runs on the processor beside a GPU takes nothing of the GPU's budget."""
    beside, alone = engine.OnnxBackend("cuda"), engine.OnnxBackend("cpu")
    assert beside._host is not beside.meter
    assert alone._host is alone.meter


def test_gpu_memory_is_capped():
    options = engine.provider_options("CUDAExecutionProvider", 3 * 2**30)
    assert (options["gpu_mem_limit"], options["arena_extend_strategy"]) == (
        str(3 * 2**30),
        "kSameAsRequested",
    )
    assert "gpu_mem_limit" not in engine.provider_options("CUDAExecutionProvider", None)
    assert engine.provider_options("CPUExecutionProvider", 1) == {}


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_listed_but_cannot_be_loaded(onnx_models):
    """ONNX Runtime would compute on the CPU and say nothing."""
    graph = tightfit.inspect(str(onnx_models("sd1", "fp32"))).components["unet"].graph
    assert graph
    cure = r"cannot load CUDAExecutionProvider here: pip install 'onnxruntime-gpu\[cuda,cudnn\]'[^\n]*$"
    with pytest.raises(TightfitError, match=cure):
        engine.OnnxSession(graph, "CUDAExecutionProvider", engine.ProcessMeter(), UNET.graph)


def test_a_session_never_falls_back_on_the_cpu(onnx_models, monkeypatch):
    """It would where there is no memory on the GPU, and print."""
    graph = tightfit.inspect(str(onnx_models("sd1", "fp32"))).components["unet"].graph
    assert graph
    tried = []

    def fails(self, providers, *_):
        tried.append(providers)
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fails)
    with pytest.raises(OutOfMemoryError, match="Failed to allocate"):
        engine.OnnxSession(graph, "CUDAExecutionProvider", engine.ProcessMeter(), UNET.graph)
    assert len(tried) == 1


def test_fp32_on_cuda_is_no_tf32():
    assert engine.provider_options("CUDAExecutionProvider", None)["use_tf32"] == "0"


def test_fp16_graphs_are_refused_where_they_answer_nan(onnx_models):
    specs = {
        kind: tightfit.inspect(str(onnx_models(family, kind)))
        for family, kind in (("sd1", "fp32"), ("sdxl", "fp16"))
    }
    for card, precision, why in (
        ("gtx-1650", "fp16", "NaN"),
        ("gtx-1650", "fp32", ""),
        ("rtx-2060", "fp16", ""),
    ):
        hardware, spec = tightfit.profile(card), specs[precision]
        placement = Placement(
            "onnx", precision, precision, "staged", "sdpa", "whole", "CUDAExecutionProvider"
        )
        refused = engine.OnnxBackend.refuses(
            spec, spec.components["unet"], placement, hardware, Extent(1, 64, 64)
        )
        assert why in (refused or "")
        assert bool(refused) == bool(why)
