"""Which device computes each region: the cheapest choice that fits the devices' memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph, Region
from raygraft.graph.tensors import WeightSlice
from raygraft.placement import costs
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger

Candidates = Mapping[str, tuple[str, ...]]
"""Leaf region -> the devices it may go to, in the devices' order."""
EXACT_SECONDS = 20.0
"""Most time that the exact search may take."""


@dataclass(frozen=True)
class Problem:
    """What is to be assigned: every leaf to one of its candidates, within the memory."""

    graph: Graph
    devices: Mapping[str, DeviceProfile]
    candidates: Candidates
    limits: Limits
    tokens: int
    """Tokens of context that the cache must hold at least."""

    def fits(self, assignment: Mapping[str, str]) -> bool:
        """Whether no device holds more than its memory."""
        return not overfull(self, assignment)

    def filled(self, assignment: Mapping[str, str]) -> dict[str, Ledger]:
        """The ledgers of an assignment, which need not be complete."""
        ledgers = {
            name: Ledger(self.graph, device, self.limits) for name, device in self.devices.items()
        }
        for leaf in self.graph.leaves:
            if leaf.name in assignment:
                ledgers[assignment[leaf.name]].add(leaf)
        return ledgers


def overfull(problem: Problem, assignment: Mapping[str, str]) -> list[Ledger]:
    """Ledgers of the devices that hold more than their memory."""
    filled = problem.filled(assignment).values()
    return [ledger for ledger in filled if ledger.used(problem.tokens) > ledger.device.memory]


def assign(problem: Problem, *, exact: bool) -> dict[str, str] | None:
    """Leaf region -> device, or None when nothing fits.

    First the cheapest assignment as if memory were endless; if that does not fit, devices are
    filled in the graph's order; if that fails and `exact`, a search by HiGHS decides.
    """
    attempts = (cheapest, fill_in_order, search_exactly) if exact else (cheapest, fill_in_order)
    for attempt in attempts:
        found = attempt(problem)
        if found is not None and problem.fits(found):
            return found
    return None


def cheapest(problem: Problem) -> dict[str, str]:
    """The best path through the leaves, hop by hop (Viterbi), without regard to memory."""
    leaves, devices = problem.graph.leaves, problem.devices
    best: dict[str, tuple[float, tuple[str, ...]]] = {"": (0.0, ())}
    for leaf in leaves:
        reached: dict[str, tuple[float, tuple[str, ...]]] = {}
        for name in problem.candidates[leaf.name]:
            own = costs.compute_seconds(problem.graph, leaf, devices[name])
            reached[name] = min(
                (cost + own + _hop(problem, leaf, previous, name), path)
                for previous, (cost, path) in best.items()
            )
        best = {name: (cost, (*path, name)) for name, (cost, path) in reached.items()}
    order = {name: number for number, name in enumerate(devices)}
    _, path = min(best.values(), key=lambda item: (item[0], [order[name] for name in item[1]]))
    return {leaf.name: name for leaf, name in zip(leaves, path, strict=True)}


def _hop(problem: Problem, leaf: Region, source: str, target: str) -> float:
    if source in ("", target):
        return 0.0
    link = costs.link_between(problem.devices[source].node, problem.devices[target].node)
    inputs = problem.graph.subgraph(leaf.operators).inputs
    return costs.hop_seconds(link, sum(problem.graph.values[name].row_bytes for name in inputs))


def fill_in_order(problem: Problem) -> dict[str, str] | None:
    """Stay on a device until it is full, then go on with the emptiest; None if that fails."""
    forced = {leaf: names[0] for leaf, names in problem.candidates.items() if len(names) == 1}
    ledgers = problem.filled(forced)

    def free(name: str) -> int:
        return problem.devices[name].memory - ledgers[name].used(problem.tokens)

    assignment: dict[str, str] = {}
    current = ""
    for unit in _units(problem):
        names = problem.candidates[unit[0].name]
        if len(names) == 1:
            current = names[0]
        else:
            fitting = [n for n in names if ledgers[n].extra(unit, problem.tokens) <= free(n)]
            if not fitting:
                return None
            current = current if current in fitting else max(fitting, key=free)
            ledgers[current].add_all(unit)
        assignment.update((leaf.name, current) for leaf in unit)
    return assignment


def _units(problem: Problem) -> list[list[Region]]:
    """Leaves in order; those of one block together when they may go to the same devices."""
    units: list[list[Region]] = []
    key: object = None
    for leaf in problem.graph.leaves:
        top = ".".join(leaf.name.split(".")[:2])
        if key == (top, problem.candidates[leaf.name]):
            units[-1].append(leaf)
        else:
            units.append([leaf])
            key = (top, problem.candidates[leaf.name])
    return units


