"""What runs as one, of whole models and of their parts."""

from dataclasses import replace

import pytest

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.kernels.cuda.fusion import (
    CachedAttention,
    GatedProduct,
    Prepare,
    Products,
    Single,
    compile_program,
    reads,
    writes,
)
from raygraft.kernels.cuda.memory import assign_slots


def names(program):
    found = []
    for one in program.order:
        if isinstance(one, Single):
            found.append(one.operator.kind)
        elif isinstance(one, Products):
            found.append(f"{len(one.operators)} products" + (" + x" if one.residual else ""))
        else:
            found.append(type(one).__name__)
    return found


def program_of(graph, regions, kind="Q8_0"):
    operators = [name for region in regions for name in graph.regions[region].operators]
    subgraph = graph.subgraph(operators)
    kinds = {op.name: kind for op in subgraph.operators if op.kind == "matmul"}
    return subgraph, compile_program(subgraph, kinds)


def test_a_block_is_seven_launches(tiny_graph):
    subgraph, program = program_of(tiny_graph, ["blk.0"])
    assert names(program) == [
        "rms_norm", "3 products", "CachedAttention", "1 products + x",
        "rms_norm", "GatedProduct", "1 products + x",
    ]  # fmt: skip
    hidden = {"blk.0.attn.qkv.norm", "blk.0.ffn.gate_up.swiglu", "blk.0.attn.core.attention"}
    assert hidden <= program.packed
    assert not hidden & program.floats
    assert set(subgraph.outputs) <= program.floats


def test_products_take_in_the_norms_between_two_additions(tiny_graph):
    """Not the first, which nothing is added before; not the last, of which some rows are normed."""
    _, program = program_of(tiny_graph, ["blk.0", "blk.1"])
    sums = [one for one in program.order if isinstance(one, Products) and one.residual]
    taken = [one.norm and one.norm.name for one in sums]
    assert taken == [
        "blk.0.ffn.gate_up.norm",
        "blk.1.attn.qkv.norm",
        "blk.1.ffn.gate_up.norm",
        None,
    ]
    for one, before in zip(sums, [None, *sums], strict=False):
        if one.norm is not None:
            normed = program.normed[one.norm.outputs[0]]
            assert (normed.value, normed.residual) == (one.outputs[0], one.residual)
            assert before is None or one.residual == before.outputs[0]


def test_a_norm_that_others_read_keeps_its_launch(tiny_graph):
    operators = [
        name for region in ("blk.0", "blk.1") for name in tiny_graph.regions[region].operators
    ]
    subgraph = tiny_graph.subgraph(operators)
    (normed,) = next(op for op in subgraph.operators if op.name == "blk.1.attn.qkv.norm").outputs
    shown = replace(subgraph, outputs=(*subgraph.outputs, normed))
    kinds = {op.name: "Q8_0" for op in subgraph.operators if op.kind == "matmul"}
    assert normed in compile_program(subgraph, kinds).normed
    program = compile_program(shown, kinds)
    assert normed not in program.normed
    assert [one.norm.name for one in program.order if isinstance(one, Products) and one.norm] == [
        "blk.0.ffn.gate_up.norm", "blk.1.ffn.gate_up.norm",
    ]  # fmt: skip


def test_float_weights_are_not_fused_with_their_gate(tiny_graph):
    _, program = program_of(tiny_graph, ["blk.0.ffn"], "F32")
    assert names(program) == ["rms_norm", "1 products", "1 products", "swiglu", "1 products + x"]
    assert not program.packed


def test_cut_inside_of_attention(tiny_graph):
    _, program = program_of(tiny_graph, ["blk.0.attn.qkv"])
    assert names(program) == ["rms_norm", "3 products", "rope", "rope"]
    _, program = program_of(tiny_graph, ["blk.0.attn.core"])
    assert names(program) == ["CachedAttention"]
    _, program = program_of(tiny_graph, ["blk.0.attn.out"])
    assert names(program) == ["Prepare", "1 products + x"]


@pytest.mark.parametrize("regions", [["blk.0"], ["blk.0", "blk.1"], ["embed", "blk.0", "blk.1"]])
def test_everything_is_written_before_it_is_read(tiny_graph, regions):
    subgraph, program = program_of(tiny_graph, regions)
    floats, packed = set(subgraph.inputs), set()
    for one in program.order:
        if isinstance(one, Products | GatedProduct):
            assert one.x in packed
            assert set(reads(one)) - {one.x} <= floats
        else:
            assert set(reads(one)) <= floats
        if isinstance(one, Prepare):
            packed.add(one.value)
        floats |= set(writes(one)) & program.floats
        if not isinstance(one, Products):
            packed |= set(writes(one)) & program.packed
    assert set(subgraph.outputs) <= floats
    assert any(isinstance(one, CachedAttention) for one in program.order)


def test_slots_are_reused_but_never_while_read(tiny_model):
    graph = build_graph(ModelFile.open(tiny_model))
    order = [(frozenset(op.inputs), frozenset(op.outputs)) for op in graph.operators]
    slots = assign_slots(order)
    last = {name: n for n, (read, _) in enumerate(order) for name in read}
    born = {name: n for n, (_, written) in enumerate(order) for name in written}
    for a in slots:
        for b in slots:
            if a < b and slots[a] == slots[b]:
                first, second = sorted((a, b), key=born.__getitem__)
                assert born[first] < born[second]
                assert last.get(first, born[first]) < born[second]
    assert len(set(slots.values())) <= 8
