"""Capability: what is asked of a device, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from raygraft.graph.operators import DEFAULT_CACHE_TYPE, AttributeValue, Signature


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds under which a question is asked: they hold for every step of a plan."""

    max_rows: int
    """Most rows (tokens) of one step."""
    context: int
    """Longest sequence, in tokens."""
    cache_type: str = DEFAULT_CACHE_TYPE
    """Element type of the KV cache."""
    max_sequences: int = 1
    """Most sequences in one step."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A device's answer; a no carries its reason."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)


def no(reason: str) -> Verdict:
    """A no, with the reason that a person will read."""
    return Verdict(False, reason)


NO_CLAIM = no("it claims no regions")
"""What a backend says that runs operator by operator: nothing about any region in particular."""


@dataclass(frozen=True, slots=True)
class RegionSignature:
    """What a device is asked to claim: a region's kind, and the signatures in it, in order.

    Regions of equal shape share it, as the blocks of a model do.
    """

    kind: str
    operators: tuple[Signature, ...]

    def of(self, kind: str) -> tuple[Signature, ...]:
        """The signatures of one kind of operator."""
        return tuple(signature for signature in self.operators if signature.kind == kind)

    def attribute(self, kind: str, name: str) -> AttributeValue | None:
        """An attribute of the first operator of a kind; None when there is none."""
        return next((dict(s.attributes).get(name) for s in self.of(kind)), None)

    @property
    def weight_types(self) -> frozenset[str]:
        """Types of the weights of its matrix products, such as "Q4_1"."""
        return frozenset(
            kind for s in self.of("matmul") for role, kind, _ in s.weights if role == "weight"
        )

    @property
    def head_size(self) -> int:
        """Width of one head of its attention; 0 when it has none."""
        for signature in self.of("attention"):
            return signature.shapes[0] // int(dict(signature.attributes)["heads"])
        return 0

    def __str__(self) -> str:
        return f"{self.kind} of {len(self.operators)} operators"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Kinds of operators that stand next to each other in the graph's order.

    Every convex run of them becomes a region of this kind, which the backend may claim.
    """

    kind: str
    operators: tuple[str, ...]
