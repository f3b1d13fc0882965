"""The exact search: an integer program, solved by HiGHS (https://highs.dev) through SciPy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from raygraft.graph.tensors import WeightSlice
from raygraft.placement import costs
from raygraft.placement.problem import Assignment, Choice, Problem

SECONDS = 10.0
"""Most time that a search may take."""
GAP = 0.1
"""A choice within this share of the best one is good enough."""
ROUNDS = 4
"""HiGHS computes in floats: an answer may be some bytes over, and is asked for again."""

_TIME_LIMIT = 1
"""Status of SciPy's `milp` that leaves open whether there is an answer."""


class OutOfTimeError(Exception):
    """The search took too long to tell whether there is an assignment."""


def search_exactly(problem: Problem, seconds: float = SECONDS) -> Assignment | None:
    """A cheap assignment that holds; None when there is none. Raises OutOfTimeError."""
    if not all(problem.able.values()):
        return None
    margins = dict.fromkeys(problem.devices, 0)
    for _ in range(ROUNDS):
        found = _Program(problem, margins).solve(seconds)
        if found is None and any(margins.values()):
            break  # only with less than its memory
        if found is None or problem.holds(found):
            return found
        for ledger in problem.overfull(found):
            over = ledger.used(problem.tokens) - ledger.device.memory
            margins[ledger.device.name] += over
    raise OutOfTimeError


class _Program:
    """The program, row by row.

    Its variables are 0 or 1: a choice is taken; a weight that several atoms share is on a device;
    the device changes before an atom. One more per device is the share of the widest workspace
    that it needs.
    """

    def __init__(self, problem: Problem, margins: Mapping[str, int]) -> None:
        self.problem = problem
        self.margins = margins
        """Bytes of each device that are left free."""
        self.index: dict[tuple[object, ...], int] = {}
        self.costs: list[float] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.covering: dict[tuple[str, str], list[Choice]] = {}
        """(atom, device) -> the choices that run it there."""
        users: dict[WeightSlice, list[str]] = {}
        for atom, footprint in problem.pieces.footprints.items():
            for weight, _ in footprint.slices:
                users.setdefault(weight, []).append(atom)
        self.shared = {weight: names for weight, names in users.items() if len(names) > 1}

    def solve(self, seconds: float) -> Assignment | None:
        """The assignment, in the graph's order; None when there is none."""
        # It takes a third of a second to import, and few plans need it.
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
        from scipy.sparse import coo_matrix  # noqa: PLC0415

        self._add_variables()
        self._add_cover()
        self._add_changes()
        self._add_groups()
        for name in self.problem.devices:
            if self.problem.memory(name) is not None:
                self._add_memory(name)
        numbers = [number for number, (row, _, _) in enumerate(self.rows) for _ in row]
        columns = [index for row, _, _ in self.rows for index in row]
        factors = [factor for row, _, _ in self.rows for factor in row.values()]
        shape = (len(self.rows), len(self.costs))
        matrix = coo_matrix((factors, (numbers, columns)), shape=shape).tocsr()
        low, high = [row[1] for row in self.rows], [row[2] for row in self.rows]
        result = milp(
            np.array(self.costs),
            integrality=[key[0] != "workspace" for key in self.index],
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": seconds, "mip_rel_gap": GAP},
        )
        if result.x is None:
            if result.status == _TIME_LIMIT:
                raise OutOfTimeError
            return None
        taken = [
            key[1]
            for key, index in self.index.items()
            if isinstance(key[1], Choice) and result.x[index] > 0.5
        ]
        position = self.problem.position
        return tuple(sorted(taken, key=lambda choice: position[choice.atoms[0]]))

    def _variable(self, cost: float, *key: object) -> None:
        self.index[key] = len(self.costs)
        self.costs.append(cost)

    def _add_variables(self) -> None:
        for choices in self.problem.choices:
            for choice in choices:
                self._variable(self.problem.seconds(choice), "choice", choice)
                for atom in choice.atoms:
                    self.covering.setdefault((atom, choice.device), []).append(choice)
        for region in self.problem.atoms:
            self._variable(costs.HOP_SECONDS["ring"], "change", region.name)
        for name in self.problem.devices:
            self._variable(0.0, "workspace", name)
            for weight in self.shared:
                self._variable(0.0, "shared", weight, name)

    def _on(self, atom: str, device: str, factor: float = 1.0) -> dict[int, float]:
        """The row that is `factor` when an atom is on a device, else 0."""
        choices = self.covering.get((atom, device), [])
        return {self.index["choice", choice]: factor for choice in choices}

    def _add_cover(self) -> None:
        """Each atom is run once."""
        for atom in self.problem.atoms:
            row: dict[int, float] = {}
            for name in self.problem.devices:
                row |= self._on(atom.name, name)
            self.rows.append((row, 1.0, 1.0))

    def _add_changes(self) -> None:
        """A change of device counts."""
        for before, atom in pairwise(self.problem.atoms):
            for name in self.problem.devices:
                row = self._on(atom.name, name)
                if not row:
                    continue
                for index, factor in self._on(before.name, name, -1.0).items():
                    row[index] = row.get(index, 0.0) + factor
                row[self.index["change", atom.name]] = -1.0
                self.rows.append((row, -np.inf, 0.0))

    def _add_groups(self) -> None:
        """What belongs together is on the same device."""
        for group in self.problem.groups:
            first, *others = sorted(group, key=self.problem.position.__getitem__)
            for other in others:
                for name in self.problem.devices:
                    row = self._on(first, name)
                    for index, factor in self._on(other, name, -1.0).items():
                        row[index] = row.get(index, 0.0) + factor
                    if row:
                        self.rows.append((row, 0.0, 0.0))

    def _add_memory(self, name: str) -> None:
        """A device holds no more than its memory."""
        problem, device = self.problem, self.problem.devices[name]
        footprints = problem.pieces.footprints
        here = [atom.name for atom in problem.atoms if (atom.name, name) in self.covering]
        widest = max((footprints[atom].workspace for atom in here), default=0)
        workspace = self.index["workspace", name]
        total: dict[int, float] = {workspace: float(widest)}
        for atom in here:
            own = footprints[atom]
            common = [weight for weight, _ in own.slices if weight in self.shared]
            alone = [form for weight, form in own.slices if weight not in self.shared]
            nbytes = own.token_bytes * problem.tokens
            nbytes += sum(device.weight_bytes[form] for form in alone)
            for index in self._on(atom, name):
                total[index] = total.get(index, 0.0) + nbytes
            row = self._on(atom, name, own.workspace / widest)
            self.rows.append((row | {workspace: -1.0}, -np.inf, 0.0))
            for weight in common:
                row = self._on(atom, name) | {self.index["shared", weight, name]: -1.0}
                self.rows.append((row, -np.inf, 0.0))
        for weight in self.shared:
            nbytes = device.bytes_of(problem.graph, weight)
            total[self.index["shared", weight, name]] = float(nbytes)
        self.rows.append((total, -np.inf, float(device.memory - self.margins[name])))
