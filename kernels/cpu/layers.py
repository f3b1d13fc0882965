"""Everything between the matrix products: norms, positions, attention, activations.

Each function computes a thread's share: the `share`-th of `shares` parts of the rows, or of the
rows and heads.
"""

from __future__ import annotations

import math

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.matmul import widen_tile
from raygraft.kernels.cpu.vector import (
    LANES,
    fused,
    get,
    get_integer,
    load,
    multiply,
    put,
    splat,
    store,
    total,
    word,
)

_BYTES = 4 * LANES

# Where the numbers and addresses that describe a step lie, in bytes.
STEP_ROWS, POSITIONS, SEQUENCE, TABLES, TABLE_STRIDE, LOGIT_ROWS, LOGITS, TOKENS = (
    8 * place for place in range(8)
)


@compiled(nogil=True)
def table_of(step: int, row: int) -> int:
    """Address of the block table of a row's sequence."""
    sequence = get_integer(word(step + SEQUENCE) + 4 * row)
    address: int = word(step + TABLES) + 4 * word(step + TABLE_STRIDE) * sequence
    return address


@compiled(nogil=True)
def dot(a: int, b: int, size: int) -> float:
    """The product of two rows of floats."""
    whole = size // LANES
    parts = splat(np.float32(0))
    for k in range(whole):
        parts = fused(load(a + _BYTES * k), load(b + _BYTES * k), parts)
    result: float = total(parts)
    for k in range(whole * LANES, size):
        result += get(a + 4 * k) * get(b + 4 * k)
    return result


@compiled(nogil=True)
def norm(
    x: int, weight: int, out: int, width: int, epsilon: float, rows: int, share: int, shares: int
) -> None:
    """Root mean square norm of each row."""
    for row in range(share, rows, shares):
        own, target = x + 4 * width * row, out + 4 * width * row
        scale = np.float32(1.0 / math.sqrt(dot(own, own, width) / width + epsilon))
        whole = width // LANES
        factor = splat(scale)
        for k in range(whole):
            scaled = multiply(load(own + _BYTES * k), factor)
            store(target + _BYTES * k, multiply(scaled, load(weight + _BYTES * k)))
        for k in range(whole * LANES, width):
            put(target + 4 * k, get(own + 4 * k) * scale * get(weight + 4 * k))


@compiled(nogil=True)
def rotate(
    x: int,
    out: int,
    table: int,
    positions: int,
    heads: int,
    head_size: int,
    rotated: int,
    neox: int,
    rows: int,
    share: int,
    shares: int,
) -> None:
    """Rotary embedding. `table` holds cosine and sine of each position's `rotated / 2` pairs."""
    half = rotated // 2
    for item in range(share, rows * heads, shares):
        row = item // heads
        at, target = x + 4 * head_size * item, out + 4 * head_size * item
        angles = table + 8 * half * get_integer(positions + 4 * row)
        for pair in range(half):
            first = pair if neox else 2 * pair
            second = pair + half if neox else 2 * pair + 1
            a, b = get(at + 4 * first), get(at + 4 * second)
            cosine, sine = get(angles + 8 * pair), get(angles + 8 * pair + 4)
            put(target + 4 * first, a * cosine - b * sine)
            put(target + 4 * second, a * sine + b * cosine)
        for rest in range(rotated, head_size):
            put(target + 4 * rest, get(at + 4 * rest))


