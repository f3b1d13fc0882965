"""What is to be checked of a device, and what came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from raygraft.graph.capability import Limits, RegionSignature, Verdict
from raygraft.graph.graph import Graph, Region, Subgraph
from raygraft.graph.operators import Signature, Value
from raygraft.graph.tensors import TensorInfo

What = Signature | RegionSignature

BOUND = 1e-3
"""Largest error that is allowed. Float32 in another order of additions comes to about 1e-6, inputs
and weights rounded to float16 to 3e-4. A result that is one per cent off is wrong."""
F16_CACHE_BOUND = 5e-3
"""The same where keys and values are kept in float16, and may be rounded before or after a sum."""


class Outcome(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    UNCHECKED = "unchecked"
    """It could not be run here; the device is believed."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came out of one check on one device."""

    what: str
    claim: bool
    """Whether it was a claimed region; else an operator."""
    where: str
    """The region or operator that was run, the first of its signature."""
    count: int
    """How many regions or operators of the model share the signature."""
    bound: float
    outcome: Outcome
    error: float | None = None
    """Norm of the difference over the norm of the reference: the worst row of all outputs and
    steps. None when there was nothing to measure."""
    detail: str = ""
    """What is wrong, or why it could not be checked."""

    @property
    def ok(self) -> bool:
        return self.outcome is not Outcome.FAILED


@dataclass(frozen=True, slots=True)
class Check:
    """One distinct claim or operator, with all that is needed to run it."""

    what: What
    where: str
    count: int
    subgraph: Subgraph
    values: Mapping[str, Value]
    """Those that its operators read or produce."""
    tensors: Mapping[str, TensorInfo]
    vocabulary: int
    limits: Limits

    @property
    def claim(self) -> bool:
        """Whether a claimed region is checked, and no operator."""
        return isinstance(self.what, RegionSignature)

    @property
    def bound(self) -> float:
        """Largest error that is allowed. The backend has no say in it."""
        narrow = bool(self.subgraph.states) and self.limits.cache_type != "f32"
        return F16_CACHE_BOUND if narrow else BOUND

    def result(self, outcome: Outcome, error: float | None = None, detail: str = "") -> CheckResult:
        """A result of this check."""
        what = str(self.what)
        return CheckResult(
            what, self.claim, self.where, self.count, self.bound, outcome, error, detail
        )


def list_checks(
    graph: Graph,
    verdicts: Mapping[Signature, Verdict],
    claims: Mapping[RegionSignature, Verdict],
    found: Sequence[Region],
    limits: Limits,
) -> tuple[Check, ...]:
    """A check for every distinct operator that a device supports and every region it claims.

    `found` are the regions that its backend's patterns found, beside those of the graph. The first
    operator or region of a signature stands for all that share it. Claims come first, small ones
    before large ones.
    """
    regions: dict[RegionSignature, list[Region]] = {}
    for region in (*graph.all_regions, *found):
        kind = graph.region_signature(region)
        if claims.get(kind):
            regions.setdefault(kind, []).append(region)
    operators: dict[Signature, list[str]] = {}
    for op in graph.operators:
        if verdicts.get(graph.signature(op)):
            operators.setdefault(graph.signature(op), []).append(op.name)
    checks: list[Check] = []
    for claim, same in sorted(regions.items(), key=lambda item: len(item[1][0].operators)):
        first = same[0]
        subgraph = replace(graph.subgraph(first.operators), claim=first.kind)
        names = {region.operators for region in same}  # a pattern may find one of the tree
        checks.append(_check(graph, claim, first.name, len(names), subgraph, limits))
    for signature, sharing in operators.items():
        subgraph = graph.subgraph(sharing[:1])
        checks.append(_check(graph, signature, sharing[0], len(sharing), subgraph, limits))
    return tuple(checks)


def _check(
    graph: Graph, what: What, where: str, count: int, subgraph: Subgraph, limits: Limits
) -> Check:
    values = _values(subgraph)
    return Check(
        what=what,
        where=where,
        count=count,
        subgraph=subgraph,
        values={name: graph.values[name] for name in values},
        tensors={w.tensor: graph.tensors[w.tensor] for w in subgraph.weights},
        vocabulary=graph.dimensions.vocabulary,
        limits=limits,
    )


def _values(subgraph: Subgraph) -> Iterable[str]:
    return dict.fromkeys(name for op in subgraph.operators for name in (*op.inputs, *op.outputs))
