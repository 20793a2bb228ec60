"""The OpenVINO engine: the same picture, what it takes told beforehand, what is refused and why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import tightfit
from onnx import helper, numpy_helper
from tightfit.benchmarks.metrics import psnr
from tightfit.runtime import backends
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.graph import Graph, read_graph
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner.wishes import Wishes

MIB = 2**20
SMALL = {"seed": 1, "num_inference_steps": 2, "width": 32, "height": 32}
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def way(precision: str = "fp32", **others) -> Placement:
    fields = {"residency": "staged", "attention": "sdpa", "tiling": "whole"} | others
    return Placement("openvino", precision, precision, **fields)


def painted(folder, **wishes):
    with tightfit.load(str(folder), device="cpu", **wishes) as pipe:
        result = pipe.generate(tightfit.Request("a red heart", **SMALL))
    return result.images[0], result.plan


@needs_openvino
def test_the_picture_is_torchs(onnx_models, shallow_models):
    expected, _ = painted(shallow_models["sd1"], precision="fp32")
    folder = onnx_models("sd1", "fp32")
    for precision, least in (("fp32", 60), ("bf16", 25)):
        if precision not in Hardware.detect("cpu").precisions:
            continue
        picture, plan = painted(folder, backend="openvino", precision=precision)
        assert {(p.backend, p.arithmetic) for p in plan.placements.values()} == {("openvino", precision)}
        assert psnr(picture, expected) >= least


@needs_openvino
def test_links_as_in_the_hubs_cache(onnx_models, tmp_path):
    """model.onnx and its weights are links to blobs of other names."""
    folder, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    source = onnx_models("sd1", "fp32")
    for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        link = folder / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"{number:040x}")
    wishes = {"backend": "openvino", "precision": "fp32"}
    linked, plain = (np.asarray(painted(place, **wishes)[0], int) for place in (folder, source))
    assert np.abs(linked - plain).max() <= 1


_GROWTH = """
import sys
import numpy as np
from pathlib import Path
from tightfit.runtime.backends.openvino import backend as engine
from tightfit.runtime.backends.openvino.footprint import call_footprint
from tightfit.runtime.costs.footprint import peak
from tightfit.runtime.models.families.networks import UNET
from tightfit.runtime.models.graph import read_graph
from tightfit.runtime.machine.process import ProcessPeak, resident

graph = read_graph(Path(sys.argv[1]))
x = np.random.default_rng(0).normal(size=(1, 32, 640, 640)).astype(np.float32)
predicted = peak("cpu", (), call_footprint(graph, sys.argv[2], (("x", x.shape),)))
process, start = ProcessPeak(), resident()
process.reset()
engine.answers = lambda graph, names: ["y"]
session = engine.OpenVinoSession(graph, "CPU", sys.argv[2], engine.ProcessMeter(), UNET.graph)
session(x=x)
took = process.bytes() - start
session.close()
print(predicted, took, resident() - start)
"""


def network(file):
    """Of 128 MiB of weights and buffers of 50 MiB: normalised, convolved, and multiplied by a matrix."""
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.normal(0, 0.1, (32, 32, 3, 3)) for i in range(2)}
    weights |= {"m": random.normal(0, 0.01, (4096, 8192)), "scale": np.ones(32), "bias": np.zeros(32)}
    nodes, last = [], "x"
    for i in range(2):
        nodes += [
            helper.make_node("GroupNormalization", [last, "scale", "bias"], [f"n{i}"], num_groups=8),
            helper.make_node("Sigmoid", [f"n{i}"], [f"s{i}"]),
            helper.make_node("Mul", [f"n{i}", f"s{i}"], [f"a{i}"]),
            helper.make_node("Conv", [f"a{i}", f"w{i}"], [f"c{i}"], pads=[1] * 4),
            helper.make_node("Add", [f"c{i}", last], [f"r{i}"]),
        ]
        last = f"r{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["p"]),
        helper.make_node("Tile", ["p", "times"], ["t"]),
        helper.make_node("Reshape", ["t", "row"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["y"]),
    ]
    constants = {"times": np.array([1, 128, 1, 1], np.int64), "row": np.array([1, 4096], np.int64)}
    arrays = {name: array.astype(np.float32) for name, array in weights.items()} | constants
    ends = [helper.make_tensor_value_info("x", 1, ["b", 32, "h", "w"])]
    ends += [helper.make_tensor_value_info("y", 1, ["b", 8192])]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, file, save_as_external_data=True, location="model.onnx_data")
    return file


@needs_openvino
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_process_grows_as_predicted(tmp_path, compute):
    """By what the system says of a process of its own; and when it is closed, its memory is the system's
    again, but for libraries."""
    if compute not in Hardware.detect("cpu").precisions:
        pytest.skip(f"this processor has no {compute}")
    run = [sys.executable, "-c", _GROWTH, str(network(tmp_path / "model.onnx")), compute]
    done = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    predicted, took, left = map(int, done.split())
    assert took > 200 * MIB
    assert predicted == pytest.approx(took, rel=0.1)
    assert left < 90 * MIB


@needs_openvino
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_angles_are_exact(tmp_path, compute):
    """Of timesteps that bf16 has no number for, beside numpy's in fp64."""
    from tightfit.runtime.backends.openvino.compiled import Compiled

    if compute not in Hardware.detect("cpu").precisions:
        pytest.skip(f"this processor has no {compute}")
    rates, weight = np.exp(-np.arange(32) / 4), np.random.default_rng(0).normal(size=(64, 64))
    nodes = [
        helper.make_node("Unsqueeze", ["t", "axis"], ["rows"]),
        helper.make_node("Mul", ["rows", "rates"], ["angles"]),
        *(helper.make_node(kind, ["angles"], [kind]) for kind in ("Sin", "Cos")),
        helper.make_node("Concat", ["Sin", "Cos"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w"], ["y"]),
    ]
    arrays = {"rates": rates.astype(np.float32), "w": weight.astype(np.float32), "axis": np.array([1])}
    ends = [helper.make_tensor_value_info(name, 1, sides) for name, sides in (("t", ["b"]), ("y", ["b", 64]))]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    times = np.array([731.5, 981], np.float32)
    compiled = Compiled(read_graph(tmp_path / "model.onnx"), "CPU", compute, (("t", times.shape),))
    angles = times[:, None] * rates
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1) @ weight
    for _ in range(2):
        (got,) = compiled({"t": times}, ["y"])
        assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)


