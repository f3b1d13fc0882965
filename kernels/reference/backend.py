"""The reference backend's class: capability, memory, and a runner that walks the operators."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from gguf import quants
from threadpoolctl import threadpool_limits

from raygraft.graph.capability import YES, Limits, Verdict, no
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator, Signature
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Step
from raygraft.graph.tensors import WeightForm, WeightSlice, WeightSource
from raygraft.kernels.base import Array, Backend, BackendOptions, Description, Runner, Values
from raygraft.kernels.host import describe_host
from raygraft.kernels.reference import operators, sampling
from raygraft.kernels.reference.cache import PagedCache, refused_cache

OPERATORS = (
    "get_rows",
    "rms_norm",
    "matmul",
    "rope",
    "attention",
    "add",
    "swiglu",
    "select_rows",
    "sample",
)
READABLE = {"F32", "F16", *(kind.name for kind in quants._type_traits)}
"""Weight types that the `gguf` package dequantises."""


class ReferenceBackend(Backend):
    """Every operator, for every weight type, in float32."""

    loads_beside = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._source: WeightSource | None = None
        self._loaded: dict[WeightSlice, Array] = {}

    def describe(self) -> Description:
        """The machine's processor and memory."""
        return describe_host("reference", self.options.threads, (("numpy", np.__version__),))

    def supports_op(self, signature: Signature, limits: Limits) -> Verdict:
        """Every operator of the vocabulary, on every weight type that can be dequantised."""
        if signature.kind not in OPERATORS:
            return no(f"it has no operator {signature.kind}")
        for role, kind, _ in signature.weights:
            if kind not in READABLE:
                return no(f"it cannot read the {role} of type {kind}")
        if signature.kind == "attention":
            return refused_cache(signature, limits.cache_type)
        return YES

    def weight_bytes(self, form: WeightForm) -> int:
        """Four bytes per element: weights are held in float32."""
        return prod(form[1]) * 4

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        """Dequantise the weights; a tied tensor is held once for all subgraphs."""
        _limit_threads(self.options.threads)
        if weights is not self._source:
            self._source, self._loaded = weights, {}
        for weight in subgraph.weights:
            if weight not in self._loaded:
                self._loaded[weight] = weights.read(weight).dequantise()
        own = {weight: self._loaded[weight] for weight in subgraph.weights}
        return ReferenceRunner(subgraph, own, limits.cache_type)


_LIMITED: list[int] = []


def _limit_threads(threads: int) -> None:
    """For the whole process. BLAS may hang when this is set anew while another thread computes."""
    if _LIMITED[-1:] != [threads]:
        threadpool_limits(threads, user_api="blas")
        _LIMITED.append(threads)


class ReferenceRunner(Runner):
    """Walks the operators of a subgraph in order."""

    def __init__(
        self, subgraph: Subgraph, weights: dict[WeightSlice, Array], cache_type: str
    ) -> None:
        self._subgraph = subgraph
        self._weights = weights
        self._cache_type = cache_type
        self._caches: dict[str, PagedCache] = {}

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """One paged cache for each attention operator."""
        self._caches = {
            op.name: PagedCache(op.state, blocks, block_size, self._cache_type)
            for op in self._subgraph.operators
            if op.state is not None
        }

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...]:
        """Keys and values."""
        cache = self._caches[name]
        return cache.keys[pages], cache.values[pages]

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """See `Runner.import_state`."""
        cache = self._caches[name]
        cache.keys[pages], cache.values[pages] = content

    def hand_on_state(self, name: str) -> PagedCache:
        """See `Runner.hand_on_state`."""
        return self._caches[name]

    def take_state(self, name: str, state: object) -> bool:
        """See `Runner.take_state`."""
        if not isinstance(state, PagedCache) or not state.like(self._caches[name]):
            return False
        self._caches[name] = state
        return True

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step, operator by operator."""
        values = dict(inputs)
        for operator in self._subgraph.operators:
            arguments = [values[name] for name in operator.inputs]
            results = self._apply(operator, step, arguments)
            values.update(zip(operator.outputs, results, strict=True))
        return {name: values[name] for name in self._subgraph.outputs}

    def _apply(self, operator: Operator, step: Step, inputs: list[Array]) -> tuple[Array, ...]:
        x = inputs
        attributes: dict[str, Any] = dict(operator.attributes)
        w = {role: self._weights[weight] for role, weight in operator.weights}
        match operator.kind:
            case "get_rows":
                result = w["weight"][step.tokens]
            case "rms_norm":
                result = operators.rms_norm(x[0], w["weight"], attributes["epsilon"])
            case "matmul":
                result = operators.matmul(x[0], w["weight"], w.get("bias"))
            case "rope":
                rotary = RotaryEmbedding.from_attributes(operator.attributes)
                result = operators.rope(x[0], step.positions, rotary, w.get("factors"))
            case "attention":
                result = operators.attention(
                    *x,
                    step=step,
                    cache=self._caches[operator.name],
                    heads=attributes["heads"],
                    scale=attributes["scale"],
                )
            case "add":
                result = x[0] + x[1]
            case "swiglu":
                result = operators.swiglu(x[0], x[1])
            case "select_rows":
                result = x[0][step.logit_rows]
            case "sample":
                return sampling.sample(x[0], step.sampling)
            case kind:
                raise NotImplementedError(f"operator {kind}")
        return (result,)
