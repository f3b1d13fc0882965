"""Tokens that the GPU takes, against the reference's."""

from dataclasses import replace

import numpy as np
import pytest
from checked_runs import rows_step, runs
from sampled_rows import sampling_of
from single_operators import Given, greedy, subgraph_of

from raygraft.graph.capability import Limits
from raygraft.graph.operators import Operator, Value
from raygraft.graph.step import Step
from raygraft.kernels.reference.sampling import sample

pytestmark = pytest.mark.gpu
NAMES = ("id", "logprob", "top", "top_logprobs")


def check(found, right, rows):
    """Tokens are the same, log probabilities nearly so."""
    for name, expected in zip(NAMES, right, strict=True):
        if expected.dtype == np.int32:
            assert np.array_equal(found[name], expected), (name, rows)
        else:
            np.testing.assert_allclose(found[name], expected, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [11, 320, 49152, 128256])
@pytest.mark.parametrize("wanted", [0, 1, 10, 20])
def test_greedy_samples(backend, vocabulary, wanted):
    random = np.random.default_rng(vocabulary)
    operator = Operator("s", "sample", ("x",), NAMES)
    kinds = ("int32", "float32") * 2
    for rows in (1, 5):
        logits = (3 * random.standard_normal((rows, vocabulary))).astype(np.float32)
        logits[0, [3, 9]] = 40.0  # a tie goes to the lower id
        subgraph = subgraph_of([operator], {"x": vocabulary}, ("x",))
        for name, kind in zip(NAMES, kinds, strict=True):
            subgraph.values[name] = Value(name, 20, kind, "logits")
        runner = backend.load(subgraph, Given(), Limits(8, 64))
        step = rows_step(rows)
        step = Step(*[getattr(step, n) for n in ("tokens", "positions", "sequence", "block_tables",
                                                 "logit_rows")], greedy(rows, wanted))  # fmt: skip
        step.sampling.logprobs[-1] = min(wanted, 3)
        right = sample(logits, step.sampling)
        for found in runs(backend, runner, step, {"x": logits}):
            check(found, right, rows)


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
    subgraph = subgraph_of([Operator("s", "sample", ("x",), NAMES)], {"x": vocabulary}, ("x",))
    for name, kind in zip(NAMES, ("int32", "float32") * 2, strict=True):
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
            check(found, right, rows)