def search_exactly(problem: Problem) -> dict[str, str] | None:
    """The cheapest assignment that fits, as an integer program; None when there is none.

    A search that runs out of time gives its best so far.
    """
    return _Program(problem).solve()


class _Program:
    """The integer program, row by row.

    Its variables are 0 or 1: a leaf is on a device; a weight that several leaves share is on a
    device; the device changes before a leaf. One more per device is the share of the widest
    workspace that it needs.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.variables: dict[tuple[str, object, str], int] = {}
        self.costs: list[float] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        users: dict[WeightSlice, list[str]] = {}
        for leaf in problem.graph.leaves:
            for weight in problem.graph.subgraph(leaf.operators).weights:
                users.setdefault(weight, []).append(leaf.name)
        self.shared = {weight: names for weight, names in users.items() if len(names) > 1}

    def solve(self) -> dict[str, str] | None:
        """The assignment."""
        self._add_variables()
        self._add_choices()
        self._add_memory()
        matrix = lil_matrix((len(self.rows), len(self.costs)))
        for number, (row, _, _) in enumerate(self.rows):
            for index, factor in row.items():
                matrix[number, index] = factor
        low, high = [row[1] for row in self.rows], [row[2] for row in self.rows]
        result = milp(
            np.array(self.costs),
            integrality=[kind != "workspace" for kind, _, _ in self.variables],
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix.tocsr(), low, high),
            options={"time_limit": EXACT_SECONDS, "mip_rel_gap": 0.1},
        )
        if result.x is None:
            return None
        return {
            str(leaf): device
            for (kind, leaf, device), index in self.variables.items()
            if kind == "leaf" and result.x[index] > 0.5
        }

    def _variable(self, kind: str, what: object, device: str, cost: float) -> None:
        self.variables[kind, what, device] = len(self.costs)
        self.costs.append(cost)

    def _add_variables(self) -> None:
        problem = self.problem
        for leaf in problem.graph.leaves:
            for name in problem.candidates[leaf.name]:
                seconds = costs.compute_seconds(problem.graph, leaf, problem.devices[name])
                self._variable("leaf", leaf.name, name, seconds)
            self._variable("change", leaf.name, "", costs.HOP_SECONDS["ring"])
        for name in problem.devices:
            self._variable("workspace", "", name, 0.0)
            for weight in self.shared:
                self._variable("shared", weight, name, 0.0)

    def _add_choices(self) -> None:
        """Each leaf is on one device; changes are counted; shared weights follow their leaves."""
        index, candidates = self.variables, self.problem.candidates
        for leaf in self.problem.graph.leaves:
            row = {index["leaf", leaf.name, name]: 1.0 for name in candidates[leaf.name]}
            self.rows.append((row, 1.0, 1.0))
        for before, leaf in pairwise(self.problem.graph.leaves):
            for name in candidates[leaf.name]:
                row = {index["leaf", leaf.name, name]: 1.0, index["change", leaf.name, ""]: -1.0}
                if name in candidates[before.name]:
                    row[index["leaf", before.name, name]] = -1.0
                self.rows.append((row, -np.inf, 0.0))
        for weight, users in self.shared.items():
            for user in users:
                for name in candidates[user]:
                    row = {index["leaf", user, name]: 1.0, index["shared", weight, name]: -1.0}
                    self.rows.append((row, -np.inf, 0.0))

    def _add_memory(self) -> None:
        """No device holds more than its memory."""
        graph, problem = self.problem.graph, self.problem
        for name, device in problem.devices.items():
            widest = Ledger(graph, device, problem.limits)
            widest.add_all(graph.leaves)
            workspace = self.variables["workspace", "", name]
            row = {workspace: float(widest.workspace)}
            for leaf in graph.leaves:
                if name not in problem.candidates[leaf.name]:
                    continue
                own = Ledger(graph, device, problem.limits)
                own.add(leaf)
                index = self.variables["leaf", leaf.name, name]
                common = sum(device.bytes_of(graph, w) for w in own.slices & self.shared.keys())
                row[index] = float(own.used(problem.tokens) - own.workspace - common)
                part = own.workspace / widest.workspace
                self.rows.append(({index: part, workspace: -1.0}, -np.inf, 0.0))
            for weight in self.shared:
                index = self.variables["shared", weight, name]
                row[index] = float(device.bytes_of(graph, weight))
            self.rows.append((row, -np.inf, float(device.memory)))
