"""Regions in few words, and repetitions of stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture.plans import HALVES, THIRDS, dealt, planned

from raygraft.graph.graph import Graph
from raygraft.graph.selectors import Selector
from raygraft.picture.folding import common_text, fold, fold_alike, without_number
from raygraft.picture.repeats import Repeat, find_repeats


def texts(graph: Graph, selector: str) -> list[str]:
    operators = Selector.parse(selector).operators(graph)
    return [item.text for item in fold(graph, named(graph, operators))]


def named(graph: Graph, operators: frozenset[str]) -> list[str]:
    return [atom.name for atom in graph.atoms if not operators.isdisjoint(atom.operators)]


@pytest.mark.parametrize(
    ("selector", "folded"),
    [
        ("model", ["model"]),
        ("embed", ["embed"]),
        ("blk.2", ["blk.2"]),
        ("blk.*", ["blk.[0-3]"]),
        ("kind:attention", ["blk.[0-3].attn"]),
        ("kind:qkv+kind:core+kind:out", ["blk.[0-3].attn"]),
        ("kind:core+kind:out", ["blk.[0-3].attn.core", "blk.[0-3].attn.out"]),
        ("blk.[0,2-3].ffn", ["blk.[0,2-3].ffn"]),
        ("embed+blk.[0-1]+blk.2.attn", ["embed", "blk.[0-1]", "blk.2.attn"]),
        ("head+sample+blk.0.ffn.down", ["blk.0.ffn.down", "head", "sample"]),
    ],
)
def test_fold(four_blocks: Graph, selector: str, folded: list[str]) -> None:
    assert texts(four_blocks, selector) == folded


def test_pieces_of_a_leaf_are_named_until_they_are_whole(four_blocks: Graph) -> None:
    leaf = four_blocks.regions["blk.1.attn.qkv"]
    graph = four_blocks.with_region("mine", "mine", leaf.operators[:2])
    pieces = [atom.name for atom in graph.atoms if atom.name.startswith(leaf.name)]
    assert pieces == ["blk.1.attn.qkv#0", "blk.1.attn.qkv#2"]
    assert [item.text for item in fold(graph, pieces)] == ["blk.1.attn.qkv"]
    assert [item.text for item in fold(graph, pieces[1:])] == ["blk.1.attn.qkv#2"]


@given(st.data())
def test_folding_loses_nothing(four_blocks: Graph, data: st.DataObject) -> None:
    """What is folded can be read as selectors again: the same atoms, once each."""
    names = [atom.name for atom in four_blocks.atoms]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    folded = fold(four_blocks, chosen)
    assert sorted(atom for item in folded for atom in item.atoms) == sorted(chosen)
    for item in folded:
        operators = Selector.parse(item.text).operators(four_blocks)
        assert named(four_blocks, operators) == sorted(item.atoms, key=names.index)


def test_only_what_is_alike_shares_a_name(four_blocks: Graph) -> None:
    names = [atom.name for atom in four_blocks.atoms]
    folded = fold_alike(four_blocks, names, lambda name: name.startswith("blk.2"))
    assert [item.text for item in folded] == ["embed", "blk.[0-1,3]", "blk.2", "head", "sample"]


@pytest.mark.parametrize(
    ("text", "name", "without"),
    [
        ("it claims blk.3.attn", "blk.3.attn.core", "it claims blk.*.attn"),
        ("it claims blk.30.attn", "blk.3.attn.core", "it claims blk.30.attn"),
        ("rule 3 (blk.[3-5]=a)", "blk.3.attn", "rule 3 (blk.[3-5]=a)"),
        ("rule 1 (head=a)", "head", "rule 1 (head=a)"),
    ],
)
def test_texts_without_the_number_of_the_block(text: str, name: str, without: str) -> None:
    assert without_number(text, name) == without
    assert common_text([text], [name]) == text
    assert common_text([text, text], [name, "blk.4.attn"]) == text


def test_repeats_of_common_plans(thirty_blocks: Graph) -> None:
    assert repeats(thirty_blocks, 2, HALVES) == (Repeat(0, 2, 29),)
    assert repeats(thirty_blocks, 3, THIRDS) == (Repeat(1, 3, 29),)
    assert repeats(thirty_blocks, 8, dealt(thirty_blocks)) == (Repeat(0, 8, 3),)
    assert repeats(thirty_blocks, 1) == ()
    assert repeats(thirty_blocks, 2, ("blk.[0-14]=a", "blk.[15-29]=b", "head=b")) == ()


def test_repeats_begin_with_a_block(thirty_blocks: Graph) -> None:
    """`embed` elsewhere moves everything by one stage, and head and sample end apart."""
    assert repeats(thirty_blocks, 3, (*HALVES, "embed=c", "head=c")) == (Repeat(1, 2, 30),)


def test_two_halves_have_a_repetition_each(thirty_blocks: Graph) -> None:
    rules = ("blk.[0-14].attn=a", "blk.[0-14].ffn=b", "blk.[15-29].attn=c", "blk.[15-29].ffn=d")
    plan = planned(thirty_blocks, 4, (*rules, "head=a", "embed=a")).plan
    found = find_repeats(plan.stages)
    assert found == (Repeat(0, 2, 15), Repeat(30, 2, 15))
    assert [number for repeat in found for number in (repeat.folded[0], repeat.folded[-1])] == [
        2, 29, 32, 59,
    ]  # fmt: skip


def test_an_exception_interrupts_a_repetition(thirty_blocks: Graph) -> None:
    found = repeats(thirty_blocks, 3, (*HALVES, "blk.10.ffn=c"))
    assert found == (Repeat(0, 2, 10), Repeat(22, 2, 18))


def test_small_plans_are_drawn_whole(four_blocks: Graph) -> None:
    assert repeats(four_blocks, 2, HALVES) == ()


def repeats(graph: Graph, devices: int, rules: tuple[str, ...] | list[str] = ()) -> object:
    return find_repeats(planned(graph, devices, rules).plan.stages)


@given(st.data())
def test_folded_stages_are_the_first_ones_in_later_blocks(
    thirty_blocks: Graph, data: st.DataObject
) -> None:
    """Every folded stage is the one a period before it, by the same number of blocks."""
    cycle = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=5))
    odd = data.draw(st.integers(0, 29))
    rules = [f"blk.{n}={cycle[n % len(cycle)]}" for n in range(30)]
    stages = planned(thirty_blocks, 3, [*rules, f"blk.{odd}.attn=c"]).plan.stages
    seen: set[int] = set()
    for repeat in find_repeats(stages):
        assert not seen.intersection(repeat.folded)
        seen.update(repeat.folded)
        for number in repeat.folded:
            stage, before = stages[number], stages[number - repeat.period]
            assert stage.device == before.device
            kinds = [name.split(".")[2:] for name in before.regions if name.startswith("blk.")]
            assert [name.split(".")[2:] for name in stage.regions] == kinds
