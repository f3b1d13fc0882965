"""Operators: the nodes of a graph, and what decides whether a backend can run one.

Rows are tokens; every value is a matrix `[rows, width]`. The kinds, their inputs and their weights:

| kind          | inputs   | weights       | attributes              | output                    |
|---------------|----------|---------------|-------------------------|---------------------------|
| `get_rows`    |          | weight        |                         | rows of the step's ids    |
| `rms_norm`    | x        | weight        | epsilon                 | x / rms(x) * weight       |
| `matmul`      | x        | weight, bias? |                         | x @ weight.T + bias       |
| `rope`        | x        | factors?      | see `RotaryEmbedding`   | x, rotated by position    |
| `attention`   | q, k, v  |               | heads, kv_heads, scale  | softmax(q k.T) v, causal  |
| `add`         | a, b     |               |                         | a + b                     |
| `swiglu`      | gate, up |               |                         | silu(gate) * up           |
| `select_rows` | x        |               |                         | rows whose logits count   |
| `sample`      | logits   |               |                         | ids and log probabilities |

`get_rows` and `rope` read tokens and positions from the step, which every device receives.
`attention` first writes k and v to its `KeyValueState`, then attends over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from raygraft.graph.tensors import Shape, TensorInfo, WeightSlice

AttributeValue = int | float | str
Attributes = tuple[tuple[str, AttributeValue], ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What an operator produces: `[rows, width]` of a NumPy dtype name.

    `rows` is "tokens" for one row per token of the step, "logits" for one per sampled row.
    `width` is the most columns there can be; log probabilities may have fewer.
    """

    name: str
    width: int
    dtype: str = "float32"
    rows: str = "tokens"

    @property
    def row_bytes(self) -> int:
        return self.width * {"float32": 4, "float16": 2, "int32": 4}[self.dtype]


@dataclass(frozen=True, slots=True)
class KeyValueState:
    """The paged KV cache of one attention operator."""

    name: str
    kv_heads: int
    key_size: int
    value_size: int

    def token_bytes(self, cache_type: str) -> int:
        """Bytes that one token takes, with elements of a type of `CACHE_TYPES`."""
        elements = self.kv_heads * (self.key_size + self.value_size)
        return math.ceil(elements * CACHE_TYPES[cache_type])


CacheType = Literal["f32", "f16", "q8_0"]
DEFAULT_CACHE_TYPE: CacheType = "f32"
CACHE_TYPES: Mapping[str, float] = MappingProxyType({"f32": 4, "f16": 2, "q8_0": 34 / 32})
"""Element types of a KV cache, and their bytes. "q8_0" shares a scale among 32, as in weights."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One node. `inputs` and `outputs` are names of values; weights have roles ("weight")."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[tuple[str, WeightSlice], ...] = ()
    attributes: Attributes = ()
    state: KeyValueState | None = None

    def weight(self, role: str) -> WeightSlice | None:
        """The weight of a role, or None."""
        return dict(self.weights).get(role)


@dataclass(frozen=True, slots=True)
class Signature:
    """All that decides whether a backend can run an operator, and nothing else.

    `shapes` are the widths of inputs and outputs, `weights` the role, type and shape of each.
    Layers of equal shape share their signatures, so a model has few.
    """

    kind: str
    shapes: tuple[int, ...]
    weights: tuple[tuple[str, str, Shape], ...] = ()
    attributes: Attributes = ()

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shapes))]
        parts += [
            f"{role} {kind} {'x'.join(map(str, shape))}" for role, kind, shape in self.weights
        ]
        parts += [f"{name}={value}" for name, value in self.attributes]
        return f"{self.kind}({', '.join(parts)})"


def signature_of(
    operator: Operator, values: Mapping[str, Value], tensors: Mapping[str, TensorInfo]
) -> Signature:
    """The signature of an operator of a graph with these values and tensors."""
    names = (*operator.inputs, *operator.outputs)
    weights = tuple(
        (role, tensors[weight.tensor].type, weight.shape(tensors[weight.tensor]))
        for role, weight in operator.weights
    )
    shapes = tuple(values[name].width for name in names)
    return Signature(operator.kind, shapes, weights, operator.attributes)
