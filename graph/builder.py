"""What an architecture's file writes its graph with: regions as blocks, operators as calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from raygraft.graph.errors import ModelFileError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Dimensions, Graph, Region
from raygraft.graph.operators import Attributes, KeyValueState, Operator, Value
from raygraft.graph.tensors import Shape, WeightSlice

MAX_LOGPROBS = 20
"""Most log probabilities that a sampled token can be reported with."""


@dataclass
class _OpenRegion:
    name: str
    kind: str
    parent: str | None
    children: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)


class GraphBuilder:
    """Collects operators in topological order, under the region that is open.

    Value names are the names of the operators that produce them.
    """

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self._operators: list[Operator] = []
        self._values: dict[str, Value] = {}
        self._regions: dict[str, _OpenRegion] = {"model": _OpenRegion("model", "model", None)}
        self._path: list[_OpenRegion] = [self._regions["model"]]

    @contextmanager
    def region(self, name: str, kind: str) -> Iterator[None]:
        """Open a region below the open one; its full name is the parent's, a dot, and `name`."""
        parent = self._path[-1]
        full = name if parent.parent is None else f"{parent.name}.{name}"
        opened = _OpenRegion(full, kind, parent.name)
        parent.children.append(full)
        self._regions[full] = opened
        self._path.append(opened)
        yield
        self._path.pop()

    def width(self, value: str) -> int:
        """Columns of a value."""
        return self._values[value].width

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return tensor in self.model.tensors

    def weight(self, tensor: str, shape: Shape) -> WeightSlice:
        """A whole tensor, checked against the shape that the architecture expects."""
        info = self.model.tensors.get(tensor)
        if info is None:
            raise ModelFileError(f"{self.model.path}: the tensor {tensor} is missing")
        if info.shape != shape:
            raise ModelFileError(
                f"{self.model.path}: the tensor {tensor} has the shape {info.shape}, "
                f"expected is {shape}"
            )
        return WeightSlice(tensor, stop=shape[0])

    def operator(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        outputs: tuple[Value, ...],
        *,
        weights: dict[str, WeightSlice] | None = None,
        attributes: Attributes = (),
        state: KeyValueState | None = None,
    ) -> None:
        """Add an operator to the open region."""
        self._values.update((value.name, value) for value in outputs)
        names = tuple(value.name for value in outputs)
        roles = tuple((weights or {}).items())
        self._operators.append(Operator(name, kind, inputs, names, roles, attributes, state))
        for region in self._path:
            region.operators.append(name)

    def _simple(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        width: int,
        *,
        weights: dict[str, WeightSlice] | None = None,
        attributes: Attributes = (),
        state: KeyValueState | None = None,
        rows: str | None = None,
    ) -> str:
        full = f"{self._path[-1].name}.{name}"
        rows = rows or (self._values[inputs[0]].rows if inputs else "tokens")
        self.operator(
            kind,
            full,
            inputs,
            (Value(full, width, rows=rows),),
            weights=weights,
            attributes=attributes,
            state=state,
        )
        return full

    def get_rows(self, name: str, tensor: str, rows: int, width: int) -> str:
        """Embeddings of the step's token ids."""
        weight = self.weight(tensor, (rows, width))
        return self._simple("get_rows", name, (), width, weights={"weight": weight})

    def rms_norm(self, name: str, x: str, tensor: str, epsilon: float) -> str:
        """Root mean square norm (https://arxiv.org/abs/1910.07467)."""
        weight = self.weight(tensor, (self.width(x),))
        attributes = (("epsilon", epsilon),)
        return self._simple(
            "rms_norm", name, (x,), self.width(x), weights={"weight": weight}, attributes=attributes
        )

    def matmul(self, name: str, x: str, stem: str, width: int) -> str:
        """A linear map to `width` columns by `stem.weight`, and `stem.bias` where there is one."""
        weights = {"weight": self.weight(f"{stem}.weight", (width, self.width(x)))}
        if self.has(f"{stem}.bias"):
            weights["bias"] = self.weight(f"{stem}.bias", (width,))
        return self._simple("matmul", name, (x,), width, weights=weights)

    def rope(
        self, name: str, x: str, attributes: Attributes, factors: WeightSlice | None = None
    ) -> str:
        """Rotary position embedding of each head."""
        weights = {} if factors is None else {"factors": factors}
        return self._simple(
            "rope", name, (x,), self.width(x), weights=weights, attributes=attributes
        )

    def attention(
        self, name: str, q: str, k: str, v: str, state: KeyValueState, heads: int, scale: float
    ) -> str:
        """Causal grouped-query attention over a paged cache (https://arxiv.org/abs/2305.13245)."""
        attributes = (("heads", heads), ("kv_heads", state.kv_heads), ("scale", scale))
        width = heads * state.value_size
        return self._simple("attention", name, (q, k, v), width, attributes=attributes, state=state)

    def add(self, name: str, a: str, b: str) -> str:
        """The residual addition."""
        return self._simple("add", name, (a, b), self.width(a))

    def swiglu(self, name: str, gate: str, up: str) -> str:
        """Gated activation (https://arxiv.org/abs/2002.05202)."""
        return self._simple("swiglu", name, (gate, up), self.width(gate))

    def select_rows(self, name: str, x: str) -> str:
        """Only the rows whose logits are wanted."""
        return self._simple("select_rows", name, (x,), self.width(x), rows="logits")

    def sample(self, logits: str) -> tuple[str, ...]:
        """Token ids and log probabilities; the names of the four values."""
        prefix = self._path[-1].name
        outputs = (
            Value(f"{prefix}.id", 1, "int32", "logits"),
            Value(f"{prefix}.logprob", 1, "float32", "logits"),
            Value(f"{prefix}.top_ids", MAX_LOGPROBS, "int32", "logits"),
            Value(f"{prefix}.top_logprobs", MAX_LOGPROBS, "float32", "logits"),
        )
        self.operator("sample", f"{prefix}.sample", (logits,), outputs)
        return tuple(value.name for value in outputs)

    def build(self, dimensions: Dimensions, results: tuple[str, ...]) -> Graph:
        """The finished graph. `results` are the values that leave it."""
        regions = {
            name: Region(r.name, r.kind, r.parent, tuple(r.children), tuple(r.operators))
            for name, r in self._regions.items()
        }
        architecture = self.model.get("general.architecture", str)
        return Graph(
            architecture,
            dimensions,
            tuple(self._operators),
            self._values,
            regions,
            self.model.tensors,
            results,
        )
