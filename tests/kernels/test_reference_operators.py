"""The reference operators against plain loops in float64."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from raygraft.graph.operators import KeyValueState
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Sampling, Step
from raygraft.kernels.reference import operators
from raygraft.kernels.reference.cache import PagedCache

NOTHING_SAMPLED = Sampling(*(np.zeros(0, np.int32) for _ in fields(Sampling)))


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(scale: float) -> None:
    x, weight, epsilon = normal(0, 3, 8) * np.float32(scale), normal(1, 8), 1e-5
    expected = np.empty((3, 8))
    for row in range(3):
        mean_square = sum(float(value) ** 2 for value in x[row]) / 8
        for column in range(8):
            expected[row, column] = x[row, column] / math.sqrt(mean_square + epsilon)
            expected[row, column] *= weight[column]
    found = operators.rms_norm(x, weight, epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_rms_norm_of_zeros() -> None:
    found = operators.rms_norm(np.zeros((2, 4), np.float32), np.ones(4, np.float32), 1e-6)
    np.testing.assert_array_equal(found, np.zeros((2, 4)))


@pytest.mark.parametrize("bias", [None, normal(9, 5)])
def test_matmul(bias: NDArray[np.float32] | None) -> None:
    x, weight = normal(2, 3, 7), normal(3, 5, 7)
    expected = np.zeros((3, 5)) if bias is None else np.tile(bias.astype(float), (3, 1))
    for row in range(3):
        for output in range(5):
            for column in range(7):
                expected[row, output] += float(x[row, column]) * float(weight[output, column])
    np.testing.assert_allclose(operators.matmul(x, weight, bias), expected, rtol=1e-5, atol=1e-6)


ROTARIES = {
    "plain": {},
    "part of a head": {"size": 8},
    "linear": {"scaling": "linear", "factor": 4.0},
    "yarn": {"scaling": "yarn", "factor": 4.0, "original_context": 64},
    "yarn, other betas": {
        "scaling": "yarn",
        "factor": 40.0,
        "original_context": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 0.75,
    },
}


def angle_and_magnitude(
    rotary: RotaryEmbedding, position: int, pair: int, factor: float
) -> tuple[float, float]:
    """As llama.cpp computes them, pair by pair (`rope_yarn` of its CPU backend)."""
    plain = position * rotary.base ** (-2.0 * pair / rotary.size) / factor
    if rotary.scaling == "none":
        return plain, 1.0
    interpolated = plain / rotary.factor
    if rotary.scaling == "linear":
        return interpolated, 1.0

    def corrected(beta: float) -> float:
        turns = rotary.original_context / (beta * 2 * math.pi)
        return rotary.size * math.log(turns) / (2 * math.log(rotary.base))

    low = max(0, math.floor(corrected(rotary.beta_fast)))
    high = min(rotary.size - 1, math.ceil(corrected(rotary.beta_slow)))
    mix = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
    magnitude = rotary.attention_factor * (1 + 0.1 * math.log(rotary.factor))
    return interpolated * (1 - mix) + plain * mix, magnitude


@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("style", ["interleaved", "neox"])
@pytest.mark.parametrize("scaling", ROTARIES)
def test_rope(style: str, scaling: str, with_factors: bool) -> None:
    plain = RotaryEmbedding(heads=3, size=16, base=10000.0, style=style)
    rotary = replace(plain, **ROTARIES[scaling])
    half, positions = rotary.size // 2, np.array([0, 1, 5, 130], np.int32)
    factors = np.linspace(1, 8, half, dtype=np.float32)
    x = normal(4, len(positions), 3 * 16)
    expected = x.astype(np.float64).reshape(len(positions), 3, 16)
    for row, position in enumerate(positions):
        for head in range(3):
            for pair in range(half):
                factor = float(factors[pair]) if with_factors else 1.0
                angle, magnitude = angle_and_magnitude(rotary, int(position), pair, factor)
                neox = style == "neox"
                i, j = (pair, pair + half) if neox else (2 * pair, 2 * pair + 1)
                a, b = expected[row, head, i], expected[row, head, j]
                expected[row, head, i] = magnitude * (a * math.cos(angle) - b * math.sin(angle))
                expected[row, head, j] = magnitude * (a * math.sin(angle) + b * math.cos(angle))
    before = x.copy()
    found = operators.rope(x, positions, rotary, factors if with_factors else None)
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, before)  # the input may be a residual: it stays


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    """Whoever turns more than 32 times within the trained context stays as it was."""
    plain = RotaryEmbedding(heads=1, size=128, base=10000.0, style="neox")
    yarn = replace(plain, scaling="yarn", factor=8.0, original_context=4096)
    turns = plain.frequencies() * 4096 / (2 * math.pi)
    ratio = yarn.frequencies() / plain.frequencies()
    np.testing.assert_allclose(ratio[turns > 40], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 8)
    assert np.all(np.diff(ratio) <= 1e-12)
    assert yarn.magnitude == pytest.approx(1.2079, abs=1e-4)  # 0.1 ln 8 + 1


def test_attributes_round_trip() -> None:
    for options in ROTARIES.values():
        rotary = replace(RotaryEmbedding(2, 16, 5e5, "neox"), **options)
        assert RotaryEmbedding.from_attributes(rotary.attributes()) == rotary


def test_swiglu_extremes() -> None:
    """Nothing overflows on the way; the sigmoid of a large negative number is 0."""
    gate = np.array([[-1e30, -1e4, -104, -88, -1, -0.0, 1e-30, 1, 88, 1e4, 1e30]], np.float32)
    up = np.full_like(gate, 3)
    expected = []
    for value in gate[0].astype(float):
        silu = value / (1 + math.exp(-value)) if value > -700 else 0.0
        expected.append(3 * silu)
    np.testing.assert_allclose(operators.swiglu(gate, up)[0], expected, rtol=1e-6, atol=1e-37)


def test_softmax_extremes() -> None:
    x = np.array([[1e30, 0, -np.inf, -1e30], [0, 0, -np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(operators.softmax(x), [[1, 0, 0, 0], [0.5, 0.5, 0, 0]])


HEADS, KV_HEADS, KEY_SIZE, VALUE_SIZE, SCALE = 6, 2, 8, 4, 0.3
STATE = KeyValueState("core", KV_HEADS, KEY_SIZE, VALUE_SIZE)


class Conversation:
    """The queries, keys and values of one whole sequence, and its pages."""

    def __init__(self, seed: int, length: int, pages: list[int]) -> None:
        self.q = normal(seed, length, HEADS * KEY_SIZE)
        self.k = normal(seed + 1, length, KV_HEADS * KEY_SIZE)
        self.v = normal(seed + 2, length, KV_HEADS * VALUE_SIZE)
        self.pages = pages
        self.done = 0

    @property
    def left(self) -> int:
        return len(self.q) - self.done

    def attended(self) -> NDArray[np.float64]:
        """What every row must attend to, in loops."""
        queries = self.q.astype(np.float64).reshape(-1, HEADS, KEY_SIZE)
        keys = self.k.astype(np.float64).reshape(-1, KV_HEADS, KEY_SIZE)
        values = self.v.astype(np.float64).reshape(-1, KV_HEADS, VALUE_SIZE)
        result = np.zeros((len(queries), HEADS, VALUE_SIZE))
        for row in range(len(queries)):
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                scores = [SCALE * queries[row, head] @ keys[n, shared] for n in range(row + 1)]
                powers = [math.exp(score - max(scores)) for score in scores]
                for n, power in enumerate(powers):
                    result[row, head] += power / sum(powers) * values[n, shared]
        return result.reshape(len(queries), -1)


def ragged_step(conversations: list[Conversation], rows: list[int], order: list[int]) -> Step:
    """The next `rows` of each conversation, which come in any `order` of conversations."""
    table = np.full((len(conversations), max(len(c.pages) for c in conversations)), -1, np.int32)
    for number, conversation in enumerate(conversations):
        table[number, : len(conversation.pages)] = conversation.pages
    ranges = [range(c.done, c.done + n) for c, n in zip(conversations, rows, strict=True)]
    positions = [position for number in order for position in ranges[number]]
    owners = [number for number in order for _ in ranges[number]]
    return Step(
        tokens=np.zeros(len(owners), np.int32),
        positions=np.array(positions, np.int32),
        sequence=np.array(owners, np.int32),
        block_tables=table,
        logit_rows=np.zeros(0, np.int32),
        sampling=NOTHING_SAMPLED,
    )


def run_step(cache: PagedCache, conversations: list[Conversation], step: Step) -> None:
    """One step through the operator, held against the loops."""
    places = list(zip(step.sequence.tolist(), step.positions.tolist(), strict=True))
    q, k, v = (
        np.stack([getattr(conversations[owner], name)[position] for owner, position in places])
        for name in "qkv"
    )
    found = operators.attention(q, k, v, step=step, cache=cache, heads=HEADS, scale=SCALE)
    expected = np.stack([conversations[owner].attended()[position] for owner, position in places])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@given(data=st.data())
def test_attention_over_shuffled_pages_in_ragged_batches(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    needed = [-(-length // block_size) for length in lengths]
    pages = data.draw(st.permutations(range(sum(needed) + 2)))
    conversations = []
    for number, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        conversations.append(Conversation(10 * number, length, pages[:count]))
        pages = pages[count:]
    cache = PagedCache(STATE, sum(needed) + 2, block_size)
    while any(conversation.left for conversation in conversations):
        rows = [data.draw(st.integers(0, conversation.left)) for conversation in conversations]
        if not any(rows):
            rows = [conversation.left for conversation in conversations]
        order = data.draw(st.permutations(range(len(conversations))))
        run_step(cache, conversations, ragged_step(conversations, rows, order))
        for conversation, count in zip(conversations, rows, strict=True):
            conversation.done += count


def test_rows_of_two_sequences_may_alternate() -> None:
    conversations = [Conversation(0, 3, [2]), Conversation(50, 3, [0])]
    step = ragged_step(conversations, [3, 3], [0, 1])
    mixed = np.array([3, 0, 4, 1, 2, 5])
    alternating = replace(step, positions=step.positions[mixed], sequence=step.sequence[mixed])
    run_step(PagedCache(STATE, 3, 4), conversations, alternating)


def test_attention_ignores_what_a_page_held_before() -> None:
    cache = PagedCache(STATE, 2, 4)
    cache.keys[:] = cache.values[:] = 1e6
    conversation = Conversation(0, 5, [1, 0])
    run_step(cache, [conversation], ragged_step([conversation], [5], [0]))


def test_cache_of_half_precision_rounds_keys_and_values() -> None:
    conversation = Conversation(0, 6, [1, 0])
    step = ragged_step([conversation], [6], [0])
    cache = PagedCache(STATE, 2, 4, "f16")
    assert cache.keys.dtype == cache.values.dtype == np.float16
    found = operators.attention(
        conversation.q, conversation.k, conversation.v,
        step=step, cache=cache, heads=HEADS, scale=SCALE,
    )  # fmt: skip
    conversation.k = conversation.k.astype(np.float16).astype(np.float32)
    conversation.v = conversation.v.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(found, conversation.attended(), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_cache_gives_back_what_was_written(cache_type: str) -> None:
    cache = PagedCache(STATE, 5, 4, cache_type)
    table = np.array([3, 1, 4, -1], np.int32)
    k = np.arange(10 * KV_HEADS * KEY_SIZE, dtype=np.float32).reshape(10, -1)
    v = np.arange(10 * KV_HEADS * VALUE_SIZE, dtype=np.float32).reshape(10, -1)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 10)):
        positions = np.arange(10, dtype=np.int32)[rows]
        cache.write(table, positions, k[rows], v[rows])
    for length in (1, 4, 5, 10):
        keys, values = cache.read(table, length)
        np.testing.assert_array_equal(keys.reshape(length, -1), k[:length])
        np.testing.assert_array_equal(values.reshape(length, -1), v[:length])
        assert keys.dtype == values.dtype == np.float32
    for untouched in (0, 2):
        assert not cache.keys[untouched].any()
        assert not cache.values[untouched].any()
