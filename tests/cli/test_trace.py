"""`raygraft run --trace`."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli.command_line import Command

CUT = (
    *("--device", "a:threads=1,backend=reference", "--place", "kind:attention=a"),
    *("--device", "b:threads=1,backend=reference", "--place", "kind:ffn=b"),
)
PROMPT = ("-p", "the cat", "-n", 4, "--temp", 0)


@pytest.mark.ray
def test_a_timeline_of_a_run(
    ray_cluster: None, raygraft: Command, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    ended = raygraft("run", "-m", tiny_model, *PROMPT, *CUT, "--trace", path, "--json")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)["plan"]
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert f"{path}: {len(drawn)} events" in ended.err.replace("\n", "")
    stages = Counter((e["args"]["step"], e["args"]["stage"]) for e in drawn if e["cat"] == "stage")
    assert set(stages.values()) == {1}
    steps = {step for step, _ in stages}
    assert set(stages) == {(step, stage["number"]) for step in steps for stage in plan["stages"]}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in drawn)
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"engine", "a", "b"}


@pytest.mark.ray
def test_a_timeline_as_rows(
    ray_cluster: None, raygraft: Command, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.parquet"
    ended = raygraft("run", "-m", tiny_model, *PROMPT, *CUT, "--trace", path)
    assert ended.code == 0, ended.err
    rows = pq.read_table(path).to_pylist()
    assert {row["kind"] for row in rows} == {"stage", "wait", "send", "header", "tokens", "text"}


@pytest.mark.parametrize("name", ["trace.txt", "none/trace.json"])
def test_a_file_that_cannot_be_is_refused_first(
    raygraft: Command, tmp_path: Path, name: str
) -> None:
    ended = raygraft("run", "-m", "no-such.gguf", *PROMPT, "--trace", tmp_path / name)
    assert ended.code == 2
    assert name in ended.err


def test_help_says_what_opens_it(raygraft: Command) -> None:
    assert "perfetto" in raygraft("run", "--help").out
