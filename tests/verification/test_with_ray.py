"""Devices that crash or hang in an actor: reported, started anew, and kept out."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from raygraft import LLM, SamplingParams
from raygraft.actors import ray_fleet
from raygraft.actors.part import Questions
from raygraft.actors.ray_fleet import RayFleet
from raygraft.graph.capability import Limits
from raygraft.graph.errors import UnsupportedRegionError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.verification.checks import CheckResult
from raygraft.placement.devices import DeviceSpec
from raygraft.placement.rules import Rule
from raygraft.planning import plan_on
from raygraft.verification import WithdrawnWarning

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

LIARS = Path(__file__).parent / "liars.py"
LIMITS = Limits(max_rows=32, context=64, max_sequences=4)


@pytest.fixture(params=[None, "both"], ids=["apart", "in one actor"])
def fleet(request: pytest.FixtureRequest) -> Iterator[RayFleet]:
    """A device that crashes on attention and hangs on feed-forward, beside an honest one."""
    liar = DeviceSpec("liar", f"{LIARS}:CrashesAndHangs", threads=1, actor=request.param)
    fleet = RayFleet([liar, DeviceSpec("honest", "reference", threads=1, actor=request.param)])
    yield fleet
    fleet.shutdown()


def test_a_device_that_crashes_and_hangs(
    fleet: RayFleet, tiny_model: Path, tiny_graph: Graph
) -> None:
    questions = Questions(tiny_graph, LIMITS)
    results = fleet.verify(questions, ModelFile.open(tiny_model), deadline=2.5)
    found: dict[str, CheckResult] = {check.where: check for check in results["liar"]}
    assert {where: check.detail for where, check in found.items()} == {
        "embed": "",
        "blk.0.ffn": "no answer within 2.5 s",
        "blk.0.attn": "its process died",
    }
    assert all(check.ok for check in results["honest"])
    # The actor is another one, which gives the same answers; they stay withdrawn.
    liar, _ = fleet.profiles(questions)
    claimed = {signature.kind: verdict for signature, verdict in liar.claims.items()}
    assert claimed["embed"].ok
    assert claimed["attention"].reason == "withdrawn: its process died"
    assert claimed["ffn"].reason == "withdrawn: no answer within 2.5 s"

    def plan(*rules: str) -> dict[str, str]:
        parsed = [Rule.parse(rule) for rule in rules]
        made, _, _ = plan_on(fleet, tiny_graph, parsed, limits=LIMITS, context=64, model="tiny")
        return {placement.region: placement.device for placement in made.placements}

    devices = plan("embed=liar")
    assert devices.pop("embed") == "liar"
    assert set(devices.values()) == {"honest"}
    with pytest.raises(UnsupportedRegionError, match=r"liar: .*withdrawn: its process died"):
        plan("kind:attention=liar")


def test_llm_verifies_before_it_loads(tiny_model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    honest = "honest:backend=reference,threads=1"
    with LLM(tiny_model, devices=[honest]) as llm:
        (expected,) = llm.generate("the cat", params)
    devices = [f"liar:backend={LIARS}:Crashes,threads=1", honest]
    said = "device liar: claim of blk.0.attn and 1 alike withdrawn: its process died"
    with (
        pytest.warns(WithdrawnWarning, match=said),
        LLM(tiny_model, devices=devices, verify=True) as llm,
    ):
        (answer,) = llm.generate("the cat", params)
    assert answer.token_ids == expected.token_ids
    assert {stage.device for stage in llm.plan.stages} == {"honest"}
    assert [check.ok for check in llm.verification["liar"]] == [False]


def test_weights_come_through_the_object_store(
    tiny_model: Path, tiny_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a device whose machine lacks the file."""
    fleet = RayFleet([DeviceSpec("a", f"{LIARS}:AttentionOnly", threads=1)])
    monkeypatch.setattr(ray_fleet, "have_files", lambda _, __, names: dict.fromkeys(names, False))
    try:
        (check,) = fleet.verify(Questions(tiny_graph, LIMITS), ModelFile.open(tiny_model))["a"]
    finally:
        fleet.shutdown()
    assert check.detail == ""
    assert check.error is not None
    assert check.error < 1e-6
