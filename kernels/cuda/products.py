"""Launches of matrix products.

Up to FEW rows, every product reads its weights once, as they are. More rows go through cuBLAS: a
quantised matrix is expanded to halves in a scratch buffer that all share, and multiplied there;
one of halves is multiplied where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raygraft.graph.operators import Operator
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import (
    FRAGMENTS_SPLIT,
    Norm,
    Product,
    integer,
    number,
    pointer,
)
from raygraft.kernels.cuda.buffers import FEW, Buffers, capacity
from raygraft.kernels.cuda.formats import TILE
from raygraft.kernels.cuda.fusion import GatedProduct, Products, Program
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.rows import THREADS, RowKernels
from raygraft.kernels.cuda.weights import Floats, PackedMatrix, Weight

SCRATCH_HALVES = 2**27
"""Elements of a matrix that are expanded at once."""
_COMPUTE_32F = 68  # CUBLAS_COMPUTE_32F
_ZERO = np.zeros((), np.float32)


class ProductLaunches:
    """Launches the products of a subgraph."""

    def __init__(
        self,
        gpu: Gpu,
        program: Program,
        buffers: Buffers,
        kernels: RowKernels,
        weights: Mapping[str, Mapping[str, Weight]],
    ) -> None:
        self._gpu = gpu
        self._normed = program.normed
        self._buffers = buffers
        self._kernels = kernels
        self._weights = weights

    def launch(self, one: Products, rows: int) -> None:
        first = self._weights[one.operators[0].name]["weight"]
        if isinstance(first, Floats):
            self._float_product(one, first, rows)
        elif rows <= FEW:
            self._few_products(one, rows)
        else:
            for op, output in zip(one.operators, one.outputs, strict=True):
                self._many_product(one, op, output, rows)

    def _few_products(self, one: Products, rows: int) -> None:
        arguments = self._product(one.x, one.operators, rows)
        for segment, output in zip(arguments.segments, one.outputs, strict=False):
            segment.out = self._buffers.floats(output)
        if one.residual:
            arguments.segments[0].residual = self._buffers.floats(one.residual)
        if one.normed:
            arguments.y = self._buffers.packed(one.normed, rows)
            arguments.after = self._norm(one.normed, rows)
        shape = sources.shape_for(arguments.rows)
        blocks = sum(-(-s.tiles // shape.row_tiles) for s in arguments.segments)
        self._run_product(one.operators, arguments, blocks, gated=False)

    def launch_gated(self, one: GatedProduct, rows: int) -> None:
        operators = (one.gate, one.up)
        if rows > FEW:
            width = self._buffers.width(one.output)
            size = 4 * width * capacity(rows)
            gate, up = (self._buffers.room(f"product {n}", size) for n in (0, 1))
            for op, out in zip(operators, (gate, up), strict=True):
                self._multiply(one.x, op, out, rows)
                self._finish(one.x, op, out, width, rows)
            self._kernels.gate(gate, up, one.output, rows, self._buffers.floats(one.output))
            return
        arguments = self._product(one.x, operators, rows)
        arguments.segments[0].out = self._buffers.floats(one.output)
        arguments.y = self._buffers.packed(one.output, rows)
        shape = sources.shape_for(arguments.rows)
        blocks = -(-arguments.segments[0].tiles // shape.row_tiles)
        self._run_product(operators, arguments, blocks, gated=True)

    def _product(self, x: str, operators: tuple[Operator, ...], rows: int) -> Product:
        """Arguments, but for outputs and residual."""
        arguments = Product()
        kinds = self._kinds(operators)
        for segment, op in zip(arguments.segments, operators, strict=False):
            weight = self._matrix(op)
            segment.weights, segment.scale = weight.address, weight.scale
            segment.rows, segment.tiles = weight.rows, weight.tiles
            segment.format = kinds.index(weight.format.name)
            segment.bias = self._bias(op)
        arguments.x = self._buffers.packed(x, rows)
        arguments.count, arguments.rows = len(operators), rows
        arguments.chunks = -(-self._buffers.width(x) // 64)
        arguments.columns = 2 * rows if arguments.x.form == FRAGMENTS_SPLIT else rows
        if x in self._normed:
            arguments.before = self._norm(x, rows)
        return arguments

    def _norm(self, made: str, rows: int) -> Norm:
        """Where some products leave, and others find, what a norm needs."""
        own, buffers = self._normed[made], self._buffers
        weight = self._weights[own.norm.name]["weight"]
        assert isinstance(weight, Floats)
        width = buffers.width(made)
        blocks = -(-width // (TILE * sources.shape_for(rows).row_tiles))
        return Norm(
            weight.address, buffers.sums(own.value), buffers.factor(own.previous),
            buffers.factor(made), blocks, width, float(dict(own.norm.attributes)["epsilon"]),
        )  # fmt: skip

    def _kinds(self, operators: tuple[Operator, ...]) -> tuple[str, str]:
        names = sorted({self._matrix(op).format.name for op in operators})
        return names[0], names[-1]

    def _run_product(
        self, operators: tuple[Operator, ...], arguments: Product, blocks: int, *, gated: bool
    ) -> None:
        kinds = self._kinds(operators)
        shape = sources.shape_for(arguments.rows)
        squares = 4 * arguments.rows * (arguments.before.count + 1)
        share = -(-blocks // self._gpu.processors)
        warps = sources.product_warps(kinds, shape, share, squares, self._gpu.shared_memory)
        shared = sources.product_shared_bytes(kinds, shape, warps) + squares
        kernel = self._gpu.kernel(
            f"product {kinds[0]} {kinds[1]}",
            sources.product_name(shape, warps, gated),
            lambda: sources.product_source(kinds),
            shared=True,
        )
        self._gpu.launch(kernel, (blocks, 1, 1), 32 * warps, (arguments,), shared)

    def _matrix(self, op: Operator) -> PackedMatrix:
        weight = self._weights[op.name]["weight"]
        assert isinstance(weight, PackedMatrix)
        return weight

    def _bias(self, op: Operator) -> int:
        bias = self._weights[op.name].get("bias")
        return 0 if bias is None else bias.address

    def _many_product(self, one: Products, op: Operator, output: str, rows: int) -> None:
        width = self._buffers.width(output)
        out = self._buffers.floats(output)
        if not one.residual:
            self._multiply(one.x, op, out, rows)
            self._finish(one.x, op, out, width, rows)
            return
        product = self._buffers.room("product 0", 4 * width * capacity(rows))
        self._multiply(one.x, op, product, rows)
        self._kernels.add(
            self._buffers.floats(one.residual), product, out, width, rows,
            scales=self._buffers.scales(one.x, rows), bias=self._bias(op),
        )  # fmt: skip

    def _finish(self, x: str, op: Operator, out: int, width: int, rows: int) -> None:
        """What a product still lacks: the scales of its input's rows, the bias."""
        scales, bias = self._buffers.scales(x, rows), self._bias(op)
        if scales or bias:
            self._kernels.add(0, out, out, width, rows, scales=scales, bias=bias)

    def _multiply(self, x: str, op: Operator, out: int, rows: int) -> None:
        """By cuBLAS, through rows of halves."""
        weight, packed = self._matrix(op), self._buffers.packed(x, rows)
        columns, kind = weight.columns, weight.format.name
        if weight.format.in_rows:
            self._gemm(
                weight.address, weight.chunks * weight.format.columns, packed.data, packed.stride,
                out, weight.rows, (weight.rows, rows, columns), "float16", weight.scale,
            )  # fmt: skip
            return
        kernel = self._gpu.kernel(f"expand {kind}", "expand", lambda: sources.expand_source(kind))
        stride = -(-columns // 8) * 8
        at_once = max(1, SCRATCH_HALVES // (stride * TILE))
        scratch = self._buffers.room(
            "expanded weights", 2 * min(at_once, weight.tiles) * TILE * stride
        )
        for tile in range(0, weight.tiles, at_once):
            tiles = min(at_once, weight.tiles - tile)
            count = min(weight.rows - tile * TILE, tiles * TILE)
            self._gpu.launch(
                kernel, (-(-weight.chunks // 8), tiles, 1), THREADS,
                (pointer(weight.address), pointer(scratch), integer(tile), integer(weight.rows),
                 integer(columns), integer(stride), integer(weight.chunks), number(weight.scale)),
            )  # fmt: skip
            self._gemm(
                scratch, stride, packed.data, packed.stride, out + 4 * tile * TILE,
                weight.rows, (count, rows, columns), "float16",
            )  # fmt: skip

    def _float_product(self, one: Products, weight: Floats, rows: int) -> None:
        (op,), (output,) = one.operators, one.outputs
        outputs, columns = weight.shape
        x, out = self._buffers.floats(one.x), self._buffers.floats(output)
        residual = self._buffers.floats(one.residual) if one.residual else 0
        bias = self._bias(op)
        if rows <= FEW:
            self._kernels.launch(
                "product_floats", (-(-outputs // 8), 1, 1), THREADS, pointer(weight.address),
                pointer(x), pointer(bias), pointer(residual), pointer(out), integer(outputs),
                integer(columns), integer(rows),
            )  # fmt: skip
            return
        size = (outputs, rows, columns)
        if residual:
            product = self._buffers.room("product 0", 4 * outputs * capacity(rows))
            self._gemm(weight.address, columns, x, columns, product, outputs, size, "float32")
            self._kernels.add(residual, product, out, outputs, rows, bias=bias)
            return
        self._gemm(weight.address, columns, x, columns, out, outputs, size, "float32")
        if bias:
            self._kernels.add(0, out, out, outputs, rows, bias=bias)

    def _gemm(
        self,
        weights: int,
        weights_stride: int,
        x: int,
        x_stride: int,
        out: int,
        out_stride: int,
        size: tuple[int, int, int],
        dtype: str,
        scale: float = 1.0,
    ) -> None:
        """out [rows, outputs] = scale * x [rows, columns] @ weights [outputs, columns].T, float32.

        `size` is (outputs, rows, columns); inputs are of `dtype`. cuBLAS counts columns first.
        """
        from cupy_backends.cuda.libs import cublas  # noqa: PLC0415

        runtime = self._gpu.cupy.cuda.runtime
        factor = np.array(scale, np.float32)
        kind = runtime.CUDA_R_16F if dtype == "float16" else runtime.CUDA_R_32F
        cublas.gemmEx(
            self._gpu.cupy.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N,
            *size, factor.ctypes.data, weights, kind, weights_stride, x, kind, x_stride,
            _ZERO.ctypes.data, out, runtime.CUDA_R_32F, out_stride, _COMPUTE_32F, -1,
        )  # fmt: skip
