"""What is checked of an honest device, and that it passes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_llama

from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.part import Questions
from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import YES, Limits
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels import create_backend
from raygraft.kernels.base import BackendOptions
from raygraft.kernels.verification.checks import Check, Outcome, list_checks
from raygraft.kernels.verification.steps import BLOCK_SIZE, random_steps
from raygraft.kernels.verification.trial import make_trial, obstacle, run_trial
from raygraft.placement.devices import DeviceSpec

LIARS = Path(__file__).parent / "liars.py"
LIMITS = Limits(max_rows=64, context=128, max_sequences=4)


def checks_of(graph: Graph, limits: Limits = LIMITS) -> tuple[Check, ...]:
    """All that there is to check of a graph."""
    claims = {graph.region_signature(region): YES for region in graph.all_regions}
    return list_checks(graph, dict.fromkeys(graph.signatures, YES), claims, (), limits)


def test_equal_regions_and_operators_are_checked_once(tiny_graph: Graph) -> None:
    checks = checks_of(tiny_graph)
    assert len({check.what for check in checks}) == len(checks)
    claims = {check.where: check.count for check in checks if check.claim}
    assert claims["blk.0"] == claims["blk.0.attn"] == claims["blk.0.attn.qkv"] == 2
    assert claims["embed"] == claims["model"] == 1
    assert not any(where.startswith("blk.1") for where in claims)
    assert [c.where for c in checks if c.claim][-1] == "model"
    operators = [check for check in checks if not check.claim]
    assert {check.what for check in operators} == set(tiny_graph.signatures)
    assert sum(check.count for check in operators) == len(tiny_graph.operators)


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_a_device_that_rounds_passes_whatever_it_claims(cache_type: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", quantization="Q8_0", tied=True, biases=True)
    model = ModelFile.open(path)
    graph = build_graph(model)
    fleet = InProcessFleet([DeviceSpec("a", f"{LIARS}:ClaimsAll", threads=1)])
    limits = replace(LIMITS, cache_type=cache_type)
    results = fleet.verify(Questions(graph, limits), model)["a"]
    assert len(results) > len(graph.signatures)
    assert [check.detail for check in results if check.outcome is not Outcome.OK] == []
    assert 0 < max(check.error or 0 for check in results) < 1e-3


def test_what_does_not_fit_is_not_checked(tiny_model: Path, tiny_graph: Graph) -> None:
    """No plan would put it there; the device is believed, and the result says so."""
    spec = DeviceSpec("a", f"{LIARS}:ClaimsAll", threads=1, memory=100_000)
    results = InProcessFleet([spec]).verify(
        Questions(tiny_graph, LIMITS), ModelFile.open(tiny_model)
    )["a"]
    whole = next(check for check in results if check.where == "model")
    assert whole.outcome is Outcome.UNCHECKED
    assert whole.ok
    assert whole.detail.startswith("its weights take ")
    assert next(check for check in results if check.where == "blk.0.attn").outcome is Outcome.OK


def test_the_reference_says_when_it_cannot_help(tiny_graph: Graph) -> None:
    check = next(check for check in checks_of(tiny_graph) if check.where == "model")
    assert "GiB for its weights, 0.0 GiB are free" in obstacle(check, 1000)
    assert obstacle(check, 1 << 40) == ""
    unknown = replace(check, limits=replace(LIMITS, cache_type="q4_0"))
    assert "the reference cannot run it: it has no cache of type q4_0" in obstacle(unknown, 1 << 40)


def test_the_same_seed_gives_the_same_trial(tiny_model: Path, tiny_graph: Graph) -> None:
    model = ModelFile.open(tiny_model)
    weights = MappedWeights(model.files, model.tensors)
    check = checks_of(tiny_graph)[0]

    def inputs(seed: int) -> list[np.ndarray]:
        trial = make_trial(check, weights, seed=seed)
        return [step.step.tokens for step in trial.steps]

    assert all(map(np.array_equal, inputs(1), inputs(1)))
    assert not all(map(np.array_equal, inputs(1), inputs(2)))


@given(
    rows=st.integers(1, 300),
    context=st.integers(1, 5000),
    sequences=st.integers(1, 4),
    seed=st.integers(0, 99),
    stateless=st.booleans(),
)
def test_steps_stay_within_the_limits(
    rows: int, context: int, sequences: int, seed: int, stateless: bool
) -> None:
    limits = Limits(rows, context, max_sequences=sequences)
    rng = np.random.default_rng(seed)
    steps, blocks = random_steps(rng, limits, vocabulary=50, stateless=stateless)
    assert steps
    for named in steps:
        step = named.step
        assert 1 <= step.rows <= rows
        assert len(step.block_tables) <= sequences
        assert 0 <= step.positions.min() <= step.positions.max() < context
        assert step.sampling.rows == len(step.logit_rows)
        used = [page for table in step.block_tables for page in table if page >= 0]
        assert len(set(used)) == len(used)
        assert max(used) < blocks
        for number, table in enumerate(step.block_tables):
            own = step.positions[step.sequence == number]
            assert np.array_equal(own, np.arange(own[0], own[0] + len(own)))
            assert np.sum(table >= 0) == -(-(own[-1] + 1) // BLOCK_SIZE)


def test_steps_are_of_all_kinds() -> None:
    limits = Limits(256, 4096, max_sequences=8)
    steps, _ = random_steps(np.random.default_rng(0), limits, 50, stateless=False)
    assert [named.title for named in steps] == [
        "7 rows",
        "25 rows of 3 sequences after 7 others",
        "3 rows of 3 sequences after 32 others",
        "1 row after 20 others",
        "7 rows of 2 sequences after 15 others",
        "256 rows",
        "56 rows of 2 sequences after 256 others",
        "2 rows of 2 sequences after 312 others",
    ]
    assert [len(named.step.logit_rows) for named in steps] == [1, 25, 3, 1, 0, 1, 2, 2]
    pages = [named.step.block_tables for named in steps]
    assert not np.array_equal(np.sort(pages[5][0]), pages[5][0])  # not in order


def test_a_backend_that_fails_to_load_is_a_result(tiny_model: Path, tiny_graph: Graph) -> None:
    model = ModelFile.open(tiny_model)
    weights = MappedWeights(model.files, {})  # a device whose file lacks the tensors
    check = next(check for check in checks_of(tiny_graph) if check.where == "blk.0.attn.qkv.q")
    trial = make_trial(check, MappedWeights(model.files, model.tensors))
    found = run_trial(create_backend("reference", BackendOptions()), trial, weights)
    assert found.detail == "KeyError: 'blk.0.attn_q.weight', while loading"
