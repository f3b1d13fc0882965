"""The planner: graph, devices and rules in, a plan out, or an error that says what conflicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from raygraft.graph.capability import Limits
from raygraft.graph.errors import CapacityError, UnsupportedRegionError
from raygraft.graph.graph import Graph
from raygraft.placement import costs
from raygraft.placement.assignment import Candidates, Problem, assign, cheapest
from raygraft.placement.devices import ENGINE, DeviceProfile
from raygraft.placement.memory import Ledger
from raygraft.placement.plan import DeviceUse, Placement, Plan, Stage
from raygraft.placement.rules import Applied, Rule, apply_rules
from raygraft.placement.stages import cut_stages, list_transfers

BLOCK_SIZE = 16
LEAST_CONTEXT = 512
"""A plan whose cache holds fewer tokens is refused, unless the user asked for fewer."""


def make_plan(
    graph: Graph,
    devices: Sequence[DeviceProfile],
    rules: Sequence[Rule] = (),
    *,
    limits: Limits,
    context: int | None = None,
    model: str = "",
    engine_node: str = "",
) -> Plan:
    """Assign every region to a device.

    `limits.context` is an upper bound; `context` is what the user insists on. Without it, the
    context is what fits. Raises PlanError (UnsupportedRegionError, CapacityError) when nothing
    can hold, ConfigurationError for a rule that names no region or device.
    """
    by_name = {device.name: device for device in devices}
    applied = apply_rules(graph, rules, by_name)
    candidates = _candidates(graph, devices, applied)
    problem = Problem(graph, by_name, candidates, limits, 0)
    contexts = _contexts(limits, context)
    for tokens in contexts:
        problem = replace(problem, tokens=tokens)
        assignment = assign(problem, exact=tokens == contexts[-1])
        if assignment is not None:
            break
    else:
        raise CapacityError(_does_not_fit(problem, applied))
    stages = cut_stages(graph, assignment)
    node_of = {device.name: device.node for device in devices} | {ENGINE: engine_node}
    transfers = list_transfers(graph, stages, node_of)
    filled = problem.filled(assignment)
    blocks = _cache_blocks(filled.values(), limits, context)
    reasons = _reasons(problem, assignment, applied)
    uses = _uses(graph, stages, filled, blocks)
    hops = sum(costs.hop_seconds(transfer.link, transfer.row_bytes) for transfer in transfers)
    return Plan(
        model=model,
        limits=replace(limits, context=min(limits.context, blocks * BLOCK_SIZE)),
        block_size=BLOCK_SIZE,
        cache_blocks=blocks,
        asked=all(device.asked for device in devices),
        placements=tuple(
            Placement(leaf.name, assignment[leaf.name], reasons[leaf.name]) for leaf in graph.leaves
        ),
        stages=stages,
        transfers=transfers,
        devices=uses,
        seconds_per_token=sum(use.seconds_per_token for use in uses) + hops,
    )


def _candidates(
    graph: Graph, devices: Sequence[DeviceProfile], applied: dict[str, Applied]
) -> Candidates:
    """Where each leaf may go. Raises UnsupportedRegionError with every device's answer."""
    found: dict[str, tuple[str, ...]] = {}
    for leaf in graph.leaves:
        rule = applied.get(leaf.name)
        answers = {
            device.name: device.can_run(graph, leaf)
            for device in devices
            if rule is None or device.name in rule.rule.devices
        }
        found[leaf.name] = tuple(name for name, verdict in answers.items() if verdict)
        if not found[leaf.name]:
            who = f"{rule} asks for" if rule else "there are only"
            said = "; ".join(f"{name}: {verdict.reason}" for name, verdict in answers.items())
            raise UnsupportedRegionError(
                f"no device can run the region {leaf.name}: {who} {', '.join(answers)} ({said})"
            )
    return found


