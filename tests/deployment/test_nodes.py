"""Regions on several nodes: the same tokens as in one process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from deployment.processes import run

pytestmark = pytest.mark.process

# Cut -> the links that its records take, as (source, target, link).
LINKS = {
    "attention elsewhere": {("a", "b", "object"), ("b", "a", "object"), ("b", "engine", "ring")},
    "sampling elsewhere": {("a", "b", "object"), ("b", "a", "object"), ("b", "engine", "object")},
    "both on another node": {("a", "b", "ring"), ("b", "a", "ring"), ("a", "engine", "object")},
    "model not there": {("a", "b", "object"), ("b", "a", "object"), ("a", "engine", "object")},
}


@pytest.fixture(scope="module")
def document(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nodes")
    model = shutil.copy(tiny_model, folder / "model.gguf")
    driver = Path(__file__).parent / "several_nodes.py"
    done = run(sys.executable, driver, model, folder / "out.json", timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return read


def test_weights_are_sent_where_the_file_is_not(document: dict[str, Any]) -> None:
    assert document["model not there"]["tensors_sent"] == document["model not there"]["tensors"]
    assert document["attention elsewhere"]["tensors_sent"] == 0


@pytest.mark.parametrize("cut", LINKS)
def test_cut_over_nodes(document: dict[str, Any], cut: str) -> None:
    found = document[cut]
    assert found["asked"] is True
    assert {tuple(link) for link in found["links"]} == LINKS[cut]
    for expected, answer in zip(document["uncut"]["answers"], found["answers"], strict=True):
        assert answer["tokens"] == expected["tokens"]
        for ours, theirs in zip(answer["logprobs"], expected["logprobs"], strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert [value for _, value in ours] == pytest.approx(
                [value for _, value in theirs], abs=1e-5
            )
