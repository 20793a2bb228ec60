"""Checks that an exported network answers what torch answers, at other sizes than it was traced at. If it
does not, names the operator where it departs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from . import onnx_networks

# Of the answer's norm. Sums are in another order; fp16 has 11 bits, and a network about a hundred layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


class DepartureError(Exception):
    """The exported network answers something else than torch."""


@dataclass(frozen=True)
class Room:
    """How to fill the checked network with its weights again, and how to return freed memory to the
    system."""

    fill: Callable[[], object]
    release: Callable[[], object]


def check(
    file: Path,
    subject: onnx_networks.Subject,
    program: torch.export.ExportedProgram,
    dtype: torch.dtype,
    room: Room,
) -> float:
    """The largest relative error of an answer. Raises DepartureError if it is above TOLERANCE.

    `subject.module` has its weights, in fp32. It loses them here, so that they are not in memory twice.
    """
    cases = [subject.arguments(size, dtype, "cpu", seed=1) for size in subject.checked]
    expected = []
    with torch.inference_mode():
        for arguments in cases:
            real = {
                name: value.float() if value.is_floating_point() else value
                for name, value in arguments.items()
            }
            expected.append([answer.numpy() for answer in subject.call(subject.module, **real)])
    subject.module.to("meta")
    room.release()
    session, most = _session(file), 0.0
    for arguments, answers in zip(cases, expected, strict=True):
        try:
            got = session.run(list(subject.outputs), _feed(subject, arguments))
        except Exception as failure:  # ONNX Runtime has a class of its own for every status
            shapes = {name: list(value.shape) for name, value in _feed(subject, arguments).items()}
            raise DepartureError(
                f"{subject.name} cannot be run with {shapes} ({str(failure).splitlines()[0]})"
            ) from failure
        error = max(_relative(np.asarray(a, np.float32), b) for a, b in zip(got, answers, strict=True))
        if not error <= TOLERANCE[dtype]:
            room.fill()
            where = _first_departure(file, subject, program, arguments, dtype)
            raise DepartureError(
                f"{subject.name} is {error:.1e} from torch, {TOLERANCE[dtype]:.0e} is allowed; "
                f"it departs at {where}"
            )
        most = max(most, error)
    return float(f"{most:.2e}")


def _feed(subject: onnx_networks.Subject, arguments: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A session's arrays as a graph is called with them."""
    return {subject.graph_name(name): value.numpy() for name, value in arguments.items()}


def _session(file: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The graph as it is written, without second copies of weights.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-12))


def _first_departure(
    file: Path,
    subject: onnx_networks.Subject,
    program: torch.export.ExportedProgram,
    arguments: dict[str, torch.Tensor],
    dtype: Any,
) -> str:
    """The first operator whose answer is not torch's. Values have the same names in the traced program and
    the graph."""
    import onnx

    expected = _every_answer(subject, program, arguments, dtype)
    model = onnx.load(file, load_external_data=False)
    made = {name: node for node in model.graph.node for name in node.output}
    shared = [name for name in made if name in expected]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shared)
    watched = file.with_name("watched.onnx")
    try:
        watched.write_bytes(model.SerializeToString())
        got = _session(watched).run(shared, _feed(subject, arguments))
    finally:
        watched.unlink(missing_ok=True)
    for name, value in ((name, np.asarray(value)) for name, value in zip(shared, got, strict=True)):
        if value.size == expected[name].size:  # attention's answer has another shape
            error = _relative(np.asarray(value, np.float32).reshape(expected[name].shape), expected[name])
            if not error <= TOLERANCE[dtype]:
                return f"{made[name].op_type} ({name}, off by {error:.1e})"
    return "the end"


def _every_answer(
    subject: onnx_networks.Subject,
    program: torch.export.ExportedProgram,
    arguments: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:
    """The answer of each operator of the traced program, in fp32, by its name there."""
    answers: dict[str, np.ndarray] = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                answers[n.name] = out.float().numpy().copy()
            return out

    module: Any = program.module()
    for node in list(module.graph.nodes):  # it was traced on meta, which nodes name
        if "assert" in str(node.target) or node.target == "_guards_fn":
            module.graph.erase_node(node)
        elif "device" in node.kwargs:
            node.update_kwarg("device", "cpu")
    state = {
        f"{onnx_networks.PREFIX}{name}": value.to(dtype)
        for name, value in subject.module.state_dict().items()
    }
    module.load_state_dict(state, assign=True, strict=False)
    with torch.inference_mode():
        Watching(module).run(*arguments.values())
    return answers
