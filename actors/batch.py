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


def divide(rows: int, wanted: Sequence[int]) -> list[int]:
    """Shares of `rows`, none above what is wanted, and the least share as large as it can be.

    What cannot be divided evenly goes to those that come first.
    """
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], -index))
    for place, index in enumerate(order):
        shares[index] = min(wanted[index], rows // (len(order) - place))
        rows -= shares[index]
    return shares
