"""The graph of a Llama: regions, their boundaries, and which operators can run as one."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.graph.tensors import WeightSlice

BEFORE = "blk.0.ffn.down.residual"


def draw(path: Path, **options: Any) -> Graph:
    return build_graph(ModelFile.open(write_tiny_llama(path / "tiny.gguf", **options)))


def test_the_tree_of_regions(tiny_graph: Graph) -> None:
    blocks = [
        f"blk.{n}{rest}"
        for n in range(2)
        for rest in (
            "", ".attn", ".attn.qkv", ".attn.core", ".attn.out",
            ".ffn", ".ffn.gate_up", ".ffn.down",
        )
    ]  # fmt: skip
    assert list(tiny_graph.regions) == ["model", "embed", *blocks, "head", "sample"]
    for region in tiny_graph.regions.values():
        for child in region.children:
            assert tiny_graph.regions[child].parent == region.name
        below = [name for c in region.children for name in tiny_graph.regions[c].operators]
        assert not region.children or list(region.operators) == below
    assert list(tiny_graph.index) == list(tiny_graph.regions["model"].operators)


@pytest.mark.parametrize(
    ("region", "inputs", "outputs"),
    [
        ("embed", [], ["embed.tokens"]),
        ("blk.1", [BEFORE], ["blk.1.ffn.down.residual"]),
        ("blk.1.attn", [BEFORE], ["blk.1.attn.out.residual"]),
        (
            "blk.1.attn.qkv",
            [BEFORE],
            ["blk.1.attn.qkv.v", "blk.1.attn.qkv.q_rope", "blk.1.attn.qkv.k_rope"],
        ),
        (
            "blk.1.attn.core",
            ["blk.1.attn.qkv.q_rope", "blk.1.attn.qkv.k_rope", "blk.1.attn.qkv.v"],
            ["blk.1.attn.core.attention"],
        ),
        ("blk.1.attn.out", ["blk.1.attn.core.attention", BEFORE], ["blk.1.attn.out.residual"]),
        ("blk.1.ffn", ["blk.1.attn.out.residual"], ["blk.1.ffn.down.residual"]),
        ("blk.1.ffn.gate_up", ["blk.1.attn.out.residual"], ["blk.1.ffn.gate_up.swiglu"]),
        (
            "blk.1.ffn.down",
            ["blk.1.ffn.gate_up.swiglu", "blk.1.attn.out.residual"],
            ["blk.1.ffn.down.residual"],
        ),
        ("head", ["blk.1.ffn.down.residual"], ["head.logits"]),
        (
            "sample",
            ["head.logits"],
            ["sample.id", "sample.logprob", "sample.top_ids", "sample.top_logprobs"],
        ),
        ("model", [], ["sample.id", "sample.logprob", "sample.top_ids", "sample.top_logprobs"]),
    ],
)
def test_boundaries_follow_from_the_data_flow(
    tiny_graph: Graph, region: str, inputs: list[str], outputs: list[str]
) -> None:
    subgraph = tiny_graph.subgraph(tiny_graph.regions[region].operators)
    assert (list(subgraph.inputs), list(subgraph.outputs)) == (inputs, outputs)


def test_weights_and_states_of_a_region(tiny_graph: Graph) -> None:
    attention = tiny_graph.subgraph(tiny_graph.regions["blk.1.attn"].operators)
    assert [weight.tensor for weight in attention.weights] == [
        f"blk.1.attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")
    ]
    (state,) = attention.states
    assert (state.name, state.kv_heads, state.key_size) == ("blk.1.attn.core", 2, 16)
    assert (state.token_bytes("f32"), state.token_bytes("f16")) == (256, 128)


def test_widths_and_rows_of_values(tiny_graph: Graph) -> None:
    found = {
        name.removeprefix("blk.0."): (value.width, value.dtype, value.rows)
        for name, value in tiny_graph.values.items()
        if not name.startswith("blk.1.")
    }
    assert found == {
        "embed.tokens": (64, "float32", "tokens"),
        "attn.qkv.norm": (64, "float32", "tokens"),
        "attn.qkv.q": (64, "float32", "tokens"),
        "attn.qkv.k": (32, "float32", "tokens"),
        "attn.qkv.v": (32, "float32", "tokens"),
        "attn.qkv.q_rope": (64, "float32", "tokens"),
        "attn.qkv.k_rope": (32, "float32", "tokens"),
        "attn.core.attention": (64, "float32", "tokens"),
        "attn.out.o": (64, "float32", "tokens"),
        "attn.out.residual": (64, "float32", "tokens"),
        "ffn.gate_up.norm": (64, "float32", "tokens"),
        "ffn.gate_up.gate": (96, "float32", "tokens"),
        "ffn.gate_up.up": (96, "float32", "tokens"),
        "ffn.gate_up.swiglu": (96, "float32", "tokens"),
        "ffn.down.down": (64, "float32", "tokens"),
        "ffn.down.residual": (64, "float32", "tokens"),
        "head.rows": (64, "float32", "logits"),
        "head.norm": (64, "float32", "logits"),
        "head.logits": (320, "float32", "logits"),
        "sample.id": (1, "int32", "logits"),
        "sample.logprob": (1, "float32", "logits"),
        "sample.top_ids": (20, "int32", "logits"),
        "sample.top_logprobs": (20, "float32", "logits"),
    }


def test_operators_stand_in_topological_order(deep_graph: Graph) -> None:
    seen: set[str] = set()
    for operator in deep_graph.operators:
        assert seen.issuperset(operator.inputs)
        seen.update(operator.outputs)
    assert seen == set(deep_graph.values)


def test_leaves_hold_every_operator_once(deep_graph: Graph) -> None:
    together = [name for leaf in deep_graph.leaves for name in leaf.operators]
    assert together == [operator.name for operator in deep_graph.operators]


@pytest.mark.parametrize(
    ("regions", "convex"),
    [
        (["blk.0.attn.qkv", "blk.0.attn.core"], True),
        (["blk.0.attn.core", "blk.0.attn.out"], True),
        (["blk.0.attn.qkv", "blk.0.attn.out"], False),  # core lies between
        (["blk.0.attn", "blk.1.attn"], False),
        (["blk.0.attn", "blk.0.ffn", "blk.1.attn"], True),
        (["embed", "blk.0.attn.out"], False),
        (["embed", "sample"], False),
        (["model"], True),
    ],
)
def test_which_regions_can_run_as_one(tiny_graph: Graph, regions: list[str], convex: bool) -> None:
    names = [name for region in regions for name in tiny_graph.regions[region].operators]
    assert tiny_graph.is_convex(names) is convex


def test_every_region_is_convex(deep_graph: Graph) -> None:
    for region in deep_graph.regions.values():
        assert deep_graph.is_convex(region.operators)


def path_returns(graph: Graph, chosen: Collection[str]) -> bool:
    """Whether a path leaves the chosen operators and comes back, by walking every path."""
    waiting = [
        reader.name
        for name in chosen
        for value in graph.operators[graph.index[name]].outputs
        for reader in graph.consumers[value]
        if reader.name not in chosen
    ]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in chosen:
            return True
        if name not in seen:
            seen.add(name)
            for value in graph.operators[graph.index[name]].outputs:
                waiting += [reader.name for reader in graph.consumers[value]]
    return False


@given(st.data())
def test_any_operators_have_the_boundary_of_their_data_flow(
    tiny_graph: Graph, data: st.DataObject
) -> None:
    names = [operator.name for operator in tiny_graph.operators]
    scattered = st.sets(st.sampled_from(names), min_size=1)
    first = st.integers(0, len(names) - 1)
    run = st.tuples(first, first).map(lambda pair: set(names[min(pair) : max(pair) + 1]))
    chosen = data.draw(scattered | run)

    inside = [op for op in tiny_graph.operators if op.name in chosen]
    outside = [op for op in tiny_graph.operators if op.name not in chosen]
    produced = {value for op in inside for value in op.outputs}
    read = {value for op in inside for value in op.inputs}
    read_outside = {value for op in outside for value in op.inputs} | set(tiny_graph.results)

    subgraph = tiny_graph.subgraph(chosen)
    assert list(subgraph.operators) == inside
    assert set(subgraph.inputs) == read - produced
    assert set(subgraph.outputs) == produced & read_outside
    assert len(set(subgraph.inputs)) == len(subgraph.inputs)
    assert len(set(subgraph.outputs)) == len(subgraph.outputs)
    assert tiny_graph.is_convex(chosen) is not path_returns(tiny_graph, chosen)


@given(st.data())
def test_regions_beside_the_tree_are_made_of_atoms(tiny_graph: Graph, data: st.DataObject) -> None:
    names = [operator.name for operator in tiny_graph.operators]
    graph = tiny_graph
    for number in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(names) - 1))
        length = data.draw(st.integers(1, 8))
        holes = data.draw(st.sets(st.sampled_from(names), max_size=2))
        chosen = set(names[start : start + length]) - holes
        if chosen and graph.is_convex(chosen):
            graph = graph.with_region(f"own{number}", "own", chosen)

    assert [name for atom in graph.atoms for name in atom.operators] == names
    assert len({atom.name for atom in graph.atoms}) == len(graph.atoms)
    for atom in graph.atoms:
        assert graph.is_convex(atom.operators)
    for region in graph.all_regions:
        inside = [
            atom for atom in graph.atoms if not {*atom.operators}.isdisjoint(region.operators)
        ]
        assert {name for atom in inside for name in atom.operators} == set(region.operators)
    if graph is tiny_graph:
        assert [a.name for a in graph.atoms] == [leaf.name for leaf in graph.leaves]


def test_regions_beside_the_tree_that_cannot_be(tiny_graph: Graph) -> None:
    attention = tiny_graph.regions["blk.0.attn"].operators
    graph = tiny_graph.with_region("mine", "fused", attention[3:9])
    assert graph.own_regions[0].operators == attention[3:9]
    assert tiny_graph.own_regions == ()
    for taken in ("mine", "blk.0.attn"):
        with pytest.raises(ConfigurationError, match=f"a region named '{taken}' already"):
            graph.with_region(taken, "fused", attention)
    with pytest.raises(ConfigurationError, match="'split' is not convex: a path leaves it"):
        graph.with_region("split", "fused", (attention[0], attention[-1]))


def test_head_of_its_own_or_tied(tmp_path: Path) -> None:
    for tied, tensor in ((False, "output.weight"), (True, "token_embd.weight")):
        graph = draw(tmp_path, tied=tied)
        logits = graph.producer["head.logits"]
        assert logits.weight("weight") == WeightSlice(tensor, stop=320)
        assert ("output.weight" in graph.tensors) is not tied


def test_biases_of_projections(tmp_path: Path) -> None:
    biased = {
        operator.name
        for operator in draw(tmp_path, blocks=1, biases=True).operators
        if operator.weight("bias") is not None
    }
    parts = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.out.o")
    parts += ("ffn.gate_up.gate", "ffn.gate_up.up", "ffn.down.down")
    assert biased == {f"blk.0.{part}" for part in parts}
    plain = draw(tmp_path, blocks=1)
    assert all(operator.weight("bias") is None for operator in plain.operators)


def test_factors_of_rope(tmp_path: Path) -> None:
    for factors in (False, True):
        graph = draw(tmp_path, rope_factors=factors)
        expected = WeightSlice("rope_freqs.weight", stop=8) if factors else None
        ropes = [operator for operator in graph.operators if operator.kind == "rope"]
        assert [rope.weight("factors") for rope in ropes] == [expected] * 4


def test_scaling_of_rope(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context": 64}
    graph = draw(tmp_path, rope_scaling=scaling, rope_base=5e5)
    query, key = (dict(graph.producer[f"blk.0.attn.qkv.{x}_rope"].attributes) for x in "qk")
    assert query == {
        "heads": 4,
        "size": 16,
        "base": 5e5,
        "style": "interleaved",
        "scaling": "yarn",
        "factor": 4.0,
        "original_context": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }
    assert key == {**query, "heads": 2}


def test_few_distinct_signatures(deep_graph: Graph) -> None:
    """Layers of equal shape share theirs."""
    assert len(deep_graph.operators) == 1 + 12 * 15 + 3 + 1
    assert len(deep_graph.signatures) == 14
    assert [str(signature) for signature in deep_graph.signatures[:4]] == [
        "get_rows(32, weight F32 320x32)",
        f"rms_norm(32x32, weight F32 32, epsilon={EPSILON})",
        "matmul(32x32, weight F32 32x32)",
        "matmul(32x8, weight F32 8x32)",
    ]


EPSILON = 9.999999747378752e-06
"""1e-5 as the file's float32 has it."""


def test_signatures_tell_types_apart(tmp_path: Path) -> None:
    graph = draw(tmp_path, quantization={"blk.1.ffn_down.weight": "Q8_0"})
    down = [graph.signature(graph.producer[f"blk.{n}.ffn.down.down"]) for n in range(2)]
    assert [signature.weights for signature in down] == [
        (("weight", "F32", (64, 96)),),
        (("weight", "Q8_0", (64, 96)),),
    ]


def test_pickle_round_trip(tiny_graph: Graph) -> None:
    copy = pickle.loads(pickle.dumps(tiny_graph))
    assert copy == tiny_graph
    assert copy.leaves == tiny_graph.leaves
    assert copy.signatures == tiny_graph.signatures
