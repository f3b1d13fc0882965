"""How rows are sampled, as the GPU is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raygraft.graph.step import Sampling
from raygraft.kernels.base import Array


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step wants of sampling: where it differs, other kernels are launched."""

    best: int = 1
    """How many of the best tokens are looked for."""
    drawn: bool = False
    """Whether a row may take another token than its best."""

    @classmethod
    def of(cls, sampling: Sampling) -> Wanted:
        """By what its rows ask for."""
        adjusted = len(sampling.history) or len(sampling.bias_ids)
        drawn = bool(adjusted) or bool(np.any(sampling.temperature > 0))
        return cls(max(1, int(max(sampling.logprobs, default=0))), drawn)

    def size(self, rows: int) -> int:
        """Bytes of the results of so many rows."""
        return 8 * rows * (1 + self.best)


ROW: np.dtype[np.void] = np.dtype(
    {
        "names": [
            "seed", "stream", "temperature", "top_p", "min_p", "repeat_penalty",
            "presence_penalty", "frequency_penalty", "top_k", "position",
            "biased", "biases", "seen", "histories",
        ],
        "formats": ["i8"] * 2 + ["f4"] * 6 + ["i4"] * 6,
    }
)  # fmt: skip
"""How a row is sampled: `Row` of draw.cu."""
_PARAMETERS = (ROW.names or ())[:10]


def describe(sampling: Sampling) -> tuple[Array, Array]:
    """How rows are sampled, `[rows]` of `ROW`, and the lists that they point into, int32."""
    rows = np.zeros(sampling.rows, ROW)
    for name in _PARAMETERS:
        rows[name] = getattr(sampling, name)
    lists: list[Array] = []
    length = 0
    for row in range(sampling.rows) if len(sampling.bias_ids) or len(sampling.history) else ():
        own = slice(*sampling.bias_start[row : row + 2])
        biases = (sampling.bias_ids[own], sampling.bias_values[own].view(np.int32))
        start, stop = sampling.history_start[row : row + 2]
        seen = np.unique(sampling.history[start:stop], return_counts=True)
        for number, place, pair in (("biased", "biases", biases), ("seen", "histories", seen)):
            rows[row][number], rows[row][place] = len(pair[0]), length
            lists += pair
            length += 2 * len(pair[0])
    return rows, np.concatenate(lists).astype(np.int32) if lists else np.zeros(0, np.int32)
