"""A network as ONNX, in the layout that Optimum exports: model.onnx in its subfolder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import sha256
from ..families.family import Network
from ..families.networks import adding_residuals
from ..graph import Graph, read_graph
from ..manifest import read_manifest
from ..spec import Component

GRAPH = "model.onnx"
CONTROLLED = "model_controlled.onnx"
"""The same U-Net, which adds what ControlNets answer; it reads its weights from the same file."""


def read_network(network: Network, config: Mapping[str, Any], file: Path) -> Graph:
    """The graph in `file`, whose inputs are those of the network, and as wide as its config says."""
    graph = read_graph(file)
    names = network.graph
    if not names.needed <= graph.inputs.keys() <= names.needed | names.optional:
        raise TightfitError(
            f"{file} has the inputs {', '.join(sorted(graph.inputs))}, "
            f"a {network.name} has {', '.join(sorted(names.needed))}: "
            "files of different models were mixed, or one was renamed; copy or export the model again"
        )
    for value, rank, which, field in names.sides:
        sides, wanted = (graph.inputs | graph.outputs).get(value, (0, ()))[1], config.get(field)
        if sides and len(sides) != rank:
            raise TightfitError(
                f"{graph.file} has {value} of {len(sides)} sides, not {rank}: copy or export the model again"
            )
        if sides and isinstance(sides[which], int) and isinstance(wanted, int) and sides[which] != wanted:
            raise TightfitError(
                f"{graph.file} has {value} of {list(sides)}, its config says {field} {wanted}: "
                "files of different models were mixed; copy or export the model again"
            )
    return graph


def controlled(component: Component) -> Component | None:
    """The denoiser as it adds what ControlNets answer; None where no such graph was exported."""
    if component.graph is None or not (file := component.graph.file.with_name(CONTROLLED)).exists():
        return None
    check_unmixed(file, read_manifest(file.parent.parent))
    network = adding_residuals(component.network, component.config)
    return replace(component, network=network, graph=read_network(network, component.config, file))


def check_unmixed(file: Path, manifest: Mapping[str, Any]) -> None:
    """A graph of another export would read its weights from wrong places in the file beside it. The weights
    are not read here."""
    told = manifest.get("components", {}).get(file.parent.name, {}).get("sha256", {}).get(file.name)
    if told and sha256(file) != told:
        raise TightfitError(
            f"{file} is not the one that was exported into this folder: copy or export the model again "
            "(or delete its tightfit.json, if you changed the graph yourself)"
        )
