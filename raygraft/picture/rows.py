"""Rows of text about a plan's regions: where, how large, why, and what every device says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from raygraft.picture.folding import Folded, common_text, fold_alike, without_number
from raygraft.placement.plan import Plan
from raygraft.placement.problem import Problem
from raygraft.placement.reasons import DeviceAnswer, every_answer


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """Regions on one device for one reason."""

    regions: str
    atoms: tuple[str, ...]
    device: str
    nbytes: int
    """Of their weights, as the device holds them; shared ones count once."""
    reason: str
    claim: str


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """What one device says about some regions."""

    device: str
    can: bool
    answer: str
    seconds: float | None
    """Nominal time of one row, of all the regions together."""
    chosen: bool


class Rows:
    """Looks everything up about one plan. Folding lets regions that are alike share a row."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        self.plan, self.problem, self.graph = plan, problem, problem.graph
        self.placements = {placement.region: placement for placement in plan.placements}
        self.atoms = {atom.name: atom for atom in self.graph.atoms}

    def reasons(
        self, atoms: Iterable[str] | None = None, *, folded: bool = True
    ) -> list[ReasonRow]:
        """Where atoms are, and why: all of them, or these."""
        return [self._reason_row(item) for item in self._fold(atoms, self._place, folded)]

    def answers(
        self, atoms: Iterable[str] | None = None, *, folded: bool = True
    ) -> list[tuple[ReasonRow, list[AnswerRow]]]:
        """The same, each with every device's answer."""
        return [
            (self._reason_row(item), self.answers_about(item.atoms))
            for item in self._fold(atoms, self._place_and_answers, folded)
        ]

    def answers_about(self, atoms: Sequence[str]) -> list[AnswerRow]:
        """Every device's answer about atoms that are alike."""
        rows = []
        for own in zip(*(self._answers[atom] for atom in atoms), strict=True):
            seconds = [answer.seconds for answer in own if answer.seconds is not None]
            rows.append(
                AnswerRow(
                    device=own[0].device,
                    can=own[0].can,
                    answer=common_text([answer.answer for answer in own], atoms),
                    seconds=sum(seconds) if own[0].can else None,
                    chosen=own[0].chosen,
                )
            )
        return rows

    def operators(self, atoms: Iterable[str]) -> str:
        """Kinds of operators, with their numbers: `rms_norm, 3 matmul, 2 rope`."""
        names = [name for atom in atoms for name in self.atoms[atom].operators]
        kinds = Counter(self.graph.operators[self.graph.index[name]].kind for name in names)
        return ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in kinds.items())

    def nbytes(self, device: str, atoms: Iterable[str]) -> int:
        """Memory that the weights of some atoms take on a device."""
        own = [name for atom in atoms for name in self.atoms[atom].operators]
        weights = self.graph.subgraph(own).weights
        profile = self.problem.devices[device]
        return sum(profile.bytes_of(self.graph, weight) for weight in weights)

    def owns_cache(self, atoms: Iterable[str]) -> bool:
        """Whether the cache of any of these lies with them."""
        names = [name for atom in atoms for name in self.atoms[atom].operators]
        return any(self.graph.operators[self.graph.index[name]].state for name in names)

    @cached_property
    def _answers(self) -> Mapping[str, list[DeviceAnswer]]:
        found: dict[str, list[DeviceAnswer]] = {}
        for answer in every_answer(self.problem, self.plan.device_of):
            found.setdefault(answer.region, []).append(answer)
        return found

    def _fold(
        self, atoms: Iterable[str] | None, likeness: Callable[[str], Hashable], folded: bool
    ) -> list[Folded]:
        names = list(self.atoms if atoms is None else atoms)
        if folded:
            return fold_alike(self.graph, names, likeness)
        return [Folded(name, (name,)) for name in names]

    def _place(self, atom: str) -> Hashable:
        placement = self.placements[atom]
        return placement.device, without_number(placement.reason, atom)

    def _place_and_answers(self, atom: str) -> Hashable:
        own = [(a.can, without_number(a.answer, atom)) for a in self._answers[atom]]
        return self._place(atom), tuple(own)

    def _reason_row(self, item: Folded) -> ReasonRow:
        own = [self.placements[atom] for atom in item.atoms]
        claims = [placement.claim for placement in own if placement.claim]
        return ReasonRow(
            regions=item.text,
            atoms=item.atoms,
            device=own[0].device,
            nbytes=self.nbytes(own[0].device, item.atoms),
            reason=common_text([placement.reason for placement in own], item.atoms),
            claim=common_text(claims, item.atoms) if claims else "",
        )


def duration(seconds: float) -> str:
    """A time for a person: 12 µs, 3.4 ms, 1.2 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        amount = seconds * factor
        if amount >= 1 or unit == "µs":
            return f"{amount:.{0 if amount >= 100 or unit == 'µs' else 1}f} {unit}"
    raise AssertionError
