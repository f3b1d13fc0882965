"""Sampling: greedy rows on the GPU, others by the reference from copied logits."""

from __future__ import annotations

import numpy as np

from raygraft.graph.builder import MAX_LOGPROBS
from raygraft.graph.step import Sampling
from raygraft.kernels.base import Array
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import integer, pointer
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.memory import Arena

PARTS = 64
"""Of a vocabulary, each a block's."""
LARGEST_VOCABULARY = PARTS * 48 * 1024 // 4
_THREADS = 256
_LEAST_BYTES = 64 * 1024
"""Of the results: where they lie must not change between two steps that draw."""


def is_greedy(sampling: Sampling) -> bool:
    """Whether every row takes the largest logit, as it is."""
    plain = not len(sampling.history) and not len(sampling.bias_ids)
    few = int(max(sampling.logprobs, default=0)) <= MAX_LOGPROBS
    return plain and few and bool(np.all(sampling.temperature <= 0))


def best_wanted(sampling: Sampling) -> int:
    """How many of the best logits are looked for: one at least, the token itself."""
    return max(1, int(max(sampling.logprobs, default=0)))


def results(arena: Arena, size: int = 0) -> int:
    """The address of results of so many bytes; drawn tokens come first."""
    return arena.room("samples", max(size, _LEAST_BYTES), "sampling")


def launch_greedy(
    gpu: Gpu, arena: Arena, logits: int, vocabulary: int, rows: int, most: int
) -> tuple[int, int]:
    """Sample; the address of the results and their bytes. `read_greedy` reads a copy of them."""
    parts = rows * PARTS
    sums = arena.room("sums of parts", 8 * parts, "sampling")
    best = arena.room("best of parts", 8 * parts * most, "sampling")
    ids = best + 4 * parts * most
    size = 8 * rows * (1 + most)
    found = results(arena, size)
    shared = 4 * -(-vocabulary // PARTS)
    kernel = gpu.kernel("sample", "best_of_parts", sources.sample_source, shared)
    gpu.launch(
        kernel, (PARTS, rows, 1), _THREADS,
        (pointer(logits), pointer(best), pointer(ids), pointer(sums), integer(vocabulary),
         integer(most)),
        shared,
    )  # fmt: skip
    kernel = gpu.kernel("sample", "join_parts", sources.sample_source)
    starts = (0, 4 * rows, 8 * rows, 8 * rows + 4 * rows * most)
    gpu.launch(
        kernel, (rows, 1, 1), _THREADS,
        (pointer(best), pointer(ids), pointer(sums), integer(PARTS), integer(most),
         *[pointer(found + start) for start in starts]),
    )  # fmt: skip
    return found, size


def read_greedy(words: Array, sampling: Sampling, most: int) -> tuple[Array, Array, Array, Array]:
    """The four outputs of `sample` from what `launch_greedy` left, as int32."""
    rows, wanted = sampling.rows, int(max(sampling.logprobs, default=0))
    ids = words[:rows].reshape(rows, 1)
    chosen = words[rows : 2 * rows].view(np.float32).reshape(rows, 1).copy()
    table = words[2 * rows :]
    top_ids = table[: rows * most].reshape(rows, most)[:, :wanted].copy()
    top = table[rows * most :].view(np.float32).reshape(rows, most)[:, :wanted].copy()
    unwanted = np.arange(wanted) >= sampling.logprobs[:, None]
    top_ids[unwanted], top[unwanted] = -1, -np.inf
    return ids.copy(), chosen.copy(), top_ids, top
