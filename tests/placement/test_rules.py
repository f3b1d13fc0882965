"""Rules: which one decides about a region, and what is said about those that cannot hold."""

import re

import pytest
from device_profiles import LIMITS, assignment_of, device

from raygraft.graph.errors import ConfigurationError, SelectorError, UnsupportedRegionError
from raygraft.graph.graph import Graph
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import Rule


def decided(graph: Graph, *rules: str) -> dict[str, str]:
    """Leaf -> device, of those that a rule takes away from `z`."""
    parsed = [Rule.parse(rule) for rule in ("*=z", *rules)]
    devices = [device(graph, name) for name in "abz"]
    device_of = make_plan(graph, devices, parsed, limits=LIMITS).device_of
    return {leaf: name for leaf, name in device_of.items() if name != "z"}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], {}),
        (["head=a"], {"head": "a"}),
        (["blk.1.ffn=a"], {"blk.1.ffn.gate_up": "a", "blk.1.ffn.down": "a"}),
        (["blk.1.ffn=a", "blk.1.ffn.down=b"], {"blk.1.ffn.gate_up": "a", "blk.1.ffn.down": "b"}),
        (["blk.1.ffn.down=b", "blk.1.ffn=a"], {"blk.1.ffn.gate_up": "a", "blk.1.ffn.down": "a"}),
        (["head=a", "head=b", "head=z", "head=a|z"], {}),
        (["head=a|z", "head=b|a"], {"head": "a"}),
        (["head=b", "*=z"], {}),
        (["!blk.*=a"], {"embed": "a", "head": "a", "sample": "a"}),
        (["head+sample=a", "head=b"], {"head": "b", "sample": "a"}),
        (["kind:ffn+!blk.[0-2].ffn=a"], {"blk.3.ffn.gate_up": "a", "blk.3.ffn.down": "a"}),
        (["kind:core=a"], {f"blk.{n}.attn.core": "a" for n in range(4)}),
        (["blk.[2-9].attn.out=a"], {"blk.2.attn.out": "a", "blk.3.attn.out": "a"}),
    ],
)
def test_the_last_rule_that_matches_wins(
    four_blocks: Graph, rules: list[str], expected: dict[str, str]
) -> None:
    assert decided(four_blocks, *rules) == expected


def test_a_rule_for_the_model_reaches_every_region(four_blocks: Graph) -> None:
    expected = assignment_of(four_blocks, a="model", b="blk.2.attn head")
    assert decided(four_blocks, "*=a", "blk.2.attn=b", "head=b") == expected


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
        ("head=c", ConfigurationError, "rule 2 (head=c): there is no device 'c'"),
        ("head=a|c", ConfigurationError, "there is no device 'c'; the devices are a, b, z"),
        ("blk.4.attn=a", SelectorError, "selector 'blk.4.attn' names no region: this model has"),
        ("kind:experts=a", SelectorError, "the kinds of this model are attention, block"),
    ],
)  # fmt: skip
def test_rule_that_cannot_hold(
    four_blocks: Graph, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        decided(four_blocks, text)


def runs(graph: Graph, leaf: str, profile: DeviceProfile) -> bool:
    """Whether a rule may send the leaf there."""
    rules, devices = [Rule.parse(f"{leaf}={profile.name}")], [profile, device(graph, "z")]
    try:
        make_plan(graph, devices, rules, limits=LIMITS)
    except UnsupportedRegionError:
        return False
    return True


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ((), "model"),
        (("attention",), "blk.0.attn blk.1.attn"),
        (("kind:attention",), "blk.0.attn blk.1.attn"),
        (("attention", "head"), "blk.0.attn blk.1.attn head"),
        (("blk.0",), "blk.0"),
        (("blk.*.ffn.down", "blk.0.a*"), "blk.0.ffn.down blk.1.ffn.down blk.0.attn"),
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
    profile = device(tiny_graph, "a", regions=regions)
    assert {
        leaf.name for leaf in tiny_graph.leaves if runs(tiny_graph, leaf.name, profile)
    } == taken
