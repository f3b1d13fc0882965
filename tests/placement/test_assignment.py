"""Plans under scarce memory, against trying every assignment."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
from device_profiles import LIMITS, assignment_of, device, room_for
from hypothesis import given, settings
from hypothesis import strategies as st

from raygraft.graph.errors import CapacityError
from raygraft.graph.graph import Graph
from raygraft.placement import assignment
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger
from raygraft.placement.planner import make_plan
from raygraft.placement.rules import Rule

TOKENS = LIMITS.context


def used_by(
    graph: Graph, device_of: Mapping[str, str], devices: Mapping[str, DeviceProfile]
) -> dict[str, int]:
    """Bytes that an assignment takes on each device."""
    ledgers = {name: Ledger(graph, found, LIMITS) for name, found in devices.items()}
    for leaf in graph.leaves:
        ledgers[device_of[leaf.name]].add(leaf)
    return {name: ledger.used(TOKENS) for name, ledger in ledgers.items()}


def planned(graph: Graph, devices: Mapping[str, DeviceProfile], *rules: str) -> dict[str, str]:
    """Leaf -> device by the planner, held against the devices' memory."""
    plan = make_plan(
        graph, list(devices.values()), [Rule.parse(rule) for rule in rules], limits=LIMITS
    )
    used = used_by(graph, plan.device_of, devices)
    assert all(used[name] <= found.memory for name, found in devices.items())
    assert {use.device: use.weights + use.workspace + use.cache for use in plan.devices} == used
    return plan.device_of


def with_memory(graph: Graph, memories: Mapping[str, int]) -> dict[str, DeviceProfile]:
    return {name: device(graph, name, memory) for name, memory in memories.items()}


def test_the_search_finds_what_filling_in_order_does_not(
    four_blocks: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling starts on the larger device and leaves a rest on both that is too small for head."""
    split = {"a": "embed blk.0 head sample", "b": "blk.1 blk.2 blk.3"}
    memories = {name: room_for(four_blocks, regions) for name, regions in split.items()}
    devices = with_memory(four_blocks, memories)
    assert set(planned(four_blocks, devices).values()) == {"a", "b"}
    monkeypatch.setattr(assignment, "search_exactly", lambda problem, seconds: None)
    with pytest.raises(CapacityError):
        planned(four_blocks, devices)


@given(data=st.data())
@settings(max_examples=25)
def test_a_fit_is_found_if_there_is_one(one_block: Graph, data: st.DataObject) -> None:
    """To the byte, with a tied weight, on two devices: against all 256 assignments."""
    leaves = [leaf.name for leaf in one_block.leaves]
    roomy = with_memory(one_block, {"a": 0, "b": 0})
    memories = used_by(
        one_block, {leaf: data.draw(st.sampled_from("ab")) for leaf in leaves}, roomy
    )
    memories["b"] -= min(data.draw(st.sampled_from([0, 0, 1, 1000])), memories["b"])
    choices = [("a", "b"), ("a", "b"), ("a", "b"), ("a",), ("b",)]
    candidates = [data.draw(st.sampled_from(choices)) for _ in leaves]
    rules = [f"{leaf}={'|'.join(names)}" for leaf, names in zip(leaves, candidates, strict=True)]

    def fits(device_of: dict[str, str]) -> bool:
        return all(n <= memories[name] for name, n in used_by(one_block, device_of, roomy).items())

    assignments = (dict(zip(leaves, names, strict=True)) for names in product(*candidates))
    if any(fits(device_of) for device_of in assignments):
        device_of = planned(one_block, with_memory(one_block, memories), *rules)
        assert all(device_of[leaf] in names for leaf, names in zip(leaves, candidates, strict=True))
    else:
        with pytest.raises(CapacityError):
            planned(one_block, with_memory(one_block, memories), *rules)


@given(data=st.data())
@settings(max_examples=10)
def test_a_known_fit_on_three_devices_is_found(tiny_graph: Graph, data: st.DataObject) -> None:
    example = {leaf.name: data.draw(st.sampled_from("abc")) for leaf in tiny_graph.leaves}
    spare = data.draw(st.sampled_from([0, 1, 5000]))
    used = used_by(tiny_graph, example, with_memory(tiny_graph, dict.fromkeys("abc", 0)))
    planned(tiny_graph, with_memory(tiny_graph, {name: n + spare for name, n in used.items()}))


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000])
def test_a_tight_fit_of_any_size(four_blocks: Graph, scale: int) -> None:
    """Weights of gigabytes are counted to the byte too."""
    split = {"a": "embed blk.0 head sample", "b": "blk.1 blk.2 blk.3"}
    devices = {
        name: replace(
            found, weight_bytes={form: n * scale for form, n in found.weight_bytes.items()}
        )
        for name, found in with_memory(four_blocks, dict.fromkeys(split, 0)).items()
    }
    used = used_by(four_blocks, assignment_of(four_blocks, **split), devices)
    tight = {name: replace(found, memory=used[name]) for name, found in devices.items()}
    planned(four_blocks, tight)


def test_tokens_are_looked_up_where_they_are_drawn(four_blocks: Graph) -> None:
    """A hop more costs less than the engine between any two steps, unless somebody wants it."""
    devices = [device(four_blocks, name, 2**21) for name in "ab"]
    rules = [Rule.parse(rule) for rule in ("kind:attention=a", "kind:ffn=b", "embed=a")]
    plan = make_plan(four_blocks, devices, rules[:2], limits=LIMITS)
    assert {plan.device_of[name] for name in ("embed", "head", "sample")} == {"b"}
    (placement,) = (p for p in plan.placements if p.region == "embed")
    assert placement.reason == "cheapest, as tokens are drawn there"
    apart = make_plan(four_blocks, devices, rules, limits=LIMITS)
    assert (apart.device_of["embed"], apart.device_of["sample"]) == ("a", "b")
    assert plan.hops == apart.hops + 1
