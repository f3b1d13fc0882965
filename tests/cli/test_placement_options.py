"""`--region` and `-ot` beside `--place`, from the command line to the plan."""

import json
from pathlib import Path

import pytest
from cli.command_line import Command

TWO = ("--device", "a:threads=1", "--device", "b:threads=1")


@pytest.mark.parametrize(
    ("arguments", "on_b"),
    [
        (("--region", "tail=blk.1.ffn+head", "--place", "*=a", "--place", "tail=b"),
         "blk.1.ffn head"),
        (("--region", "one=embed", "--region", "two=head", "--place", "one~two",
          "--place", "!one=a", "--place", "two=b"), "embed head"),
        (("-ot", "blk.1.ffn=b", "-ot", ".*=a"), "blk.1.ffn"),
        (("-ot", "blk.1.ffn=b,.*=a", "--place", "blk.1.ffn.down=a"), "blk.1.ffn.gate_up"),
        (("--override-tensor", "blk.1.attn=b,.*=a", "--place", "head+sample=b"),
         "blk.1.attn head sample"),
        (("--place", "!head=a", "--place", "head=!a"), "head"),
    ],
)  # fmt: skip
def test_a_plan_with(
    raygraft: Command, tiny_model: Path, arguments: tuple[str, ...], on_b: str
) -> None:
    ended = raygraft("plan", "-m", tiny_model, *TWO, *arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    placements = json.loads(ended.out)["placements"]
    found = [p["region"] for p in placements if p["device"] == "b"]
    assert all(any(name.startswith(wanted) for wanted in on_b.split()) for name in found)
    assert all(any(name.startswith(wanted) for name in found) for wanted in on_b.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--region", "tail"), "region 'tail': expected NAME=SELECTOR"),
        (("--region", "blk.9=head"), "'blk.9' cannot be a region's name"),
        (("--region", "head=blk.1"), "there is a region named 'head' already"),
        (("--region", "x=embed+head"), "region 'x' is not convex"),
        (("--region", "x=blk.9"), "'blk.9' names no region"),
        (("-ot", "attn_q=a"), "blk.0.attn.qkv would be torn apart"),
        (("-ot", "ffn=CUDA0"), "no device is meant by 'CUDA0'"),
    ],
)
def test_a_wrong_option(
    raygraft: Command, tiny_model: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = raygraft("plan", "-m", tiny_model, *TWO, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert "Traceback" not in ended.err
