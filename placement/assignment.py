"""Which device computes each atom: the cheapest choices that fit the devices' memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from raygraft.placement import costs
from raygraft.placement.devices import Place
from raygraft.placement.exact import SECONDS, search_exactly
from raygraft.placement.filling import fill_in_order
from raygraft.placement.problem import (
    Assignment,
    Choice,
    PricedChoices,
    Problem,
    block_of,
    devices_of,
)


def assign(problem: Problem, *, exact: bool, seconds: float = SECONDS) -> Assignment | None:
    """Choices for all atoms, or None when there are none that hold.

    First the cheapest ones as if memory were endless. If they do not hold, what fits of them stays
    and the rest moves on, or devices are filled in the graph's order, whichever is cheaper. If
    both fail and `exact`, a search decides. Raises OutOfTimeError when that takes too long.
    In the end the first piece may go to where the last one is.
    """
    found = _assign(problem, exact, seconds)
    if found is None:
        return None
    closed = with_tokens_looked_up_where_drawn(problem, found)
    return closed if problem.holds(closed) else found


def with_tokens_looked_up_where_drawn(problem: Problem, assignment: Assignment) -> Assignment:
    """The first piece on the device of the last one, if that is cheaper; whether it fits or not.

    All else goes hop by hop, but the last hop leads back to the beginning.
    """
    first, last = assignment[0], assignment[-1]
    there = [c for c in problem.choices[0] if (c.device, c.atoms) == (last.device, first.atoms)]
    offers = [assignment, *((choice, *assignment[1:]) for choice in there)]
    return min(offers, key=problem.cost)


def _assign(problem: Problem, exact: bool, seconds: float) -> Assignment | None:
    found = cheapest(problem)
    if found is not None and problem.holds(found):
        return found
    if not problem.has_room:
        return None
    offers = [trim(problem), fill_in_order(problem, whole=True)]
    holding = [offer for offer in offers if offer is not None and problem.holds(offer)]
    if holding:
        return min(holding, key=problem.cost)
    found = fill_in_order(problem, whole=False)
    if found is not None and problem.holds(found):
        return found
    return search_exactly(problem, seconds) if exact else None


def cheapest(problem: Problem, choices: PricedChoices | None = None) -> Assignment | None:
    """The best path through the atoms, hop by hop (Viterbi), without regard to memory.

    `choices` are those that are open, all of them unless given. What belongs together goes where
    it computes fastest. None when no path is found.
    """
    choices = problem.priced_choices if choices is None else choices
    found = _best_path(problem, choices)
    if found is None or not problem.groups:
        return found
    votes = devices_of(found)
    able: dict[str, set[str]] = {}
    for choice in (choice for own in choices for choice, _ in own):
        for atom in choice.atoms:
            able.setdefault(atom, set()).add(choice.device)
    device_of: dict[str, str] = {}
    for group in problem.groups:
        names = [name for name in problem.devices if all(name in able[atom] for atom in group)]
        if not names:
            return None
        device_of |= dict.fromkeys(group, _fastest(problem, group, names, votes))
    together = [
        [
            (c, own)
            for c, own in found
            if all(device_of.get(a, c.device) == c.device for a in c.atoms)
        ]
        for found in choices
    ]
    return _best_path(problem, together)


def _fastest(
    problem: Problem, group: frozenset[str], names: Sequence[str], votes: Mapping[str, str]
) -> str:
    """The device that computes a group fastest; of equal ones that which has most of it."""
    atoms = sorted(group)
    most = Counter(votes[atom] for atom in atoms)

    def rank(name: str) -> tuple[float, int]:
        return sum(problem.pieces.seconds(atom, name) for atom in atoms), -most[name]

    return min(names, key=rank)


def _best_path(problem: Problem, choices: PricedChoices) -> Assignment | None:
    count = len(problem.atoms)
    order = {name: number for number, name in enumerate(problem.devices)}
    place_of = {name: device.place for name, device in problem.devices.items()}
    # For each position and device of the last choice: seconds so far, the device before (its
    # number and its name), and that choice.
    best: list[dict[str, tuple[float, int, str, Choice]]] = [{} for _ in range(count + 1)]
    for number in range(count):
        here = best[number]
        if number and not here:
            continue
        staying = {name: (reached[0], order[name], name) for name, reached in here.items()}
        near, far = _cheapest_hops(staying, place_of, problem.pieces.input_bytes[number])
        for choice, own in choices[number]:
            name = choice.device
            place = place_of[name]
            offers = (near.get(where, far) for where in (place, place.node))
            cost, before, name_before = min(staying.get(name, far), *offers, far)
            stop = best[number + len(choice.atoms)]
            if name not in stop or (cost + own, before) < stop[name][:2]:
                stop[name] = (cost + own, before, name_before, choice)
    if not best[count]:
        return None
    name = min(best[count], key=lambda name: (best[count][name][0], order[name]))
    path: list[Choice] = []
    while name:
        _, _, name_before, last = best[count][name]
        path.append(last)
        count, name = count - len(last.atoms), name_before
    return tuple(reversed(path))


_Arrival = tuple[float, int, str]
"""Seconds until then; number and name of the device that it comes from."""


def _cheapest_hops(
    staying: Mapping[str, _Arrival], place_of: Mapping[str, Place], nbytes: int
) -> tuple[dict[str | Place, _Arrival], _Arrival]:
    """The best way to reach other devices of each node and of each actor, and devices anywhere."""
    if not staying:
        return {}, (0.0, -1, "")
    best: dict[str | Place, _Arrival] = {}
    for arrival in staying.values():
        place = place_of[arrival[2]]
        for where in (place, place.node):
            best[where] = min(arrival, best.get(where, arrival))
    cost, number, name = min(best.values())
    far, ring, shared = (costs.hop_seconds(link, nbytes) for link in ("tcp", "ring", costs.SHARED))
    near = {
        where: (found[0] + (shared if isinstance(where, Place) else ring), found[1], found[2])
        for where, found in best.items()
    }
    return near, (cost + far, number, name)


def trim(problem: Problem) -> Assignment | None:
    """Of the cheapest choices what fits; what does not fit looks for the next device.

    None when something finds no device at all.
    """
    choices: PricedChoices = problem.priced_choices
    for _ in range(2 * len(problem.devices)):
        found = cheapest(problem, choices)
        overfull = problem.overfull(found or ())
        if found is None or not overfull:
            return found
        for name in (ledger.device.name for ledger in overfull):
            leaving = set(_leaving(problem, found, name))
            for group in problem.groups:
                if not leaving.isdisjoint(group):
                    leaving |= group
            choices = [
                [(c, own) for c, own in found if c.device != name or leaving.isdisjoint(c.atoms)]
                for found in choices
            ]
    return None


def _leaving(problem: Problem, assignment: Assignment, device: str) -> Iterator[str]:
    """The atoms that a device has no room for. Of each run it keeps the beginning, by blocks."""
    ledger = problem.filled(())[device]
    for name, run in groupby(assignment, key=lambda choice: choice.device):
        if name != device:
            continue
        room = True
        for _, block in groupby(run, key=lambda choice: block_of(choice.atoms[0])):
            choices = list(block)
            whole = problem.fits(ledger, [atom for choice in choices for atom in choice.atoms])
            empty = not ledger.slices and not ledger.token_bytes
            for choice in choices:
                room = room and (whole or (empty and problem.fits(ledger, choice.atoms)))
                if room:
                    for atom in choice.atoms:
                        ledger.put(problem.pieces.footprints[atom])
                else:
                    yield from choice.atoms
