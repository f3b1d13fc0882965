"""Assignments under scarce memory, against trying every one."""

from dataclasses import replace
from itertools import product

import pytest
from device_profiles import LIMITS, assignment_of, device, room_for
from hypothesis import given, settings
from hypothesis import strategies as st

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph
from raygraft.placement.assignment import (
    Problem,
    assign,
    cheapest,
    fill_in_order,
    overfull,
    search_exactly,
)
from raygraft.placement.planner import make_plan

TOKENS = 64


def problem_with(
    graph: Graph,
    memories: dict[str, int],
    candidates: dict[str, tuple[str, ...]] | None = None,
    limits: Limits = LIMITS,
) -> Problem:
    devices = {name: device(graph, name, memory) for name, memory in memories.items()}
    everywhere = {leaf.name: tuple(memories) for leaf in graph.leaves}
    return Problem(graph, devices, everywhere | (candidates or {}), limits, TOKENS)


def used_by(graph: Graph, assignment: dict[str, str], names: str) -> dict[str, int]:
    """Bytes that an assignment takes on each device."""
    problem = problem_with(graph, dict.fromkeys(names, 0))
    return {name: ledger.used(TOKENS) for name, ledger in problem.filled(assignment).items()}


def test_the_search_finds_what_filling_in_order_does_not(four_blocks: Graph) -> None:
    """Filling starts on the larger device and leaves a rest on both that is too small for head."""
    split = {"a": "embed blk.0 head sample", "b": "blk.1 blk.2 blk.3"}
    memories = {name: room_for(four_blocks, regions) for name, regions in split.items()}
    problem = problem_with(four_blocks, memories)
    filled = fill_in_order(problem)
    assert filled is None or not problem.fits(filled)
    assert assign(problem, exact=False) is None
    found = search_exactly(problem)
    assert found is not None
    assert problem.fits(found)
    plan = make_plan(four_blocks, list(problem.devices.values()), limits=LIMITS)
    assert problem.fits(plan.device_of)


def test_the_search_weighs_hops(four_blocks: Graph) -> None:
    """With room to spare it finds what no hop can better: one device."""
    problem = problem_with(four_blocks, dict.fromkeys("abc", 1 << 30))
    found = search_exactly(problem)
    assert found is not None
    assert len(set(found.values())) == 1


def test_nothing_fits(four_blocks: Graph) -> None:
    problem = problem_with(four_blocks, dict.fromkeys("abc", 200 * 1024))
    assert assign(problem, exact=True) is None
    assert {ledger.device.name for ledger in overfull(problem, cheapest(problem))} == {"a"}


@given(data=st.data())
@settings(max_examples=25)
def test_a_fit_is_found_if_there_is_one(one_block: Graph, data: st.DataObject) -> None:
    """To the byte, with a tied weight, on two devices: against all 256 assignments."""
    leaves = [leaf.name for leaf in one_block.leaves]
    example = {leaf: data.draw(st.sampled_from("ab")) for leaf in leaves}
    missing = data.draw(st.sampled_from([0, 0, 1, 1000]))
    memories = used_by(one_block, example, "ab")
    memories["b"] -= min(missing, memories["b"])
    choices = [("a", "b"), ("a", "b"), ("a", "b"), ("a",), ("b",)]
    candidates = {leaf: data.draw(st.sampled_from(choices)) for leaf in leaves}
    problem = problem_with(one_block, memories, candidates)
    possible = any(
        problem.fits(dict(zip(leaves, names, strict=True)))
        for names in product(*(candidates[leaf] for leaf in leaves))
    )
    found = assign(problem, exact=True)
    assert (found is not None) == possible
    if found is not None:
        assert problem.fits(found)
        assert all(found[leaf] in candidates[leaf] for leaf in leaves)


@given(data=st.data())
@settings(max_examples=10)
def test_a_known_fit_on_three_devices_is_found(tiny_graph: Graph, data: st.DataObject) -> None:
    example = {leaf.name: data.draw(st.sampled_from("abc")) for leaf in tiny_graph.leaves}
    spare = data.draw(st.sampled_from([0, 1, 5000]))
    memories = {name: used + spare for name, used in used_by(tiny_graph, example, "abc").items()}
    problem = problem_with(tiny_graph, memories)
    found = assign(problem, exact=True)
    assert found is not None
    assert problem.fits(found)


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000])
def test_a_tight_fit_of_any_size(four_blocks: Graph, scale: int) -> None:
    """Weights of gigabytes are counted to the byte too."""
    split = {"a": "embed blk.0 head sample", "b": "blk.1 blk.2 blk.3"}
    scaled = {
        name: replace(
            found, weight_bytes={form: n * scale for form, n in found.weight_bytes.items()}
        )
        for name, found in problem_with(four_blocks, dict.fromkeys("ab", 0)).devices.items()
    }
    problem = replace(problem_with(four_blocks, dict.fromkeys("ab", 0)), devices=scaled)
    ledgers = problem.filled(assignment_of(four_blocks, **split))
    tight = {
        name: replace(scaled[name], memory=ledger.used(TOKENS)) for name, ledger in ledgers.items()
    }
    problem = replace(problem, devices=tight)
    found = assign(problem, exact=True)
    assert found is not None
    assert problem.fits(found)
