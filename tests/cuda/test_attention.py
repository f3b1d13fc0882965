"""Attention over the paged cache against float64, and the cache's pages."""

import numpy as np
import pytest
from checked_runs import FLOATS, HALVES, inputs_of, load, runs
from single_operators import Given, error, step_of, subgraph_of

from raygraft.graph.capability import Limits
from raygraft.graph.operators import KeyValueState, Operator
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.kernels.reference.operators import rope

pytestmark = pytest.mark.gpu

TABLES = [
    [9, 4, 7, 1, 30, 31, 32, 33],
    [0, 12, 3, 8, 20, 21, 22, 23],
    [5, 11, 2, 6, 24, 25, 26, 27],
]


def ragged_steps():
    """Prompts of unlike length, single rows, a prompt beside rows that go on, on shuffled pages."""
    yield step_of([list(range(70)), list(range(3)), list(range(21))], TABLES)
    yield step_of([[70], [3], [21]], TABLES)
    yield step_of([[71], list(range(4, 30)), [22, 23, 24]], TABLES)
    yield step_of([list(range(72, 110)), [30], [25]], TABLES)
    yield step_of([[110]], TABLES[:1])


class ExactAttention:
    """Attention in float64, with keys and values rounded as the cache rounds them."""

    def __init__(self, heads, kv_heads, cache_type):
        self.heads, self.kv_heads = heads, kv_heads
        self.dtype = {"f32": np.float32, "f16": np.float16}[cache_type]
        self.seen = {}

    def __call__(self, step, q, k, v, scale):
        out = []
        for row in range(step.rows):
            past = self.seen.setdefault(int(step.sequence[row]), ([], []))
            for kept, new in zip(past, (k[row], v[row]), strict=True):
                del kept[step.positions[row] :]
                kept.append(new.astype(self.dtype).astype(np.float64).reshape(self.kv_heads, -1))
            keys, values = (np.repeat(np.stack(x), self.heads // self.kv_heads, 1) for x in past)
            own = q[row].astype(np.float64).reshape(self.heads, -1)
            scores = np.einsum("hd,thd->ht", own, keys) * scale
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out.append(np.einsum("ht,thd->hd", weights, values).reshape(-1))
        return np.array(out)


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_size", "value_size"),
    [(9, 3, 64, 64), (32, 8, 128, 128), (4, 4, 16, 16), (5, 1, 33, 20), (8, 2, 80, 80),
     (2, 1, 200, 256)],
)  # fmt: skip
def test_attention(backend, heads, kv_heads, key_size, value_size, cache_type):
    random = np.random.default_rng(heads)
    widths = {
        "q": heads * key_size, "k": kv_heads * key_size, "v": kv_heads * value_size,
        "y": heads * value_size,
    }  # fmt: skip
    scale = key_size**-0.5
    attributes = (("heads", heads), ("kv_heads", kv_heads), ("scale", scale))
    state = KeyValueState("s", kv_heads, key_size, value_size)
    operator = Operator("a", "attention", ("q", "k", "v"), ("y",), (), attributes, state)
    runner = load(backend, [operator], widths, {}, cache_type)
    exact = ExactAttention(heads, kv_heads, cache_type)
    for step in ragged_steps():
        inputs = {
            n: random.standard_normal((step.rows, widths[n])).astype(np.float32) for n in "qkv"
        }
        right = exact(step, inputs["q"], inputs["k"], inputs["v"], scale)
        bound = FLOATS if step.rows <= 16 else HALVES if cache_type == "f16" else 1e-4
        for found in runs(backend, runner, step, inputs):
            assert error(found["y"], right) < bound, step.rows


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (3, 1, 64), (2, 1, 200)])
def test_attention_over_contexts_of_any_length(backend, heads, kv_heads, size, cache_type):
    """One share of a context, several, all; alone and beside others."""
    random = np.random.default_rng(size)
    widths = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size, "y": heads * size}
    attributes = (("heads", heads), ("kv_heads", kv_heads), ("scale", size**-0.5))
    state = KeyValueState("s", kv_heads, size, size)
    operator = Operator("a", "attention", ("q", "k", "v"), ("y",), (), attributes, state)
    limits = Limits(max_rows=128, context=4096, cache_type=cache_type, max_sequences=4)
    runner = backend.load(subgraph_of([operator], widths, ()), Given(), limits)
    runner.allocate_state(1000, 16)
    pages = random.permutation(1000)[:800].reshape(4, 200).tolist()
    exact, content = ExactAttention(heads, kv_heads, cache_type), {}
    positions = (40, 767, 768, 3100)
    dtype = {"f32": np.float32, "f16": np.float16}[cache_type]
    for sequence in range(4):
        shape = (2, 200, kv_heads, 16, size)
        keys, values = random.standard_normal(shape).astype(dtype)
        runner.import_state("a", pages[sequence], (keys, values))
        rows = (x.transpose(0, 2, 1, 3).reshape(3200, -1) for x in (keys, values))
        content[sequence] = [list(x.astype(np.float64).reshape(3200, kv_heads, -1)) for x in rows]
    for chosen in ([0], [1], [2], [3], [3, 0, 1], [2, 3, 1, 0]):
        step = step_of([[positions[s]] for s in chosen], [pages[s] for s in chosen])
        exact.seen = {row: tuple(map(list, content[s])) for row, s in enumerate(chosen)}
        inputs = {
            n: random.standard_normal((step.rows, widths[n])).astype(np.float32) for n in "qkv"
        }
        right = exact(step, inputs["q"], inputs["k"], inputs["v"], size**-0.5)
        for found in runs(backend, runner, step, inputs):
            assert error(found["y"], right) < FLOATS, chosen


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_pages_go_from_one_runner_to_other_pages_of_another(backend, cache_type):
    random = np.random.default_rng(9)
    attributes = (("heads", 2), ("kv_heads", 1), ("scale", 0.3))
    state = KeyValueState("s", 1, 20, 24)
    operator = Operator("a", "attention", ("q", "k", "v"), ("y",), (), attributes, state)
    widths = {"q": 40, "k": 20, "v": 24, "y": 48}
    one, other = (load(backend, [operator], widths, {}, cache_type) for _ in range(2))
    steps = [list(range(37)), [37]]
    for positions in steps:
        inputs = inputs_of(random, len(positions), {name: widths[name] for name in "qkv"})
        expected = one.run(step_of([positions], [[3, 1, 7]]), inputs)["y"]
        if len(positions) > 1:
            other.import_state("a", [0, 8, 2], one.export_state("a", [3, 1, 7]))
    assert np.array_equal(other.run(step_of([[37]], [[0, 8, 2]]), inputs)["y"], expected)


