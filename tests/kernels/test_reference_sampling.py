"""Sampling: filters and penalties by hand-computed tables, draws that depend on nothing else."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampled_rows import sampling_of

from raygraft.kernels.reference.sampling import sample

Logits = NDArray[np.float32]


def draws(logits: Logits, count: int, **params: Any) -> list[int]:
    """The tokens drawn at so many positions of one sequence."""
    rows = [{"position": position, **params} for position in range(count)]
    ids, *_ = sample(np.tile(logits, (count, 1)), sampling_of(rows))
    return ids[:, 0].tolist()


def greedy(logits: list[float], **params: Any) -> int:
    rows = sampling_of([{"temperature": 0.0, **params}])
    return int(sample(np.array([logits], np.float32), rows)[0][0, 0])


@pytest.mark.parametrize(
    ("logits", "token"),
    [([0, 3, 1], 1), ([2, 5, 5, 5], 1), ([-7, -9], 0), ([0, 0, 0], 0), ([-1e30, 1e30], 1)],
)
def test_greedy_takes_the_best_and_of_equals_the_first(logits: list[float], token: int) -> None:
    assert greedy(logits) == token
    assert greedy(logits, top_k=1, top_p=0.1, min_p=0.9, seed=5, position=3) == token


HALVES = np.log(np.array([0.0625, 0.125, 0.5, 0.0625, 0.25], np.float32))
"""Best first: token 2 with a half, 4 with a quarter, 1 with an eighth, 0 and 3 with a 16th each."""


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, {2, 4, 1, 0, 3}),
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 4}),
        ({"top_k": 4}, {2, 4, 1, 0}),  # of equals the lower id
        ({"top_k": 99}, {2, 4, 1, 0, 3}),
        ({"top_p": 0.0}, {2}),
        ({"top_p": 0.49}, {2}),
        ({"top_p": 0.51}, {2, 4}),
        ({"top_p": 0.76}, {2, 4, 1}),
        ({"top_p": 0.88}, {2, 4, 1, 0}),
        ({"top_p": 0.99}, {2, 4, 1, 0, 3}),
        ({"min_p": 0.1}, {2, 4, 1, 0, 3}),
        ({"min_p": 0.2}, {2, 4, 1}),  # at least 0.2 * 0.5
        ({"min_p": 0.49}, {2, 4}),
        ({"min_p": 0.51}, {2}),
        ({"min_p": 1.0}, {2}),
        ({"top_p": 0.8}, {2, 4, 1}),
        ({"top_p": 0.8, "top_k": 3}, {2, 4}),  # 4/7 + 2/7 is more than 0.8
        ({"top_p": 0.8, "min_p": 0.3}, {2, 4}),
        ({"top_k": 2, "temperature": 100.0}, {2, 4}),  # filters before temperature
        ({"min_p": 0.2, "temperature": 100.0}, {2, 4, 1}),
        ({"temperature": 100.0}, {2, 4, 1, 0, 3}),
        ({"temperature": 1e-3}, {2}),
        ({"bias": {2: -1e9}, "top_k": 2}, {4, 1}),
        ({"bias": {0: 4.0}, "top_k": 1}, {0}),
        ({"bias": dict.fromkeys((0, 1, 2, 3), -100.0)}, {4}),
        ({"history": [2, 2, 2], "frequency_penalty": 30.0, "top_k": 1}, {4}),
    ],
)
def test_tokens_that_the_filters_keep(params: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(HALVES, 200, **params)) == kept


LOGITS = [2.0, -2.0, 1.0, 0.0]
HISTORY = [0, 0, 1, 3]


@pytest.mark.parametrize(
    ("params", "adjusted"),
    [
        ({}, [2.0, -2.0, 1.0, 0.0]),
        ({"repeat_penalty": 2.0}, [1.0, -4.0, 1.0, 0.0]),
        ({"presence_penalty": 0.5}, [1.5, -2.5, 1.0, -0.5]),
        ({"frequency_penalty": 0.5}, [1.0, -2.5, 1.0, -0.5]),
        ({"frequency_penalty": -1.0}, [4.0, -1.0, 1.0, 1.0]),
        (
            {"repeat_penalty": 4.0, "presence_penalty": 0.25, "frequency_penalty": 1.0},
            [-1.75, -9.25, 1.0, -1.25],
        ),
        ({"bias": {1: 3.0, 2: -0.5}}, [2.0, 1.0, 0.5, 0.0]),
        ({"bias": {1: 3.0}, "repeat_penalty": 2.0}, [1.0, 0.5, 1.0, 0.0]),  # bias comes first
    ],
)
def test_penalties_and_bias(params: dict[str, Any], adjusted: list[float]) -> None:
    """A probe beside each token, a little better or worse than its adjusted logit."""
    for token, expected in enumerate(adjusted):
        others = {n: -1e9 for n in range(4) if n != token}
        bias = {**others, **{n: v for n, v in params.get("bias", {}).items() if n == token}}
        row = {**params, "history": HISTORY, "bias": bias}
        assert greedy([*LOGITS, expected - 1e-3], **row) == token
        assert greedy([*LOGITS, expected + 1e-3], **row) == 4


def test_log_probabilities_are_the_models() -> None:
    """Whatever the temperature, the filters and the bias are."""
    params = {"temperature": 0.3, "top_k": 1, "bias": {0: 50.0}, "logprobs": 3}
    ids, logprob, best_ids, best = sample(HALVES[None], sampling_of([params]))
    assert ids.tolist() == [[0]]
    np.testing.assert_allclose(logprob, [[math.log(0.0625)]], rtol=1e-6)
    assert best_ids.tolist() == [[2, 4, 1]]
    np.testing.assert_allclose(best, np.log([[0.5, 0.25, 0.125]]), rtol=1e-6)
    assert [a.dtype.name for a in (ids, logprob, best_ids, best)] == ["int32", "float32"] * 2


def test_best_are_sorted_and_equal_ones_stand_by_id() -> None:
    logits = np.array([[1, 3, 2, 3, 2, 3, 2, 0]] * 4, np.float32)
    rows = [{"logprobs": wanted} for wanted in (5, 0, 2, 20)]
    _, _, ids, best = sample(logits, sampling_of(rows))
    order = [1, 3, 5, 2, 4, 6, 0, 7]
    assert ids.tolist() == [
        order[:5] + [-1] * 15,
        [-1] * 20,
        order[:2] + [-1] * 18,
        order + [-1] * 12,
    ]
    assert np.all(np.isneginf(best) == (ids == -1))
    norm = math.log(sum(math.exp(value) for value in logits[0]))
    np.testing.assert_allclose(best[3, :8], logits[0, order] - norm, rtol=1e-6)


def test_no_rows() -> None:
    arrays = sample(np.zeros((0, 5), np.float32), sampling_of([]))
    assert [array.shape for array in arrays] == [(0, 1), (0, 1), (0, 0), (0, 0)]


row_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repeat_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "top_k": st.integers(0, 12),
        "logprobs": st.integers(0, 4),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stream": st.integers(0, 3),
        "position": st.integers(0, 2**31 - 1),
        "history": st.lists(st.integers(0, 11), max_size=6),
        "bias": st.dictionaries(st.integers(0, 11), st.sampled_from([-5.0, 5.0]), max_size=2),
    }
)


@given(rows=st.lists(row_strategy, min_size=1, max_size=5), logits_seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_row_does_not_depend_on_its_batch(rows: list[dict[str, Any]], logits_seed: int) -> None:
    logits = np.random.default_rng(logits_seed).standard_normal((len(rows), 12), dtype=np.float32)
    ids, logprobs, best_ids, best = sample(logits, sampling_of(rows))
    for number, row in enumerate(rows):
        alone = sample(logits[number : number + 1], sampling_of([row]))
        assert alone[0][0, 0] == ids[number, 0]
        assert alone[1][0, 0] == logprobs[number, 0]
        np.testing.assert_array_equal(alone[2][0], best_ids[number, : row["logprobs"]])
        np.testing.assert_array_equal(alone[3][0], best[number, : row["logprobs"]])


def test_the_same_request_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal(50, dtype=np.float32)
    once = draws(logits, 64, seed=1234)
    assert draws(logits, 64, seed=1234) == once
    assert draws(logits, 64, seed=1235) != once
    assert draws(logits, 64, seed=1234, stream=1) != once


@pytest.mark.parametrize("vary", ["position", "seed", "stream"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(vary: str, temperature: float) -> None:
    """Chi-square over 2,000 draws; the bound is passed once in a million times by chance."""
    count, logits = 2000, np.linspace(-1, 1, 8, dtype=np.float32)
    rows = [{"temperature": temperature, vary: number} for number in range(count)]
    ids, *_ = sample(np.tile(logits, (count, 1)), sampling_of(rows))
    powers = np.exp(logits / temperature)
    expected = count * powers / powers.sum()
    seen = np.bincount(ids[:, 0], minlength=8)
    assert np.sum((seen - expected) ** 2 / expected) < 41  # 7 degrees of freedom


def test_filtered_draws_are_renormalised() -> None:
    """Two thirds and one third are left of a half and a quarter."""
    seen = np.bincount(draws(HALVES, 2000, top_k=2), minlength=5) / 2000
    np.testing.assert_allclose(seen, [0, 0, 2 / 3, 0, 1 / 3], atol=0.04)
