"""Selectors: what they name, and what is said when they name nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygraft.graph.errors import SelectorError
from raygraft.graph.graph import Graph
from raygraft.graph.selectors import Selector


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("blk.3.attn", "blk.3.attn"),
        (" head ", "head"),
        ("blk.[0-2].attn", "blk.0.attn blk.1.attn blk.2.attn"),
        ("blk.[3].ffn", "blk.3.ffn"),
        ("blk.[9-10,1]", "blk.1 blk.9 blk.10"),
        ("blk.[1-3,2-4]", "blk.1 blk.2 blk.3 blk.4"),
        ("blk.[10-99].attn.core", "blk.10.attn.core blk.11.attn.core"),
        ("blk.[007]", "blk.7"),
        ("blk.1?", "blk.10 blk.11"),
        ("blk.1*", "blk.1 blk.10 blk.11"),
        ("blk.[4-5].*", "blk.4.attn blk.4.ffn blk.5.attn blk.5.ffn"),
        ("blk.2.f*.*", "blk.2.ffn.gate_up blk.2.ffn.down"),
        ("blk.2.*.o*", "blk.2.attn.out"),
        ("blk.0.a*", "blk.0.attn"),
        ("*.[7].attn.o?t", "blk.7.attn.out"),
        ("model", "model"),
        ("*", "model"),
        ("*mb*", "embed"),
        ("kind:embed", "embed"),
        ("kind:block", " ".join(f"blk.{n}" for n in range(12))),
        ("kind:attention", " ".join(f"blk.{n}.attn" for n in range(12))),
        ("kind:sa*", "sample"),
        ("kind:model", "model"),
        ("blk.1.attn+head", "blk.1.attn head"),
        (" head + blk.1.attn ", "blk.1.attn head"),
        ("blk.[0-2].ffn+!blk.1.ffn", "blk.0.ffn blk.2.ffn"),
        ("!blk.1.ffn + blk.[0-1].ffn", "blk.0.ffn"),
        ("blk.1.ffn+!blk.1.ffn.down", "blk.1.ffn.gate_up"),
        ("blk.[3-4]+!kind:attention", "blk.3.ffn blk.4.ffn"),
        ("!kind:block", "embed head sample"),
        ("!blk.*+!embed", "head sample"),
    ],
)  # fmt: skip
def test_regions_that_a_selector_names(deep_graph: Graph, text: str, regions: str) -> None:
    selected = Selector.parse(text).select(deep_graph)
    assert [region.name for region in selected] == regions.split()


@given(ranges=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=4))
def test_a_range_names_exactly_the_numbers_inside(
    deep_graph: Graph, ranges: list[tuple[int, int]]
) -> None:
    ranges = [(min(pair), max(pair)) for pair in ranges]
    inside = {n for start, stop in ranges for n in range(start, stop + 1) if n < 12}
    items = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    selector = Selector.parse(f"blk.[{items}].ffn")
    assert {region.name for region in deep_graph.regions.values() if selector.matches(region)} == {
        f"blk.{n}.ffn" for n in inside
    }


def names_below(graph: Graph, part: str) -> set[str]:
    """Operators of all regions that one term without `!` names."""
    return {name for region in Selector.parse(part).select(graph) for name in region.operators}


PARTS = ("model", "blk.*", "kind:ffn", "kind:attention", "blk.[0-5]", "blk.3.attn.core", "head")
PARTS += ("embed", "blk.[4-9].ffn.down", "kind:sample")


@given(
    meant=st.lists(st.sampled_from(PARTS), max_size=3),
    excluded=st.lists(st.sampled_from(PARTS), max_size=3),
)
def test_terms_add_and_exclude(deep_graph: Graph, meant: list[str], excluded: list[str]) -> None:
    expected = set().union(*(names_below(deep_graph, part) for part in meant or ["model"]))
    expected -= set().union(*(names_below(deep_graph, part) for part in excluded))
    selector = Selector.parse("+".join([*meant, *(f"!{part}" for part in excluded)] or ["model"]))
    if not expected:
        with pytest.raises(SelectorError, match="excludes all that it names"):
            selector.select(deep_graph)
        return
    assert selector.operators(deep_graph) == expected
    regions = selector.select(deep_graph)
    assert {name for region in regions for name in region.operators} == expected


@given(st.data())
def test_every_region_is_named_by_its_own_name(deep_graph: Graph, data: st.DataObject) -> None:
    region = data.draw(st.sampled_from(list(deep_graph.regions.values())))
    assert Selector.parse(region.name).select(deep_graph) == (region,)
    assert region in Selector.parse(f"kind:{region.kind}").select(deep_graph)
    star = ".".join("*" for _ in region.name.split("."))
    assert Selector.parse(star).matches(region) == (star != "*" or region.name == "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "selector '': cannot read ''; a segment is a name, a pattern with * or ?, or a range"),
        ("blk..attn", "cannot read ''"),
        ("blk.[].attn", "cannot read '[]'"),
        ("blk.[1-].attn", "cannot read '[1-]'"),
        ("blk.[-1].attn", "cannot read '[-1]'"),
        ("blk.[1,].attn", "cannot read '[1,]'"),
        ("blk.[1-2", "cannot read '[1-2'"),
        ("blk.1-2.attn", "cannot read '1-2'"),
        ("blk.[0-1]\n.attn", "cannot read '[0-1]\\n'"),
        ("blk.[5-3].attn", "the range 5-3 is empty"),
        ("kind:", "'' is no kind of region"),
        ("head+", "selector 'head+': cannot read ''"),
        ("!", "selector '!': cannot read ''"),
        ("!!head", "cannot read '!head'"),
        ("kind:a.b", "'a.b' is no kind of region"),
        ("kind:[0-1]", "'[0-1]' is no kind of region"),
        ("blk/3", "cannot read 'blk/3'"),
    ],
)
def test_selector_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(SelectorError, match=re.escape(message)):
        Selector.parse(text)


@given(st.text(alphabet="blk.[]0123456789-,*? \n:kind_ñ²٣+!") | st.text())
def test_any_text_is_a_selector_or_refused(deep_graph: Graph, text: str) -> None:
    try:
        selector = Selector.parse(text)
        selector.select(deep_graph)
    except SelectorError as error:
        assert repr(text.strip()) in str(error)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("blk.12.attn", "did you mean blk.2.attn"),
        ("blk.3.attention", "did you mean blk.3.attn"),
        ("blk.[12-15]", "the regions embed, blk.0 to blk.11, head and sample"),
        ("output", "the regions embed, blk.0 to blk.11, head and sample"),
        ("blk.[0-x]", "cannot read '[0-x]'"),
        ("kind:attn", "the kinds of this model are attention, block, core, down, embed, ffn"),
    ],
)
def test_hint_when_nothing_is_named(deep_graph: Graph, text: str, hint: str) -> None:
    with pytest.raises(SelectorError, match=re.escape(hint)) as caught:
        Selector.parse(text).select(deep_graph)
    assert f"selector {text!r}" in str(caught.value)
