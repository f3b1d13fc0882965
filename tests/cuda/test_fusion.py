"""What runs as one, of whole models and of their parts."""

from dataclasses import replace

import pytest
from single_operators import subgraph_of

from raygraft.graph.architectures import build_graph
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.operators import Operator
from raygraft.graph.tensors import WeightSlice
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


def test_a_block_is_at_most_seven_launches(tiny_graph):
    subgraph, program = program_of(tiny_graph, ["blk.0"])
    assert names(program) == [
        "rms_norm", "3 products", "CachedAttention", "1 products + x",
        "rms_norm", "GatedProduct", "1 products + x",
    ]  # fmt: skip
    hidden = {"blk.0.attn.qkv.norm", "blk.0.ffn.gate_up.swiglu", "blk.0.attn.core.attention"}
    assert hidden <= program.packed
    assert not hidden & program.floats
    assert set(subgraph.outputs) <= program.floats


def taken_in(program):
    """Names of the norms that products take in, in the order of the products before them."""
    made = [one.normed for one in program.order if isinstance(one, Products) and one.normed]
    assert sorted(made) == sorted(program.normed)
    return [program.normed[name].norm.name for name in made]


def test_products_take_in_the_norms_between_two_additions(tiny_graph):
    """Not the first, which nothing is added before; not the last, of which some rows are normed."""
    _, program = program_of(tiny_graph, ["blk.0", "blk.1"])
    norms = ["blk.0.ffn.gate_up.norm", "blk.1.attn.qkv.norm", "blk.1.ffn.gate_up.norm"]
    assert taken_in(program) == norms
    made = {
        one.operator.inputs[0]: one.operator.outputs[0]
        for one in program.order
        if isinstance(one, Single) and one.operator.kind == "rms_norm"
    }
    for one in program.order:
        if isinstance(one, Products) and one.normed:
            own = program.normed[one.normed]
            assert own.value == one.outputs[0]
            assert own.previous == made[one.residual]


def test_norms_that_keep_their_launch(tiny_graph):
    operators = [
        name for region in ("blk.0", "blk.1") for name in tiny_graph.regions[region].operators
    ]
    subgraph = tiny_graph.subgraph(operators)
    kinds = {op.name: "Q8_0" for op in subgraph.operators if op.kind == "matmul"}
    inner, last = "blk.1.attn.qkv.norm", "blk.1.ffn.gate_up.norm"
    assert inner in taken_in(compile_program(subgraph, kinds))
    # What it makes is an output.
    (made,) = next(op for op in subgraph.operators if op.name == inner).outputs
    shown = replace(subgraph, outputs=(*subgraph.outputs, made))
    assert taken_in(compile_program(shown, kinds)) == ["blk.0.ffn.gate_up.norm", last]
    # The products that read it, or those before it, are in float32.
    for name in ("blk.1.attn.qkv.q", "blk.0.ffn.down.down"):
        assert name in kinds
        mixed = compile_program(subgraph, kinds | {name: "F32"})
        assert taken_in(mixed) == ["blk.0.ffn.gate_up.norm", last]


def test_the_factor_of_a_norm_is_there_before_it_is_asked_for():
    """x + A norm(x) = r, r + B norm(r) = s, s + C norm(s): the second sum reads norm(r) itself."""
    operators = []
    for n, x in enumerate("xrs"):
        role = (("weight", WeightSlice("w")),)
        operators += [
            Operator(f"norm{n}", "rms_norm", (x,), (f"n{n}",), role, (("epsilon", 1e-5),)),
            Operator(f"m{n}", "matmul", (f"n{n}",), (f"h{n}",), role),
            Operator(f"add{n}", "add", (x, f"h{n}"), ("rst"[n],)),
        ]
    names = [name for op in operators for name in (*op.inputs, *op.outputs)]
    subgraph = subgraph_of(operators, dict.fromkeys(names, 64))
    program = compile_program(subgraph, {f"m{n}": "Q8_0" for n in range(3)})
    assert list(program.normed) == ["n1"]


def test_what_is_added_to_may_be_what_is_multiplied():
    role = (("weight", WeightSlice("w")),)
    operators = [
        Operator("norm", "rms_norm", ("x",), ("n",), role, (("epsilon", 1e-5),)),
        Operator("m", "matmul", ("n",), ("h",), role), Operator("add", "add", ("n", "h"), ("y",)),
    ]  # fmt: skip
    program = compile_program(subgraph_of(operators, dict.fromkeys("xnhy", 64)), {"m": "Q8_0"})
    assert "n" in program.floats & program.packed


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
