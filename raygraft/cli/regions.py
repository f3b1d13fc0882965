"""`raygraft regions`: the tree of regions that selectors name."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.tree import Tree

from raygraft.cli import options as o
from raygraft.cli.report import out, progress
from raygraft.graph.graph import Graph, Region
from raygraft.graph.selectors import Selector
from raygraft.model import Model
from raygraft.placement.costs import size


def regions(
    selector: Annotated[
        str, typer.Argument(help="Which regions: 'blk.3', 'blk.[0-2].attn', 'kind:attention'.")
    ] = "model",
    model: o.ModelOption = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="List the operators of each region.")
    ] = False,
    as_json: o.JsonOption = False,
) -> None:
    """List the regions of a model: their names, kinds, weights, and what flows in and out."""
    with progress(quiet=as_json) as say:
        graph = Model(model, say).graph
    chosen = Selector.parse(selector).select(graph)
    if as_json:
        names = dict.fromkeys(r.name for region in chosen for r in graph.descendants(region))
        document = {"regions": [_document(graph, graph.regions[name]) for name in names]}
        print(json.dumps(document, indent=1))
        return
    for region in chosen:
        out.print(_tree(graph, region, operators))


def _document(graph: Graph, region: Region) -> dict[str, object]:
    subgraph = graph.subgraph(region.operators)
    return {
        "name": region.name,
        "kind": region.kind,
        "parent": region.parent,
        "children": list(region.children),
        "operators": list(region.operators),
        "inputs": {name: graph.values[name].width for name in subgraph.inputs},
        "outputs": {name: graph.values[name].width for name in subgraph.outputs},
        "weights": [weight.tensor for weight in subgraph.weights],
        "weight_bytes": _weight_bytes(graph, region),
        "states": [state.name for state in subgraph.states],
    }


def _weight_bytes(graph: Graph, region: Region) -> int:
    weights = graph.subgraph(region.operators).weights
    return sum(weight.nbytes(graph.tensors[weight.tensor]) for weight in weights)


def _tree(graph: Graph, region: Region, operators: bool) -> Tree:
    """The region with all below it; blocks that are shaped like the one before are folded."""
    tree = Tree(_label(graph, region))
    folded: list[str] = []
    before: object = None
    for child in (graph.regions[name] for name in region.children):
        shape = _shape(graph, child)
        if child.children and shape == before:
            folded.append(child.name)
            continue
        _say_folded(tree, folded)
        before = shape
        tree.add(_tree(graph, child, operators))
    _say_folded(tree, folded)
    if operators and not region.children:
        for name in region.operators:
            tree.add(f"[dim]{graph.signature(graph.operators[graph.index[name]])}[/dim]")
    return tree


def _shape(graph: Graph, region: Region) -> object:
    return [graph.signature(graph.operators[graph.index[name]]) for name in region.operators]


def _say_folded(tree: Tree, folded: list[str]) -> None:
    if folded:
        names = folded[0] if len(folded) == 1 else f"{folded[0]} to {folded[-1]}"
        tree.add(f"{names} [dim]alike[/dim]")
        folded.clear()


def _label(graph: Graph, region: Region) -> str:
    subgraph = graph.subgraph(region.operators)
    flows = []
    for names in (subgraph.inputs, subgraph.outputs):
        flows.append("+".join(str(graph.values[name].width) for name in names) or "ids")
    state = ", owns a cache" if subgraph.states and not region.children else ""
    nbytes = size(_weight_bytes(graph, region))
    return f"{region.name} [dim]{region.kind}, {nbytes}, {' → '.join(flows)}{state}[/dim]"
