"""The page's text: everything stands there, safely, and nothing is loaded."""

import re
from dataclasses import replace

import pytest
from picture.documents import Document
from picture.plans import HALVES, THIRDS, Planned, dealt, planned

from raygraft.graph.capability import YES
from raygraft.graph.graph import Graph
from raygraft.picture import plan_page
from raygraft.picture.page import HUES, hue_of
from raygraft.picture.rows import Rows, duration
from raygraft.placement.planner import make_plan, make_problem
from raygraft.placement.rules import Rule

EVIL = "</script></title><img src=x onerror=alert(1)>\"'&.gguf"


def page_of(made: Planned) -> Document:
    return Document(plan_page(made.plan, made.problem))


def test_all_regions_and_reasons_are_there(four_blocks: Graph) -> None:
    made = planned(four_blocks, 3, THIRDS)
    text = " ".join(page_of(made).texts("body"))
    for placement in made.plan.placements:
        assert f"{placement.region} {placement.device} " in text
        assert placement.reason in text
    assert "rms_norm, 3 matmul, 2 rope" in text
    assert "23)" in text


def test_every_box_has_its_text(thirty_blocks: Graph) -> None:
    page = page_of(planned(thirty_blocks, 2, HALVES))
    boxes = page.all("a", "box")
    assert len(boxes) == 60 + 6
    details = {element.attributes["id"] for element in page.all("section", "detail")}
    for box in boxes:
        assert box.attributes["href"].removeprefix("#") in details
        assert box.attributes["aria-label"].startswith(("Stage ", "28 stages "))
        assert "".join(box.text).strip()
    (kept,) = (e for e in page.all("section") if e.attributes.get("id") == "stage-1")
    text = " ".join(" ".join(kept.text).split())
    assert "rule 2 (kind:ffn=b)" in text
    assert "a: rule 2 (kind:ffn=b)" in text  # what the other device says
    assert "b: supports all its operators" in text
    assert "receives from a: blk.0.attn.out.residual (256 B a token, ring)" in text


def test_the_head_says_what_the_plan_says(four_blocks: Graph) -> None:
    made = planned(four_blocks, 2, HALVES, nodes=("n0", "n1"), model="my.gguf")
    page = page_of(made)
    assert page.texts("h1") == ["my.gguf"]
    assert page.texts("title")[0] == "Plan of my.gguf"
    facts = dict(zip(page.texts("dt")[:5], page.texts("dd")[:5], strict=True))
    assert facts["hops a token"] == str(made.plan.hops) == "8"
    assert facts["sent a token"] == "1.9 KiB"
    assert facts["tokens of context"] == "64"
    assert facts["a token, predicted"] == duration(made.plan.seconds_per_token)
    assert [text.split()[0] for text in page.texts("div", "name")] == ["a", "b"]
    assert "cpu on n1" in page.texts("div", "name")[1]


def test_it_says_whether_devices_were_asked(four_blocks: Graph) -> None:
    asked = page_of(planned(four_blocks, 2, HALVES))
    assert "devices were asked" in asked.texts("span", "badge")
    assert not asked.all("p", "declared")
    declared = page_of(planned(four_blocks, 2, HALVES, asked=False))
    assert "declared, not asked" in declared.texts("span", "badge")
    assert declared.texts("p", "declared")[0].startswith("No device was asked: this plan is made")
    made = planned(four_blocks, 2, HALVES)
    devices = [made.problem.devices["a"], replace(made.problem.devices["b"], asked=False)]
    problem = make_problem(four_blocks, devices, (), limits=made.problem.limits)
    plan = make_plan(four_blocks, devices, limits=made.problem.limits)
    (text,) = page_of(Planned(plan, problem)).texts("p", "declared")
    assert text.startswith("b: not asked; the plan is partly made from declarations")


