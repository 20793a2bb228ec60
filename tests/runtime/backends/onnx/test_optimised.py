"""What ONNX Runtime makes of operators that transformers have, and what its kernels take, held against ONNX
Runtime itself."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tightfit.runtime.backends.onnx import dryrun
from tightfit.runtime.backends.onnx.call import _rewritten
from tightfit.runtime.backends.onnx.footprint import call_footprint
from tightfit.runtime.backends.onnx.optimised import executed
from tightfit.runtime.models.graph import read_graph

WIDTH = 64
node = helper.make_node


def model_of(nodes, inputs, outputs, constants, dtypes=None):
    """Of inputs (name, sides), whose sides may be names."""
    kinds = dtypes or {}
    given = [helper.make_tensor_value_info(name, kinds.get(name, 1), sides) for name, sides in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "g", given, made, stored), opset_imports=opsets, ir_version=10
    )


def one(value):
    return np.array(value, np.float32)


def weight(*sides):
    return np.random.default_rng(0).normal(0, 0.1, sides).astype(np.float32)


def tanh_gelu(x, y):
    """As transformers writes it out."""
    return [
        node("Mul", [x, "half"], [f"{y}0"]), node("Pow", [x, "three"], [f"{y}1"]),
        node("Mul", [f"{y}1", "cubed"], [f"{y}2"]), node("Add", [x, f"{y}2"], [f"{y}3"]),
        node("Mul", [f"{y}3", "root"], [f"{y}4"]), node("Tanh", [f"{y}4"], [f"{y}5"]),
        node("Add", [f"{y}5", "one"], [f"{y}6"]), node("Mul", [f"{y}0", f"{y}6"], [y]),
    ]  # fmt: skip


def a_block():
    """Modulation of matrices, two parallel branches, feed-forward layers of each kind, and a constant that is
    computed of a weight."""
    nodes = [
        node("MatMul", ["time", "m"], ["t0"]), node("Add", ["t0", "b"], ["t1"]),
        node("Sigmoid", ["t1"], ["t2"]), node("Mul", ["t1", "t2"], ["t3"]),
        node("MatMul", ["t3", "m"], ["t4"]), node("Unsqueeze", ["t4", "axis"], ["shift"]),
        node("Transpose", ["m"], ["turned"], perm=[1, 0]),
        node("LayerNormalization", ["x", "b"], ["normed"]), node("Add", ["normed", "shift"], ["n"]),
        node("MatMul", ["n", "w"], ["f0"]), node("Add", ["f0", "b4"], ["f1"]),
        node("Gelu", ["f1"], ["f2"], approximate="tanh"), node("MatMul", ["f2", "v"], ["fed"]),
        node("MatMul", ["n", "turned"], ["q"]), *tanh_gelu("q", "g"),
        node("Mul", ["g", "scale"], ["s0"]), node("Sigmoid", ["s0"], ["s1"]),
        node("Mul", ["g", "s1"], ["s2"]),
        node("MatMul", ["s2", "m"], ["attended"]),
        node("Add", ["attended", "fed"], ["sum"]), node("Add", ["x", "sum"], ["y"]),
    ]  # fmt: skip
    constants = {
        "m": weight(WIDTH, WIDTH), "w": weight(WIDTH, 4 * WIDTH), "v": weight(4 * WIDTH, WIDTH),
        "b": weight(WIDTH), "b4": weight(4 * WIDTH), "axis": np.array([1]), "scale": one(1.702),
        "half": one(0.5), "three": one(3), "cubed": one(0.044715), "root": one(0.7978845), "one": one(1),
    }  # fmt: skip
    return nodes, constants


@pytest.mark.parametrize("sides", [("rows", "tokens"), (2, 8)], ids=["sides that vary", "fixed"])
def test_operators_and_their_order_are_onnx_runtimes(tmp_path, sides):
    nodes, constants = a_block()
    shapes = {"x": (*sides, WIDTH), "time": (sides[0], WIDTH)}
    model = model_of(nodes, shapes, ["y"], constants)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    theirs = onnx.load(tmp_path / "optimised.onnx").graph.node
    ours = executed(dryrun.Shapes(model, {"x": (2, 8, WIDTH), "time": (2, WIDTH)}))
    views = {"Reshape", "Unsqueeze"}  # around a Gemm of more than matrices
    found, wanted = ([each for each in nodes if each.op_type not in views] for nodes in (ours, theirs))
    names = {"FastGelu": "Gelu", "BiasGelu": "Gelu"}  # which of them it is takes the same
    kinds = [[names.get(each.op_type, each.op_type) for each in nodes] for nodes in (found, wanted)]
    assert kinds[0] == kinds[1]
    assert {"QuickGelu", "Gelu", "Gemm"} <= {*kinds[0]}
    assert [each.output[0] for each in ours][-1] == "y"


def kinds_that_run(nodes, inputs, constants):
    return [
        each.op_type for each in executed(dryrun.Shapes(model_of(nodes, inputs, ["y"], constants), inputs))
    ]


def test_a_gate_is_no_factor():
    """x sigmoid(g x) of a g that is computed is not fused: g lives until then."""
    nodes = [
        node("Mul", ["g", "x"], ["a"]), node("Sigmoid", ["a"], ["s"]), node("Mul", ["x", "s"], ["y"]),
    ]  # fmt: skip
    sides = (2, 8)
    assert kinds_that_run(nodes, {"x": sides, "g": sides}, {}) == ["Mul", "Sigmoid", "Mul"]
    assert kinds_that_run(nodes, {"x": sides}, {"g": one(1.702)}) == ["QuickGelu"]


def test_a_convolution_of_few_channels_reads_rows():
    """Of a convolution's answer, too, which is in blocks: a copy comes before."""
    nodes = [
        node("Conv", ["x", "w"], ["few"], pads=[1] * 4), node("Conv", ["few", "w2"], ["y"], pads=[1] * 4),
    ]  # fmt: skip
    constants = {"w": weight(3, 32, 3, 3), "w2": weight(32, 3, 3, 3)}
    kinds = kinds_that_run(nodes, {"x": (1, 32, 16, 16)}, constants)
    assert kinds == ["ReorderInput", "BlockedConv", "ReorderOutput", "BlockedConv", "ReorderOutput"]


