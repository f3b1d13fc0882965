"""Which device computes each atom: the cheapest choices that fit the devices' memory."""

from __future__ import annotations

from raygraft.graph.graph import Region
from raygraft.placement import costs
from raygraft.placement.exact import search_exactly
from raygraft.placement.problem import Assignment, Choice, Problem


def assign(problem: Problem, *, exact: bool) -> Assignment | None:
    """Choices for all atoms, or None when there are none that hold.

    First the cheapest ones as if memory were endless; if that does not hold, devices are filled
    in the graph's order; if that fails and `exact`, a search by HiGHS decides.
    """
    attempts = (cheapest, fill_in_order, search_exactly) if exact else (cheapest, fill_in_order)
    for attempt in attempts:
        found = attempt(problem)
        if found is not None and problem.holds(found):
            return found
    return None


def cheapest(problem: Problem) -> Assignment | None:
    """The best path through the atoms, hop by hop (Viterbi), without regard to memory.

    None when some atom has no choice.
    """
    count = len(problem.atoms)
    order = {name: number for number, name in enumerate(problem.devices)}
    # For each position and device of the last choice: cost, order, last choice, device before it.
    best: list[dict[str, tuple[float, int, Choice | None, str]]] = [{} for _ in range(count + 1)]
    best[0][""] = (0.0, 0, None, "")
    for number in range(count):
        for choice in problem.choices[number]:
            own = problem.seconds(choice)
            stop = number + len(choice.atoms)
            for before, (cost, *_) in best[number].items():
                total = cost + own + _hop(problem, number, before, choice.device)
                offer = (total, order.get(before, -1), choice, before)
                known = best[stop].get(choice.device)
                if known is None or offer[:2] < known[:2]:
                    best[stop][choice.device] = offer
    if not best[count]:
        return None
    device = min(best[count], key=lambda name: (best[count][name][0], order[name]))
    path: list[Choice] = []
    stop = count
    while stop:
        _, _, last, before = best[stop][device]
        assert last is not None
        path.append(last)
        stop, device = stop - len(last.atoms), before
    return tuple(reversed(path))


def _hop(problem: Problem, number: int, source: str, target: str) -> float:
    if source in ("", target):
        return 0.0
    link = costs.link_between(problem.devices[source].node, problem.devices[target].node)
    return costs.hop_seconds(link, problem.input_bytes[number])


def fill_in_order(problem: Problem) -> Assignment | None:
    """Stay on a device until it is full, then go on with the emptiest; None if that fails.

    The atoms of one block stay together while that is possible.
    """
    only = [choices[0] for choices in problem.choices if len(choices) == 1]
    forced = [choice for choice in only if len(choice.atoms) == 1]
    ledgers = problem.filled(forced)

    def free(name: str) -> float:
        memory = problem.memory(name)
        return float("inf") if memory is None else memory - ledgers[name].used(problem.tokens)

    taken: list[Choice] = []
    number = 0
    while number < len(problem.atoms):
        current = taken[-1].device if taken else ""
        run = None
        for runs in _runs(problem, number):
            fitting = [
                run
                for run in runs
                if ledgers[run[0].device].extra(_new(problem, run, forced), problem.tokens)
                <= free(run[0].device)
            ]
            if fitting:
                run = min(fitting, key=lambda run: (run[0].device != current, -free(run[0].device)))
                break
        if run is None:
            return None
        ledgers[run[0].device].add_all(_new(problem, run, forced))
        taken += run
        number += sum(len(choice.atoms) for choice in run)
    return tuple(taken)


def _new(problem: Problem, run: list[Choice], forced: list[Choice]) -> list[Region]:
    """Atoms of a run that are not counted yet."""
    fresh = [choice for choice in run if choice not in forced]
    return [problem.atoms[problem.position[atom]] for choice in fresh for atom in choice.atoms]


def _runs(problem: Problem, start: int) -> tuple[list[list[Choice]], list[list[Choice]]]:
    """What could come next: on each device all of the block that is left; or one choice."""
    top = _block(problem.atoms[start].name)
    stop = start
    while stop < len(problem.atoms) and _block(problem.atoms[stop].name) == top:
        stop += 1
    whole, single = [], []
    for first in problem.choices[start]:
        single.append([first])
        run, number = [first], start + len(first.atoms)
        while number < stop:
            same = [c for c in problem.choices[number] if c.device == first.device]
            if not same:
                break
            run.append(same[0])
            number += len(same[0].atoms)
        if number == stop:
            whole.append(run)
    return whole, single


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2])
