"""Stages and transfers: three golden cuts, and what must hold of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from device_profiles import LIMITS, assignment_of, device
from hypothesis import given, settings
from hypothesis import strategies as st

from raygraft.graph.graph import Graph
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Stage
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import Rule

NAMES = "abcde"
RESULTS = "sample.id sample.logprob sample.top_ids sample.top_logprobs"


def cut(graph: Graph, device_of: dict[str, str]) -> Plan:
    """The plan whose rules say of every leaf where it goes."""
    rules = [Rule.parse(f"{leaf}={name}") for leaf, name in device_of.items()]
    devices = [device(graph, name) for name in NAMES]
    plan = make_plan(graph, devices, rules, limits=LIMITS)
    assert plan.device_of == device_of
    return plan


@dataclass(frozen=True)
class Cut:
    """A golden cut: stages as "device: regions", transfers as "stage source>target: values"."""

    assignment: dict[str, str]
    stages: list[str]
    transfers: list[str]


ATTENTION_AND_FEED_FORWARD = Cut(
    {"a": "embed blk.0.attn blk.1.attn", "b": "blk.0.ffn blk.1.ffn head sample"},
    [
        "a: embed blk.0.attn.qkv blk.0.attn.core blk.0.attn.out",
        "b: blk.0.ffn.gate_up blk.0.ffn.down",
        "a: blk.1.attn.qkv blk.1.attn.core blk.1.attn.out",
        "b: blk.1.ffn.gate_up blk.1.ffn.down head sample",
    ],
    [
        "0 a>b: blk.0.attn.out.residual",
        "1 b>a: blk.0.ffn.down.residual",
        "2 a>b: blk.1.attn.out.residual",
        f"3 b>engine: {RESULTS}",
    ],
)

# The residual goes from its producer straight to `out`, beside q, k and v.
QKV_CORE_OUT = Cut(
    {
        "a": "model",
        "b": "blk.0.attn.core blk.1.attn.core",
        "c": "blk.0.attn.out blk.1.attn.out",
    },
    [
        "a: embed blk.0.attn.qkv",
        "b: blk.0.attn.core",
        "c: blk.0.attn.out",
        "a: blk.0.ffn.gate_up blk.0.ffn.down blk.1.attn.qkv",
        "b: blk.1.attn.core",
        "c: blk.1.attn.out",
        "a: blk.1.ffn.gate_up blk.1.ffn.down head sample",
    ],
    [
        "0 a>c: embed.tokens",
        "0 a>b: blk.0.attn.qkv.v blk.0.attn.qkv.q_rope blk.0.attn.qkv.k_rope",
        "1 b>c: blk.0.attn.core.attention",
        "2 c>a: blk.0.attn.out.residual",
        "3 a>c: blk.0.ffn.down.residual",
        "3 a>b: blk.1.attn.qkv.v blk.1.attn.qkv.q_rope blk.1.attn.qkv.k_rope",
        "4 b>c: blk.1.attn.core.attention",
        "5 c>a: blk.1.attn.out.residual",
        f"6 a>engine: {RESULTS}",
    ],
)

# The residual stays on `a`, so `out` needs nothing but the core's result.
CORE_ALONE = Cut(
    {"a": "model", "b": "blk.0.attn.core"},
    [
        "a: embed blk.0.attn.qkv",
        "b: blk.0.attn.core",
        "a: blk.0.attn.out blk.0.ffn.gate_up blk.0.ffn.down"
        " blk.1.attn.qkv blk.1.attn.core blk.1.attn.out blk.1.ffn.gate_up blk.1.ffn.down"
        " head sample",
    ],
    [
        "0 a>b: blk.0.attn.qkv.v blk.0.attn.qkv.q_rope blk.0.attn.qkv.k_rope",
        "1 b>a: blk.0.attn.core.attention",
        f"2 a>engine: {RESULTS}",
    ],
)

UNCUT = Cut(
    {"e": "model"},
    [
        "e: embed blk.0.attn.qkv blk.0.attn.core blk.0.attn.out blk.0.ffn.gate_up blk.0.ffn.down"
        " blk.1.attn.qkv blk.1.attn.core blk.1.attn.out blk.1.ffn.gate_up blk.1.ffn.down"
        " head sample"
    ],
    [f"0 e>engine: {RESULTS}"],
)


@pytest.mark.parametrize("golden", [ATTENTION_AND_FEED_FORWARD, QKV_CORE_OUT, CORE_ALONE, UNCUT])
def test_golden_cuts(tiny_graph: Graph, golden: Cut) -> None:
    plan = cut(tiny_graph, assignment_of(tiny_graph, **golden.assignment))
    stages, transfers = plan.stages, plan.transfers
    assert [f"{stage.device}: {' '.join(stage.regions)}" for stage in stages] == golden.stages
    assert [
        f"{t.source_stage} {t.source}>{t.target}: {' '.join(t.values)}" for t in transfers
    ] == golden.transfers
    assert [stage.number for stage in stages] == list(range(len(stages)))
    assert [transfer.number for transfer in transfers] == list(range(len(transfers)))


def test_blocks_dealt_to_four_devices(four_blocks: Graph) -> None:
    """Every second one, there and back again: a device may have several stages."""
    dealt = {"a": "embed blk.0", "b": "blk.1", "c": "blk.2", "d": "blk.3 head sample"}
    plan = cut(four_blocks, assignment_of(four_blocks, **dealt))
    assert [stage.device for stage in plan.stages] == list("abcd")
    assert [(t.source, t.target, t.row_bytes) for t in plan.transfers] == [
        ("a", "b", 256),
        ("b", "c", 256),
        ("c", "d", 256),
        ("d", "engine", 168),  # an id, its log probability, and the twenty best
    ]
    turns = {"a": "embed blk.0 blk.2", "b": "blk.1 blk.3 head sample"}
    plan = cut(four_blocks, assignment_of(four_blocks, **turns))
    assert [stage.device for stage in plan.stages] == list("abab")
    assert [(t.source, t.target) for t in plan.transfers] == [
        ("a", "b"), ("b", "a"), ("a", "b"), ("b", "engine"),
    ]  # fmt: skip


def test_a_value_for_several_devices_is_sent_to_each(tiny_graph: Graph) -> None:
    apart = {"a": "model", "b": "blk.0.ffn.gate_up", "c": "blk.0.ffn.down"}
    plan = cut(tiny_graph, assignment_of(tiny_graph, **apart))
    residual = "blk.0.attn.out.residual"
    assert [(t.source, t.target) for t in plan.transfers if residual in t.values] == [
        ("a", "b"), ("a", "c"),
    ]  # fmt: skip


@st.composite
def assignments(draw: st.DrawFn, graph: Graph) -> dict[str, str]:
    names = NAMES[: draw(st.integers(1, 5))]
    return {leaf.name: draw(st.sampled_from(names)) for leaf in graph.leaves}


def depends_on(graph: Graph, stages: Sequence[Stage]) -> list[set[int]]:
    """For each stage, the stages whose values it reads."""
    stage_of = {name: stage.number for stage in stages for name in stage.operators}
    return [{stage_of[graph.producer[value].name] for value in stage.inputs} for stage in stages]


@given(data=st.data())
@settings(max_examples=150)
def test_any_assignment_becomes_a_good_cut(tiny_graph: Graph, data: st.DataObject) -> None:
    device_of = data.draw(assignments(tiny_graph))
    plan = cut(tiny_graph, device_of)
    stages, transfers = plan.stages, plan.transfers
    assert Plan.from_json(plan.to_json()) == plan

    # Every leaf is in one stage of its device, with all its operators.
    regions = [region for stage in stages for region in stage.regions]
    assert sorted(regions) == sorted(device_of)
    for stage in stages:
        assert {device_of[region] for region in stage.regions} == {stage.device}
        operators = [n for r in stage.regions for n in tiny_graph.regions[r].operators]
        assert sorted(stage.operators) == sorted(operators)

        # A stage can run as one, and has the boundary of its data flow.
        assert tiny_graph.is_convex(stage.operators)
        subgraph = tiny_graph.subgraph(stage.operators)
        assert (stage.inputs, stage.outputs) == (subgraph.inputs, subgraph.outputs)

    # Stages stand in topological order.
    sources = depends_on(tiny_graph, stages)
    for stage in stages:
        assert all(source < stage.number for source in sources[stage.number])

    # Each input is made on the device or sent to it, before; each value goes to a device once.
    arrives = [(value, t.target) for t in transfers for value in t.values]
    assert len(set(arrives)) == len(arrives)
    sent_by = {(v, t.target): t.source_stage for t in transfers for v in t.values}
    for stage in stages:
        for value in stage.inputs:
            maker = next(s for s in stages if value in s.outputs)
            if maker.device != stage.device:
                assert sent_by[value, stage.device] == maker.number < stage.number
    wanted = {(value, s.device) for s in stages for value in s.inputs}
    results = {(value, ENGINE) for value in tiny_graph.results}
    assert set(arrives) <= wanted | results  # nothing travels in vain
    assert results <= set(arrives)
    for transfer in transfers:
        assert transfer.source == stages[transfer.source_stage].device != transfer.target
        widths = [tiny_graph.values[value].row_bytes for value in transfer.values]
        assert transfer.row_bytes == sum(widths)


@given(data=st.data())
@settings(max_examples=60)
def test_stages_are_maximal(tiny_graph: Graph, data: st.DataObject) -> None:
    """Two stages of a device that follow each other cannot be one: another lies between."""
    stages = cut(tiny_graph, data.draw(assignments(tiny_graph))).stages
    before: list[set[int]] = []
    for sources in depends_on(tiny_graph, stages):
        before.append(sources.union(*(before[source] for source in sources)))
    for name in NAMES:
        own = [stage.number for stage in stages if stage.device == name]
        for earlier, later in pairwise(own):
            between = {n for n in before[later] if earlier in before[n]}
            assert between, f"stages {earlier} and {later} of {name} could be one"
