"""Paged caches, and launches of attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raygraft.graph.operators import KeyValueState, Operator
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import (
    Attention,
    PromptAttention,
    Rotation,
    integer,
    pointer,
)
from raygraft.kernels.cuda.buffers import FEW, Buffers, capacity
from raygraft.kernels.cuda.fusion import CachedAttention
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.rows import RowKernels
from raygraft.kernels.cuda.step import DeviceStep

LARGEST_HEAD = 256
MOST_SPLITS = 32
"""Shares of a context in the attention of few rows; as in `decode_attention.cu`."""
_VECTORS = ((32, 1), (64, 2), (96, 3), (128, 4), (256, 8))


@dataclass(slots=True)
class Cache:
    """Keys and values of one attention operator, `[blocks, kv_heads, block_size, room]`."""

    keys: Any
    values: Any
    key_room: int
    value_room: int
    block_size: int
    kind: str


def allocate_cache(
    gpu: Gpu, state: KeyValueState, blocks: int, block_size: int, kind: str
) -> Cache:
    """Room for a paged cache; heads are rounded up to multiples of four elements."""
    dtype = {"f32": "float32", "f16": "float16"}[kind]
    rooms = [-(-size // 4) * 4 for size in (state.key_size, state.value_size)]
    arrays = [
        gpu.allocate(f"the cache {state.name}", (blocks, state.kv_heads, block_size, room), dtype)
        for room in rooms
    ]
    return Cache(arrays[0], arrays[1], rooms[0], rooms[1], block_size, kind)


class AttentionLaunches:
    """Launches the attention of a subgraph."""

    def __init__(
        self,
        gpu: Gpu,
        buffers: Buffers,
        kernels: RowKernels,
        step: DeviceStep,
        tables: Mapping[str, Any],
    ) -> None:
        """`tables` holds the angles of each `rope`, on the GPU."""
        self._gpu = gpu
        self._buffers = buffers
        self._kernels = kernels
        self._step = step
        self._tables = tables
        self.caches: dict[str, Cache] = {}

    def rotation(self, op: Operator | None) -> tuple[Rotation, int]:
        if op is None:
            return Rotation(0, 0, 0), 0
        rotary = RotaryEmbedding.from_attributes(op.attributes)
        table = int(self._tables[op.name].data.ptr)
        return Rotation(table, rotary.size, int(rotary.style == "neox")), rotary.heads

    def launch(self, one: CachedAttention, rows: int) -> None:
        op, cache = one.attention, self.caches[one.attention.name]
        state = op.state
        assert state is not None
        attributes = dict(op.attributes)
        at = self._step.addresses
        few = rows <= FEW
        own: Attention | PromptAttention = Attention() if few else PromptAttention()
        own.q, own.out = self._buffers.floats(one.q), self._buffers.floats(op.outputs[0])
        own.packed = self._buffers.packed(op.outputs[0], rows)
        own.keys, own.values = int(cache.keys.data.ptr), int(cache.values.data.ptr)
        own.positions, own.tables, own.stride = at.positions, at.tables, at.stride
        own.heads, own.kv_heads = int(attributes["heads"]), state.kv_heads
        own.key_size, own.value_size = state.key_size, state.value_size
        own.key_room, own.value_room = cache.key_room, cache.value_room
        own.block_size, own.scale = cache.block_size, float(attributes["scale"])
        if isinstance(own, Attention) and self._buffers.counts.apart:
            own.k, own.v = self._buffers.floats(one.k), self._buffers.floats(one.v)
            own.q_turn = self.rotation(one.q_rope)[0]
            own.k_turn = self.rotation(one.k_rope)[0]
        else:
            self._store_heads(one, own, cache.kind, rows)
        if isinstance(own, Attention):
            self._attend_few(own, rows, cache.kind)
        else:
            self._attend_many(own, rows, cache.kind)

    def _store_heads(
        self, one: CachedAttention, own: Attention | PromptAttention, cache_kind: str, rows: int
    ) -> None:
        """Rotate, and write the cache, before any row reads what another one writes."""
        at = self._step.addresses
        queries = self._buffers.room("queries", 4 * own.heads * own.key_size * capacity(rows))
        sizes = (own.key_size, own.value_size, own.key_room, own.value_room, own.block_size)
        self._kernels.launch(
            f"store_heads_{cache_kind}", (rows, own.heads + 2 * own.kv_heads, 1), 64,
            *[pointer(self._buffers.floats(name)) for name in (one.q, one.k, one.v)],
            pointer(queries), pointer(own.keys), pointer(own.values), pointer(at.positions),
            pointer(at.sequence), pointer(at.tables), integer(at.stride),
            self.rotation(one.q_rope)[0], self.rotation(one.k_rope)[0],
            *[integer(size) for size in (own.heads, own.kv_heads, *sizes)],
        )  # fmt: skip
        own.q = queries

    def _attend_few(self, own: Attention, rows: int, cache_kind: str) -> None:
        size = max(own.key_size, own.value_size)
        vectors = next(count for most, count in _VECTORS if size <= most)
        group = own.heads // own.kv_heads
        together = 1 if group == 1 else 2 if vectors == 8 else 4
        blocks = own.kv_heads * -(-group // together)
        # Two blocks fit on a processor: more would wait for a second turn.
        splits = min(MOST_SPLITS, max(1, 2 * self._gpu.processors // (blocks * rows)))
        width = own.value_room + 2
        own.partial = self._buffers.room("attention", 4 * FEW * own.heads * MOST_SPLITS * width)
        own.arrived = self._buffers.room("attention's counters", 4 * FEW * blocks)
        own.sequence = self._step.addresses.sequence
        shared = sources.decode_attention_shared_bytes(vectors, together, cache_kind)
        variant = (cache_kind, vectors, together)
        name = sources.decode_attention_name(variant)
        kernel = self._gpu.kernel(
            name, name, lambda: sources.decode_attention_source([variant]), shared=True
        )
        self._gpu.launch(kernel, (splits, blocks, rows), 128, (own,), shared)

    def _attend_many(self, own: PromptAttention, rows: int, cache_kind: str) -> None:
        most = max(own.key_size, own.value_size)
        size = next(known for known in sources.ATTENTION_SIZES if most <= known)
        shared = sources.prompt_attention_shared_bytes(size, cache_kind)
        own.tiles = self._step.addresses.tiles
        kernel = self._gpu.kernel(
            "prompt attention",
            f"attend_prompt_{cache_kind}_{size}",
            sources.prompt_attention_source,
            shared=True,
        )
        self._gpu.launch(kernel, (self._step.tile_count, own.heads, 1), 128, (own,), shared)