def test_names_cannot_do_anything(four_blocks: Graph) -> None:
    """A file may be named anything, and so may a node."""
    page = page_of(planned(four_blocks, 2, HALVES, model=EVIL, nodes=('"><b x=y>', EVIL)))
    assert page.texts("h1") == [EVIL]
    assert page.texts("title")[0] == f"Plan of {EVIL}"
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert not [e for e in page.elements if any(name.startswith("on") for name in e.attributes)]


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_nothing_is_loaded(thirty_blocks: Graph, devices: int) -> None:
    html = plan_page(*_parts(planned(thirty_blocks, devices, dealt(thirty_blocks, devices))))
    page = Document(html)
    assert not [e.tag for e in page.elements if e.tag in {"link", "img", "iframe", "object"}]
    for element in page.elements:
        for name, value in element.attributes.items():
            if name in {"href", "src", "xlink:href", "action", "data"}:
                assert value.startswith("#")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", html)
    policy = [e.attributes.get("content", "") for e in page.all("meta")]
    assert any(text.startswith("default-src 'none'") for text in policy)


def test_ids_are_unique(thirty_blocks: Graph) -> None:
    page = page_of(planned(thirty_blocks, 8, dealt(thirty_blocks)))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_the_same_plan_gives_the_same_page(four_blocks: Graph) -> None:
    made = [planned(four_blocks, 3, THIRDS) for _ in range(2)]
    assert plan_page(*_parts(made[0])) == plan_page(*_parts(made[1]))


def test_claims_are_told(four_blocks: Graph) -> None:
    """Folded, a claim stands for every block's own."""
    attention = [r for r in four_blocks.all_regions if r.kind == "attention"]
    made = planned(four_blocks, 2)
    claims = {four_blocks.region_signature(region): YES for region in attention}
    devices = [
        replace(made.problem.devices["a"], regions=("embed", "ffn", "head", "sample")),
        replace(made.problem.devices["b"], claims=claims, verdicts={}),
    ]
    limits = made.problem.limits
    plan = make_plan(four_blocks, devices, limits=limits)
    problem = make_problem(four_blocks, devices, (), limits=limits)
    (row,) = (row for row in Rows(plan, problem).reasons() if row.device == "b")
    assert row.regions == "blk.[0-3].attn"
    assert row.claim == "blk.*.attn"
    assert row.reason.endswith("it claims blk.*.attn")
    text = " ".join(page_of(Planned(plan, problem)).texts("aside"))
    assert "Runs as a part of blk.2.attn, which the device claims as one." in text
    assert "b: claims blk.2.attn" in text
    assert "a: it only takes embed, ffn, head, sample" in text


def test_a_claim_of_which_a_part_must_be_elsewhere(four_blocks: Graph) -> None:
    rules = ("blk.0.attn.core=a",)
    made = planned(four_blocks, 2, rules)
    attention = four_blocks.regions["blk.0.attn"]
    claims = {four_blocks.region_signature(attention): YES}
    devices = [made.problem.devices["a"], replace(made.problem.devices["b"], verdicts={})]
    devices[1] = replace(devices[1], claims=claims)
    parsed = [Rule.parse(rule) for rule in rules]
    problem = make_problem(four_blocks, devices, parsed, limits=made.problem.limits)
    plan = make_plan(four_blocks, devices, parsed, limits=made.problem.limits)
    answers = {row.regions: said[1] for row, said in Rows(plan, problem).answers(folded=False)}
    assert answers["blk.0.attn.core"].answer == "rule 1 (blk.0.attn.core=a)"
    text = "it claims blk.0.attn, but not all of that may be there"
    assert answers["blk.0.attn.qkv"].answer == text
    assert answers["blk.1.attn.qkv"].answer == "claims blk.1.attn"
    assert not answers["embed"].can


def test_hues_differ() -> None:
    hues = [hue_of(number) for number in range(20)]
    assert len(set(hues)) == 20
    assert tuple(hues[: len(HUES)]) == HUES


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (1.2e-5, "12 µs"), (0.0034, "3.4 ms"), (0.25, "250 ms"), (61.04, "61.0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def _parts(made: Planned) -> tuple[object, ...]:
    return made.plan, made.problem
