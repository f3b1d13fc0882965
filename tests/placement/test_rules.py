"""Rules: which one decides about a region, and what is said about those that cannot hold."""

import re

import pytest
from device_profiles import assignment_of, device

from raygraft.graph.errors import ConfigurationError, SelectorError
from raygraft.graph.graph import Graph
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.rules import Rule, apply_rules


def decided(graph: Graph, *rules: str) -> dict[str, int]:
    """Leaf -> number of the rule that decides about it."""
    applied = apply_rules(graph, [Rule.parse(rule) for rule in rules], ("a", "b"))
    return {leaf: one.number for leaf, one in applied.items()}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], {}),
        (["head=a"], {"head": 1}),
        (["blk.1.ffn=a"], {"blk.1.ffn.gate_up": 1, "blk.1.ffn.down": 1}),
        (["blk.1.ffn=a", "blk.1.ffn.down=b"], {"blk.1.ffn.gate_up": 1, "blk.1.ffn.down": 2}),
        (["blk.1.ffn.down=b", "blk.1.ffn=a"], {"blk.1.ffn.gate_up": 2, "blk.1.ffn.down": 2}),
        (["head=a", "head=b", "head=a|b"], {"head": 3}),
        (["kind:core=a"], {f"blk.{n}.attn.core": 1 for n in range(4)}),
        (["blk.[2-9].attn.out=a"], {"blk.2.attn.out": 1, "blk.3.attn.out": 1}),
    ],
)
def test_the_last_rule_that_matches_wins(
    four_blocks: Graph, rules: list[str], expected: dict[str, int]
) -> None:
    assert decided(four_blocks, *rules) == expected


def test_a_rule_for_the_model_reaches_every_region(four_blocks: Graph) -> None:
    expected = assignment_of(four_blocks, one="model", two="blk.2.attn head")
    found = decided(four_blocks, "*=a", "blk.2.attn=b", "head=b")
    assert {leaf: min(number, 2) for leaf, number in found.items()} == {
        leaf: {"one": 1, "two": 2}[name] for leaf, name in expected.items()
    }


@pytest.mark.parametrize(
    ("text", "selector", "devices"),
    [
        ("kind:attention=gpu0", "kind:attention", ("gpu0",)),
        ("blk.[0-3].ffn = a | b ", "blk.[0-3].ffn", ("a", "b")),
        (" * =a", "*", ("a",)),
    ],
)
def test_reading_a_rule(text: str, selector: str, devices: tuple[str, ...]) -> None:
    rule = Rule.parse(text)
    assert (rule.selector.text, rule.devices) == (selector, devices)
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("blk.0", ConfigurationError, "rule 'blk.0': expected SELECTOR=DEVICE"),
        ("", ConfigurationError, "rule '': expected SELECTOR=DEVICE"),
        ("head=", ConfigurationError, "rule head=: a device's name is missing"),
        ("head=a||b", ConfigurationError, "rule head=a||b: a device's name is missing"),
        ("=a", SelectorError, "selector '': cannot read ''"),
        ("head=b=a", SelectorError, "selector 'head=b': cannot read 'head=b'"),
        ("head=c", ConfigurationError, "rule 2 (head=c): there is no device 'c'; the devices are a, b"),
        ("head=a|c", ConfigurationError, "rule 2 (head=a|c): there is no device 'c'"),
        ("blk.4.attn=a", SelectorError, "selector 'blk.4.attn' names no region: this model has"),
        ("kind:experts=a", SelectorError, "the kinds of this model are attention, block"),
    ],
)  # fmt: skip
def test_rule_that_cannot_hold(
    four_blocks: Graph, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        decided(four_blocks, "embed=a", text)


def runnable(graph: Graph, profile: DeviceProfile) -> set[str]:
    return {leaf.name for leaf in graph.leaves if profile.can_run(graph, leaf)}


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ((), "model"),
        (("attention",), "blk.0.attn blk.1.attn"),
        (("kind:attention",), "blk.0.attn blk.1.attn"),
        (("attention", "head"), "blk.0.attn blk.1.attn head"),
        (("blk.0",), "blk.0"),
        (("blk.*.ffn.down", "core"), "blk.0.ffn.down blk.1.ffn.down blk.0.attn.core blk.1.attn.core"),
        (("block", "embed"), "blk.0 blk.1 embed"),
    ],
)  # fmt: skip
def test_a_device_takes_only_its_regions(
    tiny_graph: Graph, regions: tuple[str, ...], expected: str
) -> None:
    taken = {
        leaf.name
        for name in expected.split()
        for leaf in tiny_graph.descendants(tiny_graph.regions[name])
        if not leaf.children
    }
    assert runnable(tiny_graph, device(tiny_graph, "a", regions=regions)) == taken
