"""The paged KV cache of one attention operator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.operators import KeyValueState
from raygraft.graph.step import Ints

DTYPES = {"f32": np.float32, "f16": np.float16}


class PagedCache:
    """Keys and values in pages of `block_size` tokens, `[blocks, block_size, heads, size]`.

    Pages are described in https://arxiv.org/abs/2309.06180.
    """

    def __init__(
        self, state: KeyValueState, blocks: int, block_size: int, cache_type: str = "f32"
    ) -> None:
        dtype = DTYPES[cache_type]
        self.block_size = block_size
        self.keys = np.zeros((blocks, block_size, state.kv_heads, state.key_size), dtype)
        self.values = np.zeros((blocks, block_size, state.kv_heads, state.value_size), dtype)

    def write(
        self, block_table: Ints, positions: Ints, k: NDArray[np.float32], v: NDArray[np.float32]
    ) -> None:
        """Store keys and values `[rows, width]` of one sequence at its positions."""
        pages = block_table[positions // self.block_size]
        places = positions % self.block_size
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
