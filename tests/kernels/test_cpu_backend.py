"""The CPU backend against float64 arithmetic and against the reference, odd sizes included."""

import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import config
from tiny_models import write_tiny_llama
from weight_blocks import block_size, random_weight

from raygraft import LLM, SamplingParams
from raygraft.graph.builder import MAX_LOGPROBS
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import KeyValueState, Operator, Signature, Value
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Sampling, Step
from raygraft.graph.tensors import QuantizedTensor, WeightSlice
from raygraft.kernels import BackendOptions, create_backend
from raygraft.kernels.cpu.formats import FORMATS, format_of

BOUND = 1e-5
ROUNDED_BOUND = 3e-5
"""Of products with weights that are integers, where x is rounded to 16 bits."""
CACHE_BOUNDS = {"f32": 1e-5, "f16": 1e-5, "q8_0": 2e-4}
"""Both sides round to the same cache. With 8 bits a number in ten thousand lies so close to the
middle of two that float32 decides, and is a 250th of its block's largest off."""
PAGES = 75
TYPES = (*FORMATS, "TQ2_0")
"""The last has no packing: it is held as float32."""
LIMITS = Limits(max_rows=300, context=512, max_sequences=4)


class Given:
    """Weights that a test makes (a `WeightSource`)."""

    def __init__(self, **weights: QuantizedTensor) -> None:
        self.weights = weights

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        return self.weights[weight.tensor]


def quantised(values: np.ndarray, kind: str) -> QuantizedTensor:
    raw = quants.quantize(values, GGMLQuantizationType[kind])
    return QuantizedTensor(kind, values.shape, raw.view(np.uint8).reshape(*values.shape[:-1], -1))


def step_of(positions: list[list[int]], tables: list[list[int]]) -> Step:
    """A step of sequences with these positions; every row is wanted."""
    flat = np.array([p for own in positions for p in own], np.int32)
    owners = np.array([n for n, own in enumerate(positions) for _ in own], np.int32)
    rows = len(flat)
    zeros, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    words, empty = np.zeros(rows, np.int64), np.zeros(0, np.int32)
    starts = np.zeros(rows + 1, np.int32)
    sampling = Sampling(
        zeros, zeros + 1, zeros, zeros + 1, zeros, zeros, ints, ints, words, words, flat + 1,
        starts, empty, starts, empty, empty.astype(np.float32),
    )  # fmt: skip
    wanted = np.arange(rows, dtype=np.int32)
    return Step(flat % 7, flat, owners, np.array(tables, np.int32), wanted, sampling)