@pytest.mark.parametrize("others", [{"kv_num_heads": 2}, {"kv_num_heads": 8, "softcap": 30.0}])
def test_attention_that_multi_head_attention_cannot_do_stays(others):
    attention = node("Attention", ["x", "k", "v"], ["y"], q_num_heads=8, **others)
    model = model_of([attention], dict.fromkeys("xkv", (1, 4, WIDTH)), ["y"], {})
    assert _rewritten(model) is model


def a_residual():
    """Convolution, norm, SiLU, convolution, and the first's answer added."""
    return [
        node("Conv", ["x", "w"], ["r"], pads=[1] * 4),
        node("GroupNormalization", ["r", "b", "b"], ["g"], num_groups=8),
        node("Sigmoid", ["g"], ["s"]), node("Mul", ["g", "s"], ["t"]),
        node("Conv", ["t", "w2"], ["u"], pads=[1] * 4), node("Add", ["u", "r"], ["y"]),
    ]  # fmt: skip


def kernels():
    """Graphs of one operator, or of those that are fused to one: inputs as (type, sides), and constants."""
    tokens, real = 2048, "float32"
    rows, few, wide = ((real, (1, tokens, width)) for width in (8 * WIDTH, 2 * WIDTH, 8192))
    scores = (1, 1, tokens, tokens)
    attention = node("Attention", ["x", "k", "v", "mask"], ["y"], q_num_heads=8, kv_num_heads=2)
    heads = {"x": rows, "k": few, "v": few}
    yield "grouped heads, a mask", [attention], heads | {"mask": (real, scores)}, {}
    yield "grouped heads, a mask of bits", [attention], heads | {"mask": ("bool", scores)}, {}
    where = node("Where", ["c", "x", "z"], ["y"])
    yield "Where", [where], {"c": ("bool", wide[1]), "x": wide, "z": wide}, {}
    gelu = [node("Add", ["x", "b"], ["a"]), node("Gelu", ["a"], ["y"])]
    yield "GELU of a bias", gelu, {"x": wide}, {"b": weight(8192)}
    halves = [node("Add", ["x", "b"], ["a"]), node("Gelu", ["a"], ["g"], approximate="tanh")]
    halves.append(node("Cast", ["g"], ["y"], to=TensorProto.FLOAT))
    yield "GELU in fp16", halves, {"x": ("float16", wide[1])}, {"b": weight(8192).astype(np.float16)}
    silu = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    yield "SiLU", silu, {"x": wide}, {}
    some = (1, tokens // 2, 8192)
    scattered = node("ScatterElements", ["x", "i", "u"], ["y"], axis=1)
    yield "ScatterElements", [scattered], {"x": wide, "i": ("int64", some), "u": (real, some)}, {}
    filters = {"w": weight(32, 32, 3, 3), "w2": weight(32, 32, 3, 3), "b": weight(32)}
    yield "a block of a VAE", a_residual(), {"x": (real, (1, 32, 384, 384))}, filters


_TAKES = """
import json, sys
import numpy as np
import onnxruntime
from tightfit.runtime.backends.onnx.backend import session_options
from tightfit.runtime.machine.process import ProcessPeak, release, resident
process = ProcessPeak()
for file, inputs in json.loads(sys.argv[1]):
    feeds = {name: np.zeros(sides, kind) + np.ones(1, kind) for name, (kind, sides) in inputs.items()}
    session = onnxruntime.InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
    release()
    process.reset()
    before = resident()
    session.run(None, feeds)
    print(process.bytes() - before)
    del session, feeds
"""


def test_bytes_of_kernels(tmp_path):
    """What each takes beside its inputs, as a process of its own grows."""
    told, predicted = [], {}
    for title, nodes, inputs, constants in kernels():
        file = tmp_path / f"{len(told)}.onnx"
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for name, (kind, _) in inputs.items()}
        # Sides of which only that of channels is known.
        sides = {
            name: [
                side if side in (32, WIDTH, 2 * WIDTH, 8 * WIDTH, 8192) else f"{i}_of_{len(shape)}"
                for i, side in enumerate(shape)
            ]
            for name, (_, shape) in inputs.items()
        }
        onnx.save(model_of(nodes, sides, ["y"], constants, kinds), file)
        shapes = tuple((name, shape) for name, (_, shape) in inputs.items())
        predicted[title] = call_footprint(read_graph(file), True, shapes).kept
        told.append((str(file), inputs))
    command = [sys.executable, "-c", _TAKES, json.dumps(told)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    took = dict(zip(predicted, map(int, run.stdout.split()), strict=True))
    assert min(took.values()) > 50 * 2**20
    assert predicted == pytest.approx(took, rel=0.1), {
        name: f"{predicted[name] / took[name] - 1:+.0%}" for name in took
    }
