"""Schedules and rings: whatever the interleaving, nobody waits for room and nobody for ever."""

from collections.abc import Sequence
from random import Random

import pytest
from device_profiles import LIMITS, assignment_of, device
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_simulator import Choice, DeadlockError, simulate

from raygraft.actors.ahead import can_be_sent_ahead
from raygraft.graph.graph import Graph
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import Rule
from raygraft.placement.schedule import (
    most_half_batches,
    records_of,
    ring_slots,
    schedule_of,
    used_actors,
    used_devices,
)

NAMES = "abcde"


def plan_of(graph: Graph, device_of: dict[str, str], actors: dict[str, str] | None = None) -> Plan:
    """`actors` holds those of devices that share one."""
    rules = [Rule.parse(f"{leaf}={name}") for leaf, name in device_of.items()]
    devices = [device(graph, name, actor=(actors or {}).get(name, "")) for name in NAMES]
    return make_plan(graph, devices, rules, limits=LIMITS)


QKV_CORE_OUT = {
    "a": "model",
    "b": "blk.0.attn.core blk.1.attn.core",
    "c": "blk.0.attn.out blk.1.attn.out",
}


def test_turns_of_a_device(tiny_graph: Graph) -> None:
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, **QKV_CORE_OUT))
    schedule = schedule_of(plan, "c")
    assert (schedule.sources, schedule.targets) == (("a", "b"), ("a",))
    assert [
        (turn.stage.number, [t.number for t in turn.receive], [t.number for t in turn.send])
        for turn in schedule.turns
    ] == [(2, [0, 2], [3]), (5, [4, 6], [7])]
    assert schedule.turns[0].forget == (
        "blk.0.attn.core.attention", "blk.0.attn.out.residual", "embed.tokens",
    )  # fmt: skip
    assert schedule_of(plan, "a").targets == ("c", "b", ENGINE)
    assert used_devices(plan.stages) == ("a", "b", "c")


def test_a_value_lives_until_its_last_use(tiny_graph: Graph) -> None:
    """The residual waits on its device while the core is elsewhere."""
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, a="model", b="blk.0.attn.core"))
    first, second = schedule_of(plan, "a").turns
    assert "embed.tokens" not in first.forget
    assert "embed.tokens" in second.forget
    assert "blk.0.attn.qkv.q_rope" in first.forget  # sent, and of no more use here


def test_devices_of_one_actor_take_turns_in_one_schedule(tiny_graph: Graph) -> None:
    """The core and what follows it share an actor: between them nothing is sent."""
    device_of = assignment_of(tiny_graph, **QKV_CORE_OUT)
    plan = plan_of(tiny_graph, device_of, {"b": "both", "c": "both"})
    assert [(t.number, t.source, t.target, t.link) for t in plan.transfers[:4]] == [
        (0, "a", "c", "ring"),
        (1, "a", "b", "ring"),
        (2, "b", "c", "shared"),
        (3, "c", "a", "ring"),
    ]
    assert (used_actors(plan), most_half_batches(plan)) == (("a", "both"), 2)
    schedule = schedule_of(plan, "both")
    assert [
        (turn.stage.device, [t.number for t in turn.receive], [t.number for t in turn.send])
        for turn in schedule.turns
    ] == [("b", [0, 1], []), ("c", [], [3]), ("b", [4, 5], []), ("c", [], [7])]
    assert "blk.0.attn.core.attention" not in schedule.turns[0].forget
    assert "blk.0.attn.core.attention" in schedule.turns[1].forget
    assert {(t.source, t.target) for t in records_of(plan)} == {
        ("a", "both"), ("both", "a"), ("a", ENGINE),
    }  # fmt: skip
    assert plan.hops == len(plan.transfers) - 2


def test_a_value_goes_to_an_actor_once(tiny_graph: Graph) -> None:
    """What b and c both read of a, b gets, and c finds it there."""
    device_of = assignment_of(tiny_graph, a="model", b="blk.0.attn.qkv", c="blk.0.attn.out")
    plan = plan_of(tiny_graph, device_of, {"b": "both", "c": "both"})
    embedding = [(t.target, t.link) for t in plan.transfers if t.values == ("embed.tokens",)]
    assert embedding == [("b", "ring"), ("c", "shared")]


# b sends a the residual, and later the core's result: nothing tells b that the first was taken.
TWO_ON_THEIR_WAY = {"b": "model", "c": "blk.1.attn.qkv", "a": "blk.1.attn.out"}


