"""A short run of the bench that kills actors, stops them and takes nodes away."""

import json
import sys
from pathlib import Path

import pytest
from deployment.processes import REPOSITORY, run

pytestmark = pytest.mark.process


def test_answers_survive(tiny_model_with_room: Path, tmp_path: Path) -> None:
    """The seed makes it a node, then actors."""
    out = tmp_path / "chaos.json"
    options = ("--kills", 4, "--seed", 1, "--pause", 0.5, "--json", out)
    chaos = REPOSITORY / "bench" / "chaos.py"
    done = run(sys.executable, chaos, "-m", tiny_model_with_room, *options, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["wrong"] == []
    assert found["injuries"]["node"] == 1
    assert found["answers"] > 16
    assert found["recoveries"] >= 2
    assert found["after"] == found["before"]
    assert found["processes_left"] == []
