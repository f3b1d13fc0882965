"""Sampling in compiled code: the tokens of the reference, however many threads look for them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampled_rows import sampling_of

from raygraft.graph.step import Sampling, Step
from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import drawing
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.described_steps import DescribedSteps
from raygraft.kernels.cpu.drawing import NO_WEIGHTS, keep_best
from raygraft.kernels.cpu.philox import uniform_number
from raygraft.kernels.cpu.picking import pick
from raygraft.kernels.reference.sampling import sample

BOUND = 3e-6
"""Of log probabilities: exponentials are right to 2e-7, and 256 are summed in float32."""


def compiled_sample(
    logits: NDArray[np.float32], sampling: Sampling, threads: int
) -> tuple[NDArray[Any], ...]:
    """What the two instructions find, one thread after the other."""
    rows, width = logits.shape
    numbers = np.arange(rows, dtype=np.int32)
    steps = DescribedSteps(threads)
    steps.sampled = True
    described = steps.describe(Step(numbers, numbers, numbers, numbers[:, None], numbers, sampling))
    program = np.zeros((2, at.FIELDS), np.int64)
    program[:, at.KIND // 8] = at.LOOK_THROUGH, at.JOIN
    program[:, at.A // 8], program[:, at.OWN // 8] = logits.ctypes.data, width
    scratch = np.empty(drawing.scratch_bytes(width), np.uint8)
    step = described.words.ctypes.data
    for instruction in program:
        for thread in range(threads):
            pick(instruction.ctypes.data, step, rows, scratch.ctypes.data, thread, threads)
    return described.sampled(0)


def check(logits: NDArray[np.float32], rows: list[dict[str, Any]], threads: int) -> None:
    sampling = sampling_of(rows)
    expected = sample(logits, sampling)
    ids, chosen, best_ids, best = compiled_sample(logits, sampling, threads)
    assert ids.tolist() == expected[0].tolist()
    assert best_ids.tolist() == expected[2].tolist()
    np.testing.assert_allclose(chosen, expected[1], atol=BOUND, rtol=3e-7)
    np.testing.assert_allclose(best, expected[3], atol=BOUND, rtol=3e-7)


def row_strategy(width: int) -> st.SearchStrategy[dict[str, Any]]:
    ids = st.integers(0, width - 1)
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.2, 0.8, 1.0, 1.5, 50.0]),
            "top_p": st.sampled_from([0.0, 0.1, 0.55, 0.95, 0.999, 1.0, 1.0]),
            "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
            "repeat_penalty": st.sampled_from([1.0, 1.3]),
            "presence_penalty": st.sampled_from([0.0, -0.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.7]),
            "top_k": st.sampled_from([0, 0, 1, 5, 40, 200]),
            "logprobs": st.sampled_from([0, 1, 5, 20]),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "stream": st.integers(0, 3),
            "position": st.integers(0, 2**31 - 2),
            "history": st.just([]) | st.lists(ids, max_size=80),
            "bias": st.just({}) | st.dictionaries(ids, st.sampled_from([-5.0, 5.0]), max_size=3),
        }
    )


@given(data=st.data())
@settings(max_examples=150)
def test_it_draws_what_the_reference_draws(data: st.DataObject) -> None:
    """Vocabularies that are no whole vectors, equal logits, flat and steep distributions."""
    width = data.draw(st.sampled_from([1, 5, 16, 17, 256, 300, 1000, 4099]), "width")
    rows = data.draw(st.lists(row_strategy(width), min_size=1, max_size=4), "rows")
    threads = data.draw(st.integers(1, 5), "threads")
    rng = np.random.default_rng(data.draw(st.integers(0, 999), "logits"))
    spread = data.draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 20.0]), "spread")
    logits = rng.normal(0, spread, (len(rows), width)).astype(np.float32)
    if data.draw(st.booleans(), "rounded"):
        logits = np.round(logits)  # many are equal, and some are -0
    check(logits, rows, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0}],
)
def test_a_vocabulary_of_usual_size(params: dict[str, Any], threads: int) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (4, 49152)).astype(np.float32)
    logits[3] = 0
    rows = [{**params, "seed": 7, "position": row, "logprobs": 5} for row in range(4)]
    check(logits, rows, threads)


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    other=st.integers(-(2**63), 2**63 - 1),
    counter=st.integers(0, 2**31 - 1),
)
@example(key=0, other=0, counter=0)
@example(key=-1, other=2**63 - 1, counter=1)
@settings(max_examples=100)
def test_random_numbers_are_numpys(key: int, other: int, counter: int) -> None:
    words = np.array([key, other], np.int64).view(np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words, counter=[counter, 0, 0, 0]))
    assert uniform(key, other, counter) == generator.random()


@compiled
def uniform(key: int, other: int, counter: int) -> float:
    return uniform_number(key, other, counter)


@given(
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    goal=st.integers(0, 320),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
@settings(max_examples=200)
def test_the_fewest_best_that_reach_a_goal(
    weights: list[int], goal: int, seed: int, weighted: bool
) -> None:
    keys = np.random.default_rng(seed).permutation(10 * len(weights))[: len(weights)]
    keys = keys.astype(np.int64)
    heavy = np.array(weights if weighted else [1] * len(keys), np.float64)
    weight_of = dict(zip(keys.tolist(), heavy.tolist(), strict=True))
    best_first = sorted(weight_of, reverse=True)
    reached = np.cumsum([weight_of[key] for key in best_first]) >= goal
    expected = int(np.argmax(reached)) + 1 if reached.any() else len(keys)
    address = heavy.ctypes.data if weighted else NO_WEIGHTS
    found = keep_best(keys.ctypes.data, address, len(keys), float(goal))
    assert set(keys[:found].tolist()) == set(best_first[:found])
    assert found == expected
    assert keys[found - 1] == best_first[found - 1]
    if weighted:
        assert all(weight_of[key] == own for key, own in zip(keys.tolist(), heavy, strict=True))


def test_logits_that_are_no_numbers_draw_some_token() -> None:
    """A broken model must not break the process."""
    logits = np.full((1, 300), np.nan, np.float32)
    for params in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"bias": {3: 1.0}}):
        ids, *_ = compiled_sample(logits, sampling_of([params]), 2)
        assert 0 <= ids[0, 0] < 300