@pytest.mark.parametrize(
    ("assignment", "slots"),
    [
        ({"a": "model"}, {"a>engine": 8}),
        (QKV_CORE_OUT, {"a>b": 1, "a>c": 1, "b>c": 1, "c>a": 1, "a>engine": 8}),
        (TWO_ON_THEIR_WAY, {"b>c": 1, "c>b": 1, "b>a": 2, "a>b": 1, "b>engine": 8}),
    ],
)
def test_slots_of_rings(
    tiny_graph: Graph, assignment: dict[str, str], slots: dict[str, int]
) -> None:
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, **assignment))
    pairs = dict.fromkeys((t.source, t.target) for t in plan.transfers)
    found = {f"{source}>{target}": ring_slots(plan, source, target) for source, target in pairs}
    assert found == slots


ROUNDS = st.lists(
    st.lists(st.booleans(), min_size=0, max_size=3).map(lambda others: (True, *others)),
    min_size=2,
    max_size=4,
)
"""Half-batches with rows and without; the first one of a round always has some."""


def prefer(order: Sequence[str]) -> Choice:
    """Whoever comes first in `order` runs as long as it can."""
    return lambda ready: min(ready, key=order.index)


def shuffled(seed: int) -> Choice:
    return Random(seed).choice


@given(data=st.data())
@settings(max_examples=120)
def test_any_plan_runs_in_any_interleaving(tiny_graph: Graph, data: st.DataObject) -> None:
    names = NAMES[: data.draw(st.integers(1, 5))]
    together = data.draw(st.sampled_from(["", "ab", "ace", "bcd", "abcde"]), label="together")
    plan = plan_of(
        tiny_graph,
        {leaf.name: data.draw(st.sampled_from(names)) for leaf in tiny_graph.leaves},
        dict.fromkeys(together, together[:1]),
    )
    orders = st.permutations([*NAMES, ENGINE]).map(prefer)
    for choose in (*(shuffled(seed) for seed in range(3)), data.draw(orders), data.draw(orders)):
        rounds = data.draw(ROUNDS, label="rounds")
        result = simulate(plan, choose, rounds=rounds)
        assert result.waits_for_room == 0
        assert result.received == result.sent
        steps = sum(has_rows for halves in rounds for has_rows in halves)
        for pair, records in result.sent.items():
            if ENGINE not in pair:
                assert len(records) % steps == 0
                numbers = [[n for s, n, _ in records if s == step] for step, *_ in records]
                assert all(of_one_step == sorted(of_one_step) for of_one_step in numbers)


@given(data=st.data())
@settings(max_examples=60)
def test_any_plan_runs_with_steps_sent_ahead(tiny_graph: Graph, data: st.DataObject) -> None:
    """The actor that looks tokens up draws them: it ends one step before it begins the next."""
    names = NAMES[: data.draw(st.integers(1, 5))]
    device_of = {leaf.name: data.draw(st.sampled_from(names)) for leaf in tiny_graph.leaves}
    device_of["sample"] = device_of["embed"]
    plan = plan_of(tiny_graph, device_of)
    assert can_be_sent_ahead(plan, tiny_graph)
    orders = st.permutations([*NAMES, ENGINE]).map(prefer)
    for choose in (*(shuffled(seed) for seed in range(3)), data.draw(orders)):
        result = simulate(plan, choose, rounds=[(True,)] * 5, ahead=True)
        assert result.waits_for_room == 0
        assert result.received == result.sent


def test_tokens_that_another_actor_draws_are_waited_for(tiny_graph: Graph) -> None:
    device_of = assignment_of(tiny_graph, a="model", b="sample")
    assert not can_be_sent_ahead(plan_of(tiny_graph, device_of), tiny_graph)
    assert can_be_sent_ahead(plan_of(tiny_graph, device_of, {"a": "one", "b": "one"}), tiny_graph)


def test_a_plan_that_needs_several_slots_waits_with_fewer(tiny_graph: Graph) -> None:
    """The figure of `ring_slots` is not larger than it must be."""
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, **TWO_ON_THEIR_WAY))
    choose = prefer(["engine", "b", "c", "a"])
    assert simulate(plan, choose).waits_for_room == 0
    assert simulate(plan, choose, slots=lambda _: 1).waits_for_room > 0


def test_half_batches_need_slots_of_their_own(tiny_graph: Graph) -> None:
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, a="model", b="head"))
    choose = prefer(["engine", "a", "b"])
    rounds = [(True, True)] * 3
    assert simulate(plan, choose, rounds=rounds).waits_for_room == 0
    assert simulate(plan, choose, rounds=rounds, slots=lambda _: 1).waits_for_room > 0


def test_the_simulator_finds_a_deadlock(tiny_graph: Graph) -> None:
    """Rings without room stop everything."""
    plan = plan_of(tiny_graph, assignment_of(tiny_graph, **QKV_CORE_OUT))
    with pytest.raises(DeadlockError, match="all wait"):
        simulate(plan, shuffled(0), slots=lambda _: 0)
