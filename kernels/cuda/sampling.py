"""Sampling on the GPU: the best tokens with their log probabilities, then draws of other rows."""

from __future__ import annotations

import numpy as np

from raygraft.graph.step import Sampling
from raygraft.kernels.base import Array
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import integer, pointer
from raygraft.kernels.cuda.memory import Arena
from raygraft.kernels.cuda.sampled_rows import Wanted
from raygraft.kernels.cuda.shared import Shared

PARTS = 64
"""Of a vocabulary, each a block's."""
LARGEST_VOCABULARY = PARTS * 48 * 1024 // 4
_THREADS = 256
_DRAWING_THREADS = 1024
_DRAWING_BLOCKS = 16
"""Each draws one row at a time, and has memory for a row's logits and as many ids."""
_LEAST_BYTES = 64 * 1024
"""Of the results: where they lie must not change between two steps that draw."""


def results(arena: Arena, size: int = 0) -> int:
    """The address of results of so many bytes; drawn tokens come first."""
    return arena.room("samples", max(size, _LEAST_BYTES), "sampling")


def launch(shared: Shared, logits: int, vocabulary: int, rows: int, wanted: Wanted) -> None:
    """Sample rows of logits, by what was uploaded of the step. `read` reads a copy of `results`."""
    gpu, arena, most = shared.gpu, shared.arena, wanted.best
    parts = rows * PARTS
    sums = arena.room("sums of parts", 8 * parts, "sampling")
    best = arena.room("best of parts", 8 * parts * most, "sampling")
    totals = arena.room("totals of rows", 8 * rows, "sampling")
    ids = best + 4 * parts * most
    found = results(arena, wanted.size(rows))
    kernel_shared = 4 * -(-vocabulary // PARTS)
    kernel = gpu.kernel("sample", "best_of_parts", sources.sample_source, shared=kernel_shared > 0)
    gpu.launch(
        kernel, (PARTS, rows, 1), _THREADS,
        (pointer(logits), pointer(best), pointer(ids), pointer(sums), integer(vocabulary),
         integer(most)),
        kernel_shared,
    )  # fmt: skip
    kernel = gpu.kernel("sample", "join_parts", sources.sample_source)
    starts = (0, 4 * rows, 8 * rows, 8 * rows + 4 * rows * most)
    gpu.launch(
        kernel, (rows, 1, 1), _THREADS,
        (pointer(best), pointer(ids), pointer(sums), integer(PARTS), integer(most),
         *[pointer(found + start) for start in starts], pointer(totals)),
    )  # fmt: skip
    if not wanted.drawn:
        return
    blocks = min(rows, _DRAWING_BLOCKS)
    copies = arena.room("copies of logits", 4 * blocks * vocabulary, "sampling")
    candidates = arena.room("candidates", 4 * blocks * vocabulary, "sampling")
    step = shared.step.addresses
    kernel = gpu.kernel("draw", "draw", sources.draw_source)
    gpu.launch(
        kernel, (blocks, 1, 1), _DRAWING_THREADS,
        (pointer(logits), pointer(totals), pointer(step.sampling), pointer(step.lists),
         pointer(copies), pointer(candidates), pointer(found), pointer(found + 4 * rows),
         integer(vocabulary), integer(rows)),
    )  # fmt: skip


def read(words: Array, sampling: Sampling, wanted: Wanted) -> tuple[Array, Array, Array, Array]:
    """The four outputs of `sample` from a copy of the results, as int32."""
    rows, most = sampling.rows, wanted.best
    asked = int(max(sampling.logprobs, default=0))
    ids = words[:rows].reshape(rows, 1)
    chosen = words[rows : 2 * rows].view(np.float32).reshape(rows, 1).copy()
    table = words[2 * rows :]
    top_ids = table[: rows * most].reshape(rows, most)[:, :asked].copy()
    top = table[rows * most :].view(np.float32).reshape(rows, most)[:, :asked].copy()
    unwanted = np.arange(asked) >= sampling.logprobs[:, None]
    top_ids[unwanted], top[unwanted] = -1, -np.inf
    return ids.copy(), chosen.copy(), top_ids, top
