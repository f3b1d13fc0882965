"""From one row of logits to one token, in compiled code: what `reference/sampling.py` defines.

A token is known by its key, an int64 that is the larger the better the token is: the order of its
logit, then how low its id is. What the filters keep is found by a search for the place where the
best have a given weight together, which sorts nothing; the draw is the same search by id.
"""

from __future__ import annotations

import math

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.philox import uniform_number
from raygraft.kernels.cpu.vector import (
    add,
    bits_of,
    exponential,
    get,
    get_double,
    larger,
    largest,
    load,
    multiply,
    put,
    put_double,
    splat,
    total,
    where_at_least,
)
from raygraft.kernels.raw import copy_bytes, get_integer, put_word, word

SUMMED = 256
"""Powers that are summed in float32; such sums are summed in float64."""
_BLOCK = 64
NO_WEIGHTS = 0
_LAST_ID = 0xFFFFFFFF
_COLDEST = 1e-30
_NEAR = 4.0
"""How far below the best logit top-p looks for candidates first. As far as _FAR are all."""
_FAR = 64.0
_STEP, _LEAST = 2.3e-16, 5e-324
"""Of a double to the next one: relative, and from 0."""


def scratch_bytes(width: int) -> int:
    """Memory that a row of so many logits is drawn with: a copy, then keys, then weights."""
    return 4 * (width + LANES) + 2 * 8 * (width + LANES)


@compiled(nogil=True)
def draw(x: int, width: int, row: int, highest: float, powers: float, scratch: int) -> int:
    """The token of a row of logits `x`; `row` is where its parameters lie.

    `highest` is the largest logit, `powers` the sum of exp(logit - highest).
    """
    best = np.float32(highest)
    if word(row + at.BIASED) > 0 or word(row + at.SEEN) > 0:
        copy_bytes(scratch, x, 4 * width)
        x = scratch
        _adjust(x, row)
        best = _highest(x, width)
        powers = _powers(x, width, best, np.float32(1), np.float32(-np.inf), NO_WEIGHTS)
    keys = scratch + 4 * (width + LANES)
    weights = keys + 8 * (width + LANES)
    temperature, min_p = get_double(row + at.TEMPERATURE), get_double(row + at.MIN_P)
    if temperature <= 0:
        return id_of(word(keys)) if _candidates(x, width, best, keys) > 0 else 0
    limit = np.float32(-np.inf)
    if min_p > 0:
        least = float(best) + math.log(min_p)
        limit = np.float32(least)
        if limit < least:
            limit += abs(limit) * np.float32(6e-8)  # the next one
    scale = np.float32(1 / max(temperature, _COLDEST))
    uniform = uniform_number(word(row + at.SEED), word(row + at.STREAM), word(row + at.POSITION))
    top_k, top_p = word(row + at.TOP_K), get_double(row + at.TOP_P)
    if 0 < top_k < width:
        kept = best_of(x, width, top_k, keys)
        if top_p < 1:
            kept = _nucleus(x, best, keys, weights, kept, top_p, -1.0)
    elif top_p < 1:
        near = _reaching(x, width, best, top_p * powers)
        kept = _candidates(x, width, near, keys)
        kept = _nucleus(x, best, keys, weights, kept, top_p, powers)
    else:
        whole = _powers(x, width, best, scale, limit, weights)
        return _token_at(x, width, best, scale, limit, weights, uniform * whole)
    return _draw_among(x, best, scale, limit, keys, weights, kept, uniform)


