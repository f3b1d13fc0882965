"""Each kernel against float64, on odd sizes, with everything that it must write poisoned before."""

from dataclasses import replace

import numpy as np
import pytest
from sampled_rows import sampling_of
from single_operators import Given, block_of, error, greedy, quantised, step_of, subgraph_of

from raygraft.graph.capability import Limits
from raygraft.graph.operators import KeyValueState, Operator, Value
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Step
from raygraft.graph.tensors import WeightSlice
from raygraft.kernels import BackendOptions, create_backend
from raygraft.kernels.reference.operators import rope
from raygraft.kernels.reference.sampling import sample

pytestmark = pytest.mark.gpu

HALVES = 2e-3
FLOATS = 2e-5
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4",
)  # fmt: skip
ROWS = (1, 3, 4, 5, 8, 9, 16, 17, 70)
TABLES = [
    [9, 4, 7, 1, 30, 31, 32, 33],
    [0, 12, 3, 8, 20, 21, 22, 23],
    [5, 11, 2, 6, 24, 25, 26, 27],
]


def poison(backend):
    """Fill what kernels write with NaN. Packed values keep their filling, counters their zero."""
    for key, room in backend.shared.arena._slots.items():
        if key != "attention's counters" and not (isinstance(key, tuple) and key[0] == "packed"):
            room.fill(0xFF)
    backend._gpu.cupy.cuda.runtime.deviceSynchronize()


def runs(backend, runner, step, inputs):
    """Plainly, captured, and replayed, each with a fresh step and poisoned memory."""
    found = []
    for _ in range(3):
        copy = Step(*[getattr(step, name) for name in Step.__dataclass_fields__])
        found.append(runner.run(copy, {name: x.copy() for name, x in inputs.items()}))
        poison(backend)
    return found


def load(backend, operators, widths, weights, cache_type="f32", logits=()):
    limits = Limits(max_rows=128, context=128, cache_type=cache_type, max_sequences=4)
    subgraph = subgraph_of(operators, widths, logits)
    runner = backend.load(subgraph, Given(**weights), limits)
    if subgraph.states:
        runner.allocate_state(40, 16)
    return runner


def rows_step(rows, wanted=None):
    return step_of([list(range(rows))], [list(range(8))], wanted)


def product(name, x, y, weight, bias=""):
    roles = [("weight", WeightSlice(weight))]
    if bias:
        roles.append(("bias", WeightSlice(bias)))
    return Operator(name, "matmul", (x,), (y,), tuple(roles))


def exact_product(x, weight, bias=None):
    y = x.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    return y if bias is None else y + bias.dequantise()


def inputs_of(random, rows, widths):
    return {
        name: (random.standard_normal((rows, width)) * 3).astype(np.float32)
        for name, width in widths.items()
    }


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(37, 3), (256, 8), (1, 1), (16, 5)])
def test_products(backend, kind, shape):
    outputs, blocks = shape
    random = np.random.default_rng(outputs)
    columns = blocks * block_of(kind) + (5 if block_of(kind) == 1 else 0)
    weight = quantised(random.standard_normal((outputs, columns), np.float32), kind)
    bias = quantised(random.standard_normal(outputs, np.float32), "F32")
    widths = {"x": columns, "y": outputs}
    for own_bias in ("", "b"):
        operators = [product("m", "x", "y", "w", own_bias)]
        runner = load(backend, operators, widths, {"w": weight, "b": bias})
        for rows in ROWS:
            inputs = inputs_of(random, rows, {"x": columns})
            exact = exact_product(inputs["x"], weight, bias if own_bias else None)
            for found in runs(backend, runner, rows_step(rows), inputs):
                bound = FLOATS if kind == "F32" or rows <= 16 else HALVES
                assert error(found["y"], exact) < bound, (rows, own_bias)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "Q6_K"), ("F16", "Q8_0", "F16"), ("F32",) * 3])
def test_products_of_one_input_and_a_residual(backend, kinds):
    random = np.random.default_rng(2)
    weights = {
        f"w{n}": quantised(random.standard_normal((40 + 24 * n, 256), np.float32), kind)
        for n, kind in enumerate(kinds)
    }
    weights["last"] = quantised(random.standard_normal((30, 40), np.float32), "F16")
    operators = [product(f"m{n}", "x", f"y{n}", f"w{n}") for n in range(3)]
    operators += [product("o", "y0", "z", "last"), Operator("a", "add", ("r", "z"), ("sum",))]
    widths = {"x": 256, "y0": 40, "y1": 64, "y2": 88, "z": 30, "r": 30, "sum": 30}
    runner = load(backend, operators, widths, weights)
    for rows in (1, 7, 16, 33):
        inputs = inputs_of(random, rows, {"x": 256, "r": 30})
        exact = {f"y{n}": exact_product(inputs["x"], weights[f"w{n}"]) for n in range(3)}
        exact["sum"] = inputs["r"] + exact_product(exact["y0"], weights["last"])
        for found in runs(backend, runner, rows_step(rows), inputs):
            for name in ("y1", "y2", "sum"):
                assert error(found[name], exact[name]) < HALVES, (rows, name)


