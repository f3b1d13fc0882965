"""The CUDA backend's class: capability, memory, loading weights."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from raygraft.graph.capability import YES, Limits, Verdict, no
from raygraft.graph.errors import LinkError
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import CACHE_TYPES, Operator, Signature
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.tensors import WeightForm, WeightSlice, WeightSource
from raygraft.kernels.base import Backend, BackendOptions, Description, Runner
from raygraft.kernels.cuda.attention import LARGEST_HEAD
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.nccl import NcclRing, OpenedNccl, available, join_nccl, open_nccl
from raygraft.kernels.cuda.rings import CudaRing, OpenedRing, join_ring, open_ring
from raygraft.kernels.cuda.runner import CudaRunner
from raygraft.kernels.cuda.sampling import LARGEST_VOCABULARY
from raygraft.kernels.cuda.shared import Shared
from raygraft.kernels.cuda.unit import CudaUnit
from raygraft.kernels.cuda.weights import (
    Floats,
    Weight,
    angles,
    load_weight,
    loaded_bytes,
    readable,
)

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


class CudaBackend(Backend):
    """One NVIDIA GPU: weights in their own quantisation, sums in float32."""

    def __init__(self, options: BackendOptions) -> None:
        """Raises ConfigurationError when there is no CuPy, or no such GPU that can be used.

        Backends of one actor on one GPU share its stream, their buffers and the step.
        """
        super().__init__(options)
        number = options.gpu
        self.shared = options.commons.get(("cuda", number), lambda: Shared(Gpu(number)))
        self._gpu = self.shared.gpu
        self._source: WeightSource | None = None
        self._loaded: dict[WeightSlice, Weight] = {}
        self._tables: dict[object, Any] = {}

    def describe(self) -> Description:
        """The GPU, its memory, its compute capability."""
        total, free = self._gpu.memory()
        runtime = self._gpu.cupy.cuda.runtime
        versions = (
            ("cupy", str(self._gpu.cupy.__version__)),
            ("cuda", _version(runtime.runtimeGetVersion())),
            ("driver", _version(runtime.driverGetVersion())),
            ("compute capability", "{}.{}".format(*self._gpu.capability)),
        )
        return Description(
            backend="cuda",
            type="gpu",
            hardware=self._gpu.name,
            memory_total=total,
            memory_free=free,
            threads=self.options.threads,
            versions=versions,
            link="cuda_ipc",
            far_link="nccl" if available() else "",
        )

    def supports_op(self, signature: Signature, limits: Limits) -> Verdict:
        """Every operator of the vocabulary, for the formats that its kernels read."""
        if signature.kind not in OPERATORS:
            return no(f"it has no operator {signature.kind}")
        for role, kind, shape in signature.weights:
            if not readable(kind, len(shape)):
                return no(f"it cannot read the {role} of type {kind}")
        if signature.kind == "attention":
            return _attention_verdict(signature, limits)
        if signature.kind == "sample" and signature.shapes[0] > LARGEST_VOCABULARY:
            return no(f"it samples from at most {LARGEST_VOCABULARY} tokens")
        return YES

    def weight_bytes(self, form: WeightForm) -> int:
        """As in the file, with rows and columns filled up to whole tiles."""
        return loaded_bytes(form)

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        """Copy the weights to the GPU; a tied tensor is held once for all subgraphs.

        Raises CapacityError, with what was needed and what was free.
        """
        if weights is not self._source:
            self._source, self._loaded, self._tables = weights, {}, {}
        with self._gpu.active():
            own = {op.name: self._weights_of(op, weights) for op in subgraph.operators}
            ropes = [op for op in subgraph.operators if op.kind == "rope"]
            tables = {op.name: self._table(op, own[op.name], limits) for op in ropes}
            self._gpu.stream.synchronize()
            self._gpu.cupy.get_default_memory_pool().free_all_blocks()
        return CudaRunner(self.shared, [CudaUnit(self.shared, subgraph, own, tables, limits)])

    def open_ring(
        self, slots: int, slot_bytes: int, link: str
    ) -> tuple[CudaRing | NcclRing, OpenedRing | OpenedNccl]:
        """See `Backend.open_ring`: "cuda_ipc", "cuda_host" or "nccl"."""
        if link == "nccl":
            with self._gpu.active():
                return open_nccl(self.shared)
        return open_ring(self.shared, slots, slot_bytes, through_host=link == "cuda_host")

    def join_ring(self, opened: OpenedRing | OpenedNccl) -> CudaRing | NcclRing:
        """See `Backend.join_ring`."""
        if isinstance(opened, OpenedNccl):
            return join_nccl(self.shared, opened)
        if opened.process == os.getpid():  # what one thread asks of CUDA may wait for the other
            raise LinkError("GPUs write to each other's memory only between processes")
        return join_ring(self.shared, opened)

    def interrupt(self, wanted: bool) -> None:
        """See `Backend.interrupt`."""
        self.shared.stop[0] = int(wanted)
        for link in [*self.shared.far_links] if wanted else ():
            link.abort()

    def _weights_of(self, op: Operator, weights: WeightSource) -> dict[str, Weight]:
        found: dict[str, Weight] = {}
        for role, weight in op.weights:
            if weight not in self._loaded:
                self._loaded[weight] = load_weight(self._gpu, weight.tensor, weights.read(weight))
            found[role] = self._loaded[weight]
        return found

    def _table(self, op: Operator, weights: dict[str, Weight], limits: Limits) -> Any:
        """The angles of a `rope`; those that turn alike share a table."""
        rotary = replace(RotaryEmbedding.from_attributes(op.attributes), heads=1)
        key = (rotary, op.weight("factors"), limits.context)
        if key not in self._tables:
            factors = weights.get("factors")
            assert factors is None or isinstance(factors, Floats)
            plain = None if factors is None else factors.data.get()
            self._tables[key] = self._gpu.cupy.asarray(angles(rotary, limits.context, plain))
        return self._tables[key]


def _attention_verdict(signature: Signature, limits: Limits) -> Verdict:
    if limits.cache_type not in CACHE_TYPES:
        return no(f"it has no cache of type {limits.cache_type}")
    attributes = dict(signature.attributes)
    q, _, v, _ = signature.shapes
    size = max(q // int(attributes["heads"]), v // int(attributes["kv_heads"]))
    if size > LARGEST_HEAD:
        return no(f"its attention has heads of at most {LARGEST_HEAD} elements, these have {size}")
    return YES


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
