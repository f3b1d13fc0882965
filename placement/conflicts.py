"""Why no plan is possible: rules, answers and limits that cannot all hold together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from raygraft.graph.graph import Region
from raygraft.placement.assignment import assign
from raygraft.placement.exact import OutOfTimeError
from raygraft.placement.problem import Answer, Member, MemoryLimit, Problem
from raygraft.placement.rules import Applied

SECONDS = 10.0
"""Time after which the search for a smaller conflict ends; what is left then is still one."""


def members_of(problem: Problem) -> list[Member]:
    """All that could be part of a conflict: answers, memory limits, then rules."""
    limits = [MemoryLimit(name, device.memory) for name, device in problem.devices.items()]
    return [*_answers(problem, problem.atoms), *limits, *problem.constraints.rules]


def members_about(problem: Problem, atom: Region) -> list[Member]:
    """All that keeps an atom, and the regions around it that are claimed, from being run."""
    about = [atom]
    for name in problem.devices:
        for _, start, stop in problem.pieces.claimed(name):
            if start <= problem.position[atom.name] < stop:
                about += problem.atoms[start:stop]
    rules = {
        rule: None
        for other in about
        for name in problem.devices
        if (rule := problem.constraints.obstacle(other.operators[0], name)) is not None
    }
    return [*_answers(problem, about), *rules]


def _answers(problem: Problem, atoms: Iterable[Region]) -> list[Answer]:
    answers: dict[Answer, None] = {}
    for name, device in problem.devices.items():
        for atom in atoms:
            restriction = device.restriction(problem.graph, atom)
            if restriction:
                answers[Answer(name, restriction)] = None
            answers.update(dict.fromkeys(problem.answers(atom, name)))
    return list(answers)


def is_possible(
    problem: Problem,
    members: Iterable[Member],
    among: Iterable[Member],
    seconds: float = SECONDS,
) -> bool:
    """Whether there is an assignment when only `members` count of all those `among`.

    What a rule that does not count has decided is open then, not decided by an earlier rule. True
    as well when `seconds` do not suffice to tell.
    """
    counting = frozenset(members)
    ignored = frozenset(among) - counting
    trial = replace(
        problem,
        constraints=problem.constraints.only(
            [member for member in counting if isinstance(member, Applied)]
        ),
        ignored=frozenset(member for member in ignored if not isinstance(member, Applied)),
    )
    try:
        return assign(trial, exact=True, seconds=seconds) is not None
    except OutOfTimeError:
        return True


def smallest_conflict(
    problem: Problem,
    members: Sequence[Member],
    among: Sequence[Member],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Member, ...]:
    """Of `members` that are impossible together, some that are possible when any one goes.

    Halves, quarters and so on are left out while it stays impossible, at last single ones (a
    deletion filter). Empty when the members are not impossible, or not for sure.
    """
    deadline = clock() + SECONDS
    if is_possible(problem, members, among):
        return ()
    kept = list(members)
    size = max(1, len(kept) // 2)
    while True:
        start = 0
        while start < len(kept):
            left = deadline - clock()
            if left <= 0:
                return tuple(kept)
            fewer = kept[:start] + kept[start + size :]
            if is_possible(problem, fewer, among, left):
                start += size
            else:
                kept = fewer
        if size == 1:
            return tuple(kept)
        size //= 2
