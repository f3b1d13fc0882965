"""`raygraft verify`, and `--verify` on `run`."""

import json
from pathlib import Path

import pytest
from cli.command_line import Command

LIARS = Path(__file__).parents[1] / "verification" / "liars.py"
SCALED = ("--device", f"board:backend={LIARS}:Scaled,threads=1")
HONEST = ("--device", "cpu:backend=reference,threads=1")

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_table_for_each_device(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("verify", "-m", tiny_model, *SCALED, *HONEST)
    assert ended.code == 1
    assert "blk.0.attn" in ended.out
    assert (
        "blk.0.attn          attention of 9 operators      2  1.0e-02  0.001  withdrawn"
        in ended.out
    )
    assert "claim of blk.0.attn and 1 alike withdrawn: error 0.01, bound 0.001, in " in ended.out
    assert "\n1 withdrawn\n\ndevice cpu on " in ended.out
    assert "\n14 ok\n" in ended.out
    assert "checking 1 of " in ended.err
    assert "warning" not in ended.err


def test_as_json(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("verify", "-m", tiny_model, *HONEST, "--json")
    assert (ended.code, ended.err) == (0, "")
    document = json.loads(ended.out)
    assert (document["ok"], document["model"]) == (True, tiny_model.name)
    (device,) = document["devices"]
    assert device["name"] == "cpu"
    checks = {check["where"]: check for check in device["checks"]}
    attention = checks["blk.0.attn.core.attention"]
    assert (attention["outcome"], attention["claim"], attention["count"]) == ("ok", False, 2)
    assert 0 <= attention["error"] < attention["bound"] == 1e-3


def test_run_leaves_out_what_fails(raygraft: Command, tiny_model: Path) -> None:
    run = ("run", "-m", tiny_model, "-p", "the cat", "-n", 4, "--temp", 0, "--verify", "--json")
    ended = raygraft(*run, *SCALED, *HONEST)
    assert ended.code == 0
    (line,) = ended.err.splitlines()
    assert line.startswith("warning: device board: claim of blk.0.attn and 1 alike withdrawn: err")
    devices = {p["device"] for p in json.loads(ended.out)["plan"]["placements"]}
    assert devices == {"cpu"}
