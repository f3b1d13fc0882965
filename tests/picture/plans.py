"""Plans to be drawn: shapes that people make, on devices that run everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from device_profiles import LIMITS, PLENTY, device
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.planner import make_plan, make_problem
from raygraft.placement.problem import Problem
from raygraft.placement.rules import Rule

NAMES = "abcdefgh"
HALVES = ("kind:attention=a", "kind:ffn=b", "embed=a")
THIRDS = ("kind:qkv=a", "kind:core=b", "kind:out=c", "kind:ffn=a")


@dataclass(frozen=True)
class Planned:
    """A plan, and what it answers."""

    plan: Plan
    problem: Problem


def write_graph(folder: Path, blocks: int) -> Graph:
    """A tiny model of so many blocks."""
    return build_graph(ModelFile.open(write_tiny_llama(folder / "tiny.gguf", blocks=blocks)))


def dealt(graph: Graph, devices: int = 8) -> list[str]:
    """Rules that deal the blocks out in turn."""
    blocks = range(graph.dimensions.blocks)
    return ["embed=a", *(f"blk.{n}={NAMES[n % devices]}" for n in blocks)]


def planned(
    graph: Graph,
    devices: int,
    rules: Sequence[str] = (),
    *,
    memory: int = PLENTY,
    nodes: Sequence[str] = ("",) * 8,
    asked: bool = True,
    model: str = "tiny.gguf",
) -> Planned:
    """A plan for devices named a, b, c and so on."""
    profiles = [
        device(graph, name, memory, node=node, asked=asked)
        for name, node in zip(NAMES[:devices], nodes, strict=False)
    ]
    parsed = [Rule.parse(rule) for rule in rules]
    plan = make_plan(graph, profiles, parsed, limits=LIMITS, model=model, engine_node=nodes[0])
    return Planned(plan, make_problem(graph, profiles, parsed, limits=LIMITS))