@compiled(nogil=True)
def write_cache(
    x: int,
    cache: int,
    heads: int,
    size: int,
    block_size: int,
    step: int,
    rows: int,
    share: int,
    shares: int,
) -> None:
    """Rows into the pages of a cache `[blocks, heads, block_size, size]`."""
    for item in range(share, rows * heads, shares):
        row, head = item // heads, item % heads
        position = get_integer(word(step + POSITIONS) + 4 * row)
        table = table_of(step, row)
        page = get_integer(table + 4 * (position // block_size))
        place = ((page * heads + head) * block_size + position % block_size) * size
        for k in range(size):
            put(cache + 4 * (place + k), get(x + 4 * (size * item + k)))


@compiled(nogil=True)
def attend(
    q: int,
    keys: int,
    values: int,
    out: int,
    heads: int,
    kv_heads: int,
    key_size: int,
    value_size: int,
    block_size: int,
    scale: float,
    step: int,
    rows: int,
    scratch: int,
    share: int,
    shares: int,
) -> None:
    """Each row attends to its sequence up to itself. `scratch` holds a head's scores."""
    group = heads // kv_heads
    for item in range(share, rows * kv_heads, shares):
        row, kv_head = item // kv_heads, item % kv_heads
        length = get_integer(word(step + POSITIONS) + 4 * row) + 1
        table = table_of(step, row)
        for member in range(group):
            head = row * heads + kv_head * group + member
            own = q + 4 * key_size * head
            best = np.float32(-np.inf)
            for position in range(length):
                page = get_integer(table + 4 * (position // block_size))
                place = (page * kv_heads + kv_head) * block_size + position % block_size
                score = np.float32(dot(own, keys + 4 * key_size * place, key_size) * scale)
                put(scratch + 4 * position, score)
                best = max(best, score)
            weight = np.float32(0)
            for position in range(length):
                power = np.float32(math.exp(get(scratch + 4 * position) - best))
                put(scratch + 4 * position, power)
                weight += power
            target = out + 4 * value_size * head
            _mix(scratch, values, table, target, kv_heads, kv_head, value_size, block_size, length)
            for k in range(value_size):
                put(target + 4 * k, get(target + 4 * k) / weight)


@compiled(nogil=True)
def _mix(
    weights: int,
    values: int,
    table: int,
    target: int,
    kv_heads: int,
    kv_head: int,
    size: int,
    block_size: int,
    length: int,
) -> None:
    """The sum of a head's values, weighted."""
    whole = size // LANES
    for part in range(whole):
        mixed = splat(np.float32(0))
        for position in range(length):
            page = get_integer(table + 4 * (position // block_size))
            place = (page * kv_heads + kv_head) * block_size + position % block_size
            own = values + 4 * size * place + _BYTES * part
            mixed = fused(load(own), splat(get(weights + 4 * position)), mixed)
        store(target + _BYTES * part, mixed)
    for k in range(whole * LANES, size):
        rest = np.float32(0)
        for position in range(length):
            page = get_integer(table + 4 * (position // block_size))
            place = (page * kv_heads + kv_head) * block_size + position % block_size
            rest += get(values + 4 * (size * place + k)) * get(weights + 4 * position)
        put(target + 4 * k, rest)


@compiled(nogil=True)
def gate(a: int, b: int, out: int, count: int, share: int, shares: int) -> None:
    """silu(a) * b."""
    for k in range(count * share // shares, count * (share + 1) // shares):
        value = get(a + 4 * k)
        small = np.float32(math.exp(-abs(value)))
        one = np.float32(1)
        sigmoid = one / (one + small) if value >= 0 else small / (one + small)
        put(out + 4 * k, value * sigmoid * get(b + 4 * k))


@compiled(nogil=True)
def sum_of(a: int, b: int, out: int, count: int, share: int, shares: int) -> None:
    """a + b."""
    for k in range(count * share // shares, count * (share + 1) // shares):
        put(out + 4 * k, get(a + 4 * k) + get(b + 4 * k))


@compiled(nogil=True)
def add_bias(x: int, bias: int, width: int, rows: int, first: int, last: int) -> None:
    """Add a row to columns `first:last` of every row, in place."""
    for row in range(rows):
        for k in range(first, min(last, width)):
            at = x + 4 * (width * row + k)
            put(at, get(at) + get(bias + 4 * k))


@compiled(nogil=True)
def copy_rows(
    x: int, numbers: int, out: int, width: int, rows: int, share: int, shares: int
) -> None:
    """Chosen rows of x."""
    for row in range(share, rows, shares):
        source = x + 4 * width * get_integer(numbers + 4 * row)
        for k in range(width):
            put(out + 4 * (width * row + k), get(source + 4 * k))


@compiled(nogil=True)
def look_up(
    code: int,
    weight: int,
    tile_bytes: int,
    width: int,
    tokens: int,
    out: int,
    rows: int,
    scratch: int,
    share: int,
    shares: int,
) -> None:
    """Rows of a packed table: the tile is widened, and one lane of it taken."""
    for row in range(share, rows, shares):
        token = get_integer(tokens + 4 * row)
        widen_tile(code, weight + tile_bytes * (token // LANES), scratch, width)
        for k in range(width):
            put(out + 4 * (width * row + k), get(scratch + _BYTES * k + 4 * (token % LANES)))
