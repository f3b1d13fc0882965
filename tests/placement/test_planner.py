"""Plans as tables: memories and rules in, the split or the refusal out."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from device_profiles import LIMITS, assignment_of, device, room_for
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits, no
from raygraft.graph.errors import CapacityError, ConfigurationError, UnsupportedRegionError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.planner import BLOCK_SIZE, make_plan, size
from raygraft.placement.rules import Rule

KIB = 1024


def plan_with(graph: Graph, memories: dict[str, int], *rules: str, context: int = 64) -> Plan:
    devices = [device(graph, name, memory) for name, memory in memories.items()]
    limits = replace(LIMITS, context=context)
    return make_plan(graph, devices, [Rule.parse(rule) for rule in rules], limits=limits)


# Each block takes 146 KiB with a cache for 64 tokens, embed 82 and head 83.
@pytest.mark.parametrize(
    ("memories", "split"),
    [
        ([800], {"a": "model"}),
        ([900, 300], {"a": "model"}),
        ([300, 900], {"b": "model"}),  # no hop if one can hold it all
        # Tokens are looked up where they are drawn, if that fits.
        ([600, 600], {"a": "blk.0 blk.1 blk.2", "b": "embed blk.3 head sample"}),
        ([400, 400, 400], {"a": "embed blk.0 blk.1", "b": "blk.2 blk.3 head sample"}),
        ([300] * 4, {"a": "embed blk.0", "b": "blk.1 blk.2", "c": "blk.3 head sample"}),
        (
            [150] * 7,
            {"a": "embed", "b": "blk.0", "c": "blk.1", "d": "blk.2", "e": "blk.3"}
            | {"f": "head sample"},
        ),
        ([240, 500], {"b": "embed blk.0 blk.1 blk.2", "a": "blk.3 head sample"}),
    ],
)  # fmt: skip
def test_memories_and_the_split(
    four_blocks: Graph, memories: list[int], split: dict[str, str]
) -> None:
    named = {name: amount * KIB for name, amount in zip("abcdefg", memories, strict=False)}
    assert plan_with(four_blocks, named).device_of == assignment_of(four_blocks, **split)


@pytest.mark.parametrize(
    ("rules", "placed"),
    [
        (["kind:attention=b"], {"blk.0.attn.core": "b", "blk.3.attn.qkv": "b"}),
        (["*=b", "head=a"], {"embed": "b", "blk.2.ffn.down": "b", "head": "a"}),
        (["head=a", "*=b"], {"embed": "b", "blk.2.ffn.down": "b", "head": "b"}),
        (["head=b|c"], {"head": "b"}),
        (["head=c|b"], {"head": "b"}),  # equally dear: the order of the devices decides
        (["blk.[2-3]=c", "head=b|c"], {"blk.3.ffn.down": "c", "head": "c"}),
        (["head=a"], {"head": "a", "sample": "a"}),  # sampling stays where the logits are
        (["head=a", "sample=b"], {"head": "a", "sample": "b"}),
    ],
)
def test_rules_hold(four_blocks: Graph, rules: list[str], placed: dict[str, str]) -> None:
    plan = plan_with(four_blocks, dict.fromkeys("abc", 1 << 30), *rules)
    assert placed.items() <= plan.device_of.items()


def test_the_faster_device_is_chosen(four_blocks: Graph) -> None:
    slow, fast = device(four_blocks, "slow"), device(four_blocks, "fast", type="gpu")
    assert set(make_plan(four_blocks, [slow, fast], limits=LIMITS).device_of.values()) == {"fast"}
    many = replace(slow, name="many", threads=8)
    assert set(make_plan(four_blocks, [slow, many], limits=LIMITS).device_of.values()) == {"many"}


def test_reasons(four_blocks: Graph) -> None:
    only_head = device(four_blocks, "b", regions=("head",))
    devices = [device(four_blocks, "a"), only_head, device(four_blocks, "c")]
    rules = [Rule.parse("blk.0=a|c"), Rule.parse("blk.1=c"), Rule.parse("head=b")]
    plan = make_plan(four_blocks, devices, rules, limits=LIMITS)
    reasons = {placement.region: placement.reason for placement in plan.placements}
    assert reasons["blk.0.attn.core"] == "rule 1 (blk.0=a|c), the cheaper of them"
    assert reasons["blk.1.attn.core"] == "rule 2 (blk.1=c)"
    assert reasons["blk.2.attn.core"] == "cheapest, together with its neighbours"
    assert all(reasons.values())
    alone = make_plan(four_blocks, devices[:1], limits=LIMITS)
    assert {placement.reason for placement in alone.placements} == {"the only device"}
    plan = make_plan(
        four_blocks, [device(four_blocks, "a", regions=("block", "embed")), only_head, devices[2]],
        [Rule.parse("head=b"), Rule.parse("sample=c")], limits=LIMITS,
    )  # fmt: skip
    assert plan.device_of["head"] == "b"
    halves = plan_with(four_blocks, {"a": 600 * KIB, "b": 600 * KIB})
    assert halves.placements[-1].reason == "fills the memory that is left"


def test_exactly_the_memory_that_a_split_takes(four_blocks: Graph) -> None:
    """And with a byte less on either side there is no plan."""
    split = {"a": "embed blk.0 blk.1 blk.2.attn", "b": "blk.2.ffn blk.3 head sample"}
    memories = {name: room_for(four_blocks, regions) for name, regions in split.items()}
    rules = [f"{region}={name}" for name, regions in split.items() for region in regions.split()]
    plan = plan_with(four_blocks, memories, *rules)
    assert plan.device_of == assignment_of(four_blocks, **split)
    assert plan.cache_blocks * BLOCK_SIZE == 64
    for use in plan.devices:
        assert use.weights + use.cache + use.workspace == use.memory
    for name in split:
        with pytest.raises(CapacityError, match=f"device {name} is too small"):
            plan_with(four_blocks, memories | {name: memories[name] - 1}, *rules)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        path = write_tiny_llama(tmp_path / "tiny.gguf", blocks=1, tied=tied)
        graph = build_graph(ModelFile.open(path))
        embedding = graph.tensors["token_embd.weight"].nbytes
        apart = room_for(graph, "embed", tokens=0) + room_for(graph, "head", tokens=0)
        sizes[tied] = (room_for(graph, "model"), apart)
        plan = plan_with(graph, {"a": room_for(graph, "model")})
        assert plan.devices[0].weights == sum(t.nbytes for t in graph.tensors.values())
        plan = plan_with(graph, {"a": 1 << 30, "b": 1 << 30}, "*=a", "head=b", "sample=b")
        together = sum(use.weights for use in plan.devices)
        assert together == sum(t.nbytes for t in graph.tensors.values()) + tied * embedding
    assert sizes[False][0] - sizes[True][0] == embedding
    assert sizes[False][1] == sizes[True][1]  # on two devices each has its own


@pytest.mark.parametrize(
    ("wanted", "room", "found"),
    [
        (64, 64, 64),
        (64, 1000, 64),  # never more than is wanted
        (4096, 4096, 4096),
        (4096, 4095, 4080),  # whole pages
        (4096, 1000, 992),
        (4096, 512, 512),
        (600, 599, 592),
        (40, 48, 40),  # a context need not be whole pages, the room must
    ],
)
def test_the_context_that_fits(four_blocks: Graph, wanted: int, room: int, found: int) -> None:
    memory = room_for(four_blocks, "model", tokens=room)
    plan = plan_with(four_blocks, {"a": memory}, context=wanted)
    assert plan.limits.context == found
    assert plan.cache_blocks == -(-found // BLOCK_SIZE)


@pytest.mark.parametrize(("wanted", "room"), [(64, 63), (4096, 511), (40, 47), (600, 100)])
def test_too_little_context_is_refused(four_blocks: Graph, wanted: int, room: int) -> None:
    with pytest.raises(CapacityError, match="device a is too small: 23 regions from embed"):
        plan_with(four_blocks, {"a": room_for(four_blocks, "model", tokens=room)}, context=wanted)


def test_the_smallest_cache_decides(four_blocks: Graph) -> None:
    """Every device holds pages of the same numbers."""
    memories = {
        "a": room_for(four_blocks, "embed blk.0 blk.1 blk.2", tokens=160),
        "b": room_for(four_blocks, "blk.3", tokens=112),
        "c": room_for(four_blocks, "head sample"),
    }
    rules = ["*=a", "blk.3=b", "head=c", "sample=c"]
    plan = plan_with(four_blocks, memories, *rules, context=112)
    assert (plan.cache_blocks, plan.limits.context) == (7, 112)
    assert {use.device: use.cache for use in plan.devices} == {
        "a": 3 * 112 * 256,
        "b": 112 * 256,
        "c": 0,
    }


def test_a_context_that_is_insisted_on(four_blocks: Graph) -> None:
    limits = Limits(max_rows=8, context=4096)
    devices = [device(four_blocks, "a", room_for(four_blocks, "model", tokens=1024, limits=limits))]
    plan = make_plan(four_blocks, devices, limits=limits, context=1000)
    assert plan.cache_blocks == 63
    with pytest.raises(CapacityError, match="with a cache for 1040 tokens"):
        make_plan(four_blocks, devices, limits=limits, context=1025)


def test_pages_for_several_sequences(four_blocks: Graph) -> None:
    """Room for all at full length where there is memory; else for one at least."""
    limits = Limits(max_rows=8, context=64, max_sequences=4)
    roomy = make_plan(four_blocks, [device(four_blocks, "a")], limits=limits)
    assert (roomy.cache_blocks, roomy.limits.context) == (16, 64)
    tight = device(four_blocks, "a", room_for(four_blocks, "model", tokens=80, limits=limits))
    assert make_plan(four_blocks, [tight], limits=limits).cache_blocks == 5


def test_half_precision_caches_take_half(four_blocks: Graph) -> None:
    half = replace(LIMITS, cache_type="f16")
    plans = [
        make_plan(four_blocks, [device(four_blocks, "a")], limits=limits)
        for limits in (LIMITS, half)
    ]
    assert plans[0].devices[0].cache == 2 * plans[1].devices[0].cache == 4 * 64 * 256


@pytest.mark.parametrize(
    ("memories", "rules", "message"),
    [
        (
            {"a": 1 << 30, "b": 100 * KIB},
            ["blk.[0-1].attn=b"],
            r"device b is too small: 6 regions from blk\.0\.attn\.qkv to blk\.1\.attn\.out must be "
            r"there \(rule 1 \(blk\.\[0-1\]\.attn=b\)\); they need 134 KiB with a cache for "
            r"64 tokens, it has 100 KiB",
        ),
        (
            {"a": 1 << 30, "b": 100 * KIB},
            ["head=b", "embed=b"],
            r"2 regions from embed to head .*\(rule 2 \(embed=b\) and rule 1 \(head=b\)\); "
            r"they need 162 KiB .* has 100 KiB",
        ),
        (
            {"a": 300 * KIB, "b": 200 * KIB},
            [],
            r"the devices are too small for the model: it needs 715 KiB with a cache for "
            r"64 tokens, they have 500 KiB \(a 300 KiB, b 200 KiB\)",
        ),
        ({"a": 1}, [], r"device a is too small: 23 regions .*\(no other device can run them\)"),
    ],
)
def test_refusals_say_both_sides(
    four_blocks: Graph, memories: dict[str, int], rules: list[str], message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        plan_with(four_blocks, memories, *rules)


def test_region_that_no_device_can_run(four_blocks: Graph) -> None:
    core = four_blocks.signature(four_blocks.producer["blk.0.attn.core.attention"])
    devices = [
        device(four_blocks, "a", verdicts={core: no("its cache is of another type")}),
        device(four_blocks, "b", regions=("ffn", "head")),
    ]
    message = (
        r"no device can run the region blk\.0\.attn\.core: there are only a, b "
        r"\(a: its cache is of another type \(attention.*\); b: it only takes ffn, head\)"
    )
    with pytest.raises(UnsupportedRegionError, match=message):
        make_plan(four_blocks, devices, limits=LIMITS)
    message = (
        "no device can run the region embed: rule 1 (embed=b) asks for b "
        "(b: it only takes ffn, head)"
    )
    with pytest.raises(UnsupportedRegionError, match=re.escape(message)):
        make_plan(four_blocks, devices, [Rule.parse("embed=b")], limits=LIMITS)


def test_a_question_that_was_not_asked_is_no_yes(four_blocks: Graph) -> None:
    profile = replace(device(four_blocks, "a"), verdicts={})
    with pytest.raises(UnsupportedRegionError, match=r"a: it was not asked.*get_rows"):
        make_plan(four_blocks, [profile], limits=LIMITS)


def test_regions_of_a_device_hold(four_blocks: Graph) -> None:
    others = device(four_blocks, "a", regions=("embed", "attention", "head", "sample"))
    feed_forward = device(four_blocks, "b", regions=("ffn",))
    plan = make_plan(four_blocks, [others, feed_forward], limits=LIMITS)
    ours = " ".join(f"blk.{n}.ffn" for n in range(4))
    assert plan.device_of == assignment_of(four_blocks, a="model", b=ours)
    # The same device without its restriction.
    free = replace(feed_forward, regions=())
    plan = make_plan(four_blocks, [others, free], [Rule.parse("*=b")], limits=LIMITS)
    assert set(plan.device_of.values()) == {"b"}


def test_links_follow_the_nodes(four_blocks: Graph) -> None:
    devices = [
        device(four_blocks, "a", node="n0"),
        device(four_blocks, "b", node="n0"),
        device(four_blocks, "c", node="n1"),
    ]
    rules = [Rule.parse(rule) for rule in ("*=a", "blk.1=b", "blk.2=c", "blk.3=b")]
    plan = make_plan(four_blocks, devices, rules, limits=LIMITS, engine_node="n0")
    assert [(t.source, t.target, t.link) for t in plan.transfers] == [
        ("a", "b", "ring"),
        ("b", "c", "tcp"),
        ("c", "b", "tcp"),
        ("b", "a", "ring"),
        ("a", "engine", "ring"),
    ]
    assert plan.hops == 5
    away = make_plan(four_blocks, devices, rules, limits=LIMITS, engine_node="n1")
    assert away.transfers[-1].link == "tcp"
    assert away.seconds_per_token > plan.seconds_per_token


def test_regions_may_change_places_in_an_actor_for_less(four_blocks: Graph) -> None:
    """A device that may only run feed-forward is worth its hops where they cost next to nothing."""
    slow = device(four_blocks, "slow")
    apart, beside = (
        device(four_blocks, "fast", threads=8, regions=("ffn",), actor=actor)
        for actor in ("", "slow")
    )
    alone = make_plan(four_blocks, [slow, apart], limits=LIMITS)
    shared = make_plan(four_blocks, [slow, beside], limits=LIMITS)
    assert shared.seconds_per_token < alone.seconds_per_token
    forced = [Rule.parse("kind:ffn=fast")]
    plans = [make_plan(four_blocks, [slow, own], forced, limits=LIMITS) for own in (apart, beside)]
    assert [plan.hops for plan in plans] == [9, 1]
    assert [len(plan.transfers) for plan in plans] == [9, 9]
    assert [{use.actor for use in plan.devices} for plan in plans] == [{"slow", "fast"}, {"slow"}]
    assert Plan.from_json(plans[1].to_json()) == plans[1]
    assert plans[1].where(plans[1].devices[0]) == "cpu, with fast"


def test_declared_answers_are_marked(four_blocks: Graph) -> None:
    devices = [device(four_blocks, "a"), device(four_blocks, "b", asked=False)]
    assert not make_plan(four_blocks, devices, limits=LIMITS).asked
    assert make_plan(four_blocks, devices[:1], limits=LIMITS).asked


def any_plan(graph: Graph) -> Plan:
    return plan_with(graph, {"a": 400 * KIB, "b": 500 * KIB, "c": 400 * KIB}, "blk.2.attn=c")


def test_json_round_trip(four_blocks: Graph) -> None:
    plan = any_plan(four_blocks)
    for indent in (None, 2):
        assert Plan.from_json(plan.to_json(indent)) == plan
    first = plan.to_dict()["placements"][0]
    assert (first["region"], first["device"]) == ("embed", plan.device_of["embed"])
    assert first["reason"] == plan.placements[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan: "),
        ("[]", "not a plan: "),
        ("{}", "not a plan: model: Field required"),
        ('{"model": 3}', "not a plan: model: Input should be a valid string"),
    ],
)
def test_what_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Plan.from_json(text)


SCRIPT = """
import pickle, sys
from raygraft.placement.planner import make_plan
arguments, options = pickle.load(sys.stdin.buffer)
print(make_plan(*arguments, **options).to_json())
"""


def test_plans_are_deterministic(four_blocks: Graph) -> None:
    """Also over processes, whose sets and dicts of strings hash otherwise."""
    memories = {"a": 400 * KIB, "b": 500 * KIB, "c": 400 * KIB}
    devices = [device(four_blocks, name, memory) for name, memory in memories.items()]
    rules = [Rule.parse("blk.2.attn=c")]
    expected = any_plan(four_blocks).to_json()
    assert make_plan(four_blocks, devices, rules, limits=LIMITS).to_json() == expected
    question = pickle.dumps(((four_blocks, devices, rules), {"limits": LIMITS}))
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=question,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert answer.stdout.decode().strip() == expected


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (200 << 10, "200 KiB"),
        (513 << 20, "513 MiB"),
        (6 << 30, "6.0 GiB"),
    ],
)
def test_bytes_for_a_person(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
