"""Sampling: from logits to token ids and log probabilities.

The filters stand in llama.cpp's order: bias and penalties, top-k, top-p, min-p, temperature. Of
equal logits the lower id is the better one. A draw is the inverse of the cumulative distribution
over the kept tokens, in the order of their ids, at a Philox number
(https://www.thesalmons.org/john/random123/papers/random123sc11.pdf) keyed by (seed, stream) with
the position as its counter. In that order logits that are off by a little move the borders between
tokens by a little; best first, two of them might change places.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.step import Ints, Sampling

Logits = NDArray[np.float32]

_BLOCK = 64


def log_total(logits: Logits) -> float:
    """What is subtracted from logits to make them log probabilities, summed in float64."""
    highest = np.max(logits)
    return float(highest) + float(np.log(np.sum(np.exp(logits - highest), dtype=np.float64)))


def sample(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[Ints, NDArray[np.float32], Ints, NDArray[np.float32]]:
    """Token ids `[rows, 1]`, their log probabilities, and the best ones with theirs `[rows, n]`.

    Log probabilities are those of the model, before bias, penalties and filters. `n` is the most
    that any row wants; rows that want fewer are filled with id -1.
    """
    rows, wanted = len(logits), int(max(sampling.logprobs, default=0))
    ids = np.empty((rows, 1), np.int32)
    chosen = np.empty((rows, 1), np.float32)
    best_ids = np.full((rows, wanted), -1, np.int32)
    best = np.full((rows, wanted), -np.inf, np.float32)
    for row in range(rows):
        raw = logits[row]
        total = log_total(raw)
        token = _draw(_adjusted(raw, sampling, row), sampling, row)
        ids[row], chosen[row] = token, float(raw[token]) - total
        if count := int(sampling.logprobs[row]):
            top = _best(raw, count)
            best_ids[row, : len(top)], best[row, : len(top)] = (
                top,
                raw[top].astype(np.float64) - total,
            )
    return ids, chosen, best_ids, best


def _best(x: Logits, count: int) -> NDArray[np.intp]:
    """Indices of the largest `count` elements, best first, equal ones by index."""
    candidates = _candidates(x, count)
    return candidates[np.argsort(-x[candidates], kind="stable")][:count]


def _candidates(x: Logits, count: int) -> NDArray[np.intp]:
    """Indices, ascending, among which are those of the largest `count` elements.

    As many blocks as wanted elements have a maximum of at least `least`, so the largest elements
    reach it too: the vocabulary is read once, and little of it is sorted.
    """
    blocks = len(x) // _BLOCK
    if count >= blocks:
        return np.arange(len(x))
    highest = np.max(x[: blocks * _BLOCK].reshape(blocks, _BLOCK), axis=1)
    least = np.partition(highest, blocks - count)[blocks - count]
    return np.flatnonzero(x >= least)


def _softmax(x: Logits) -> NDArray[np.float64]:
    powers = np.exp(x.astype(np.float64) - np.max(x))
    return np.asarray(powers / np.sum(powers))


def _adjusted(logits: Logits, sampling: Sampling, row: int) -> Logits:
    """Logits with the row's bias and its penalties for ids in its history."""
    start, stop = sampling.bias_start[row : row + 2]
    if stop > start:
        logits = logits.copy()
        logits[sampling.bias_ids[start:stop]] += sampling.bias_values[start:stop]
    start, stop = sampling.history_start[row : row + 2]
    if stop > start:
        logits = logits.copy()
        seen, counts = np.unique(sampling.history[start:stop], return_counts=True)
        penalty = float(sampling.repeat_penalty[row])
        values = logits[seen]
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= counts * sampling.frequency_penalty[row] + sampling.presence_penalty[row]
        logits[seen] = values
    return logits


def _draw(logits: Logits, sampling: Sampling, row: int) -> int:
    temperature = float(sampling.temperature[row])
    if temperature <= 0:
        return int(np.argmax(logits))
    kept = np.sort(_kept(logits, sampling, row))
    cumulative = np.cumsum(_softmax(logits[kept] / np.float32(temperature)))
    target = _uniform(sampling, row) * cumulative[-1]
    return int(kept[min(int(np.searchsorted(cumulative, target, side="right")), len(kept) - 1)])


def _kept(logits: Logits, sampling: Sampling, row: int) -> NDArray[np.intp]:
    """Ids that the filters leave."""
    top_k, top_p = int(sampling.top_k[row]), float(sampling.top_p[row])
    kept = np.arange(len(logits))
    if top_k > 0 or top_p < 1:
        kept = _best(logits, top_k if top_k > 0 else len(logits))
    probabilities = _softmax(logits[kept])
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        kept, probabilities = kept[:keep], probabilities[:keep]
    likely = probabilities >= sampling.min_p[row] * np.max(probabilities)
    return np.asarray(kept[likely])


def _uniform(sampling: Sampling, row: int) -> float:
    """A number in [0, 1) that only depends on seed, stream and position."""
    key = np.array([sampling.seed[row], sampling.stream[row]], np.int64).view(np.uint64)
    generator = np.random.Philox(key=key, counter=[int(sampling.position[row]), 0, 0, 0])
    return float(np.random.Generator(generator).random())
