"""Each kernel against float64, on odd sizes, with everything that it must write poisoned before."""

import numpy as np
import pytest
from checked_runs import FLOATS, HALVES, inputs_of, load, rows_step, runs
from single_operators import Given, block_of, error, quantised, subgraph_of

from raygraft.graph.capability import Limits
from raygraft.graph.operators import KeyValueState, Operator
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.tensors import WeightSlice
from raygraft.kernels import BackendOptions, create_backend
from raygraft.kernels.reference.operators import rope

pytestmark = pytest.mark.gpu

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4",
)  # fmt: skip
ROWS = (1, 3, 4, 5, 8, 9, 16, 17, 70)


def product(name, x, y, weight, bias=""):
    roles = [("weight", WeightSlice(weight))]
    if bias:
        roles.append(("bias", WeightSlice(bias)))
    return Operator(name, "matmul", (x,), (y,), tuple(roles))


def exact_product(x, weight, bias=None):
    y = x.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    return y if bias is None else y + bias.dequantise()


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
