"""Every operator of the vocabulary but `sample`, each as the formula it stands for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Ints, Step
from raygraft.kernels.reference.cache import PagedCache

Matrix = NDArray[np.float32]


def rms_norm(x: Matrix, weight: Matrix, epsilon: float) -> Matrix:
    """x / sqrt(mean(x^2) + epsilon) * weight, per row (https://arxiv.org/abs/1910.07467)."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(epsilon)) * weight)


def matmul(x: Matrix, weight: Matrix, bias: Matrix | None = None) -> Matrix:
    """x @ weight.T + bias, with weight `[outputs, inputs]`."""
    y = x @ weight.T
    return y if bias is None else y + bias


def rope(
    x: Matrix, positions: Ints, rotary: RotaryEmbedding, factors: Matrix | None = None
) -> Matrix:
    """Rotate pairs of each head by angles that grow with the position."""
    angles = positions[:, None] * rotary.frequencies(factors)
    cosine = (np.cos(angles) * rotary.magnitude).astype(np.float32)[:, None, :]
    sine = (np.sin(angles) * rotary.magnitude).astype(np.float32)[:, None, :]
    rotated = x.reshape(len(x), rotary.heads, -1).copy()
    half = rotary.size // 2
    if rotary.style == "interleaved":
        first, second = slice(0, rotary.size, 2), slice(1, rotary.size, 2)
    else:
        first, second = slice(0, half), slice(half, rotary.size)
    a, b = rotated[..., first].copy(), rotated[..., second].copy()
    rotated[..., first] = a * cosine - b * sine
    rotated[..., second] = a * sine + b * cosine
    return rotated.reshape(x.shape)


def swiglu(gate: Matrix, up: Matrix) -> Matrix:
    """silu(gate) * up. The sigmoid is written so that exp never overflows."""
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1 / (1 + small), small / (1 + small))
    return np.asarray(gate * sigmoid * up)


def softmax(x: Matrix) -> Matrix:
    """Along the last axis."""
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.asarray(powers / np.sum(powers, axis=-1, keepdims=True))


def attention(
    q: Matrix, k: Matrix, v: Matrix, *, step: Step, cache: PagedCache, heads: int, scale: float
) -> Matrix:
    """Write k and v to the cache, then let every row attend to its sequence up to itself."""
    output = np.empty((len(q), heads * cache.values.shape[-1]), np.float32)
    for number in np.unique(step.sequence):
        rows = np.flatnonzero(step.sequence == number)
        table, positions = step.block_tables[number], step.positions[rows]
        cache.write(table, positions, k[rows], v[rows])
        keys, values = cache.read(table, int(positions[-1]) + 1)
        output[rows] = _attend(q[rows], keys, values, positions, heads, scale)
    return output


def _attend(
    q: Matrix, keys: Matrix, values: Matrix, positions: Ints, heads: int, scale: float
) -> Matrix:
    """One sequence: q `[rows, heads * size]`, keys and values `[length, kv_heads, size]`."""
    rows, (length, kv_heads, size) = len(q), keys.shape
    group = heads // kv_heads  # query heads that share a key-value head
    queries = q.reshape(rows, kv_heads, group, size).transpose(1, 2, 0, 3)
    scores = queries @ keys.transpose(1, 2, 0)[:, None] * np.float32(scale)
    future = np.arange(length) > positions[:, None]
    weights = softmax(np.where(future, -np.inf, scores))
    mixed = weights @ values.transpose(1, 0, 2)[:, None]
    return mixed.transpose(2, 0, 1, 3).reshape(rows, -1)
