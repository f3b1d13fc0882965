"""The paged KV cache of one attention operator."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from raygraft.graph.capability import YES, Verdict, no
from raygraft.graph.operators import KeyValueState, Signature
from raygraft.graph.step import Ints

DTYPES = {"f32": np.float32, "f16": np.float16, "q8_0": np.float32}
"""What elements are kept as; "q8_0" is rounded to 8 bits, and kept as floats."""


def refused_cache(signature: Signature, cache_type: str) -> Verdict:
    """Whether an attention operator can have a cache of a type."""
    if cache_type not in DTYPES:
        return no(f"it has no cache of type {cache_type}")
    if cache_type == "q8_0":
        _, k, v = signature.shapes[:3]
        kv_heads = int(dict(signature.attributes)["kv_heads"])
        for what, size in (("keys", k // kv_heads), ("values", v // kv_heads)):
            if size % 32:
                return no(f"a q8_0 cache needs {what} of a multiple of 32 numbers, not {size}")
    return YES


def _rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each 32 neighbours as 8-bit numbers with a float16 scale, as in the weight format Q8_0."""
    kind = GGMLQuantizationType.Q8_0
    return np.asarray(quants.dequantize(quants.quantize(x, kind), kind), np.float32)


class PagedCache:
    """Keys and values in pages of `block_size` tokens, `[blocks, block_size, heads, size]`.

    Pages are described in https://arxiv.org/abs/2309.06180.
    """

    def __init__(
        self, state: KeyValueState, blocks: int, block_size: int, cache_type: str = "f32"
    ) -> None:
        dtype = DTYPES[cache_type]
        self._eight_bits = cache_type == "q8_0"
        self.block_size = block_size
        self.keys = np.zeros((blocks, block_size, state.kv_heads, state.key_size), dtype)
        self.values = np.zeros((blocks, block_size, state.kv_heads, state.value_size), dtype)

    def like(self, other: PagedCache) -> bool:
        """Whether both have the same room, and keep the same in it."""
        mine, theirs = (
            (cache.keys.shape, cache.values.shape, cache.keys.dtype, cache._eight_bits)
            for cache in (self, other)
        )
        return mine == theirs

    def write(
        self, block_table: Ints, positions: Ints, k: NDArray[np.float32], v: NDArray[np.float32]
    ) -> None:
        """Store keys and values `[rows, width]` of one sequence at its positions."""
        pages = block_table[positions // self.block_size]
        places = positions % self.block_size
        if self._eight_bits:
            k, v = (_rounded(x) for x in (k, v))
        self.keys[pages, places] = k.reshape(len(positions), *self.keys.shape[2:])
        self.values[pages, places] = v.reshape(len(positions), *self.values.shape[2:])

    def read(
        self, block_table: Ints, length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of the first `length` tokens, each `[length, heads, size]`."""
        pages = block_table[: -(-length // self.block_size)]
        keys = self.keys[pages].reshape(-1, *self.keys.shape[2:])[:length]
        values = self.values[pages].reshape(-1, *self.values.shape[2:])[:length]
        return keys.astype(np.float32, copy=False), values.astype(np.float32, copy=False)
