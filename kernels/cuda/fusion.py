"""Which operators of a subgraph run as one.

- Matrix products that read the same input and stand next to each other: one launch.
- A product and the residual addition that alone reads it.
- Two products and the gate that alone reads them.
- The rotations of queries and keys, the writes to the cache, and the attention over it.
- In steps of few rows, a residual addition and the norm of what it makes: the sum is kept times the
  norm's weights, and divided by its root mean square where products read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator

MOST_TOGETHER = 3


@dataclass(frozen=True, slots=True)
class Products:
    """Products of one input, in one launch. A residual is only added to a single one."""

    x: str
    operators: tuple[Operator, ...]
    outputs: tuple[str, ...]
    residual: str = ""
    normed: str = ""
    """What a norm makes of the sum, where that needs no launch in steps of few rows."""


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """silu(gate product) * up product."""

    x: str
    gate: Operator
    up: Operator
    output: str


@dataclass(frozen=True, slots=True)
class CachedAttention:
    """Rotations where they are given, the cache's writes, the attention."""

    q: str
    k: str
    v: str
    q_rope: Operator | None
    k_rope: Operator | None
    attention: Operator


@dataclass(frozen=True, slots=True)
class Single:
    """An operator by itself."""

    operator: Operator


@dataclass(frozen=True, slots=True)
class Prepare:
    """Bring a value into the form that quantised products read."""

    value: str


Fused = Products | GatedProduct | CachedAttention | Single | Prepare


def reads(fused: Fused) -> tuple[str, ...]:
    """Values that it reads."""
    match fused:
        case Products():
            return (fused.x, fused.residual) if fused.residual else (fused.x,)
        case GatedProduct():
            return (fused.x,)
        case CachedAttention():
            return (fused.q, fused.k, fused.v)
        case Single():
            return fused.operator.inputs
        case Prepare():
            return (fused.value,)


def writes(fused: Fused) -> tuple[str, ...]:
    """Values that it writes, but for what it leaves to a norm."""
    match fused:
        case Products():
            return fused.outputs
        case GatedProduct():
            return (fused.output,)
        case CachedAttention():
            return fused.attention.outputs
        case Single():
            return fused.operator.outputs
        case Prepare():
            return ()


@dataclass(frozen=True, slots=True)
class Normed:
    """What a norm makes, packed before it is divided by its root mean square."""

    norm: Operator
    previous: str
    """What a norm made of what was added to: its factor tells how large halves are to be."""

    @property
    def value(self) -> str:
        """What is normed."""
        return self.norm.inputs[0]


@dataclass(frozen=True, slots=True)
class Program:
    """What a subgraph runs, and in which forms its values are kept."""

    order: tuple[Fused, ...]
    packed: frozenset[str]
    """Values that quantised products read, in the form they want."""
    floats: frozenset[str]
    """Values that are needed in float32."""
    normed: Mapping[str, Normed] = field(default_factory=dict)
    """By what they make: norms that products take in, in steps of few rows."""


def compile_program(subgraph: Subgraph, kinds: Mapping[str, str]) -> Program:
    """Fuse a subgraph's operators. `kinds` says how the weight of each product is held; more than
    two kinds are never in one launch."""
    order: list[Fused] = []
    fused = _Fuser(subgraph, kinds).run()
    floats = set(subgraph.outputs)
    packed: set[str] = set()
    for one in fused:
        match one:
            case Products() if kinds[one.operators[0].name] == "F32":
                floats.update(reads(one))
            case Products() | GatedProduct():
                packed.add(one.x)
                if isinstance(one, Products) and one.residual:
                    floats.add(one.residual)
            case _:
                floats.update(reads(one))
    makers = {
        name
        for one in fused
        if isinstance(one, GatedProduct | CachedAttention)
        or (isinstance(one, Single) and one.operator.kind in ("rms_norm", "swiglu"))
        for name in writes(one)
    }
    ready = set(makers)
    for one in fused:
        if isinstance(one, Products | GatedProduct) and one.x in packed and one.x not in ready:
            order.append(Prepare(one.x))
            floats.add(one.x)
            ready.add(one.x)
        order.append(one)
    normed = _take_in_norms(order, packed - floats, kinds)
    sums = {own.value: name for name, own in normed.items()}
    for number, one in enumerate(order):
        if isinstance(one, Products) and one.outputs[0] in sums:
            order[number] = replace(one, normed=sums[one.outputs[0]])
    return Program(tuple(order), frozenset(packed), frozenset(floats), normed)


