"""Which operators become one instruction: products with what follows them.

- `add` of a product and a residual stream: the sum is made as the product's results are stored;
- `swiglu` of two products of the same input: tiles of both are computed and gated together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from raygraft.graph.operators import Operator


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of a program computes."""

    kind: str
    """An operator's kind."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[Operator, ...]
    """One; or a product, and the one that it is gated with."""
    residual: str = ""
    """An input that is added to a product."""


def fuse(operators: Sequence[Operator], kept: Collection[str]) -> list[Work]:
    """The work of operators in their order; values in `kept` must be made."""
    uses = Counter(name for op in operators for name in op.inputs)
    products = {
        op.outputs[0]: op
        for op in operators
        if op.kind == "matmul" and uses[op.outputs[0]] == 1 and op.outputs[0] not in kept
    }
    fused = {work.outputs[0]: work for op in operators for work in _fused(op, products)}
    gone = {op.name for work in fused.values() for op in work.operators}
    work = []
    for op in operators:
        if op.outputs[0] in fused:
            work.append(fused[op.outputs[0]])
        elif op.name not in gone:
            work.append(Work(op.kind, op.inputs, op.outputs, (op,)))
    return work


def _fused(op: Operator, products: dict[str, Operator]) -> Iterator[Work]:
    if op.kind == "add":
        for product, other in (op.inputs, op.inputs[::-1]):
            if product in products and other != product:
                matmul = products[product]
                inputs = (*matmul.inputs, other)
                yield Work("matmul", inputs, op.outputs, (matmul,), residual=other)
                return
    elif op.kind == "swiglu" and all(name in products for name in op.inputs):
        gate, up = (products[name] for name in op.inputs)
        if gate is not up and gate.inputs == up.inputs and not _biased(gate) and not _biased(up):
            yield Work("matmul", gate.inputs, op.outputs, (gate, up))


def _biased(op: Operator) -> bool:
    return any(role == "bias" for role, _ in op.weights)