def run(backend, operator: Operator, widths: dict[str, int], weights, step, inputs, limits=LIMITS):
    values = {name: Value(name, width) for name, width in widths.items()}
    subgraph = Subgraph((operator,), operator.inputs, operator.outputs, values)
    runner = backend.load(subgraph, Given(**weights), limits)
    if operator.state is not None:
        runner.allocate_state(PAGES, 16)
    return [runner.run(s, x)[operator.outputs[0]].copy() for s, x in zip(step, inputs, strict=True)]


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=10)
@given(
    rows=st.integers(1, 20) | st.sampled_from([239, 241, 300]),
    blocks=st.integers(1, 5),
    odd=st.integers(0, 31),
    width=st.integers(1, 70),
    threads=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products(kind, rows, blocks, odd, width, threads, bias, seed):
    random = np.random.default_rng(seed)
    columns = blocks * block_size(kind) if block_size(kind) > 1 else 32 * blocks + odd
    weight = random_weight(kind, width, columns, random)
    weights = {"w": weight}
    roles = [("weight", WeightSlice("w"))]
    if bias:
        weights["b"] = quantised(random.standard_normal(width, np.float32), "F32")
        roles.append(("bias", WeightSlice("b")))
    x = random.standard_normal((rows, columns), np.float32)
    floats = weight.dequantise().astype(np.float64)
    exact = x.astype(np.float64) @ floats.T
    # A few sums may cancel to next to nothing: what sums of such terms mostly are counts then.
    usual = np.linalg.norm(np.abs(x) @ np.abs(floats).T) / columns**0.5
    if bias:
        exact += weights["b"].dequantise()
    backend = create_backend("cpu", BackendOptions(threads))
    operator = Operator("m", "matmul", ("x",), ("y",), tuple(roles))
    step = step_of([list(range(rows))], [[0, 1]])
    (ours,) = run(backend, operator, {"x": columns, "y": width}, weights, [step], [{"x": x}])
    bound = BOUND
    if format_of(kind).in_pairs:  # the fewer numbers, the less do what was rounded even out
        bound = ROUNDED_BOUND * (1 + 3 / exact.size**0.5)
    assert np.linalg.norm(ours - exact) < bound * max(usual, np.linalg.norm(exact))


def test_rounded_rows_keep_what_is_no_number_and_what_is_nothing():
    """A row with a number that is not finite is not finite; zeros and next to zeros are zeros."""
    random = np.random.default_rng(4)
    weights = {"w": random_weight("Q4_0", 20, 64, random)}
    backend = create_backend("cpu", BackendOptions(1))
    operator = Operator("m", "matmul", ("x",), ("y",), (("weight", WeightSlice("w")),))
    x = random.standard_normal((6, 64), np.float32)
    x[0, 3], x[1, 40], x[2, 63] = np.nan, np.inf, -np.inf
    x[3] = 0
    x[4] = 1e-38
    step = step_of([list(range(6))], [[0, 1]])
    (y,) = run(backend, operator, {"x": 64, "y": 20}, weights, [step], [{"x": x}])
    assert not np.isfinite(y[:3]).any()
    assert not y[3].any()
    assert np.abs(y[4]).max() < 1e-30
    exact = x[5].astype(np.float64) @ weights["w"].dequantise().astype(np.float64).T
    assert np.linalg.norm(y[5] - exact) < ROUNDED_BOUND * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", TYPES)
def test_products_do_not_depend_on_the_rows_beside(kind):
    """To the last bit: so an answer is the same in any batch, and after it was computed anew."""
    random = np.random.default_rng(5)
    columns = 2 * block_size(kind) if block_size(kind) > 1 else 301
    weights = {
        "g": random_weight(kind, 40, columns, random),
        "u": random_weight(kind, 40, columns, random),
    }
    operators = [
        Operator(name, "matmul", ("x",), (name,), (("weight", WeightSlice(name)),))
        for name in weights
    ]
    gate = Operator("y", "swiglu", ("g", "u"), ("y",))
    values = {name: Value(name, 40) for name in "guy"} | {"x": Value("x", columns)}
    subgraph = Subgraph((*operators, gate), ("x",), ("y",), values)
    runner = create_backend("cpu", BackendOptions(2)).load(subgraph, Given(**weights), LIMITS)
    x = random.standard_normal((260, columns), np.float32)

    def products(first: int, last: int) -> np.ndarray:
        step = step_of([list(range(last - first))], [list(range(20))])
        return runner.run(step, {"x": x[first:last]})["y"].copy()

    whole = products(0, 260)
    assert np.ptp(whole) > 0
    for first, rows in [
        (0, 1),
        (3, 1),
        (1, 2),
        (2, 3),
        (5, 8),
        (7, 9),
        (20, 16),
        (30, 17),
        (9, 245),
    ]:
        assert np.array_equal(products(first, first + rows), whole[first : first + rows])


def compare(operator, widths, weights, steps, inputs, threads, cache_type="f32"):
    """Ours beside the reference, on the same steps."""
    limits = replace(LIMITS, cache_type=cache_type)
    ours, reference = (
        run(
            create_backend(name, BackendOptions(threads)),
            operator, widths, weights, steps, inputs, limits,
        )
        for name in ("cpu", "reference")
    )  # fmt: skip
    for mine, theirs in zip(ours, reference, strict=True):
        assert error(mine, theirs) < CACHE_BOUNDS[cache_type]


def ragged_steps(random, context: int = 400):
    """A prompt of each of three sequences, then a row of each, on shuffled pages."""
    pages = random.permutation(PAGES).reshape(3, -1).tolist()
    lengths = [int(random.integers(1, most)) for most in (12, 40, 200)]
    steps = [step_of([list(range(n)) for n in lengths], pages)]
    for _ in range(3):
        steps.append(step_of([[n] for n in lengths], pages))
        lengths = [n + 1 for n in lengths]
    assert max(lengths) < context
    return steps


@settings(max_examples=15)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4) | st.just(60),
    size=st.integers(1, 70),
    cache_type=st.sampled_from(["f32", "f16", "q8_0"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention(kv_heads, group, size, cache_type, threads, seed):
    random = np.random.default_rng(seed)
    if cache_type == "q8_0":
        size = 32 * (size % 3 + 1)
    heads = kv_heads * group
    widths = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size, "y": heads * size}
    attributes = (("heads", heads), ("kv_heads", kv_heads), ("scale", size**-0.5))
    state = KeyValueState("s", kv_heads, size, size)
    operator = Operator("a", "attention", ("q", "k", "v"), ("y",), (), attributes, state)
    steps = ragged_steps(random)
    inputs = [
        {n: random.standard_normal((s.rows, widths[n]), np.float32) for n in "qkv"} for s in steps
    ]
    compare(operator, widths, {}, steps, inputs, threads, cache_type)


@pytest.mark.parametrize("size", [10, 32, 64])
@pytest.mark.parametrize("style", ["interleaved", "neox"])
@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_positions(style, scaling, size):
    random = np.random.default_rng(3)
    width = 3 * (size + 4)
    factor = 4.0 if scaling != "none" else 1.0
    rotary = RotaryEmbedding(3, size, 10000.0, style, scaling, factor, 32)
    factors = quantised(random.uniform(1, 4, size // 2).astype(np.float32), "F32")
    roles = (("factors", WeightSlice("f")),)
    operator = Operator("r", "rope", ("x",), ("y",), roles, rotary.attributes())
    steps = ragged_steps(random)
    inputs = [{"x": random.standard_normal((s.rows, width), np.float32)} for s in steps]
    compare(operator, {"x": width, "y": width}, {"f": factors}, steps, inputs, 2)


@pytest.mark.parametrize("width", [1, 15, 16, 50, 576])
def test_norms_sums_and_gates(width):
    random = np.random.default_rng(width)
    weight = quantised(random.standard_normal(width, np.float32), "F32")
    steps = ragged_steps(random)
    inputs = [
        {n: 9 * random.standard_normal((s.rows, width), np.float32) for n in "ab"} for s in steps
    ]
    widths = dict.fromkeys("aby", width)
    norm = Operator(
        "n", "rms_norm", ("a",), ("y",), (("weight", WeightSlice("w")),), (("epsilon", 1e-5),)
    )
    compare(norm, widths, {"w": weight}, steps, inputs, 2)
    for kind in ("add", "swiglu"):
        compare(Operator("o", kind, ("a", "b"), ("y",)), widths, {}, steps, inputs, 2)


@pytest.mark.parametrize("kind", TYPES)
def test_look_ups(kind):
    random = np.random.default_rng(5)
    weight = random_weight(kind, 41, 256, random)
    operator = Operator("e", "get_rows", (), ("y",), (("weight", WeightSlice("w")),))
    step = ragged_steps(random)[0]
    backend = create_backend("cpu", BackendOptions(2))
    (ours,) = run(backend, operator, {"y": 256}, {"w": weight}, [step], [{}])
    assert np.array_equal(ours, weight.dequantise()[step.tokens])


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_a_whole_model_says_what_the_reference_says(quantization, tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf", quantization=quantization, biases=True)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=MAX_LOGPROBS, ignore_eos=True)
    prompts = [list(range(3, 40)), [5], [9, 8, 7]]
    answers = []
    for backend in ("cpu", "reference"):
        device = {"name": "d", "backend": backend, "threads": 2}
        with LLM(path, devices=[device], runtime="in-process", max_rows=16) as llm:
            answers.append(llm.generate(prompts, params))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        for mine, reference in zip(ours.logprobs, theirs.logprobs, strict=True):
            shared = mine.keys() & reference.keys()
            assert len(shared) >= MAX_LOGPROBS - 1
            bound = 1e-3 if format_of(quantization).in_pairs else 1e-4
            assert max(abs(mine[t] - reference[t]) for t in shared) < bound


def test_threads_end_with_their_backend():
    import gc
    import threading
    import time

    def shares():
        """Those that this test's backend has started, and that have not ended."""
        return {t for t in threading.enumerate() if t.name.startswith("share")} - others

    others = set(threading.enumerate())
    backend = create_backend("cpu", BackendOptions(3))
    operator = Operator("o", "add", ("a", "b"), ("y",))
    step = step_of([[0]], [[0]])
    x = np.ones((1, 4), np.float32)
    run(backend, operator, dict.fromkeys("aby", 4), {}, [step], [{"a": x, "b": x}])
    assert len(shares()) == 2
    del backend, operator
    gc.collect()
    deadline = time.monotonic() + 5
    while shares() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not shares()


def test_pages_of_no_whole_tiles_are_refused():
    state = KeyValueState("s", 1, 4, 4)
    attributes = (("heads", 1), ("kv_heads", 1), ("scale", 0.5))
    operator = Operator("a", "attention", ("q", "k", "v"), ("y",), (), attributes, state)
    values = {name: Value(name, 4) for name in "qkvy"}
    subgraph = Subgraph((operator,), operator.inputs, operator.outputs, values)
    runner = create_backend("cpu", BackendOptions(1)).load(subgraph, Given(), LIMITS)
    with pytest.raises(ConfigurationError, match=r"pages of 24 tokens.*multiple of 16"):
        runner.allocate_state(4, 24)


def test_an_8_bit_cache_needs_whole_blocks():
    signature = Signature(
        "attention", (48, 48, 48, 48), (), (("heads", 2), ("kv_heads", 2), ("scale", 1.0))
    )
    limits = replace(LIMITS, cache_type="q8_0")
    for backend in ("cpu", "reference"):
        verdict = create_backend(backend, BackendOptions(1)).supports_op(signature, limits)
        assert not verdict.ok
        assert "keys of a multiple of 32 numbers, not 24" in verdict.reason


def test_processors_without_avx_512():
    """The same code is made of narrower registers there, and tables are read lane by lane."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the names are those of x86")
    environment = {
        **os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c",
    }  # fmt: skip
    tests = [
        "test_look_ups[IQ4_NL]", "test_products[Q4_0]", "test_products[Q6_K]", "test_attention",
        "test_positions",
    ]  # fmt: skip
    names = [f"{__file__}::{name}" for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("processor", ["core2", "haswell"])
def test_a_processor_that_is_too_old_is_refused(processor, monkeypatch):
    monkeypatch.setattr(config, "CPU_NAME", processor)
    features = {"core2": "+sse3", "haswell": "+avx,+avx2,+fma,+f16c"}[processor]
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    if processor == "haswell" or platform.machine() not in ("x86_64", "AMD64"):
        create_backend("cpu", BackendOptions(1))
    else:
        with pytest.raises(ConfigurationError, match=r"has no avx2, fma, f16c.*backend=reference"):
            create_backend("cpu", BackendOptions(1))