def _take_in_norms(
    order: Sequence[Fused], packed: Set[str], kinds: Mapping[str, str]
) -> dict[str, Normed]:
    """Norms of sums that need no launch: what they make is only `packed`.

    What is added to must have been normed before: that norm, or the products that took it in, leave
    its root mean square behind.
    """
    norms = {
        one.operator.inputs[0]: one.operator
        for one in order
        if isinstance(one, Single)
        and one.operator.kind == "rms_norm"
        and one.operator.outputs[0] in packed
    }
    found: dict[str, Normed] = {}
    known: dict[str, str] = {}  # values that have been normed: what was made of them
    for one in order:
        if isinstance(one, Products) and one.residual in known and one.outputs[0] in norms:
            norm = norms[one.outputs[0]]
            if kinds[one.operators[0].name] != "F32":
                found[norm.outputs[0]] = Normed(norm, known[one.residual])
        match one:
            case Single(Operator(kind="rms_norm") as op) if op.outputs[0] not in found:
                known[op.inputs[0]] = op.outputs[0]
            case Products(x=x) | GatedProduct(x=x) if x in found:
                known[found[x].value] = x
            case _:
                pass
    return found


class _Fuser:
    def __init__(self, subgraph: Subgraph, kinds: Mapping[str, str]) -> None:
        self._subgraph = subgraph
        self._kinds = kinds
        self._producer = {name: op for op in subgraph.operators for name in op.outputs}
        self._readers = Counter(name for op in subgraph.operators for name in op.inputs)
        self._readers.update(subgraph.outputs)

    def run(self) -> list[Fused]:
        found: dict[str, Fused] = {}  # by the operator at whose place it runs
        taken: set[str] = set()
        for op in self._subgraph.operators:
            fused = self._around(op)
            if fused is not None:
                found[op.name], inside = fused
                taken |= inside
        result: list[Fused] = []
        for op in self._subgraph.operators:
            if op.name in found:
                result.append(found[op.name])
            elif op.name in taken:
                continue
            elif op.kind == "matmul":
                self._join(result, op)
            else:
                result.append(Single(op))
        return result

    def _only_reader(self, value: str, kind: str) -> Operator | None:
        """The operator of a kind that produces a value which nobody else reads."""
        producer = self._producer.get(value)
        alone = producer is not None and producer.kind == kind and self._readers[value] == 1
        return producer if alone else None

    def _around(self, op: Operator) -> tuple[Fused, set[str]] | None:
        """What an operator becomes together with those before it, and their names."""
        if op.kind == "add":
            for own, other in (op.inputs[::-1], op.inputs):
                product = self._only_reader(own, "matmul")
                if product is not None and other != own:
                    fused = Products(product.inputs[0], (product,), op.outputs, other)
                    return fused, {product.name}
        if op.kind == "swiglu":
            gate, up = (self._only_reader(name, "matmul") for name in op.inputs)
            if gate is not None and up is not None and self._alike(gate, up):
                return GatedProduct(gate.inputs[0], gate, up, op.outputs[0]), {gate.name, up.name}
        if op.kind == "attention":
            q, k, v = op.inputs
            q_rope, k_rope = self._only_reader(q, "rope"), self._only_reader(k, "rope")
            fused_attention = CachedAttention(
                q_rope.inputs[0] if q_rope else q,
                k_rope.inputs[0] if k_rope else k,
                v, q_rope, k_rope, op,
            )  # fmt: skip
            return fused_attention, {rope.name for rope in (q_rope, k_rope) if rope}
        return None

    def _alike(self, gate: Operator, up: Operator) -> bool:
        kind = self._kinds[gate.name]
        widths = {self._subgraph.values[op.outputs[0]].width for op in (gate, up)}
        same = kind == self._kinds[up.name] and gate.inputs == up.inputs
        return same and kind != "F32" and len(widths) == 1 and gate.name != up.name

    def _join(self, result: list[Fused], op: Operator) -> None:
        """Add a product, to those just before it where they read the same."""
        last = result[-1] if result else None
        kind = self._kinds[op.name]
        if (
            isinstance(last, Products)
            and not last.residual
            and last.x == op.inputs[0]
            and len(last.operators) < MOST_TOGETHER
        ):
            kinds = {self._kinds[other.name] for other in last.operators} | {kind}
            if "F32" not in kinds and len(kinds) <= 2:
                operators, outputs = (*last.operators, op), (*last.outputs, *op.outputs)
                result[-1] = Products(last.x, operators, outputs)
                return
        result.append(Products(op.inputs[0], (op,), op.outputs))
