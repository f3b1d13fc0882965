"""`raygraft plan`: reasons, every device's answer, and the page."""

import json
from pathlib import Path

from cli.command_line import Command

CUT = ("--device", "a:threads=1", "--device", "b:threads=1,regions=ffn+head")
RULES = ("--place", "kind:attention=a", "--place", "kind:ffn=b")


def test_reasons_are_folded(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--reasons")
    assert ended.code == 0
    rows = [line.split() for line in ended.out.splitlines()]
    assert ["blk.[0-1].attn", "a"] in [row[:2] for row in rows]
    assert "blk.1.ffn.down" not in ended.out
    every = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--reasons", "--all")
    assert "blk.1.ffn.down" in every.out
    assert "blk.[0-1].ffn  " not in every.out.partition("region ")[2]


def test_why_tells_every_answer(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--why", "blk.1.attn+head")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    assert text.startswith("region device time answer blk.1.attn a →")
    assert "supports all its operators; chosen: rule 1 (kind:attention=a)" in text
    assert "b rule 1 (kind:attention=a)" in text
    assert "head a" in text
    assert "blk.0" not in text
    assert "The devices were not asked" in text


def test_why_as_json(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--why", "blk.1.ffn", "--json")
    assert (ended.code, ended.err) == (0, "")
    document = json.loads(ended.out)
    assert document["asked"] is False
    assert [row["region"] for row in document["regions"]] == ["blk.1.ffn.gate_up", "blk.1.ffn.down"]
    down = document["regions"][1]
    assert (down["device"], down["reason"]) == ("b", "rule 2 (kind:ffn=b)")
    assert down["bytes"] > 0
    a, b = down["answers"]
    assert (a["device"], a["can"], a["chosen"], a["seconds"]) == ("a", False, False, None)
    assert a["answer"] == "rule 2 (kind:ffn=b)"
    assert (b["device"], b["can"], b["chosen"]) == ("b", True, True)
    assert b["seconds"] > 0


def test_why_of_an_unknown_region(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, "--why", "blk.7")
    assert ended.code == 2
    assert "names no region" in ended.err


def test_the_page_is_written(raygraft: Command, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    ended = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--html", file)
    assert ended.code == 0
    assert f"the page is in {file}" in ended.err
    assert "No device was asked" in file.read_text(encoding="utf-8")
    quiet = raygraft("plan", "-m", tiny_model, *CUT, *RULES, "--html", file, "--json")
    assert quiet.err == ""
    assert json.loads(quiet.out)["model"] == tiny_model.name


def test_a_page_that_cannot_be_written(raygraft: Command, tiny_model: Path, tmp_path: Path) -> None:
    ended = raygraft("plan", "-m", tiny_model, *CUT, "--html", tmp_path / "no" / "plan.html")
    assert ended.code == 2
    assert "cannot be written: No such file or directory" in ended.err
    assert ended.out == ""
