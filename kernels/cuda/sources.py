"""What is handed to the compiler. Nothing here needs a GPU, so that all of it compiles in tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from raygraft.kernels.cuda.formats import FORMATS

OPTIONS = ("-std=c++17",)
DECODE_DEPTH = 3
"""How far `decode_attention.cu` fetches ahead."""
ATTENTION_SIZES = (64, 128, 256)
"""Head sizes that `prompt_attention.cu` is compiled for; others are rounded up."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A variant of the product kernel, for up to `rows` rows."""

    name: str
    rows: int
    column_tiles: int
    sets: int
    """Parts of each number of x that lie in tiles of their own; 1: in columns of their own."""
    row_tiles: int
    ring_bytes: int
    """About how much of a warp's weights is on the way at any time."""
    blocks: Mapping[int, int]
    """Blocks that a multiprocessor takes at once, by the warps of a block; most warps first."""
    many: int
    """Warps of a block where a multiprocessor takes more than one turn of blocks."""


_FEW = {12: 2, 8: 3, 4: 7}
SHAPES = (
    Shape("few", 4, 1, 1, 1, 4608, _FEW, 8),
    Shape("eight", 8, 1, 2, 1, 4608, _FEW, 8),
    Shape("sixteen", 16, 2, 2, 2, 4352, {16: 1, 8: 2, 4: 4}, 4),
)


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Bytes of shared memory that a block can have, and that a multiprocessor has."""

    block: int
    processor: int


STATIC_BYTES = 64
"""That a block of products has beside what is asked for: factors of rows."""
RESERVED_BYTES = 1024
"""That CUDA takes of each block's."""


AttentionVariant = tuple[str, int, int]
"""Of the attention of few rows: the cache's type, vectors of 32 elements that hold a head, query
heads of a block."""


def shape_for(rows: int) -> Shape:
    """The variant for so many rows."""
    return next(shape for shape in SHAPES if rows <= shape.rows)


@cache
def read(name: str) -> str:
    """A file of `source/`."""
    return files("raygraft.kernels.cuda").joinpath("source", name).read_text(encoding="utf-8")


def rows_source() -> str:
    """Norms, gates, sums, rotary positions, the cache's writes, products in float32."""
    return read("common.cuh") + read("rows.cu")


def decode_attention_source(variants: Iterable[AttentionVariant]) -> str:
    """Attention of few rows."""
    lines = [read("common.cuh"), f"#define DEPTH {DECODE_DEPTH}\n", read("decode_attention.cu")]
    for cache_type, vectors, heads in variants:
        name = decode_attention_name((cache_type, vectors, heads))
        element = {"f32": "float", "f16": "u16"}[cache_type]
        lines.append(f"ATTEND({name}, {element}, {vectors}, {heads})\n")
    return "".join(lines)


def decode_attention_name(variant: AttentionVariant) -> str:
    """Name of a kernel of `decode_attention_source`."""
    return "attend_{}_{}_{}".format(*variant)


def prompt_attention_source() -> str:
    """Attention of many rows."""
    return read("common.cuh") + read("prompt_attention.cu")


def rings_source() -> str:
    """Records that go from GPU to GPU."""
    return read("common.cuh") + read("rings.cu")


def sample_source() -> str:
    """The best tokens and their log probabilities."""
    return read("common.cuh") + read("sample.cu")


def draw_source() -> str:
    """Drawing tokens that are not the best ones."""
    return read("common.cuh") + read("draw.cu")


def expand_source(kind: str) -> str:
    """Tiles of one format back to rows, and single rows of them."""
    files = read("common.cuh") + read("formats.cuh") + read("expand.cu")
    return files + ("" if FORMATS[kind].in_rows else f"EXPAND({kind})\n") + f"LOOK_UP({kind})\n"


