"""Why no plan is possible: rules, answers and limits that cannot all hold together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from raygraft.placement.assignment import assign
from raygraft.placement.problem import Answer, Member, MemoryLimit, Problem
from raygraft.placement.rules import Applied, apply_rules

SECONDS = 10.0
"""Time after which the search for a smaller conflict ends; what is left then is still one."""


def members_of(problem: Problem, rules: Sequence[Applied]) -> list[Member]:
    """All that could be part of a conflict: answers, memory limits, then rules."""
    answers: dict[Answer, None] = {}
    limits = []
    for name, device in problem.devices.items():
        limits.append(MemoryLimit(name, device.memory))
        for atom in problem.atoms:
            restriction = device.restriction(problem.graph, atom)
            if restriction:
                answers[Answer(name, restriction)] = None
            answers.update(dict.fromkeys(problem.answers(atom, name)))
    return [*answers, *limits, *rules]


def is_possible(problem: Problem, members: Sequence[Member], among: Sequence[Member]) -> bool:
    """Whether there is an assignment when only `members` count of all those `among`."""
    rules = [member for member in members if isinstance(member, Applied)]
    ignored = frozenset(among) - frozenset(members)
    trial = replace(
        problem,
        constraints=apply_rules(problem.graph, rules, problem.devices),
        ignored=frozenset(member for member in ignored if not isinstance(member, Applied)),
    )
    return assign(trial, exact=True) is not None


def smallest_conflict(
    problem: Problem, rules: Sequence[Applied], clock: Callable[[], float] = time.monotonic
) -> tuple[Member, ...]:
    """Members that are impossible together, and possible when any one of them goes.

    Members are left out one by one while it stays impossible (a deletion filter). Empty when
    there is no conflict to be found: then it was the search that ran out of time.
    """
    among = members_of(problem, rules)
    if is_possible(problem, among, among) or not is_possible(problem, [], among):
        return ()
    kept = list(among)
    deadline = clock() + SECONDS
    for member in among:
        if clock() > deadline:
            break
        fewer = [other for other in kept if other != member]
        if not is_possible(problem, fewer, among):
            kept = fewer
    return tuple(kept)
