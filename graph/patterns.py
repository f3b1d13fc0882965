"""Finding runs of operators that a backend has a fused implementation for."""

from __future__ import annotations

from collections.abc import Sequence

from raygraft.graph.capability import Pattern
from raygraft.graph.graph import Graph, Region


def find_patterns(graph: Graph, patterns: Sequence[Pattern]) -> tuple[Region, ...]:
    """A region for every run of neighbouring operators that a pattern describes.

    A run of neighbours in the topological order is convex. It is named after its kind and its
    first operator; runs of one pattern do not overlap.
    """
    kinds = [op.kind for op in graph.operators]
    found = []
    for pattern in patterns:
        length = len(pattern.operators)
        start = 0
        while start + length <= len(kinds):
            if tuple(kinds[start : start + length]) == pattern.operators:
                names = tuple(op.name for op in graph.operators[start : start + length])
                name = f"{names[0].rpartition('.')[0]}.{pattern.kind}"
                found.append(Region(name, pattern.kind, None, (), names))
                start += length
            else:
                start += 1
    return tuple(found)


def with_found(graph: Graph, found: Sequence[Region]) -> Graph:
    """The graph with the regions that devices found; equal ones of several devices count once."""
    known = {region.name for region in graph.all_regions}
    for region in found:
        if region.name not in known:
            graph = graph.with_region(region.name, region.kind, region.operators)
            known.add(region.name)
    return graph
