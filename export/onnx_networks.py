"""A network as an ONNX graph without its weights: traced on torch's meta device, so that tracing SD 1.5 takes
no more memory than tracing a toy. Inputs, outputs and folders are named as Optimum names them, so that either
can run what the other wrote.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import nn

from ..runtime.errors import TightfitError

if TYPE_CHECKING:
    from ..runtime.models.families.family import Tracing
    from ..runtime.models.spec import Component, ModelSpec

OPSET = 23  # the first with Attention; GroupNormalization is since 21
PREFIX = "m."
_AUTO = torch.export.Dim.AUTO
_SHORTER = 0.75  # of the text length: a length to check at, other than that of tracing
_MOST_TOKENS = 1000  # where a config has no vocab_size

Size = Mapping[str, int]


@dataclass(frozen=True)
class Subject:
    """What one ONNX file is made of: a model's `component`, its `module` on the meta device, and how its
    family has it traced.

    `inputs` are the shapes of a session's arrays, with names for sides that vary, and None for those of what
    may be one zero, as which it is traced. `outputs` name the answers.
    `text_length` is that of the model, in tokens.
    """

    component: Component
    module: nn.Module
    tracing: Tracing
    inputs: Mapping[str, tuple[str | int | None, ...]]
    outputs: tuple[str, ...]
    text_length: int

    @property
    def name(self) -> str:
        """Of the network and of its folder."""
        return self.component.name

    @property
    def size(self) -> Size:
        """Lengths of the named sides, as it is traced."""
        return {"sequence_length": self.text_length, **self.tracing.size}

    @property
    def checked(self) -> tuple[Size, ...]:
        shorter = round(self.text_length * _SHORTER)
        return tuple({"sequence_length": shorter, **size} for size in self.tracing.checked)

    @property
    def call(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Of the module and a session's arrays, for all that the graph answers."""
        if (call := self.tracing.call) is None:
            return self.component.network.call
        return lambda module, **arrays: call(module, self.outputs, **arrays)

    def graph_name(self, array: str) -> str:
        """The graph's name for a session's array."""
        return self.component.network.graph.names.get(array, array)

    def arguments(
        self, size: Size, dtype: torch.dtype, device: str, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random inputs by a session's names, drawn on the CPU; on meta, shapes alone."""
        generator, tracing = torch.Generator().manual_seed(seed), self.tracing
        most = self.component.config.get("vocab_size", _MOST_TOKENS)
        following, arrays = tracing.following(self.component.config, size), {}
        kinds = dict.fromkeys(tracing.exact, torch.float32) | dict.fromkeys(tracing.tokens, torch.int64)
        for name, sides in self.inputs.items():
            if name in following and not (device == "meta" and None in sides):
                shape = following[name]
            else:
                shape = tuple(size[side] if isinstance(side, str) else side or 1 for side in sides)
            if device == "meta":
                arrays[name] = torch.empty(shape, dtype=kinds.get(name, dtype), device=device)
            elif name in tracing.tokens:
                arrays[name] = torch.randint(0, most, shape, generator=generator)
            else:
                arrays[name] = torch.randn(shape, generator=generator).to(kinds.get(name, dtype))
                if name in tracing.counts:
                    arrays[name] = arrays[name].abs() * 100
        return arrays


def check(spec: ModelSpec, component: Component) -> Tracing:
    """How the component is traced. Raises TightfitError for one that no graph can be made of."""
    if (tracing := component.network.tracing) is None:
        raise TightfitError(
            f"{spec.name} is {spec.design.title}, whose {component.name} cannot be written as ONNX: "
            "leave out --to onnx"
        )
    return tracing


def subject(spec: ModelSpec, component: Component) -> Subject:
    """The component, built without memory. Raises TightfitError for one that no graph can be made of."""
    network, tracing = component.network, check(spec, component)
    with torch.device("meta"):
        module = (tracing.build or network.build)(component).eval()  # T5 has dropout
    for part in module.modules():  # buffers made on meta have no values, so that nothing may read them
        part._buffers.update(dict.fromkeys(part._buffers))
    shapes, zeros = (
        network.graph.shapes(spec.inputs(component, 1, *spec.some_size)),
        network.graph.zeros,
    )
    inputs: dict[str, tuple[str | int | None, ...]] = {
        name: tuple(side or length for side, length in zip(tracing.sides[name], shape, strict=True))
        for name, shape in shapes.items()
        if network.graph.names.get(name) not in zeros
    }
    inputs |= {name: (None,) * 4 for name, graph_name in network.graph.names.items() if graph_name in zeros}
    return Subject(component, module, tracing, inputs, tracing.outputs(component), spec.text_length)


class Wrapped(nn.Module):
    """A module whose forward takes the inputs in order, as torch.export wants it. Names of weights begin with
    PREFIX."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.m, self._call, self._names = subject.module, subject.call, tuple(subject.inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._call(self.m, **dict(zip(self._names, tensors, strict=True)))


def trace(subject: Subject, dtype: torch.dtype) -> tuple[ir.Model, torch.export.ExportedProgram]:
    """The subject's graph in `dtype`, whose weights are initializers without values, and the program that it
    was made from."""
    import onnxscript.optimizer

    module = Wrapped(subject).to(dtype).eval().requires_grad_(False)
    arguments = subject.arguments(subject.size, dtype, "meta")
    # What torch need not halve by itself: SD 3.5's transformer is traced in half the time.
    halved = {side: count * torch.export.Dim(side) for side, count in subject.tracing.multiples.items()}
    moving = tuple(
        {i: halved.get(side, _AUTO) for i, side in enumerate(shape) if isinstance(side, str)}
        for shape in subject.inputs.values()
    )
    with _quiet():
        program = torch.export.export(
            module, tuple(arguments.values()), dynamic_shapes={"tensors": moving}, strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[subject.graph_name(name) for name in subject.inputs],
            output_names=list(subject.outputs),
            optimize=False,
            verbose=False,
        )
        assert onnx_program is not None
        model = onnx_program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # the optimizer would read it, and there is none
        onnxscript.optimizer.optimize_ir(model)
    for value, shape in zip(model.graph.inputs, subject.inputs.values(), strict=True):
        value.shape = ir.Shape(shape)
    return model, program


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's remarks, such as that torchvision is missing or weights have no values."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
