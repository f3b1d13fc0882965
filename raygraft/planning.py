"""From a model and its devices to a plan: what `LLM` and the command line share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from raygraft.actors.fleet import Fleet
from raygraft.actors.part import Questions
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError, PlanError
from raygraft.graph.graph import Graph
from raygraft.graph.patterns import with_found
from raygraft.graph.selectors import Selector
from raygraft.kernels import BACKENDS
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.override_tensor import override_rules, parse_overrides
from raygraft.placement.plan import Plan
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import AnyRule, apply_rules


def with_named_regions(graph: Graph, regions: Mapping[str, str]) -> Graph:
    """The graph with the user's own regions: name -> selector. Their kind is their name.

    Raises ConfigurationError, SelectorError.
    """
    for name, selector in regions.items():
        if not name.isidentifier():
            raise ConfigurationError(
                f"{name!r} cannot be a region's name: accepted are letters, digits and _"
            )
        graph = graph.with_region(name, name, Selector.parse(selector).operators(graph))
    return graph


def with_overrides(
    graph: Graph,
    rules: Sequence[AnyRule],
    override_tensor: Sequence[str],
    specs: Sequence[DeviceSpec],
) -> tuple[AnyRule, ...]:
    """The rules, after those that llama.cpp's `-ot` stands for. Raises ConfigurationError."""
    return (*override_rules(graph, parse_overrides(override_tensor, specs)), *rules)


def check_early(graph: Graph, rules: Sequence[AnyRule], specs: Sequence[DeviceSpec]) -> None:
    """Refuse rules that can never hold before any device is started.

    Backends of others may find regions of their own, which rules may name: then it has to wait.
    """
    if all(spec.backend in BACKENDS for spec in specs):
        apply_rules(graph, rules, [spec.name for spec in specs])


def plan_on(
    fleet: Fleet,
    graph: Graph,
    rules: Sequence[AnyRule],
    *,
    limits: Limits,
    context: int | None,
    model: str,
    drained: Collection[str] = (),
) -> tuple[Plan, Graph, tuple[DeviceProfile, ...]]:
    """Ask the devices, and plan without those that are `drained`.

    Returns the graph as well, with the regions that they found.

    Raises PlanError, ConfigurationError.
    """
    asked = fleet.profiles(Questions(graph, limits))
    profiles = tuple(profile for profile in asked if profile.name not in drained)
    if not profiles:
        raise PlanError("there is no device left to plan with")
    for profile in profiles:
        graph = with_found(graph, profile.found)
    plan = make_plan(
        graph,
        profiles,
        rules,
        limits=limits,
        context=context,
        model=model,
        engine_node=fleet.node,
    )
    return plan, graph, profiles
