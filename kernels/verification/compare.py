"""How far outputs are from the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Value
from raygraft.kernels.base import Array

FLOOR = 0.1
"""Rows smaller than this share of the average row are measured against that share: a value that
happens to be near zero is no error."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is right of an output that `sample` produces, beside the reference's own answer.

    A tie may fall either way, and a draw may lie on the edge between two tokens. So ids are right
    as well when the reference samples them from logits that are off by the bound, or when their
    log probabilities are as close as that; log probabilities belong to the ids that came with them.
    """

    ids: str
    """The output that holds the ids."""
    logprobs: NDArray[np.float32]
    """`[rows, vocabulary]` by the reference."""
    tolerance: NDArray[np.float32]
    """`[rows, 1]`: how close two log probabilities must be."""
    also_right: Sequence[Array]
    """Ids that were sampled from such logits."""

    def share_wrong(self, found: Array, expected: Array) -> float:
        """Share of wrong ids."""
        if not expected.size:
            return 0.0
        with np.errstate(invalid="ignore"):
            distance = np.abs(self.of(found) - self.of(expected))
        near = (found >= 0) & (expected >= 0) & (distance <= self.tolerance)
        same = np.any([found == ids for ids in (expected, *self.also_right)], axis=0)
        return float(1 - np.mean(same | near))

    def of(self, ids: Array) -> NDArray[np.float32]:
        """The reference's log probabilities of ids; -1 stands for none."""
        known = np.clip(ids, 0, self.logprobs.shape[1] - 1)
        found = np.take_along_axis(self.logprobs, known.astype(np.intp), axis=1)
        return np.where(ids == known, found, np.float32(-np.inf))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a step must give."""

    outputs: Mapping[str, Array]
    sampled: Mapping[str, Sampled]
    """Of the outputs that `sample` produces."""

    def error(self, name: str, found: Mapping[str, Array]) -> float:
        """The error of an output of the right form; those that stand before it are so as well."""
        sampled = self.sampled.get(name)
        if sampled is None:
            return error_of(found[name], self.outputs[name])
        if found[name].dtype.kind == "f":
            return error_of(found[name], sampled.of(found[sampled.ids]))
        return sampled.share_wrong(found[name], self.outputs[name])


def complaint(name: str, found: object, expected: Array, value: Value) -> str:
    """What is wrong with the form of an output, or with the numbers in it; empty when all is well.

    `found` is what the device returned under this name.
    """
    if not isinstance(found, np.ndarray):
        return f"output {name} is of type {type(found).__name__}, expected an array"
    if found.shape != expected.shape:
        return f"output {name} has the shape {found.shape}, expected {expected.shape}"
    if found.dtype != np.dtype(value.dtype):
        return f"output {name} is {found.dtype}, expected {value.dtype}"
    if found.dtype.kind != "f":
        return ""
    kind = "NaN" if np.isnan(found).any() else "infinity"
    wrong = int(np.sum(~np.isfinite(found) & (found != expected)))
    return f"output {name} has {kind} in {wrong} of {found.size} elements" if wrong else ""


def error_of(found: Array, expected: Array) -> float:
    """Of numbers the worst row's norm of the difference over the norm of the reference, of whole
    numbers the share that is wrong. Both arrays are of the same shape and type."""
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return float(np.mean(found != expected))
    with np.errstate(invalid="ignore"):  # infinities are right where the reference has them
        difference = np.where(found == expected, 0, found.astype(np.float64) - expected)
    sizes = _norms(np.where(np.isfinite(expected), expected, 0))
    floor = FLOOR * np.sqrt(np.mean(np.square(sizes)))
    return float(np.max(_norms(difference) / np.maximum(np.maximum(sizes, floor), 1e-30)))


def _norms(x: Array) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = np.linalg.norm(x.astype(np.float64), axis=-1)
    return rows


def missing_outputs(found: object, subgraph: Subgraph) -> str:
    """What is wrong with a result as a whole; empty when it holds all outputs."""
    if not isinstance(found, Mapping):
        return f"it returned a {type(found).__name__}, expected outputs by name"
    missing = [name for name in subgraph.outputs if name not in found]
    return f"output {', '.join(missing)} is missing" if missing else ""
