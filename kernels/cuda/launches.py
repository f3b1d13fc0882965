"""Each fused operator of a program as kernel launches on the GPU's stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygraft.graph.operators import Operator, Value
from raygraft.kernels.cuda import sampling, sources
from raygraft.kernels.cuda.arguments import integer, number, pointer
from raygraft.kernels.cuda.attention import AttentionLaunches
from raygraft.kernels.cuda.buffers import FEW, Buffers, Counts
from raygraft.kernels.cuda.fusion import (
    CachedAttention,
    GatedProduct,
    Prepare,
    Products,
    Program,
    Single,
    reads,
    writes,
)
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.memory import Arena
from raygraft.kernels.cuda.products import ProductLaunches
from raygraft.kernels.cuda.rows import THREADS, RowKernels, threads_for
from raygraft.kernels.cuda.step import DeviceStep
from raygraft.kernels.cuda.weights import Floats, Weight


class Launcher:
    """Launches the program of one subgraph."""

    def __init__(
        self,
        gpu: Gpu,
        arena: Arena,
        step: DeviceStep,
        program: Program,
        values: Mapping[str, Value],
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Any],
        own: object,
        kept: frozenset[str],
    ) -> None:
        """`weights` are by operator, by role; `tables`, `own`, `kept`: see the parts."""
        self.program = program
        self.buffers = Buffers(arena, program, values, own, kept)
        self._gpu = gpu
        self._arena = arena
        self._step = step
        self._weights = weights
        self._kernels = RowKernels(gpu, self.buffers)
        self._products = ProductLaunches(gpu, program, self.buffers, self._kernels, weights)
        self.attention = AttentionLaunches(gpu, self.buffers, self._kernels, step, tables)

    def launch(self, counts: Counts, given: Mapping[str, int]) -> None:
        """Launch everything. `given` are addresses of inputs; others lie in their own slots."""
        self.buffers.start(counts, given)
        for one in self.program.order:
            rows = self.buffers.rows((*writes(one), *reads(one))[0])
            if rows == 0:
                continue
            match one:
                case Prepare():
                    self._kernels.gate(self.buffers.floats(one.value), 0, one.value, rows, out=0)
                case Products():
                    self._products.launch(one, rows)
                case GatedProduct():
                    self._products.launch_gated(one, rows)
                case CachedAttention():
                    self.attention.launch(one, rows)
                case Single(op) if rows <= FEW and op.outputs[0] in self.program.normed:
                    pass  # products take it in
                case Single():
                    self._single(one.operator, rows)

    def _single(self, op: Operator, rows: int) -> None:
        out = self.buffers.floats(op.outputs[0])
        width = self.buffers.width(op.outputs[0])
        weights = self._weights.get(op.name, {})
        match op.kind:
            case "rms_norm":
                self._kernels.launch(
                    "rms_norm", (rows, 1, 1), min(THREADS, threads_for(width // 4)),
                    pointer(self.buffers.floats(op.inputs[0])), pointer(weights["weight"].address),
                    pointer(out), self.buffers.packed(op.outputs[0], rows),
                    pointer(self.buffers.factor(op.outputs[0]) if rows <= FEW else 0),
                    integer(width), number(float(dict(op.attributes)["epsilon"])),
                )  # fmt: skip
            case "swiglu":
                gate, up = (self.buffers.floats(name) for name in op.inputs)
                self._kernels.gate(gate, up, op.outputs[0], rows, out)
            case "add":
                a, b = (self.buffers.floats(name) for name in op.inputs)
                self._kernels.add(a, b, out, width, rows)
            case "select_rows":
                self._kernels.launch(
                    "select_rows", (rows, 1, 1), threads_for(width),
                    pointer(self.buffers.floats(op.inputs[0])),
                    pointer(self._step.addresses.wanted), pointer(out), integer(width),
                )  # fmt: skip
            case "rope":
                rotation, heads = self.attention.rotation(op)
                self._kernels.launch(
                    "rotate", (rows, heads, 1), 64, pointer(self.buffers.floats(op.inputs[0])),
                    pointer(out), pointer(self._step.addresses.positions), rotation,
                    integer(heads), integer(width // heads),
                )  # fmt: skip
            case "get_rows":
                self._look_up(weights["weight"], out, width, rows)
            case kind:
                raise NotImplementedError(f"operator {kind}")

    def _look_up(self, weight: Weight, out: int, width: int, rows: int) -> None:
        tokens = pointer(self._step.addresses.tokens)
        drawn = pointer(sampling.results(self._arena))
        if isinstance(weight, Floats):
            self._kernels.launch(
                "look_up_floats", (rows, 1, 1), threads_for(width), pointer(weight.address), tokens,
                drawn, pointer(out), integer(width),
            )  # fmt: skip
            return
        kind = weight.format.name
        kernel = self._gpu.kernel(f"expand {kind}", "look_up", lambda: sources.expand_source(kind))
        self._gpu.launch(
            kernel, (rows, 1, 1), THREADS,
            (pointer(weight.address), tokens, drawn, pointer(out), integer(width),
             integer(weight.chunks), number(weight.scale)),
        )  # fmt: skip