def exact_gate(gate, up):
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16", "F32", "Q5_1"])
def test_gated_products(backend, kind):
    random = np.random.default_rng(3)
    columns, inner = 2 * max(48, block_of(kind)), 256 + 32
    columns -= columns % block_of(kind)
    gate, up = (quantised(random.standard_normal((inner, columns), np.float32), kind) for _ in "ab")
    down = quantised(random.standard_normal((50, inner), np.float32), "Q8_0")
    bias = quantised(random.standard_normal(inner, np.float32), "F32")
    operators = [
        product("g", "x", "gate", "gw", "b"), product("u", "x", "up", "uw", "b"),
        Operator("s", "swiglu", ("gate", "up"), ("h",)), product("d", "h", "y", "dw"),
    ]  # fmt: skip
    widths = {"x": columns, "gate": inner, "up": inner, "h": inner, "y": 50}
    weights = {"gw": gate, "uw": up, "dw": down, "b": bias}
    runner = load(backend, operators, widths, weights)
    for rows in (1, 6, 13, 40):
        inputs = inputs_of(random, rows, {"x": columns})
        h = exact_gate(exact_product(inputs["x"], gate, bias), exact_product(inputs["x"], up, bias))
        exact = h @ down.dequantise().astype(np.float64).T
        for found in runs(backend, runner, rows_step(rows), inputs):
            assert error(found["y"], exact) < HALVES, rows


def test_activations_too_large_for_halves(backend):
    random = np.random.default_rng(4)
    weight = quantised(random.standard_normal((40, 64), np.float32), "Q8_0")
    operators = [
        Operator("s", "swiglu", ("g", "u"), ("h",)), product("m", "h", "y", "w"),
        Operator("a", "add", ("y", "r"), ("z",)),
    ]  # fmt: skip
    widths = {"g": 64, "u": 64, "h": 64, "y": 40, "r": 40, "z": 40}
    runner = load(backend, operators, widths, {"w": weight})
    inputs = inputs_of(random, 30, {"g": 64, "u": 64, "r": 40})
    inputs["g"][3] *= 1000
    inputs["u"][3] *= 1000
    h = exact_gate(inputs["g"].astype(np.float64).clip(-700), inputs["u"])
    exact = exact_product(h, weight) + inputs["r"]
    for found in runs(backend, runner, rows_step(30), inputs):
        for row in range(30):
            assert error(found["z"][row], exact[row]) < HALVES, row


@pytest.mark.parametrize("width", [1, 15, 64, 576, 4096, 5001])
def test_norms_sums_gates(backend, width):
    random = np.random.default_rng(width)
    weight = quantised(random.standard_normal(width, np.float32), "F32")
    norm = Operator(
        "n", "rms_norm", ("a",), ("y",), (("weight", WeightSlice("w")),), (("epsilon", 1e-5),)
    )
    widths = dict.fromkeys("aby", width)
    for rows in (1, 5, 30):
        inputs = inputs_of(random, rows, {"a": width, "b": width})
        a, b = (inputs[name].astype(np.float64) for name in "ab")
        rms = np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + 1e-5)
        for operator, exact in (
            (norm, a / rms * weight.dequantise()),
            (Operator("o", "add", ("a", "b"), ("y",)), a + b),
            (Operator("o", "swiglu", ("a", "b"), ("y",)), exact_gate(a, b)),
        ):
            runner = load(backend, [operator], widths, {"w": weight})
            own = {name: inputs[name] for name in operator.inputs}
            for found in runs(backend, runner, rows_step(rows), own):
                assert error(found["y"], exact) < FLOATS, (rows, operator.kind)