@needs_openvino
def test_no_room_is_said_before_it_is_taken(onnx_models):
    spec = tightfit.inspect(str(onnx_models("sd1", "fp32")))
    unet = spec.components["unet"]
    engine = backends.engine("openvino")
    backend = backends.backend("openvino", "cpu")
    usage = engine.footprint(spec, unet, way(), Hardware.detect("cpu"), Extent(1, 32, 32))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in spec.inputs(unet, 1, 32, 32).items()}
    session = backend.load(unet, way())
    backend.meter.limit(usage.held_bytes // 2)
    with pytest.raises(OutOfMemoryError):
        session(**arrays)
    assert backend.meter.held() == 0
    backend.meter.limit(usage.held_bytes + usage.loading + usage.kept)
    session(**arrays)
    assert backend.meter.held() == usage.held_bytes + usage.kept
    wide = {name: np.zeros(shape, np.float32) for name, shape in spec.inputs(unet, 1, 64, 32).items()}
    backend.meter.limit(None)
    session(**wide)  # compiled again, in place of the first
    larger = engine.footprint(spec, unet, way(), Hardware.detect("cpu"), Extent(1, 64, 32))
    assert backend.meter.held() == larger.held_bytes + larger.kept > usage.held_bytes + usage.kept
    session.close()
    assert backend.meter.held() == 0
    with pytest.raises(TightfitError, match="closed"):
        session(**arrays)


@needs_openvino
def test_it_steps_down(onnx_models, monkeypatch):
    """As if two rows of a batch were too much for OpenVINO, whose own bytes are left out: they hide the
    difference in a model as small as this."""
    from tightfit.runtime.backends.openvino import backend as engine
    from tightfit.runtime.backends.openvino import footprint

    whole = engine.Compiled

    def compiled(graph, device, compute, shapes):
        if dict(shapes).get("sample", (1,))[0] > 1:
            raise RuntimeError("std::bad_alloc")
        return whole(graph, device, compute, shapes)

    monkeypatch.setattr(engine, "Compiled", compiled)
    for own in ("_LIBRARY", "_PAGES"):
        monkeypatch.setattr(footprint, own, 0)
    wishes = {"backend": "openvino", "precision": "fp32"}
    with tightfit.load(str(onnx_models("sd1", "fp32")), device="cpu", **wishes) as pipe:
        result = pipe.generate(tightfit.Request("a", **SMALL | {"width": 64}))
    assert result.plan.cfg == "sequential"
    assert any("out of memory to denoise (std::bad_alloc)" in notice for notice in result.notices)


@needs_openvino
@pytest.mark.parametrize(
    ("wishes", "cure"),
    [
        ({"precision": "int4"}, r"in .*fp32 on .*, not in int4: leave out --precision int4, or --backend"),
        ({"compute": "fp16"}, r"not in fp16: leave out --compute fp16, or --backend openvino"),
        ({"residency": "streamed"}, "OpenVINO cannot stream weights: leave out --residency streamed"),
        ({"attention": "sliced"}, "has its own attention: leave out --attention sliced"),
        ({"tiling": "tiled"}, "runs whole: leave out --tiling tiled"),
    ],
)
def test_what_it_cannot_do(onnx_models, wishes, cure):
    here, spec = Hardware.detect("cpu"), tightfit.inspect(str(onnx_models("sd1", "fp32")))
    with pytest.raises(TightfitError, match=cure):
        plans = planner.plan(here, spec, tightfit.Request("a"), Wishes(backend="openvino", **wishes))
        raise TightfitError(plans[0].reason)


@needs_openvino
def test_a_guidance_window_is_costed(onnx_models, monkeypatch):
    """In a window the U-Net is called for one row and for two, and compiled for each: there and back for each
    picture."""
    spec, machine = tightfit.inspect(str(onnx_models("sd1", "fp32"))), Hardware.detect("cpu")
    wishes = Wishes(backend="openvino", residency="staged", cfg="batched", precision="fp32")

    def seconds(**window: float) -> float:
        request = tightfit.Request("a", num_inference_steps=4, num_images=3, **window)
        return tightfit.plan(machine, spec, request, wishes)[0].predicted.seconds

    whole, part, engine = seconds(), seconds(guidance_end=0.5), backends.graph_engine("openvino")
    graph = spec.denoiser.graph
    again = graph.stored_bytes / machine.read + engine.preparing_seconds(graph)
    monkeypatch.setattr(engine, "for_one_shape", False)
    assert seconds() == whole
    assert part - seconds(guidance_end=0.5) == pytest.approx(6 * again)


@needs_openvino
def test_what_it_would_unpack_is_refused(onnx_models):
    """SD 1.5's U-Net in int8 took 3.6 GiB when it was compiled, where 0.8 are stored."""
    here, spec = Hardware.detect("cpu"), tightfit.inspect(str(onnx_models("sd1", "int4")))
    plans = planner.plan(here, spec, tightfit.Request("a"), Wishes(backend="openvino"))
    assert not any(plan.fits for plan in plans)
    assert "OpenVINO unpacks the int4 weights" in plans[0].reason
    assert "export the model with --precision fp32" in plans[0].reason


@needs_openvino
def test_fp16_is_refused(onnx_models, monkeypatch):
    monkeypatch.setattr(Graph, "compute", "fp16")
    spec = tightfit.inspect(str(onnx_models("sd1", "fp32")))
    unet, here = spec.components["unet"], Hardware.detect("cpu")
    refused = backends.engine("openvino").refuses(spec, unet, way(), here, Extent(1, 32, 32))
    assert refused
    assert refused.endswith("or export the model with --precision fp32")


@needs_openvino
def test_a_card_that_it_does_not_know(onnx_models):
    card, spec = tightfit.profile("rtx-2060"), tightfit.inspect(str(onnx_models("sd1", "fp32")))
    plans = planner.plan(card, spec, tightfit.Request("a"), Wishes(backend="openvino"))
    assert "OpenVINO runs on CPUs and on Intel's GPUs, not on" in plans[0].reason


@needs_openvino
def test_nothing_is_reported():
    """OpenVINO sends its import to Google Analytics, where its telemetry can be imported."""
    code = "import sys, tightfit.runtime.backends as b; b.engine('openvino'); "
    code += "print(sys.modules['openvino_telemetry'], 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "True"]


def test_it_has_to_be_asked_for(onnx_models, sd1):
    here, spec = Hardware.detect("cpu"), tightfit.inspect(str(onnx_models("sd1", "fp32")))
    plans = planner.plan(here, spec, tightfit.Request("a"))
    assert {placement.backend for plan in plans for placement in plan.placements.values()} == {"onnx"}
    with pytest.raises(TightfitError, match="export it with --to onnx, or leave out --backend"):
        planner.plan(here, tightfit.inspect(str(sd1)), tightfit.Request("a"), Wishes(backend="openvino"))


def test_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tightfit.runtime.backends.openvino")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TightfitError, match=r"pip install 'tightfit\[openvino\]'"):
        backends.engine("openvino")
