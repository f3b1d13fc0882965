"""How often two sides pick the same best token after the same prefixes."""

from collections.abc import Iterable
from typing import NamedTuple

Distribution = dict[int, float]
"""Token id to natural log probability over the whole vocabulary, the ten best."""


class Agreement(NamedTuple):
    """Counts over positions; `differing` says (sequence, position, peer's best, our best)."""

    positions: int
    ties: int
    differing: list[tuple[int, int, int, int]]

    @property
    def share(self) -> float:
        """The part of the positions, ties left out, in which both pick the same token."""
        return 1 - len(self.differing) / (self.positions - self.ties)


def best(distribution: Distribution) -> int:
    """The most probable token; the order of the entries does not matter."""
    return max(distribution, key=distribution.__getitem__)


def margin(distribution: Distribution) -> float:
    """How far the best log probability lies above the second."""
    first, second, *_ = sorted(distribution.values(), reverse=True)
    return first - second


def agreement(
    peer: Iterable[list[Distribution]], ours: Iterable[list[Distribution]], *, tie: float = 0.0
) -> Agreement:
    """Compares position by position. Where the peer's two best are closer than `tie`: skipped.

    Raises ValueError where the sides have different numbers of positions.
    """
    positions = ties = 0
    differing = []
    for sequence, (theirs, mine) in enumerate(zip(peer, ours, strict=True)):
        for position, (expected, actual) in enumerate(zip(theirs, mine, strict=True)):
            positions += 1
            if margin(expected) < tie:
                ties += 1
            elif best(expected) != best(actual):
                differing.append((sequence, position, best(expected), best(actual)))
    return Agreement(positions, ties, differing)
