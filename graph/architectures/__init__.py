"""One file per architecture; this table is the only other place that a new one touches."""

from __future__ import annotations

from importlib import import_module

from raygraft.graph.errors import UnknownArchitectureError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph

ARCHITECTURES = {
    "llama": "raygraft.graph.architectures.llama",
}
"""`general.architecture` of a GGUF file -> the module whose `build` draws its graph."""


def build_graph(model: ModelFile) -> Graph:
    """The graph of a model file.

    Raises UnknownArchitectureError, or ModelFileError when a tensor or a key does not fit.
    """
    name = model.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"{model.path}: the architecture {name!r} is not known; "
            f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    graph: Graph = import_module(ARCHITECTURES[name]).build(model)
    return graph
