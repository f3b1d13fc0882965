"""Running single operators and small subgraphs on a backend, with steps and weights made here."""

from collections.abc import Mapping, Sequence

import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES
from tiny_models import K_QUANTIZATIONS, random_k_blocks

from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator, Value
from raygraft.graph.step import Sampling, Step
from raygraft.graph.tensors import QuantizedTensor, WeightSlice


class Given:
    """Weights that a test makes (a `WeightSource`)."""

    def __init__(self, **weights: QuantizedTensor) -> None:
        self.weights = weights

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        return self.weights[weight.tensor]


def quantised(values: np.ndarray, kind: str) -> QuantizedTensor:
    """Weights of a type; of K-quants random ones of the same size."""
    form = GGMLQuantizationType[kind]
    if kind in K_QUANTIZATIONS:
        raw = random_k_blocks("w", form, values)
    else:
        raw = quants.quantize(values, form)
    return QuantizedTensor(kind, values.shape, raw.view(np.uint8).reshape(*values.shape[:-1], -1))


def block_of(kind: str) -> int:
    """Columns must be a multiple of it."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def step_of(
    positions: Sequence[Sequence[int]], tables: Sequence[Sequence[int]], wanted: object = None
) -> Step:
    """A step of sequences with these positions; every row is wanted unless `wanted` says which."""
    flat = np.array([p for own in positions for p in own], np.int32)
    owners = np.array([n for n, own in enumerate(positions) for _ in own], np.int32)
    rows = np.arange(len(flat), dtype=np.int32) if wanted is None else np.array(wanted, np.int32)
    return Step(flat % 7, flat, owners, np.array(tables, np.int32), rows, greedy(len(rows)))


def greedy(rows: int, logprobs: int = 0) -> Sampling:
    """Parameters that take the best token."""
    zeros, words = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    ints, empty = np.zeros(rows, np.int32), np.zeros(0, np.int32)
    starts = np.zeros(rows + 1, np.int32)
    return Sampling(
        zeros, zeros + 1, zeros, zeros + 1, zeros, zeros, ints, ints + logprobs, words, words,
        ints + 1, starts, empty, starts, empty, empty.astype(np.float32),
    )  # fmt: skip


def subgraph_of(
    operators: Sequence[Operator], widths: Mapping[str, int], logits: Sequence[str] = ()
) -> Subgraph:
    """A subgraph of operators; what none of them reads is an output."""
    made = [name for op in operators for name in op.outputs]
    read = [name for op in operators for name in op.inputs]
    values = {
        name: Value(name, width, rows="logits" if name in logits else "tokens")
        for name, width in widths.items()
    }
    inputs = tuple(dict.fromkeys(name for name in read if name not in made))
    return Subgraph(
        tuple(operators), inputs, tuple(name for name in made if name not in read), values
    )


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over norm of the right answer; NaN is never small."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