@pytest.mark.parametrize(("kind", "width"), [("F16", 200), ("Q8_0", 96), ("Q4_K", 1024)])
def test_norms_that_products_take_in(backend, kind, width):
    """Rows from tiny to huge; what is normed is read by products and gates, and added to again."""
    random = np.random.default_rng(width)

    def weight(outputs, columns):
        values = random.standard_normal((outputs, columns), np.float32)
        return quantised(values / np.sqrt(columns), kind)

    inner = 2 * max(48, block_of(kind))
    shapes = {"a": (width, width), "b": (40, width), "c": (24, width), "g": (inner, width)}
    shapes |= {"u": (inner, width), "d": (width, inner), "e": (56, width)}
    weights = {name: weight(*shape) for name, shape in shapes.items()}
    for n in range(3):
        norm = 1 + 0.3 * random.standard_normal(width)
        weights[f"w{n}"] = quantised(norm.astype(np.float32), "F32")

    def norm(n, x):
        role = (("weight", WeightSlice(f"w{n}")),)
        return Operator(f"norm{n}", "rms_norm", (x,), (f"n{n}",), role, (("epsilon", 1e-5),))

    operators = [
        norm(0, "x"), product("a", "n0", "h", "a"), Operator("add", "add", ("x", "h"), ("r",)),
        norm(1, "r"), product("b", "n1", "y", "b"), product("c", "n1", "z", "c"),
        product("g", "n1", "gate", "g"), product("u", "n1", "up", "u"),
        Operator("s", "swiglu", ("gate", "up"), ("s",)), product("d", "s", "f", "d"),
        Operator("add2", "add", ("f", "r"), ("r2",)), norm(2, "r2"), product("e", "n2", "v", "e"),
    ]  # fmt: skip
    widths = dict.fromkeys(("x", "n0", "h", "r", "n1", "f", "r2", "n2"), width)
    widths |= dict.fromkeys(("gate", "up", "s"), inner) | {"y": 40, "z": 24, "v": 56}
    runner = load(backend, operators, widths, weights)

    def exact_norm(n, x):
        rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return x / rms * weights[f"w{n}"].dequantise()

    for rows in (1, 3, 4, 5, 8, 9, 16, 40):
        x = inputs_of(random, rows, {"x": width})["x"] / 3
        x = (x * 10.0 ** random.uniform(-3, 4, (rows, 1))).astype(np.float32)
        exact = {"x": x.astype(np.float64)}
        exact["r"] = exact["x"] + exact_product(exact_norm(0, exact["x"]), weights["a"])
        n1 = exact_norm(1, exact["r"])
        for name, own in (("y", "b"), ("z", "c")):
            exact[name] = exact_product(n1, weights[own])
        gate = exact_gate(exact_product(n1, weights["g"]), exact_product(n1, weights["u"]))
        exact["r2"] = exact["r"] + exact_product(gate, weights["d"])
        exact["v"] = exact_product(exact_norm(2, exact["r2"]), weights["e"])
        for found in runs(backend, runner, rows_step(rows), {"x": x}):
            for name in ("y", "z", "v"):
                for row in range(rows):
                    bound = FLOATS if rows <= 16 else HALVES
                    assert error(found[name][row], exact[name][row]) < bound, (rows, name, row)


@pytest.mark.parametrize("kind", TYPES)
def test_look_ups(backend, kind):
    random = np.random.default_rng(5)
    columns = 2 * block_of(kind) + (7 if block_of(kind) == 1 else 0)
    weight = quantised(random.standard_normal((41, columns), np.float32), kind)
    operator = Operator("e", "get_rows", (), ("y",), (("weight", WeightSlice("w")),))
    runner = load(backend, [operator], {"y": columns}, {"w": weight})
    for rows in (1, 20):
        step = rows_step(rows)
        step.tokens[:] = random.integers(0, 41, rows)
        for found in runs(backend, runner, step, {}):
            np.testing.assert_allclose(
                found["y"], weight.dequantise()[step.tokens], rtol=1e-6, atol=1e-6
            )


def test_wanted_rows(backend):
    random = np.random.default_rng(6)
    operator = Operator("s", "select_rows", ("x",), ("y",))
    runner = load(backend, [operator], {"x": 50, "y": 50}, {}, logits=("y",))
    inputs = inputs_of(random, 9, {"x": 50})
    for wanted in ([8], [0, 3, 7], []):
        for found in runs(backend, runner, rows_step(9, wanted), inputs):
            assert np.array_equal(found["y"], inputs["x"][wanted])


@pytest.mark.parametrize("style", ["interleaved", "neox"])
@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_positions(backend, style, scaling):
    random = np.random.default_rng(7)
    rotary = RotaryEmbedding(3, 10, 10000.0, style, scaling, 4.0 if scaling == "yarn" else 1.0, 32)
    factors = quantised(random.uniform(1, 4, 5).astype(np.float32), "F32")
    roles = (("factors", WeightSlice("f")),)
    operator = Operator("r", "rope", ("x",), ("y",), roles, rotary.attributes())
    runner = load(backend, [operator], {"x": 42, "y": 42}, {"f": factors})
    for rows in (1, 50):
        step = rows_step(rows)
        inputs = inputs_of(random, rows, {"x": 42})
        exact = rope(inputs["x"].astype(np.float64), step.positions, rotary, factors.dequantise())
        for found in runs(backend, runner, step, inputs):
            assert error(found["y"], exact) < FLOATS


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


