"""The error of outputs: what counts as wrong, and what does not."""

import numpy as np
import pytest

from raygraft.graph.operators import Value
from raygraft.kernels.verification.compare import Expected, Sampled, complaint, error_of

INF, NAN = np.inf, np.nan


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        (rows([3, 4]), rows([3, 4]), 0),
        (rows([3, 4], [0, 2]), rows([3, 4], [0, 1]), 1),  # the worst row
        (rows([3, 4.5]), rows([3, 4]), 0.1),
        (rows([3, 4], [0, 1e-6]), rows([3, 4], [0, 0]), 0),  # beside a large row it is nothing
        (rows([-INF, 1]), rows([-INF, 1]), 0),
        (rows([0, 1]), rows([-INF, 1]), INF),
        (np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), 0),
        (np.array([[1], [2]], np.int32), np.array([[1], [3]], np.int32), 0.5),
    ],
)
def test_errors(found: np.ndarray, expected: np.ndarray, error: float) -> None:
    assert error_of(found, expected) == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (rows([1, 2], [3, 4]), ""),
        (rows([1, -INF], [3, 4]), ""),  # as in the reference
        (rows([1, NAN], [3, NAN]), "output x has NaN in 2 of 4 elements"),
        (rows([INF, 2], [3, 4]), "output x has infinity in 1 of 4 elements"),
        (rows([1, 2]), "output x has the shape (1, 2), expected (2, 2)"),
        (rows([1, 2], [3, 4]).astype(np.int32), "output x is int32, expected float32"),
        (None, "output x is of type NoneType, expected an array"),
    ],
)
def test_forms(found: object, said: str) -> None:
    assert complaint("x", found, rows([1, -INF], [3, 4]), Value("x", 2)) == said


def test_ids_of_near_ties_are_right() -> None:
    """Tokens 0 and 1 are a near tie, token 2 is far behind, and 3 lies across an edge."""
    logprobs = rows([-1, -1.0005, -3, -5])
    sampled = Sampled("id", logprobs, rows([0.001]), [np.array([[3]], np.int32)])
    expected = Expected(
        {"id": np.array([[0]], np.int32), "logprob": rows([-1])},
        {"id": sampled, "logprob": sampled},
    )

    def errors(token: int, logprob: float) -> list[float]:
        found = {"id": np.array([[token]], np.int32), "logprob": rows([logprob])}
        return [expected.error(name, found) for name in found]

    assert errors(0, -1) == [0, 0]
    assert errors(1, -1.0005) == [0, 0]
    assert errors(3, -5) == [0, 0]
    assert errors(3, -1) == [0, pytest.approx(0.8)]
    for wrong in (2, 4, -1):
        assert errors(wrong, -1)[0] == 1
