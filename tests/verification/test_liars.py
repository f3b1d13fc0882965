"""A device that lies is caught, named with the figure, and kept out of the plan."""

from pathlib import Path

import pytest

from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.part import Questions
from raygraft.graph.capability import Limits
from raygraft.graph.errors import UnsupportedRegionError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.verification.checks import CheckResult, Outcome
from raygraft.placement.devices import DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.rules import Rule
from raygraft.planning import plan_on

LIARS = Path(__file__).parent / "liars.py"
LIMITS = Limits(max_rows=40, context=128, max_sequences=4)
RESIDUAL = "output blk.0.attn.out.residual"

LIES = {
    "Scaled": f"error 0.01, bound 0.001, in {RESIDUAL}, in a step of ",
    "OneElement": f", bound 0.001, in {RESIDUAL}, in a step of 40 rows",
    "WrongShape": f"{RESIDUAL} has the shape (7, 32), expected (7, 64), in a step of 7 rows",
    "WrongType": f"{RESIDUAL} is float64, expected float32",
    "NoArray": f"{RESIDUAL} is of type list, expected an array",
    "NotANumber": f"{RESIDUAL} has NaN in 12 of 448 elements",
    "Infinite": f"{RESIDUAL} has infinity in 1 of 448 elements",
    "NoOutput": f"{RESIDUAL} is missing",
    "Raises": "ValueError: no such page, in a step of 7 rows",
    "RaisesWhenLoading": "MemoryError: no room, while loading",
    "IgnoresTheCache": " after ",
    "OneSequence": " sequences",
    "PagesInARow": "error ",
    "OverwritesItsInput": "it overwrote its input embed.tokens",
    "KeepsItsInput": "error 1, bound 0.001, ",
    "Exits": "its thread ended",
    "Hangs": "no answer within 0.5 s",
}


def verified(
    model: Path, graph: Graph, *specs: DeviceSpec, limits: Limits = LIMITS
) -> tuple[InProcessFleet, dict[str, tuple[CheckResult, ...]]]:
    fleet = InProcessFleet(specs)
    results = fleet.verify(Questions(graph, limits), ModelFile.open(model), deadline=0.5)
    return fleet, results


def liar(name: str) -> DeviceSpec:
    return DeviceSpec("liar", f"{LIARS}:{name}", threads=1)


def plan(fleet: InProcessFleet, graph: Graph, *rules: str) -> Plan:
    parsed = [Rule.parse(rule) for rule in rules]
    return plan_on(fleet, graph, parsed, limits=LIMITS, context=None, model="tiny")[0]


def devices_of(made: Plan, kind: str) -> set[str]:
    return {p.device for p in made.placements if f".{kind}." in p.region}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_caught_and_kept_out_of_the_plan(
    name: str, tiny_model: Path, tiny_graph: Graph
) -> None:
    honest = DeviceSpec("honest", "reference", threads=1)
    rule = "kind:attention=liar"
    before = plan(InProcessFleet([liar(name), honest]), tiny_graph, rule)
    assert devices_of(before, "attn") == {"liar"}
    fleet, results = verified(tiny_model, tiny_graph, liar(name), honest)
    (found,) = results["liar"]
    assert (found.outcome, found.claim, found.where) == (Outcome.FAILED, True, "blk.0.attn")
    assert found.count == 2
    assert LIES[name] in found.detail
    if found.error is not None:
        assert found.error > found.bound == 1e-3
    assert all(check.ok and check.error < 1e-6 for check in results["honest"])
    assert devices_of(plan(fleet, tiny_graph), "attn") == {"honest"}
    with pytest.raises(UnsupportedRegionError) as error:
        plan(fleet, tiny_graph, rule)
    assert f"withdrawn: {found.detail}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [
        ("WrongOperator", "blk.0.ffn.gate_up.swiglu", "error "),
        ("AlwaysTheFirst", "sample.sample", "100% of the ids in output sample.id are wrong"),
    ],
)
def test_a_wrong_operator_alone_is_withdrawn(
    name: str, where: str, said: str, tiny_model: Path, tiny_graph: Graph
) -> None:
    fleet, results = verified(tiny_model, tiny_graph, liar(name))
    (wrong,) = [check for check in results["liar"] if not check.ok]
    assert (wrong.where, wrong.claim) == (where, False)
    assert said in wrong.detail
    (profile,) = fleet.profiles(Questions(tiny_graph, LIMITS))
    refused = [str(s) for s, verdict in profile.verdicts.items() if not verdict]
    assert refused == [wrong.what]
