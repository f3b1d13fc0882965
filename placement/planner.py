"""The planner: graph, devices and rules in, a plan out, or an error that says what conflicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from raygraft.graph.capability import Limits
from raygraft.graph.errors import CapacityError, PlanError, UnsupportedRegionError
from raygraft.graph.graph import Graph
from raygraft.placement import costs
from raygraft.placement.assignment import assign
from raygraft.placement.conflicts import members_about, members_of, smallest_conflict
from raygraft.placement.costs import size
from raygraft.placement.devices import ENGINE, DeviceProfile, Place
from raygraft.placement.exact import SECONDS, OutOfTimeError
from raygraft.placement.memory import Ledger
from raygraft.placement.pieces import Pieces
from raygraft.placement.plan import DeviceUse, Plan, Stage
from raygraft.placement.problem import Answer, Assignment, Member, MemoryLimit, Problem, op_by_op
from raygraft.placement.reasons import place_with_reasons, refusal
from raygraft.placement.rules import AnyRule, Rule, apply_rules
from raygraft.placement.stages import cut_stages, list_transfers

BLOCK_SIZE = 16
LEAST_CONTEXT = 512
"""A plan whose cache holds fewer tokens is refused, unless the user asked for fewer."""


def make_plan(
    graph: Graph,
    devices: Sequence[DeviceProfile],
    rules: Sequence[AnyRule] = (),
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
    problem = make_problem(graph, devices, rules, limits=limits)
    contexts = _contexts(limits, context)
    _refuse_uncovered(problem)
    assignment, problem = _assignment(problem, contexts)
    stages = cut_stages(graph, assignment)
    places = {device.name: device.place for device in devices}
    transfers = list_transfers(graph, stages, places | {ENGINE: Place(engine_node, ENGINE)})
    filled = problem.filled(assignment)
    blocks = _cache_blocks(filled.values(), limits, context)
    uses = _uses(problem, stages, assignment, filled, blocks)
    hops = sum(costs.hop_seconds(transfer.link, transfer.row_bytes) for transfer in transfers)
    return Plan(
        model=model,
        limits=replace(limits, context=min(limits.context, blocks * BLOCK_SIZE)),
        block_size=BLOCK_SIZE,
        cache_blocks=blocks,
        asked=all(device.asked for device in devices),
        placements=place_with_reasons(problem, assignment),
        stages=stages,
        transfers=transfers,
        devices=uses,
        seconds_per_token=sum(use.seconds_per_token for use in uses) + hops,
    )


def _assignment(problem: Problem, contexts: Sequence[int]) -> tuple[Assignment, Problem]:
    """An assignment for the longest context for which one is found, with that problem."""
    for tokens in contexts:
        problem = problem.at(tokens)
        try:
            found = assign(problem, exact=tokens == contexts[-1])
        except OutOfTimeError:
            raise CapacityError(
                f"no plan was found in {SECONDS:.0f} s: {_does_not_fit(problem)}"
            ) from None
        if found is not None:
            return found, problem
    raise _impossible(problem)


def make_problem(
    graph: Graph, devices: Sequence[DeviceProfile], rules: Sequence[AnyRule], *, limits: Limits
) -> Problem:
    """The rules and answers that a plan must obey. Raises ConfigurationError, SelectorError."""
    by_name = {device.name: device for device in devices}
    return Problem(Pieces(graph, by_name, limits), apply_rules(graph, rules, by_name))


def _refuse_uncovered(problem: Problem) -> None:
    """Raise UnsupportedRegionError, with every device's answer, for an atom that nobody runs."""
    for atom in problem.atoms:
        if problem.able[atom.name]:
            continue
        rule = problem.constraints.placed.get(atom.operators[0])
        asked = list(problem.devices)
        if rule is not None and isinstance(rule.rule, Rule):
            asked = [name for name in asked if name in rule.rule.devices]
        who = f"{rule} asks for" if rule else "there are only"
        said = "; ".join(f"{name}: {refusal(problem, atom, name)}" for name in asked)
        wanted = f"no device can run the region {atom.name}: {who} {', '.join(asked)} ({said})"
        about = members_about(problem, atom)
        conflict = smallest_conflict(problem, about, members_of(problem))
        told = (m.reason if isinstance(m, Answer) else str(m) for m in conflict)
        more = "" if all(text in wanted for text in told) else _together(conflict)
        raise UnsupportedRegionError(wanted + more, conflict=conflict)


def _together(conflict: Sequence[Member]) -> str:
    return f". Impossible together: {'; '.join(map(str, conflict))}" if conflict else ""


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
    problem: Problem,
    stages: Sequence[Stage],
    assignment: Assignment,
    filled: dict[str, Ledger],
    blocks: int,
) -> tuple[DeviceUse, ...]:
    uses = []
    for name, ledger in filled.items():
        own = [choice for choice in assignment if choice.device == name]
        uses.append(
            DeviceUse(
                device=name,
                node=ledger.device.node,
                actor=ledger.device.place.actor,
                type=ledger.device.type,
                memory=ledger.device.memory,
                weights=ledger.weights,
                cache=ledger.token_bytes * BLOCK_SIZE * blocks,
                workspace=ledger.workspace,
                stages=sum(stage.device == name for stage in stages),
                seconds_per_token=sum(problem.seconds(choice) for choice in own),
            )
        )
    return tuple(uses)


def _impossible(problem: Problem) -> PlanError:
    """The error for a problem without a solution: what is needed, what is there, what conflicts."""
    among = members_of(problem)
    conflict = smallest_conflict(problem, among, among)
    if conflict and not any(isinstance(member, MemoryLimit) for member in conflict):
        return UnsupportedRegionError(f"no plan can hold{_together(conflict)}", conflict=conflict)
    return CapacityError(_does_not_fit(problem) + _together(conflict), conflict=conflict)


def _does_not_fit(problem: Problem) -> str:
    """Needed and available: of one device that has no choice, else of all."""
    forced = {atom: able[0] for atom, able in problem.able.items() if len(able) == 1}
    for ledger in problem.overfull(op_by_op(forced)):
        name = ledger.device.name
        atoms = [atom for atom, device in forced.items() if device == name]
        first = [problem.atoms[problem.position[atom]].operators[0] for atom in atoms]
        found = (problem.constraints.placed.get(operator) for operator in first)
        why = dict.fromkeys(str(rule) for rule in found if rule is not None)
        return (
            f"device {name} is too small: {len(atoms)} regions from {atoms[0]} to {atoms[-1]} "
            f"must be there ({' and '.join(why) or 'no other device can run them'}); they need "
            f"{size(ledger.used(problem.tokens))} with a cache for {problem.tokens} tokens, "
            f"it has {size(ledger.device.memory)}"
        )
    footprints = problem.pieces.footprints.values()
    need = min(
        Ledger(problem.graph, device, problem.limits).with_more(footprints, problem.tokens)
        for device in problem.devices.values()
    )
    have = ", ".join(f"{name} {size(d.memory)}" for name, d in problem.devices.items())
    total = sum(device.memory for device in problem.devices.values())
    small = "are too small for the model" if total < need else "have no way to share the model"
    return (
        f"the devices {small}: it needs {size(need)} "
        f"with a cache for {problem.tokens} tokens, they have {size(total)} ({have})"
    )
