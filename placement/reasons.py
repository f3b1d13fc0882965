"""Why a region is where it is, and what every device says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raygraft.graph.graph import Region
from raygraft.placement.assignment import cheapest, with_tokens_looked_up_where_drawn
from raygraft.placement.plan import Placement
from raygraft.placement.problem import Assignment, Choice, Problem, devices_of
from raygraft.placement.rules import Rule


@dataclass(frozen=True, slots=True)
class DeviceAnswer:
    """What one device says about one atom of a plan."""

    region: str
    device: str
    can: bool
    answer: str
    seconds: float | None
    """Nominal time of one row there; None when it cannot run it."""
    chosen: bool


def place_with_reasons(problem: Problem, assignment: Assignment) -> tuple[Placement, ...]:
    """Every atom's device, with the reason for it."""
    device_of = devices_of(assignment)
    best = cheapest(problem)
    free = devices_of(with_tokens_looked_up_where_drawn(problem, best) if best else ())
    names = [atom.name for atom in problem.atoms]
    found = []
    for choice in assignment:
        for atom in choice.atoms:
            number = problem.position[atom]
            near = {device_of[other] for other in names[max(0, number - 1) : number + 2]}
            alone = near == {choice.device}
            if number == 0 and device_of[names[1]] != choice.device == device_of[names[-1]]:
                beside = "as tokens are drawn there"
            else:
                beside = "together with its neighbours" if alone else "with one neighbour"
            reason = _reason(problem, atom, choice.device, free.get(atom), beside)
            if choice.claim is not None:
                reason += f"; it claims {choice.claim}"
            found.append(Placement(atom, choice.device, reason, choice.claim))
    return tuple(found)


def _reason(problem: Problem, atom: str, device: str, cheapest: str | None, beside: str) -> str:
    region = problem.atoms[problem.position[atom]]
    applied = problem.constraints.placed.get(region.operators[0])
    if applied is not None and isinstance(applied.rule, Rule):
        others = len(applied.rule.devices) > 1
        return f"{applied}, the cheaper of them" if others else str(applied)
    if problem.able[atom] == (device,):
        return "the only device that can run it" if len(problem.devices) > 1 else "the only device"
    if cheapest != device:
        return "fills the memory that is left"
    return f"cheapest, {beside}"


def ways_to_run(problem: Problem) -> dict[tuple[str, str], list[Choice]]:
    """(atom, device) -> the choices that would run it there; without those that have none."""
    ways: dict[tuple[str, str], list[Choice]] = {}
    for choices in problem.choices:
        for choice in choices:
            for atom in choice.atoms:
                ways.setdefault((atom, choice.device), []).append(choice)
    return ways


def refusal(problem: Problem, atom: Region, device: str) -> str:
    """Why a device cannot run an atom: rules, then what it says about operators and claims."""
    answers = problem.answers(atom, device)
    reasons = {str(o): None for o in problem.obstacles(atom, device) if o not in answers}
    number = problem.position[atom.name]
    spans = problem.pieces.claimed(device)
    claimed = [region.name for region, start, stop in spans if start <= number < stop]
    if not claimed:
        reasons |= dict.fromkeys(answer.reason for answer in answers)
    texts = dict.fromkeys(reason.removeprefix(f"{device}: ") for reason in reasons)
    claims = " and ".join(claimed)
    return "; ".join(texts) or f"it claims {claims}, but not all of that may be there"


def every_answer(problem: Problem, device_of: Mapping[str, str]) -> list[DeviceAnswer]:
    """What each device says about every atom, in the graph's order.

    `device_of` holds the device that each atom has in the plan.
    """
    ways = ways_to_run(problem)
    answers = []
    for atom in problem.atoms:
        for device in problem.devices:
            choices = ways.get((atom.name, device), [])
            answer = "; ".join(map(_way, choices)) or refusal(problem, atom, device)
            alone = problem.seconds(Choice(device, (atom.name,))) if choices else None
            chosen = device_of.get(atom.name) == device
            answers.append(DeviceAnswer(atom.name, device, bool(choices), answer, alone, chosen))
    return answers


def _way(choice: Choice) -> str:
    return f"claims {choice.claim}" if choice.claim else "supports all its operators"
