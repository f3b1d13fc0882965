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
    "attention elsewhere": {("a", "b", "tcp"), ("b", "a", "tcp"), ("b", "engine", "ring")},
    "sampling elsewhere": {("a", "b", "tcp"), ("b", "a", "tcp"), ("b", "engine", "tcp")},
    "both on another node": {("a", "b", "ring"), ("b", "a", "ring"), ("a", "engine", "tcp")},
    "no way but Ray's": {("a", "b", "tcp"), ("b", "a", "tcp"), ("b", "engine", "tcp")},
    "model not there": {("a", "b", "tcp"), ("b", "a", "tcp"), ("a", "engine", "tcp")},
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
def test_only_who_cannot_be_reached_is_left_to_ray(document: dict[str, Any], cut: str) -> None:
    said = [line for line in document[cut]["said"] if "go through Ray" in line]
    links = ("engine to a", "engine to b", "a to b", "b to a", "b to engine")
    wanted = links if cut == "no way but Ray's" else ()
    assert len(said) == len(wanted)
    for link in wanted:
        assert any(f"link {link}: cannot reach " in line for line in said)


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


def test_a_device_of_another_node_dies(document: dict[str, Any]) -> None:
    found = document["loss"]["fail"]
    assert found["devices"] == 2
    assert found["said"].startswith(
        ("DeviceLostError: device a on", "DeviceLostError: device b on")
    )
    assert found["seconds"] < 10


def test_an_answer_goes_on_over_new_connections(document: dict[str, Any]) -> None:
    assert document["loss"]["replace"]["said"] == "the same text"
