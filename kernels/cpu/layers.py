"""What stands between the products: norms, positions, activations, copies of rows.

Each function computes some of the work: a range of rows, of elements, or the items `first, first +
by, ...` before `last`.
"""

from __future__ import annotations

import math

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.matmul import silu_times
from raygraft.kernels.cpu.vector import (
    add,
    fused,
    get,
    load,
    multiply,
    put,
    splat,
    store,
    swap_pairs,
    total,
)
from raygraft.kernels.raw import call, get_integer


@compiled(nogil=True)
def _squares(x: int, size: int) -> float:
    """The sum of the squares of a row."""
    whole = size // LANES
    parts = splat(np.float32(0))
    for k in range(whole):
        one = load(x + FLOAT_BYTES * k)
        parts = fused(one, one, parts)
    result: float = total(parts)
    for k in range(whole * LANES, size):
        result += get(x + 4 * k) * get(x + 4 * k)
    return result


@compiled(nogil=True)
def norm(
    x: int, weight: int, out: int, width: int, epsilon: float, first: int, last: int, by: int
) -> None:
    """Root mean square norm of rows."""
    for row in range(first, last, by):
        own, target = x + 4 * width * row, out + 4 * width * row
        scale = np.float32(1.0 / math.sqrt(_squares(own, width) / width + epsilon))
        whole = width // LANES
        factor = splat(scale)
        for k in range(whole):
            scaled = multiply(load(own + FLOAT_BYTES * k), factor)
            store(target + FLOAT_BYTES * k, multiply(scaled, load(weight + FLOAT_BYTES * k)))
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
    row: int,
    head: int,
) -> None:
    """Rotary embedding of one head of a row.

    For each position `table` holds `rotated` cosines, then as many sines: x * cosine + partner *
    sine. A number's partner is its neighbour, or its like in the other half (`neox`).
    """
    at = x + 4 * head_size * (row * heads + head)
    target = out + 4 * head_size * (row * heads + head)
    cosines = table + 8 * rotated * get_integer(positions + 4 * row)
    sines = cosines + 4 * rotated
    half = rotated // 2
    k = 0
    if neox:
        if half % LANES == 0:
            for k in range(0, rotated, LANES):
                partner = load(at + 4 * (k + half if k < half else k - half))
                turned = multiply(load(at + 4 * k), load(cosines + 4 * k))
                store(target + 4 * k, fused(partner, load(sines + 4 * k), turned))
        else:
            for k in range(rotated):
                other = get(at + 4 * (k + half if k < half else k - half))
                value = get(at + 4 * k) * get(cosines + 4 * k) + other * get(sines + 4 * k)
                put(target + 4 * k, value)
    else:
        whole = rotated // LANES * LANES
        for k in range(0, whole, LANES):
            own = load(at + 4 * k)
            turned = multiply(own, load(cosines + 4 * k))
            store(target + 4 * k, fused(swap_pairs(own), load(sines + 4 * k), turned))
        for k in range(whole, rotated):
            value = get(at + 4 * k) * get(cosines + 4 * k) + get(at + 4 * (k ^ 1)) * get(
                sines + 4 * k
            )
            put(target + 4 * k, value)
    for k in range(rotated, head_size):
        put(target + 4 * k, get(at + 4 * k))


@compiled(nogil=True)
def gate(a: int, b: int, out: int, first: int, last: int) -> None:
    """silu(a) * b of elements `first:last`."""
    whole = first + (last - first) // LANES * LANES
    for k in range(first, whole, LANES):
        store(out + 4 * k, silu_times(load(a + 4 * k), load(b + 4 * k)))
    for k in range(whole, last):
        value = get(a + 4 * k)
        small = np.float32(math.exp(-abs(value)))
        one = np.float32(1)
        sigmoid = one / (one + small) if value >= 0 else small / (one + small)
        put(out + 4 * k, value * sigmoid * get(b + 4 * k))


@compiled(nogil=True)
def sum_of(a: int, b: int, out: int, first: int, last: int) -> None:
    """a + b of elements `first:last`."""
    whole = first + (last - first) // LANES * LANES
    for k in range(first, whole, LANES):
        store(out + 4 * k, add(load(a + 4 * k), load(b + 4 * k)))
    for k in range(whole, last):
        put(out + 4 * k, get(a + 4 * k) + get(b + 4 * k))


@compiled(nogil=True)
def copy_rows(x: int, numbers: int, out: int, width: int, first: int, last: int, by: int) -> None:
    """Chosen rows of x."""
    for row in range(first, last, by):
        source = x + 4 * width * get_integer(numbers + 4 * row)
        for k in range(width):
            put(out + 4 * (width * row + k), get(source + 4 * k))


@compiled(nogil=True)
def look_up(
    widen: int,
    weight: int,
    tile_bytes: int,
    width: int,
    tokens: int,
    out: int,
    scratch: int,
    first: int,
    last: int,
    by: int,
) -> None:
    """Rows of a packed table: the tile is widened, and one lane of it taken."""
    for row in range(first, last, by):
        token = get_integer(tokens + 4 * row)
        call(widen, (weight + tile_bytes * (token // LANES), width, scratch))
        for k in range(width):
            put(out + 4 * (width * row + k), get(scratch + FLOAT_BYTES * k + 4 * (token % LANES)))
