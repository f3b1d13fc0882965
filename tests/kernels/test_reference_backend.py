"""The reference backend: what it says it can do, and whole models through its runner."""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph, Subgraph
from raygraft.graph.operators import Signature
from raygraft.graph.step import Sampling, Step
from raygraft.graph.tensors import QuantizedTensor, WeightSlice
from raygraft.kernels import BACKENDS, create_backend
from raygraft.kernels.base import Backend, BackendOptions, Runner

LIMITS = Limits(max_rows=16, context=32)
NOTHING_SAMPLED = Sampling(*(np.zeros(0, np.int32) for _ in fields(Sampling)))
TOKENS = np.array([5, 77, 300, 5, 19, 240, 2, 8, 100], np.int32)


def reference() -> Backend:
    return create_backend("reference", BackendOptions())


@pytest.mark.parametrize(
    ("signature", "cache_type", "reason"),
    [
        (Signature("matmul", (8, 8), (("weight", "Q4_K", (8, 8)),)), "f32", ""),
        (Signature("matmul", (8, 8), (("weight", "F16", (8, 8)),)), "f16", ""),
        (Signature("attention", (8, 8, 8, 8)), "f16", ""),
        (Signature("attention", (8, 8, 8, 8)), "q4_0", "it has no cache of type q4_0"),
        (Signature("attention", (64, 64, 64, 64), (), (("kv_heads", 2),)), "q8_0", ""),
        (
            Signature("attention", (64, 64, 32, 64), (), (("kv_heads", 2),)),
            "q8_0",
            "a q8_0 cache needs values of a multiple of 32 numbers, not 16",
        ),
        (Signature("add", (8, 8, 8)), "q8_0", ""),
        (Signature("convolve", (8, 8)), "f32", "it has no operator convolve"),
        (
            Signature("matmul", (8, 8), (("weight", "F32", (8, 8)), ("bias", "I8", (8,)))),
            "f32",
            "it cannot read the bias of type I8",
        ),
    ],
)
def test_what_it_supports(signature: Signature, cache_type: str, reason: str) -> None:
    verdict = reference().supports_op(signature, Limits(1, 1, cache_type))
    assert (verdict.ok, verdict.reason) == (not reason, reason)


def test_it_supports_a_whole_model(tiny_graph: Graph) -> None:
    assert all(reference().supports_op(signature, LIMITS) for signature in tiny_graph.signatures)


def test_description() -> None:
    description = create_backend("reference", BackendOptions(threads=3)).describe()
    assert (description.backend, description.type, description.threads) == ("reference", "cpu", 3)
    assert 0 < description.memory_free <= description.memory_total
    assert reference().weight_bytes(("Q4_0", (3, 64))) == 3 * 64 * 4


def test_unknown_backend() -> None:
    known = ", ".join(sorted(BACKENDS))
    with pytest.raises(ConfigurationError, match=f"'abacus' is not known; known are {known}"):
        create_backend("abacus", BackendOptions())


class CountedWeights:
    """A source that remembers what was read."""

    def __init__(self, model: ModelFile) -> None:
        self._source = MappedWeights(model.files, model.tensors)
        self.read_slices: list[WeightSlice] = []

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        self.read_slices.append(weight)
        return self._source.read(weight)


def step_over(positions: range, *, sequence: int = 0, blocks: int = 4) -> Step:
    """Rows of `TOKENS` at these positions, whose cache lies in pages from the last to the first."""
    rows = len(positions)
    return Step(
        tokens=TOKENS[positions.start : positions.stop],
        positions=np.arange(positions.start, positions.stop, dtype=np.int32),
        sequence=np.full(rows, sequence, np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None, ::-1],
        logit_rows=np.arange(rows, dtype=np.int32),
        sampling=NOTHING_SAMPLED,
    )


def load(backend: Backend, model: ModelFile, subgraph: Subgraph) -> Runner:
    runner = backend.load(subgraph, MappedWeights(model.files, model.tensors), LIMITS)
    runner.allocate_state(4, 4)
    return runner


def logits_subgraph(graph: Graph) -> Subgraph:
    """All but sampling."""
    return graph.subgraph([op.name for op in graph.operators if op.kind != "sample"])


VARIANTS = {
    "plain": {},
    "tied, biases and factors": {"tied": True, "biases": True, "rope_factors": True},
    "quantised": {"quantization": "Q5_0"},
    "one key-value head": {"kv_heads": 1, "head_size": 24},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_any_size_give_the_logits_of_one_pass(variant: str, tmp_path: Path) -> None:
    model = ModelFile.open(write_tiny_llama(tmp_path / "tiny.gguf", **VARIANTS[variant]))
    subgraph = logits_subgraph(build_graph(model))
    backend = reference()
    whole = load(backend, model, subgraph).run(step_over(range(9)), {})["head.logits"]
    assert whole.shape == (9, 320)
    assert 0.5 < np.std(whole) < 20
    for cuts in ([0, *range(1, 9), 9], [0, 5, 6, 9], [0, 1, 9]):
        runner = load(backend, model, subgraph)
        parts = [
            runner.run(step_over(range(start, stop)), {})["head.logits"]
            for start, stop in pairwise(cuts)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-4)


def test_regions_run_apart_give_the_same_logits(tiny_model: Path, tiny_graph: Graph) -> None:
    """Bit for bit: the same operators on the same inputs."""
    model, backend, step = ModelFile.open(tiny_model), reference(), step_over(range(9))
    whole = load(backend, model, logits_subgraph(tiny_graph)).run(step, {})["head.logits"]
    values: dict[str, NDArray[np.float32]] = {}
    for leaf in tiny_graph.leaves[:-1]:
        subgraph = tiny_graph.subgraph(leaf.operators)
        inputs = {name: values[name] for name in subgraph.inputs}
        outputs = load(backend, model, subgraph).run(step, inputs)
        assert tuple(outputs) == subgraph.outputs
        for name, output in outputs.items():
            assert output.shape == (9, tiny_graph.values[name].width)
            assert output.dtype == np.float32
        values.update(outputs)
    np.testing.assert_array_equal(values["head.logits"], whole)


def test_only_wanted_rows_reach_the_head(tiny_model: Path, tiny_graph: Graph) -> None:
    model, step = ModelFile.open(tiny_model), step_over(range(9))
    subgraph = logits_subgraph(tiny_graph)
    whole = load(reference(), model, subgraph).run(step, {})["head.logits"]
    fewer = replace(step, logit_rows=np.array([3, 8], np.int32))
    some = load(reference(), model, subgraph).run(fewer, {})["head.logits"]
    np.testing.assert_allclose(some, whole[[3, 8]], rtol=1e-5, atol=1e-5)


def test_a_tied_weight_is_read_once(tmp_path: Path) -> None:
    model = ModelFile.open(write_tiny_llama(tmp_path / "tiny.gguf", tied=True))
    graph, backend, weights = build_graph(model), reference(), CountedWeights(model)
    for region in ("embed", "head"):
        backend.load(graph.subgraph(graph.regions[region].operators), weights, LIMITS)
    names = [weight.tensor for weight in weights.read_slices]
    assert names == ["token_embd.weight", "output_norm.weight"]
