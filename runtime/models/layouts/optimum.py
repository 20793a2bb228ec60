"""A network as ONNX, in the layout that Optimum exports: model.onnx in its subfolder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ..graph import Graph, read_graph

# What each network's graph is given, and may be given beside that.
_INPUTS = {
    "unet": ({"sample", "timestep", "encoder_hidden_states"}, {"timestep_cond", "text_embeds", "time_ids"}),
    "vae_decoder": ({"latent_sample"}, set()),
    "text_encoder": ({"input_ids"}, set()),
}
# Values of each network's graph: how many sides they have, and which of these a field of its config tells.
_SIDES = {
    "unet": (("sample", 4, 1, "in_channels"), ("encoder_hidden_states", 3, 2, "cross_attention_dim")),
    "vae_decoder": (("latent_sample", 4, 1, "latent_channels"),),
    "text_encoder": (("input_ids", 2, 0, ""), ("last_hidden_state", 3, 2, "hidden_size")),
}


def read_network(name: str, config: Mapping[str, Any], file: Path) -> Graph:
    """The graph in `file`, whose inputs are those of the network `name`, and as wide as its config says."""
    graph = read_graph(file)
    needed, allowed = _INPUTS[name.removesuffix("_2")]
    if not needed <= graph.inputs.keys() <= needed | allowed:
        raise TightfitError(
            f"{file} has the inputs {', '.join(sorted(graph.inputs))}, a {name} has {', '.join(sorted(needed))}: "
            "files of different models were mixed, or one was renamed; copy or export the model again"
        )
    for value, rank, which, field in _SIDES[name.removesuffix("_2")]:
        sides, wanted = (graph.inputs | graph.outputs).get(value, (0, ()))[1], config.get(field)
        if sides and len(sides) != rank:
            raise TightfitError(f"{graph.file} has {value} of {len(sides)} sides, not {rank}: copy or export the model again")
        if sides and isinstance(sides[which], int) and isinstance(wanted, int) and sides[which] != wanted:
            raise TightfitError(
                f"{graph.file} has {value} of {list(sides)}, its config says {field} {wanted}: "
                "files of different models were mixed; copy or export the model again"
            )
    return graph
