"""Why a region is where it is, and what every device says about it."""

from __future__ import annotations

from dataclasses import dataclass

from raygraft.graph.graph import Region
from raygraft.placement.assignment import cheapest
from raygraft.placement.plan import Placement
from raygraft.placement.problem import Assignment, Problem, devices_of
from raygraft.placement.rules import Rule


@dataclass(frozen=True, slots=True)
class DeviceAnswer:
    """What one device says about one atom of a plan."""

    region: str
    device: str
    can: bool
    answer: str
    chosen: bool


def place_with_reasons(problem: Problem, assignment: Assignment) -> tuple[Placement, ...]:
    """Every atom's device, with the reason for it."""
    device_of = devices_of(assignment)
    free = devices_of(cheapest(problem) or ())
    names = [atom.name for atom in problem.atoms]
    found = []
    for choice in assignment:
        for atom in choice.atoms:
            number = problem.position[atom]
            near = {device_of[other] for other in names[max(0, number - 1) : number + 2]}
            alone = near == {choice.device}
            reason = _reason(problem, atom, choice.device, free.get(atom), alone)
            if choice.claim is not None:
                reason += f"; it claims {choice.claim}"
            found.append(Placement(atom, choice.device, reason, choice.claim))
    return tuple(found)


def _reason(problem: Problem, atom: str, device: str, cheapest: str | None, alone: bool) -> str:
    region = problem.atoms[problem.position[atom]]
    applied = problem.constraints.placed.get(region.operators[0])
    if applied is not None and isinstance(applied.rule, Rule):
        others = len(applied.rule.devices) > 1
        return f"{applied}, the cheaper of them" if others else str(applied)
    able = [name for name in problem.devices if can_run(problem, region, name)]
    if able == [device]:
        return "the only device that can run it" if len(problem.devices) > 1 else "the only device"
    if cheapest != device:
        return "fills the memory that is left"
    return "cheapest, together with its neighbours" if alone else "cheapest, with one neighbour"


def can_run(problem: Problem, atom: Region, device: str) -> str:
    """How a device could run an atom, in words; empty when it cannot."""
    for choices in problem.choices:
        for choice in choices:
            if choice.device == device and atom.name in choice.atoms:
                return f"claims {choice.claim}" if choice.claim else "supports all its operators"
    return ""


def refusal(problem: Problem, atom: Region, device: str) -> str:
    """Why a device cannot run an atom: rules and operators, then what it says about claims."""
    profile = problem.devices[device]
    reasons = dict.fromkeys(str(o) for o in problem.obstacles(atom, device))
    texts = [reason.removeprefix(f"{device}: ") for reason in reasons]
    for region in problem.graph.all_regions:
        if set(atom.operators) <= set(region.operators):
            verdict = profile.claims.get(problem.graph.region_signature(region))
            if verdict is not None and not verdict and verdict.reason not in texts:
                texts.append(verdict.reason)
    return "; ".join(texts) or "it cannot run all of the region that it claims here"


def every_answer(
    problem: Problem, assignment_of: dict[str, str], region: Region
) -> list[DeviceAnswer]:
    """What each device says about each atom of a region."""
    answers = []
    for atom in problem.atoms:
        if not set(atom.operators) <= set(region.operators):
            continue
        for device in problem.devices:
            how = can_run(problem, atom, device)
            answers.append(
                DeviceAnswer(
                    region=atom.name,
                    device=device,
                    can=bool(how),
                    answer=how or refusal(problem, atom, device),
                    chosen=assignment_of.get(atom.name) == device,
                )
            )
    return answers
