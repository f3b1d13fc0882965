"""llama.cpp's `-ot`, as rules: which region goes where, and what cannot be said."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from device_profiles import LIMITS, assignment_of, device
from tiny_models import write_tiny_llama

from raygraft import LLM
from raygraft.configuration import parse_devices
from raygraft.graph.architectures import build_graph
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.devices import DeviceSpec
from raygraft.placement.override_tensor import find_device, parse_overrides
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import AnyRule, Rule
from raygraft.planning import with_overrides

NAMES = ("a", "b", "z")


def rules_of(graph: Graph, overrides: Sequence[str], *place: str) -> tuple[AnyRule, ...]:
    specs = [DeviceSpec(name) for name in NAMES]
    return with_overrides(graph, [Rule.parse(rule) for rule in place], overrides, specs)


def moved(graph: Graph, overrides: Sequence[str], *place: str) -> dict[str, str]:
    """Leaf -> device, of those that are taken away from `z`, where everything else is."""
    rules = [Rule.parse("*=z"), *rules_of(graph, overrides, *place)]
    devices = [device(graph, name) for name in NAMES]
    device_of = make_plan(graph, devices, rules, limits=LIMITS).device_of
    return {leaf: name for leaf, name in device_of.items() if name != "z"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ffn=a"], {"a": "blk.0.ffn blk.1.ffn"}),
        (["ffn_(gate|up)=a"], {"a": "blk.0.ffn.gate_up blk.1.ffn.gate_up"}),
        (["blk.1.=a"], {"a": "blk.1"}),
        ([r"blk\.(0|7)\.attn=a"], {"a": "blk.0.attn"}),  # with its core and the cache
        (["attn_output=a"], {"a": "blk.0.attn.out blk.1.attn.out"}),  # the core stays
        (["attn_(q|k|v)=a"], {"a": "blk.0.attn.qkv blk.1.attn.qkv"}),
        (["attn_(q|k|v)=a,attn_output=a"], {"a": "blk.0.attn blk.1.attn"}),
        (["attn_(q|k|v)=a", "attn_output=b"],
         {"a": "blk.0.attn.qkv blk.1.attn.qkv", "b": "blk.0.attn.out blk.1.attn.out"}),
        ([".*=a"], {"a": "model"}),
        (["^output=a"], {"a": "head"}),  # as a search: also of output_norm
        (["output.weight$=a"], {"a": "head blk.0.attn.out blk.1.attn.out"}),
        (["token_embd=a"], {"a": "embed"}),
        (["norm=a"], {}),  # vectors move nothing
        (["ffn_norm=a,ffn=b"], {"b": "blk.0.ffn blk.1.ffn"}),
        (["attn_norm=a,attn=b"], {"b": "blk.0.attn blk.1.attn"}),
        # Of several patterns the first wins, in an option and over options.
        (["blk.0.=a,blk=b"], {"a": "blk.0", "b": "blk.1"}),
        (["blk=b,blk.0.=a"], {"b": "blk.0 blk.1"}),
        (["blk.0.=a", "blk=b"], {"a": "blk.0", "b": "blk.1"}),
        (["blk.0.ffn=a", "blk.0.=b", ".*=b"], {"b": "embed blk.0 blk.1 head", "a": "blk.0.ffn"}),
    ],
)  # fmt: skip
def test_which_regions_go_where(
    tiny_graph: Graph, overrides: list[str], expected: dict[str, str]
) -> None:
    everywhere = assignment_of(tiny_graph, z="model", **expected)
    wanted = {leaf: name for leaf, name in everywhere.items() if name != "z"}
    assert moved(tiny_graph, overrides) == wanted


def test_place_rules_come_after_and_win(tiny_graph: Graph) -> None:
    expected = assignment_of(tiny_graph, z="model", a="blk.0.ffn", b="blk.1.ffn")
    found = moved(tiny_graph, ["ffn=a"], "blk.1.ffn=b")
    assert found == {leaf: name for leaf, name in expected.items() if name != "z"}
    rules = rules_of(tiny_graph, ["ffn=a"], "blk.1.ffn=b")
    assert [str(rule) for rule in rules] == ["-ot ffn=a", "blk.1.ffn=b"]


def test_a_tied_embedding_goes_with_the_head(tmp_path: Path) -> None:
    graph = build_graph(ModelFile.open(write_tiny_llama(tmp_path / "tied.gguf", tied=True)))
    assert moved(graph, ["token_embd=a"]) == {"embed": "a", "head": "a"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["attn_q=a"],
            [
                "blk.0.attn.qkv would be torn apart",
                "blk.0.attn_q.weight to a (-ot 'attn_q=a')",
                "blk.0.attn_k.weight nowhere",
                "--place",
            ],
        ),
        (
            ["ffn_gate=a", "ffn_up=b"],
            [
                "blk.0.ffn.gate_up would be torn apart",
                "blk.0.ffn_gate.weight to a",
                "blk.0.ffn_up.weight to b (-ot 'ffn_up=b')",
            ],
        ),
        (["ffn=a", "expert=b"], ["-ot 'expert=b' matches no tensor"]),
        (["ffn=c"], ["'ffn=c'", "no device is meant by 'c'", "a (cpu), b (cpu), z (cpu)"]),
        (["ffn=CUDA0"], ["no device is meant by 'CUDA0'", "a (cpu)"]),
        (["ffn"], ["'ffn'", "expected REGEX=DEVICE"]),
        (["=a"], ["'=a'", "expected REGEX=DEVICE"]),
        (["ffn=a,"], ["''", "expected REGEX=DEVICE"]),
        (["ffn(=a"], ["'ffn(=a'", "no regular expression"]),
    ],
)
def test_what_cannot_be(tiny_graph: Graph, overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        rules_of(tiny_graph, overrides)
    for part in said:
        assert part in str(error.value)


DEVICES = ("board:backend=mine.py:Mine", "box:backend=reference", "host:backend=cpu")


@pytest.mark.parametrize(
    ("buffer", "expected"),
    [
        ("board", "board"),
        ("CPU", "box"),
        ("cpu", "box"),
        ("host", "host"),
        ("CUDA0", "gpu0"),
        ("CUDA1", "gpu1"),
        ("CUDA", "gpu0"),
        ("GPU1", "gpu1"),  # a device's own name
    ],
)
def test_names_of_buffers(buffer: str, expected: str) -> None:
    gpus = [DeviceSpec(name, "cuda") for name in ("gpu0", "gpu1")]
    assert find_device("x", buffer, (*parse_devices(DEVICES), *gpus)) == expected


@pytest.mark.parametrize("buffer", ["CUDA2", "CUDA01x", "Metal", "CPU0", "CUDA_Host", ""])
def test_buffers_that_nobody_has(buffer: str) -> None:
    gpus = [DeviceSpec(name, "cuda") for name in ("gpu0", "gpu1")]
    there = "board (mine.py:Mine), box (reference), host (cpu), gpu0 (cuda), gpu1 (cuda)"
    with pytest.raises(ConfigurationError, match=re.escape(f"there are {there}")):
        find_device("x", buffer, (*parse_devices(DEVICES), *gpus))


def test_a_device_named_as_a_buffer_is_that_device() -> None:
    specs = parse_devices(["first:backend=cpu", "CPU:backend=mine.py:Mine"])
    assert find_device("x", "CPU", specs) == "CPU"
    assert [o.device for o in parse_overrides(["a=CPU,b=first"], specs)] == ["CPU", "first"]


def test_in_the_python_api(tiny_model: Path) -> None:
    devices = ["a:threads=1", "b:threads=1"]
    with LLM(
        tiny_model, devices=devices, place={"*": "b"}, override_tensor=["attn=a"],
        runtime="in-process",
    ) as llm:  # fmt: skip
        assert set(llm.plan.device_of.values()) == {"b"}  # place wins
    with LLM(
        tiny_model, devices=devices, override_tensor=["attn=a", ".*=b"], runtime="in-process"
    ) as llm:
        on_a = {leaf for leaf, name in llm.plan.device_of.items() if name == "a"}
        assert on_a == {leaf for leaf in llm.plan.device_of if ".attn." in leaf}
        reasons = {p.region: p.reason for p in llm.plan.placements}
    assert reasons["blk.0.attn.core"] == "rule 1 (-ot attn=a)"
