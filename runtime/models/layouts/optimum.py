"""A network as ONNX, in the layout that Optimum exports: model.onnx in its subfolder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ..families.family import Network
from ..graph import Graph, read_graph


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
