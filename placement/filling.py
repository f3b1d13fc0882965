"""Filling devices one after the other: few hops, when memory is scarce."""

from __future__ import annotations

from collections.abc import Iterable

from raygraft.placement.problem import Assignment, Choice, Problem, block_of, merged


def fill_in_order(problem: Problem, whole: bool) -> Assignment | None:
    """Stay on a device until it is full, then go on with the emptiest; None if that fails.

    If `whole`, the atoms of one block stay together while that is possible. Else every atom is
    for itself, but those that share a weight are on one device.
    """
    filling = _Filling(problem, whole)
    taken: list[Choice] = []
    number = 0
    while number < len(problem.atoms):
        current = taken[-1].device if taken else ""
        run = filling.next_run(number, current)
        if run is None:
            return None
        filling.put(filling.missing(run), run[0].device)
        taken += run
        number += sum(len(choice.atoms) for choice in run)
    return tuple(taken)


class _Filling:
    """What the devices hold so far, and what is sure to come to them."""

    def __init__(self, problem: Problem, whole: bool) -> None:
        self._problem = problem
        self._whole = whole
        groups = problem.groups if whole else merged([*problem.groups, *problem.pieces.sharing])
        self._group_of = {atom: group for group in groups for atom in group}
        self._able = {
            atom: problem.able_together(self._group_of[atom]) if atom in self._group_of else able
            for atom, able in problem.able.items()
        }
        self._ledgers = problem.filled(())
        self._device_of: dict[str, str] = {}
        for atom, able in self._able.items():
            if len(able) == 1:
                self.put([atom], able[0])

    def put(self, atoms: Iterable[str], device: str) -> None:
        """Put atoms on a device, or reserve their room there."""
        for atom in atoms:
            self._ledgers[device].put(self._problem.pieces.footprints[atom])
            self._device_of[atom] = device

    def missing(self, run: list[Choice]) -> list[str]:
        """The atoms of a run, and all that belongs together with them, that have no room yet."""
        own = (atom for choice in run for atom in choice.atoms)
        together = (other for atom in own for other in self._group_of.get(atom, (atom,)))
        return [atom for atom in dict.fromkeys(together) if atom not in self._device_of]

    def next_run(self, start: int, current: str) -> list[Choice] | None:
        """All that is left of the block on one device, else a single choice; None if none fits."""
        runs_of_block, single = self._runs(start)
        for runs in (runs_of_block, single) if self._whole else (single,):
            runs.sort(key=lambda run: (run[0].device != current, -self._free(run[0].device)))
            for run in runs:
                if self._problem.fits(self._ledgers[run[0].device], self.missing(run)):
                    return run
        return None

    def _free(self, name: str) -> float:
        memory = self._problem.memory(name)
        used = self._ledgers[name].used(self._problem.tokens)
        return float("inf") if memory is None else memory - used

    def _runs(self, start: int) -> tuple[list[list[Choice]], list[list[Choice]]]:
        """What could come next: on each device all of the block that is left; or one choice."""
        atoms, choices = self._problem.atoms, self._problem.choices
        block = block_of(atoms[start].name)
        stop = start
        while stop < len(atoms) and block_of(atoms[stop].name) == block:
            stop += 1
        whole, single = [], []
        for first in filter(self._may_be, choices[start]):
            single.append([first])
            run, number = [first], start + len(first.atoms)
            while number < stop:
                same = (c for c in choices[number] if c.device == first.device)
                following = next(filter(self._may_be, same), None)
                if following is None:
                    break
                run.append(following)
                number += len(following.atoms)
            if number == stop:
                whole.append(run)
        return whole, single

    def _may_be(self, choice: Choice) -> bool:
        return all(
            choice.device in self._able[atom]
            and self._device_of.get(atom, choice.device) == choice.device
            for atom in choice.atoms
        )