@pytest.mark.parametrize("vocabulary", [11, 320, 49152, 128256])
@pytest.mark.parametrize("wanted", [0, 1, 10, 20])
def test_greedy_samples(backend, vocabulary, wanted):
    random = np.random.default_rng(vocabulary)
    names = ("id", "logprob", "top", "top_logprobs")
    operator = Operator("s", "sample", ("x",), names)
    kinds = ("int32", "float32") * 2
    for rows in (1, 5):
        logits = (3 * random.standard_normal((rows, vocabulary))).astype(np.float32)
        logits[0, [3, 9]] = 40.0  # a tie goes to the lower id
        subgraph = subgraph_of([operator], {"x": vocabulary}, ("x",))
        for name, kind in zip(names, kinds, strict=True):
            subgraph.values[name] = Value(name, 20, kind, "logits")
        runner = backend.load(subgraph, Given(), Limits(8, 64))
        step = rows_step(rows)
        step = Step(*[getattr(step, n) for n in ("tokens", "positions", "sequence", "block_tables",
                                                 "logit_rows")], greedy(rows, wanted))  # fmt: skip
        step.sampling.logprobs[-1] = min(wanted, 3)
        right = sample(logits, step.sampling)
        for found in runs(backend, runner, step, {"x": logits}):
            for name, expected in zip(names, right, strict=True):
                if expected.dtype == np.int32:
                    assert np.array_equal(found[name], expected), (name, rows)
                else:
                    np.testing.assert_allclose(found[name], expected, atol=1e-5)


PARAMETERS = {
    "temperature": [0.0, 0.2, 0.8, 1.0, 1.5, 50.0],
    "top_p": [0.0, 0.1, 0.55, 0.95, 0.999, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.05, 0.3, 1.0],
    "top_k": [0, 0, 1, 5, 40, 200],
    "logprobs": [0, 1, 20],
    "stream": [0, 1],
}


@pytest.mark.parametrize("vocabulary", [1, 11, 320, 1000, 49152, 128256])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_draws(backend, vocabulary, spread):
    """Rows of all kinds in one step, more than there are blocks; then others in the same graph."""
    random = np.random.default_rng(vocabulary)
    names = ("id", "logprob", "top", "top_logprobs")
    subgraph = subgraph_of([Operator("s", "sample", ("x",), names)], {"x": vocabulary}, ("x",))
    for name, kind in zip(names, ("int32", "float32") * 2, strict=True):
        subgraph.values[name] = Value(name, 20, kind, "logits")
    runner = backend.load(subgraph, Given(), Limits(40, 64))
    for count in (1, 5, 5, 5, 40):
        logits = random.normal(0, spread, (count, vocabulary)).astype(np.float32)
        rows = [{n: random.choice(own).item() for n, own in PARAMETERS.items()} for _ in logits]
        for number, row in enumerate(rows):
            row |= {"seed": int(random.integers(-(2**63), 2**63)), "position": number}
            if number % 3 == 1:
                row["history"] = random.integers(0, vocabulary, 80).tolist()
                row |= {"repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
            if number % 4 == 1:
                ids = random.integers(0, vocabulary, 3).tolist()
                row["bias"] = {token: float(random.normal(0, 5)) for token in ids}
        step = rows_step(count)
        step = replace(step, sampling=sampling_of(rows))
        right = sample(logits, step.sampling)
        for found in runs(backend, runner, step, {"x": logits}):
            for name, expected in zip(names, right, strict=True):
                if expected.dtype == np.int32:
                    assert np.array_equal(found[name], expected), (name, rows)
                else:
                    np.testing.assert_allclose(found[name], expected, atol=1e-5)


def test_it_says_what_it_is(backend):
    described = backend.describe()
    assert described.type == "gpu"
    assert 0 < described.memory_free <= described.memory_total
    assert {"cupy", "driver", "compute capability"} <= dict(described.versions).keys()


def test_too_large_a_weight_names_what_is_free(backend):
    from raygraft.graph.errors import CapacityError

    state = KeyValueState("s", 8, 128, 128)
    operator = Operator(
        "a", "attention", ("q", "k", "v"), ("y",), (),
        (("heads", 8), ("kv_heads", 8), ("scale", 1.0)), state,
    )  # fmt: skip
    runner = create_backend("cuda", BackendOptions()).load(
        subgraph_of([operator], dict.fromkeys("qkvy", 1024)), Given(), Limits(8, 64)
    )
    with pytest.raises(CapacityError, match=r"needs .* GiB; .* GiB are free"):
        runner.allocate_state(2**26, 16)
