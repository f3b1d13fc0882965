"""The CPU backend's class: capability, memory, packing weights."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numba
import numpy as np

from raygraft.graph.capability import YES, Limits, Verdict, no
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator, Signature
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.tensors import (
    KeyedSource,
    QuantizedTensor,
    WeightForm,
    WeightSlice,
    WeightSource,
)
from raygraft.kernels.base import Backend, BackendOptions, Description, Runner
from raygraft.kernels.cpu.assembly import Floats, Weight
from raygraft.kernels.cpu.described_steps import DescribedSteps
from raygraft.kernels.cpu.formats import FORMATS
from raygraft.kernels.cpu.lanes import has_feature
from raygraft.kernels.cpu.packed_cache import cached
from raygraft.kernels.cpu.packing import PackedWeight, pack, packed_bytes
from raygraft.kernels.cpu.products import format_functions
from raygraft.kernels.cpu.runner import CpuRunner, angles
from raygraft.kernels.cpu.team import Team
from raygraft.kernels.host import describe_host, processor_name
from raygraft.kernels.reference.backend import OPERATORS, READABLE
from raygraft.kernels.reference.cache import refused_cache

_NEEDED = dict.fromkeys(("x86_64", "amd64"), ("avx2", "fma", "f16c"))
"""What a processor must have: those of x86 since 2013, all 64-bit Arm ones."""


class CpuBackend(Backend):
    """Every operator, weights in their own quantisation, activations in float32."""

    loads_beside = True

    @classmethod
    def warm_up(cls) -> None:
        """See `Backend.warm_up`."""
        Team.prepare()

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        missing = [
            name for name in _NEEDED.get(platform.machine().lower(), ()) if not has_feature(name)
        ]
        if missing:
            raise ConfigurationError(
                f"{processor_name()} has no {', '.join(missing)}, which the cpu backend needs; "
                "use backend=reference there"
            )
        self._team = Team(options.threads)
        self._steps = DescribedSteps(options.threads)
        self._spare: dict[int, list[Floats]] = {}
        self._source: WeightSource | None = None
        self._loaded: dict[WeightSlice, Weight] = {}
        self._tables: dict[object, Floats] = {}

    def describe(self) -> Description:
        """The machine's processor and memory."""
        versions = (("numba", numba.__version__), ("numpy", np.__version__))
        return describe_host("cpu", self.options.threads, versions)

    def supports_op(self, signature: Signature, limits: Limits) -> Verdict:
        """Every operator of the vocabulary, with caches of float32, float16 or 8 bits."""
        if signature.kind not in OPERATORS:
            return no(f"it has no operator {signature.kind}")
        for role, kind, _ in signature.weights:
            if kind not in READABLE:
                return no(f"it cannot read the {role} of type {kind}")
        if signature.kind == "attention":
            return refused_cache(signature, limits.cache_type)
        return YES

    def weight_bytes(self, form: WeightForm) -> int:
        """As in the file for the formats that it packs; four bytes an element for others."""
        return packed_bytes(form)

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        """Pack the weights; a tied tensor is held once for all subgraphs."""
        self._team.prepare()
        if weights is not self._source:
            self._source, self._loaded, self._tables = weights, {}, {}
        for _, block in groupby(_slices(subgraph), _block_of):
            self._load_together([*block], weights)
        own = {op.name: self._weights_of(op) for op in subgraph.operators}
        tables = {op.name: self._table(op, own[op.name], limits) for op in _ropes(subgraph)}
        return CpuRunner(subgraph, own, tables, self._team, self._steps, limits, self._spare)

    def _table(self, op: Operator, weights: dict[str, Weight], limits: Limits) -> Floats:
        """The angles of a `rope`; those that turn alike share a table."""
        rotary = replace(RotaryEmbedding.from_attributes(op.attributes), heads=1)
        key = (rotary, op.weight("factors"), limits.context)
        if key not in self._tables:
            factors = weights.get("factors")
            assert factors is None or isinstance(factors, np.ndarray)
            self._tables[key] = angles(rotary, limits.context, factors)
        return self._tables[key]

    def _load_together(self, slices: Sequence[WeightSlice], weights: WeightSource) -> None:
        """Vectors as float32, matrices packed; what has a packing of its own is kept on disk."""
        keyed = weights if isinstance(weights, KeyedSource) else None
        kept: dict[WeightSlice, QuantizedTensor] = {}
        for weight in slices:
            if weight in self._loaded:
                continue
            raw = weights.read(weight)
            if len(raw.shape) == 1:  # copied: a few bytes of a mapped file would keep pages of it
                self._loaded[weight] = raw.dequantise().copy()
            elif keyed and raw.type in FORMATS:
                kept[weight] = raw
            else:
                self._loaded[weight] = pack(raw)
        if keyed and kept:
            packed = cached({keyed.key(weight): raw for weight, raw in kept.items()})
            self._loaded |= zip(kept, packed, strict=True)

    def _weights_of(self, op: Operator) -> dict[str, Weight]:
        found = {role: self._loaded[weight] for role, weight in op.weights}
        for own in found.values():
            if isinstance(own, PackedWeight):
                format_functions(own.format)  # compiled now, if they are not there
        return found


def _slices(subgraph: Subgraph) -> list[WeightSlice]:
    """The weights, in the order in which they are read."""
    return [*dict.fromkeys(weight for op in subgraph.operators for _, weight in op.weights)]


def _block_of(weight: WeightSlice) -> str:
    """What comes and goes together: `blk.3`, or a tensor outside of all blocks."""
    return ".".join(weight.tensor.split(".")[:2])


def _ropes(subgraph: Subgraph) -> list[Operator]:
    return [op for op in subgraph.operators if op.kind == "rope"]
