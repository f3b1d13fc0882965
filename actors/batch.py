"""What goes into a step: chunks of sequences, and how rows are divided among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygraft.actors.request import GeneratedSequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`rows` ids of a sequence, from position `start` on, that go into a step.

    The last `logits` of them need logits.
    """

    sequence: GeneratedSequence
    start: int
    rows: int
    logits: int
    drawn_in: int | None = None
    """Its only id is not known yet: the one that this row of the step before draws."""


def divide(rows: int, wanted: Sequence[int]) -> list[int]:
    """Shares of `rows`, none above what is wanted.

    Half of the rows are divided evenly, so that nobody waits for others. The rest goes to those
    that want least: they are done the sooner, and the others hardly later.
    """
    shares = [0] * len(wanted)
    even = rows - rows // 2
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], -index))
    for place, index in enumerate(order):
        shares[index] = min(wanted[index], even // (len(order) - place))
        even -= shares[index]
    left = rows - sum(shares)
    for index in sorted(order, key=lambda index: (wanted[index], index)):
        more = min(wanted[index] - shares[index], left)
        shares[index] += more
        left -= more
    return shares