def test_rotated_attention_is_rotation_then_attention(backend):
    random = np.random.default_rng(8)
    heads, kv_heads, size = 6, 2, 24
    rotary = RotaryEmbedding(heads, 20, 10000.0, "interleaved")
    key_rotary = RotaryEmbedding(kv_heads, 20, 10000.0, "interleaved")
    widths = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
    widths |= {"qr": heads * size, "kr": kv_heads * size, "y": heads * size}
    attributes = (("heads", heads), ("kv_heads", kv_heads), ("scale", 0.3))
    state = KeyValueState("s", kv_heads, size, size)
    operators = [
        Operator("rq", "rope", ("q",), ("qr",), (), rotary.attributes()),
        Operator("rk", "rope", ("k",), ("kr",), (), key_rotary.attributes()),
        Operator("a", "attention", ("qr", "kr", "v"), ("y",), (), attributes, state),
    ]
    runner = load(backend, operators, widths, {})
    exact = ExactAttention(heads, kv_heads, "f32")
    for step in ragged_steps():
        inputs = inputs_of(random, step.rows, {name: widths[name] for name in "qkv"})
        q = rope(inputs["q"].astype(np.float64), step.positions, rotary)
        k = rope(inputs["k"].astype(np.float64), step.positions, key_rotary)
        right = exact(step, q, k, inputs["v"], 0.3)
        for found in runs(backend, runner, step, inputs):
            assert error(found["y"], right) < (5e-5 if step.rows <= 16 else 1e-4), step.rows
