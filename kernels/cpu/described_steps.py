"""Steps as compiled programs see them: rows of 64-bit numbers, many of them addresses."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.step import Sampling, Step
from raygraft.kernels.base import Array
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.picking import PART_BYTES

_REMEMBERED = 8
_LONGEST_RUN = 16
"""Rows of a sequence that one thread attends with at a time."""


@dataclass(frozen=True, slots=True)
class Described:
    """A step as programs see it, or several that follow each other."""

    step: Step
    words: NDArray[np.int64]
    arrays: Sequence[Array]
    """What the words point to."""
    samples: Sequence[Array]
    """Of each step and row of logits: the token that is drawn, its log probability, the best ones
    and theirs, `[steps, rows, ...]`."""

    def sampled(self, number: int) -> tuple[Array, ...]:
        """What `sample` yields in one of the steps."""
        return tuple(array[number] for array in self.samples)


class DescribedSteps:
    """The numbers and addresses that describe steps to programs, made once for all stages."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._latest: deque[Described] = deque(maxlen=_REMEMBERED)
        self.sampled = False
        """Whether a program samples."""

    def describe(self, step: Step, steps: int = 1, *, in_one_run: bool = False) -> Described:
        """The description; what it points to lives until so many more are made.

        With several steps it is of use once: they change it. They are computed `in_one_run`, or
        somebody calls `go_on` between them.
        """
        for known in self._latest:
            if known.step is step:
                return known
        names = ("positions", "sequence", "block_tables", "logit_rows", "tokens")
        arrays: list[Array] = [
            np.ascontiguousarray(getattr(step, name), np.int32) for name in names
        ]
        if steps > 1:
            arrays = [array.copy() for array in arrays]
        runs = _runs(arrays[0], arrays[1])
        few = len(runs) == step.rows <= at.FEW_ROWS
        positions, sequence, tables, wanted, tokens = (array.ctypes.data for array in arrays)
        words = np.zeros(at.STEP_WORDS, np.int64)
        words[:12] = (
            step.rows, positions, sequence, tables, arrays[2].shape[1], wanted, len(arrays[3]),
            tokens, runs.ctypes.data, len(runs), few, steps if in_one_run else 1,
        )  # fmt: skip
        samples: list[Array] = []
        if self.sampled:
            rows, most = len(arrays[3]), int(max(step.sampling.logprobs, default=0))
            parts = np.empty(self._threads * rows * PART_BYTES, np.uint8)
            described = _describe_sampling(step.sampling)
            samples = [
                np.empty((steps, rows, 1), np.int32),
                np.empty((steps, rows, 1), np.float32),
                np.full((steps, rows, most), -1, np.int32),
                np.full((steps, rows, most), -np.inf, np.float32),
            ]
            addresses = [array.ctypes.data for array in (described[0], parts, *samples)]
            words[12:] = *addresses, most
            arrays += [*described, parts]
        found = Described(step, words, [*arrays, runs], samples)
        self._latest.append(found)
        return found


def _runs(positions: NDArray[np.int32], sequence: NDArray[np.int32]) -> NDArray[np.int32]:
    """Runs of neighbouring rows of one sequence: first row and count, `[runs, 2]`."""
    rows = len(positions)
    if rows == 1:
        return np.array([[0, 1]], np.int32)
    begins = np.ones(rows, bool)
    begins[1:] = (np.diff(sequence) != 0) | (np.diff(positions) != 1)
    first = np.flatnonzero(begins)
    starts = np.concatenate(
        [np.arange(a, b, _LONGEST_RUN) for a, b in zip(first, [*first[1:], rows], strict=True)]
    )
    ends = np.append(starts[1:], rows)
    return np.stack([starts, ends - starts], axis=1).astype(np.int32)


def _describe_sampling(sampling: Sampling) -> list[Array]:
    """How each row is sampled, `[rows, SAMPLING_FIELDS]`; then what its addresses point to."""
    words = np.zeros((sampling.rows, at.SAMPLING_FIELDS), np.int64)
    numbers = words.view(np.float64)
    for place, values in (
        (at.TEMPERATURE, sampling.temperature),
        (at.TOP_P, sampling.top_p),
        (at.MIN_P, sampling.min_p),
        (at.REPEAT_PENALTY, sampling.repeat_penalty),
        (at.PRESENCE_PENALTY, sampling.presence_penalty),
        (at.FREQUENCY_PENALTY, sampling.frequency_penalty),
    ):
        numbers[:, place // 8] = values
    for place, whole in (
        (at.TOP_K, sampling.top_k),
        (at.LOGPROBS, sampling.logprobs),
        (at.SEED, sampling.seed),
        (at.STREAM, sampling.stream),
        (at.POSITION, sampling.position),
    ):
        words[:, place // 8] = whole
    kept: list[Array] = [words]
    if len(sampling.bias_ids):
        ids = np.ascontiguousarray(sampling.bias_ids, np.int32)
        values = np.ascontiguousarray(sampling.bias_values, np.float32)
        starts = sampling.bias_start[:-1].astype(np.int64)
        words[:, at.BIASED // 8] = np.diff(sampling.bias_start)
        words[:, at.BIAS_IDS // 8] = ids.ctypes.data + 4 * starts
        words[:, at.BIAS_VALUES // 8] = values.ctypes.data + 4 * starts
        kept += [ids, values]
    if len(sampling.history):
        for row, (start, stop) in enumerate(pairwise(sampling.history_start.tolist())):
            seen, counts = np.unique(sampling.history[start:stop], return_counts=True)
            own = [np.ascontiguousarray(array, np.int32) for array in (seen, counts)]
            words[row, at.SEEN // 8 :] = len(seen), *(array.ctypes.data for array in own)
            kept += own
    return kept