@compiled(nogil=True)
def best_of(x: int, width: int, count: int, keys: int) -> int:
    """Write the keys of the `count` best logits, in no order; how many there are.

    As many blocks as are wanted have a maximum of at least some number, so the best reach it too.
    """
    blocks = width // _BLOCK
    limit = np.float32(-np.inf)
    if count < blocks:
        for block in range(blocks):
            most = load(x + 4 * _BLOCK * block)
            for part in range(1, _BLOCK // LANES):
                most = larger(load(x + 4 * _BLOCK * block + FLOAT_BYTES * part), most)
            put_word(keys + 8 * block, _key(largest(most), block))
        keep_best(keys, NO_WEIGHTS, blocks, float(count))
        last = id_of(word(keys + 8 * (count - 1)))
        for k in range(_BLOCK * last, _BLOCK * (last + 1)):
            limit = max(limit, get(x + 4 * k))
    found = _candidates(x, width, limit, keys)
    return keep_best(keys, NO_WEIGHTS, found, float(count))


@compiled(nogil=True)
def _candidates(x: int, width: int, limit: np.float32, keys: int) -> int:
    """Write the keys of all logits that reach a limit, by id; how many there are."""
    found = 0
    whole = width // LANES * LANES
    for k in range(0, whole, LANES):
        if largest(load(x + 4 * k)) >= limit:
            for j in range(k, k + LANES):
                if get(x + 4 * j) >= limit:
                    put_word(keys + 8 * found, _key(get(x + 4 * j), j))
                    found += 1
    for j in range(whole, width):
        if get(x + 4 * j) >= limit:
            put_word(keys + 8 * found, _key(get(x + 4 * j), j))
            found += 1
    return found


@compiled(nogil=True)
def keep_best(keys: int, weights: int, count: int, goal: float) -> int:
    """Bring the fewest best to the front whose weights reach a goal together; how many they are.

    The last of them comes last, the others in no order; weights move with their keys. Without
    weights each has one. If the goal is out of reach all stay. (Hoare's search, "FIND", 1961.)
    """
    low, high = 0, count
    have = 0.0
    while low < high:
        pivot = _median(
            word(keys + 8 * low), word(keys + 8 * ((low + high) // 2)), word(keys + 8 * (high - 1))
        )
        some, end, place = 0.0, low, low
        for k in range(low, high):
            key = word(keys + 8 * k)
            if key > pivot:
                some += _weight(weights, k)
                _swap(keys, weights, end, k)
                if place == end:
                    place = k
                end += 1
            elif key == pivot:
                place = k
        if end > low and have + some >= goal:
            high = end
            continue
        _swap(keys, weights, end, place)
        have += some + _weight(weights, end)
        low = end + 1
        if have >= goal:
            break
    return low


@compiled(nogil=True)
def id_of(key: int) -> int:
    """The token of a key."""
    return _LAST_ID - (key & _LAST_ID)


@compiled(nogil=True)
def _key(value: np.float32, number: int) -> int:
    bits: int = bits_of(value + np.float32(0))  # -0 is 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order << 32) + (_LAST_ID - number)


@compiled(nogil=True)
def _median(a: int, b: int, c: int) -> int:
    return max(min(a, b), min(max(a, b), c))


@compiled(nogil=True)
def _weight(weights: int, k: int) -> float:
    return get_double(weights + 8 * k) if weights != NO_WEIGHTS else 1.0


@compiled(nogil=True)
def _swap(keys: int, weights: int, i: int, k: int) -> None:
    key = word(keys + 8 * i)
    put_word(keys + 8 * i, word(keys + 8 * k))
    put_word(keys + 8 * k, key)
    if weights != NO_WEIGHTS:
        weight = get_double(weights + 8 * i)
        put_double(weights + 8 * i, get_double(weights + 8 * k))
        put_double(weights + 8 * k, weight)


@compiled(nogil=True)
def _adjust(x: int, row: int) -> None:
    """Add the row's bias, then penalise the ids that it has seen."""
    ids, values = word(row + at.BIAS_IDS), word(row + at.BIAS_VALUES)
    for k in range(word(row + at.BIASED)):
        logit = x + 4 * get_integer(ids + 4 * k)
        put(logit, get(logit) + get(values + 4 * k))
    ids, counts = word(row + at.SEEN_IDS), word(row + at.SEEN_COUNTS)
    penalty = np.float32(get_double(row + at.REPEAT_PENALTY))
    frequency, presence = (
        np.float32(get_double(row + at.FREQUENCY_PENALTY)),
        np.float32(get_double(row + at.PRESENCE_PENALTY)),
    )
    for k in range(word(row + at.SEEN)):
        logit = x + 4 * get_integer(ids + 4 * k)
        value = get(logit)
        value = value / penalty if value > 0 else value * penalty
        count = np.float32(get_integer(counts + 4 * k))
        put(logit, value - (count * frequency + presence))


@compiled(nogil=True)
def _highest(x: int, width: int) -> np.float32:
    whole = width // LANES * LANES
    most = splat(np.float32(-np.inf))
    for k in range(0, whole, LANES):
        most = larger(load(x + 4 * k), most)
    highest: np.float32 = largest(most)
    for k in range(whole, width):
        highest = max(highest, get(x + 4 * k))
    return highest


@compiled(nogil=True)
def _powers(
    x: int, width: int, best: np.float32, scale: np.float32, limit: np.float32, sums: int
) -> float:
    """The sum of exp((logit - best) * scale) over logits that reach a limit.

    `sums` takes the sum of each run of `SUMMED`, and of what is left of whole vectors.
    """
    whole = width // LANES * LANES
    least, down, factor = splat(limit), splat(-best), splat(scale)
    powers, run = 0.0, 0
    for begin in range(0, whole, SUMMED):
        some = splat(np.float32(0))
        for k in range(begin, min(begin + SUMMED, whole), LANES):
            logits = load(x + 4 * k)
            power = exponential(multiply(add(logits, down), factor))
            some = add(some, where_at_least(logits, least, power))
        own = float(total(some))
        if sums != NO_WEIGHTS:
            put_double(sums + 8 * run, own)
        run += 1
        powers += own
    own = 0.0
    for k in range(whole, width):
        if get(x + 4 * k) >= limit:
            own += math.exp((get(x + 4 * k) - best) * scale)
    if sums != NO_WEIGHTS:
        put_double(sums + 8 * run, own)
    return powers + own


@compiled(nogil=True)
def _token_at(
    x: int,
    width: int,
    best: np.float32,
    scale: np.float32,
    limit: np.float32,
    sums: int,
    target: float,
) -> int:
    """Where the powers, summed by id, exceed a target; the sums of runs are given."""
    whole = width // LANES * LANES
    runs = -(-whole // SUMMED)
    found = 0
    for run in range(runs + 1):
        own = get_double(sums + 8 * run)
        if own > 0:
            found = run
            if own > target:
                break
            target -= own
    begin, end = whole, width
    if found < runs:
        begin, end = SUMMED * found, min(SUMMED * (found + 1), whole)
    token = begin
    for k in range(begin, end):
        if get(x + 4 * k) >= limit:
            token = k
            target -= math.exp((get(x + 4 * k) - best) * scale)
            if target < 0:
                break
    return token


@compiled(nogil=True)
def _reaching(x: int, width: int, best: np.float32, goal: float) -> np.float32:
    """A limit, so that the powers of the logits that reach it have a goal as their sum or more."""
    distance = _NEAR
    while distance < _FAR:
        limit = np.float32(best - distance)
        if _powers(x, width, best, np.float32(1), limit, NO_WEIGHTS) >= goal:
            return limit
        distance *= 2
    return np.float32(-np.inf)


@compiled(nogil=True)
def _nucleus(
    x: int, best: np.float32, keys: int, weights: int, count: int, top_p: float, powers: float
) -> int:
    """Keep the best that together reach this share of `powers`, or of their own if that is 0."""
    own = 0.0
    for k in range(count):
        power = math.exp(get(x + 4 * id_of(word(keys + 8 * k))) - best)
        put_double(weights + 8 * k, power)
        own += power
    return keep_best(keys, weights, count, top_p * (powers if powers > 0 else own))


@compiled(nogil=True)
def _draw_among(
    x: int,
    best: np.float32,
    scale: np.float32,
    limit: np.float32,
    keys: int,
    weights: int,
    count: int,
    uniform: float,
) -> int:
    """Draw one of these tokens, if it reaches the limit. The keys are lost."""
    kept, powers = 0, 0.0
    for k in range(count):
        key = word(keys + 8 * k)
        logit = get(x + 4 * id_of(key))
        if logit >= limit:
            power = math.exp((logit - best) * scale)
            put_word(keys + 8 * kept, key & _LAST_ID)  # the larger, the lower the id
            put_double(weights + 8 * kept, power)
            powers += power
            kept += 1
    target = uniform * powers
    kept = keep_best(keys, weights, kept, target + target * _STEP + _LEAST)  # to exceed it
    return id_of(word(keys + 8 * (kept - 1))) if kept > 0 else 0
