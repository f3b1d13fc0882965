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
class Expected:
    """What a step must give, and ids that are right as well."""

    outputs: Mapping[str, Array]
    also_right: Mapping[str, Sequence[Array]]
    """Ids that the reference samples when its logits are off by the bound: a tie may fall either
    way, and a draw may lie on an edge."""


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


def error_of(found: Array, expected: Array, also_right: Sequence[Array] = ()) -> float:
    """Of numbers the worst row's norm of the difference over the norm of the reference, of ids the
    share that is wrong. Both arrays are of the same shape and type."""
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        right = np.any([found == ids for ids in (expected, *also_right)], axis=0)
        return float(1 - np.mean(right))
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