def _contexts(limits: Limits, context: int | None) -> list[int]:
    """Tokens to make room for, best first: what the user insists on, or halves of the longest."""
    if context is not None:
        return [_round_up(context)]
    contexts = [_round_up(limits.context)]
    while contexts[-1] > LEAST_CONTEXT:
        contexts.append(max(LEAST_CONTEXT, _round_up(contexts[-1] // 2)))
    return contexts


def _round_up(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


def _cache_blocks(ledgers: Iterable[Ledger], limits: Limits, context: int | None) -> int:
    """Pages of the cache: enough for every sequence at full length, or what fits everywhere."""
    blocks = _round_up(context or limits.context) // BLOCK_SIZE * limits.max_sequences
    for ledger in ledgers:
        if ledger.token_bytes:
            free = ledger.device.memory - ledger.used(0)
            blocks = min(blocks, free // (ledger.token_bytes * BLOCK_SIZE))
    return blocks


def _uses(
    graph: Graph, stages: Sequence[Stage], filled: dict[str, Ledger], blocks: int
) -> tuple[DeviceUse, ...]:
    uses = []
    for name, ledger in filled.items():
        own = [stage for stage in stages if stage.device == name]
        leaves = [graph.regions[region] for stage in own for region in stage.regions]
        seconds = sum(costs.compute_seconds(graph, leaf, ledger.device) for leaf in leaves)
        uses.append(
            DeviceUse(
                device=name,
                node=ledger.device.node,
                type=ledger.device.type,
                memory=ledger.device.memory,
                weights=ledger.weights,
                cache=ledger.token_bytes * BLOCK_SIZE * blocks,
                workspace=ledger.workspace,
                stages=len(own),
                seconds_per_token=seconds,
            )
        )
    return tuple(uses)


def _reasons(
    problem: Problem, assignment: dict[str, str], applied: dict[str, Applied]
) -> dict[str, str]:
    """Why each leaf is where it is."""
    free = cheapest(problem)
    reasons = {}
    leaves = problem.graph.leaves
    for number, leaf in enumerate(leaves):
        name = assignment[leaf.name]
        rule = applied.get(leaf.name)
        near = {assignment[other.name] for other in leaves[max(0, number - 1) : number + 2]}
        if rule is not None:
            reasons[leaf.name] = str(rule)
            if len(rule.rule.devices) > 1:
                reasons[leaf.name] += ", the cheaper of them"
        elif len(problem.candidates[leaf.name]) == 1:
            only = len(problem.devices) > 1
            reasons[leaf.name] = "the only device that can run it" if only else "the only device"
        elif free[leaf.name] != name:
            reasons[leaf.name] = "fills the memory that is left"
        elif near == {name}:
            reasons[leaf.name] = "cheapest, together with its neighbours"
        else:
            reasons[leaf.name] = "cheapest, with one neighbour"
    return reasons


def _does_not_fit(problem: Problem, applied: dict[str, Applied]) -> str:
    """Needed and available, and the rules that force it."""
    pinned = {leaf: names[0] for leaf, names in problem.candidates.items() if len(names) == 1}
    for name, ledger in problem.filled(pinned).items():
        needed = ledger.used(problem.tokens)
        if needed > ledger.device.memory:
            forced = [leaf for leaf, device in pinned.items() if device == name]
            rules = dict.fromkeys(str(applied[leaf]) for leaf in forced if leaf in applied)
            why = " and ".join(rules) or "no other device can run them"
            return (
                f"device {name} is too small: {len(forced)} regions from {forced[0]} to "
                f"{forced[-1]} must be there ({why}); they need {size(needed)} with a cache for "
                f"{problem.tokens} tokens, it has {size(ledger.device.memory)}"
            )
    leaves = problem.graph.leaves
    needs = [
        Ledger(problem.graph, device, problem.limits).extra(leaves, problem.tokens)
        for device in problem.devices.values()
    ]
    have = ", ".join(f"{name} {size(d.memory)}" for name, d in problem.devices.items())
    total = sum(device.memory for device in problem.devices.values())
    return (
        f"the devices are too small for the model: it needs {size(min(needs))} "
        f"with a cache for {problem.tokens} tokens, they have {size(total)} ({have})"
    )


def size(nbytes: int) -> str:
    """Bytes for a person: 5.1 MiB, 513 MiB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    amount = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024:
            break
    return f"{amount:.{0 if amount >= 100 else 1}f} {unit}"
