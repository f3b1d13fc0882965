"""Property: any rules, answers and memories give a plan that obeys all of them, or the reason.

The reason is a conflict: impossible by itself, and possible when any one of its members goes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
from device_profiles import LIMITS, device, room_for
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import YES, no
from raygraft.graph.errors import CapacityError, PlanError, UnsupportedRegionError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph, Region
from raygraft.placement.conflicts import is_possible, members_of
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger
from raygraft.placement.plan import Plan
from raygraft.placement.planner import BLOCK_SIZE, make_plan, make_problem
from raygraft.placement.problem import Answer, MemoryLimit
from raygraft.placement.rules import AnyRule, Applied, Rule, Together

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> list[Graph]:
    """One to three blocks, with a tied head and with one of its own, one with a region beside."""
    folder = tmp_path_factory.mktemp("graphs")
    found = [
        build_graph(ModelFile.open(write_tiny_llama(folder / "x.gguf", blocks=blocks, tied=tied)))
        for blocks, tied in ((1, True), (2, False), (3, True))
    ]
    norm_to_swiglu = found[1].regions["blk.0.ffn.gate_up"].operators
    return [*found, found[1].with_region("fused", "fused", (*norm_to_swiglu[:2],))]


def selectors(graph: Graph) -> st.SearchStrategy[str]:
    kinds = sorted({region.kind for region in graph.regions.values()})
    named = st.sampled_from([region.name for region in graph.all_regions])
    term = named | st.sampled_from(kinds).map("kind:{}".format)
    return term | st.tuples(term, named).map(lambda pair: f"{pair[0]}+{pair[1]}")


def rules(graph: Graph, names: Sequence[str]) -> st.SearchStrategy[list[AnyRule]]:
    chosen = st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True).map("|".join)
    some = selectors(graph)
    place = st.builds("{}={}".format, some, chosen)
    never = st.builds("{}=!{}".format, some, st.sampled_from(names))
    one = st.sampled_from([region.name for region in graph.all_regions])
    together = st.builds("{}~{}".format, some, one)
    return st.lists((place | never | together).map(Rule.parse), max_size=4)


@st.composite
def profiles(draw: st.DrawFn, graph: Graph) -> list[DeviceProfile]:
    """Devices that refuse some signatures and claim some regions, with much memory or little."""
    names = NAMES[: draw(st.integers(1, 3))]
    whole = room_for(graph, "model")
    found = []
    for name in names:
        refused = draw(st.just([]) | st.lists(st.sampled_from(graph.signatures), max_size=2))
        only_claims = draw(st.sampled_from([False, False, False, False, True]))
        verdicts = dict.fromkeys(graph.signatures if only_claims else refused, no("not this"))
        claimed = draw(st.lists(st.sampled_from(graph.all_regions), max_size=2))
        claims = {graph.region_signature(region): no("too wide") for region in graph.all_regions}
        claims |= {graph.region_signature(region): YES for region in claimed}
        share = draw(st.sampled_from([0.3, 0.5, 0.7, 1.0, 2.0]))
        kinds = draw(st.sampled_from([(), (), (), (), ("attention", "head"), ("block", "embed")]))
        own = device(graph, name, int(whole * share), verdicts=verdicts, regions=kinds)
        node = draw(st.sampled_from(["here", "there"]))
        type_ = draw(st.sampled_from(["cpu", "gpu"]))
        found.append(replace(own, claims=claims if claimed else {}, node=node, type=type_))
    return found


def allowed(graph: Graph, rules: Sequence[AnyRule], operator: str) -> set[str]:
    """The devices that the place and never rules leave for an operator."""
    left = set(NAMES)
    for rule in reversed(rules):
        if isinstance(rule, Rule) and not rule.never and operator in rule.selector.operators(graph):
            left = set(rule.devices)
            break
    for rule in rules:
        if isinstance(rule, Rule) and rule.never and operator in rule.selector.operators(graph):
            left -= set(rule.devices)
    return left


def takes(profile: DeviceProfile, graph: Graph, operator: str) -> bool:
    """Whether the owner of a device leaves an operator to it."""
    holders = [region for region in graph.all_regions if operator in region.operators]
    return not profile.regions or any(region.kind in profile.regions for region in holders)


def supports(profile: DeviceProfile, graph: Graph, operator: str) -> bool:
    return bool(profile.verdicts[graph.signature(graph.operators[graph.index[operator]])])


def check(
    plan: Plan, graph: Graph, devices: Mapping[str, DeviceProfile], rules: Sequence[AnyRule]
) -> None:
    """A plan runs every operator once, as rules, answers and memories allow."""
    device_of = {op: stage.device for stage in plan.stages for op in stage.operators}
    assert sorted(device_of) == sorted(graph.index)
    assert sum(len(stage.operators) for stage in plan.stages) == len(device_of)
    for operator, name in device_of.items():
        assert name in allowed(graph, rules, operator), operator
        assert takes(devices[name], graph, operator), operator
    for rule in rules:
        if isinstance(rule, Together):
            for group in rule.groups(graph):
                assert len({device_of[operator] for operator in group}) == 1, rule
    regions = {region.name: region for region in graph.all_regions}
    for stage in plan.stages:
        profile = devices[stage.device]
        for unit in stage.units:
            if unit.claim is None:
                assert all(supports(profile, graph, operator) for operator in unit.operators)
            else:
                assert profile.claims_region(graph, regions[unit.claim])
                assert unit.operators == regions[unit.claim].operators
    for name, profile in devices.items():
        ledger = Ledger(graph, profile, LIMITS)
        for atom in graph.atoms:
            if device_of[atom.operators[0]] == name:
                ledger.add(atom)
        assert ledger.used(plan.cache_blocks * BLOCK_SIZE) <= profile.memory
    assert plan.cache_blocks * BLOCK_SIZE >= LIMITS.context


def problem_of(graph: Graph, devices: Sequence[DeviceProfile], rules: Sequence[AnyRule]):
    return make_problem(graph, devices, rules, limits=LIMITS).at(LIMITS.context)


@settings(max_examples=150)
@given(data=st.data())
def test_a_plan_or_a_smallest_conflict(graphs: list[Graph], data: st.DataObject) -> None:
    graph = data.draw(st.sampled_from(graphs))
    devices = data.draw(profiles(graph))
    asked = data.draw(rules(graph, [profile.name for profile in devices]))
    try:
        plan = make_plan(graph, devices, asked, limits=LIMITS)
    except PlanError as error:
        problem = problem_of(graph, devices, asked)
        among = members_of(problem)
        conflict = error.conflict
        assert conflict, error
        assert set(conflict) <= set(among)
        assert not is_possible(problem, conflict, among)
        for member in conflict:
            assert is_possible(problem, [m for m in conflict if m != member], among), member
        memory = any(isinstance(member, MemoryLimit) for member in conflict)
        assert isinstance(error, CapacityError if memory else UnsupportedRegionError)
        for member in conflict:
            assert (member.reason if isinstance(member, Answer) else str(member)) in str(error)
    else:
        check(plan, graph, {profile.name: profile for profile in devices}, asked)


def ways(graph: Graph, profile: DeviceProfile, atoms: Sequence[Region]) -> bool:
    """Whether a device can run neighbouring atoms, as claims or operator by operator."""
    claimed = [r.operators for r in graph.all_regions if profile.claims_region(graph, r)]
    reached = {0}
    for start in range(len(atoms)):
        if start in reached:
            if not profile.refusals(graph, atoms[start]):
                reached.add(start + 1)
            for stop in range(start + 1, len(atoms) + 1):
                if tuple(op for atom in atoms[start:stop] for op in atom.operators) in claimed:
                    reached.add(stop)
    return len(atoms) in reached


def assignments(
    graph: Graph, devices: Mapping[str, DeviceProfile], rules: Sequence[AnyRule]
) -> Iterator[tuple[str, ...]]:
    """Every assignment of atoms to devices that obeys rules, answers and memories."""
    groups = [group for rule in rules if isinstance(rule, Together) for group in rule.groups(graph)]
    open_to = [
        [
            name
            for name, profile in devices.items()
            if name in allowed(graph, rules, atom.operators[0])
            and takes(profile, graph, atom.operators[0])
        ]
        for atom in graph.atoms
    ]
    for names in product(*open_to):
        device_of = {
            op: name for atom, name in zip(graph.atoms, names, strict=True) for op in atom.operators
        }
        if any(len({device_of[op] for op in group}) > 1 for group in groups):
            continue
        cuts = [0, *(n + 1 for n, pair in enumerate(pairwise(names)) if len(set(pair)) > 1)]
        runs = list(pairwise([*cuts, len(names)]))
        if not all(ways(graph, devices[names[a]], graph.atoms[a:b]) for a, b in runs):
            continue
        ledgers = {name: Ledger(graph, profile, LIMITS) for name, profile in devices.items()}
        for atom, name in zip(graph.atoms, names, strict=True):
            ledgers[name].add(atom)
        if all(ledger.used(LIMITS.context) <= ledger.device.memory for ledger in ledgers.values()):
            yield names


@settings(max_examples=60)
@given(data=st.data())
def test_a_plan_is_found_if_there_is_one(graphs: list[Graph], data: st.DataObject) -> None:
    """Against every assignment of one block to two devices."""
    graph = graphs[0]
    devices = {profile.name: profile for profile in data.draw(profiles(graph))[:2]}
    asked = data.draw(rules(graph, list(devices)))
    there_is_one = next(assignments(graph, devices, asked), None) is not None
    try:
        make_plan(graph, list(devices.values()), asked, limits=LIMITS)
    except PlanError:
        assert not there_is_one
    else:
        assert there_is_one


@pytest.mark.parametrize(
    ("memories", "rules", "conflict"),
    [
        # A rule that a later one overrules is no part of it.
        ("a=10 b=10", "*=a *=b", ["b has 10.0 KiB", "rule 2 (*=b)"]),
        ("a=10 b=900", "head=b model=a", ["a has 10.0 KiB", "rule 2 (model=a)"]),
        ("a=900 b=900", "head=!a head=!b", ["rule 1 (head=!a)", "rule 2 (head=!b)"]),
        (
            "a=900 b=900",
            "head=a embed=b embed~head",
            ["rule 1 (head=a)", "rule 2 (embed=b)", "rule 3 (embed~head)"],
        ),
        (
            "a=900 b=900 c=900",
            "head=a|b embed=b|c embed~head head=!b",
            [
                "rule 1 (head=a|b)",
                "rule 2 (embed=b|c)",
                "rule 3 (embed~head)",
                "rule 4 (head=!b)",
            ],
        ),
        ("a=300 b=300", "", ["a has 300 KiB", "b has 300 KiB"]),
        (
            "a=350 b=100 c=350",
            "kind:block=a|c embed~head",
            [
                "a has 350 KiB",
                "b has 100 KiB",
                "c has 350 KiB",
                "rule 1 (kind:block=a|c)",
                "rule 2 (embed~head)",
            ],
        ),
    ],
)
def test_conflicts(four_blocks: Graph, memories: str, rules: str, conflict: list[str]) -> None:
    amounts = {name: int(kib) << 10 for name, kib in (m.split("=") for m in memories.split())}
    devices = [device(four_blocks, name, amount) for name, amount in amounts.items()]
    parsed = [Rule.parse(rule) for rule in rules.split()]
    with pytest.raises(PlanError) as error:
        make_plan(four_blocks, devices, parsed, limits=LIMITS)
    assert [str(member) for member in error.value.conflict] == conflict


def test_a_claim_that_is_refused_is_told_with_its_reason(four_blocks: Graph) -> None:
    """Not that the device supports no operators, nor what it says about other regions."""
    claims = {
        four_blocks.region_signature(region): no("it claims attention alone")
        for region in four_blocks.all_regions
    }
    attention = four_blocks.region_signature(four_blocks.regions["blk.0.attn"])
    claims[attention] = no("its heads have at most 8 columns, not 16")
    none = dict.fromkeys(four_blocks.signatures, no("it supports no operators by themselves"))
    board = replace(device(four_blocks, "board", verdicts=none), claims=claims)
    rules = [Rule.parse("kind:attention=board")]
    with pytest.raises(UnsupportedRegionError, match="at most 8 columns, not 16") as error:
        make_plan(four_blocks, [board, device(four_blocks, "a")], rules, limits=LIMITS)
    assert error.value.conflict == (
        Answer("board", "its heads have at most 8 columns, not 16"),
        Applied(1, rules[0]),
    )