def product_source(kinds: tuple[str, str]) -> str:
    """Few rows times matrices of one format or of two."""
    lines = [read("common.cuh"), read("formats.cuh"), read("matvec.cu")]
    for shape in SHAPES:
        for warps, blocks in shape.blocks.items():
            sizes = (shape.column_tiles, shape.sets, shape.row_tiles, warps)
            numbers = ", ".join(map(str, (*sizes, ring_depth(kinds, shape))))
            for gated in (False, True):
                name = product_name(shape, warps, gated)
                flag = "true" if gated else "false"
                lines.append(
                    f"PRODUCT({name}, {kinds[0]}, {kinds[1]}, {numbers}, {flag}, {blocks})\n"
                )
    return "".join(lines)


def product_name(shape: Shape, warps: int, gated: bool) -> str:
    """Name of a kernel of `product_source`."""
    return f"product_{shape.name}_{warps}{'_gated' if gated else ''}"


def ring_depth(kinds: tuple[str, str], shape: Shape) -> int:
    """How many chunks of a warp are on the way at once: three where they are small enough."""
    stage = _stage_bytes(kinds, shape)
    return max(3 if stage <= 2048 else 2, shape.ring_bytes // stage)


def product_warps(
    kinds: tuple[str, str], shape: Shape, share: int, squares: int, room: SharedMemory
) -> int:
    """Warps of a block, where a multiprocessor gets `share` blocks of a launch.

    As many as let all blocks run at once: then none waits for a second turn, and all
    multiprocessors have the same to do. Where there are too many blocks for that, the rest at the
    end is a small part of the whole. A block has `squares` bytes of shared memory beside its rings.
    """

    def needed(warps: int) -> int:
        return product_shared_bytes(kinds, shape, warps) + squares + STATIC_BYTES

    fitting = [warps for warps in shape.blocks if needed(warps) <= room.block]
    for warps in fitting:
        at_once = min(shape.blocks[warps], room.processor // (needed(warps) + RESERVED_BYTES))
        if share <= at_once:
            return warps
    return next((warps for warps in fitting if warps <= shape.many), min(shape.blocks))


def product_shared_bytes(kinds: tuple[str, str], shape: Shape, warps: int) -> int:
    """Shared memory of a block of the product kernel."""
    return warps * ring_depth(kinds, shape) * _stage_bytes(kinds, shape)


def decode_attention_shared_bytes(vectors: int, heads: int, cache_type: str) -> int:
    """Shared memory of a block of the attention of few rows."""
    piece = {"f32": 16, "f16": 8}[cache_type]
    rings = 4 * DECODE_DEPTH * 2 * vectors * 32 * piece
    return max(rings, 4 * heads * 32 * vectors * 4)


def prompt_attention_shared_bytes(size: int, cache_type: str) -> int:
    """Shared memory of a block of the prompt attention."""
    splits, stages, keys = (2, 1, 32) if cache_type == "f32" else (1, 2, 64)
    if size == 256:
        keys //= 2
    return splits * (64 + 2 * stages * keys) * (size + 8) * 2


def _stage_bytes(kinds: tuple[str, str], shape: Shape) -> int:
    return shape.row_tiles * max(FORMATS[kind].chunk_bytes for kind in kinds)


def all_sources() -> dict[str, str]:
    """Every source that the backend can compile, by a name that says what it is."""
    found = {
        "rows": rows_source(),
        "decode attention": decode_attention_source(
            (cache_type, vectors, heads)
            for cache_type in ("f32", "f16")
            for vectors, most in ((1, 4), (2, 4), (3, 4), (4, 4), (8, 2))
            for heads in (1, most)
        ),
        "prompt attention": prompt_attention_source(),
        "sample": sample_source(),
        "draw": draw_source(),
        "rings": rings_source(),
    }
    found |= {f"expand {kind}": expand_source(kind) for kind in FORMATS}
    found |= {f"product {kind}": product_source((kind, kind)) for kind in FORMATS}
    found["product Q4_K Q6_K"] = product_source(("Q4_K", "Q6_K"))
    return found
