"""The timeline of a run: who did what when, as a Chrome trace and as rows."""

import json
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest

from raygraft import LLM, SamplingParams
from raygraft.actors.records import Record, RecordKind
from raygraft.actors.timeline import Timeline
from raygraft.actors.trace import EventKind, Trace
from raygraft.graph.errors import ConfigurationError

TOKENS = 5
CUT = {"kind:attention": "a", "kind:ffn": "b", "embed": "a"}  # each step has a header of its own


@pytest.fixture(scope="module", params=[1, 2])
def traced(tiny_model: Path, request: pytest.FixtureRequest) -> tuple[LLM, Timeline, int]:
    """A cut model, its timeline, and how many half-batches were in flight."""
    devices = [f"{name}:threads=1,backend=reference" for name in "ab"]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(
        tiny_model, devices=devices, place=CUT, runtime="in-process", half_batches=request.param
    ) as llm:
        llm.generate("a run that nobody looks at", params)
        llm.start_trace()
        llm.generate(["the cat", "in the house"], params)
        return llm, llm.timeline(), request.param


def test_each_stage_runs_once_a_step_where_the_plan_has_it(
    traced: tuple[LLM, Timeline, int],
) -> None:
    llm, timeline, half_batches = traced
    ran: dict[int, Counter[tuple[str, int | None]]] = defaultdict(Counter)
    for event in timeline.events:
        if event.kind == "stage":
            ran[event.step][event.track, event.stage] += 1
    planned = Counter((stage.device, stage.number) for stage in llm.plan.stages)
    assert len(ran) >= TOKENS
    assert len({event.half_batch for event in timeline.events}) == half_batches
    assert all(found == planned for found in ran.values())


def test_nothing_overlaps_on_one_track(traced: tuple[LLM, Timeline, int]) -> None:
    _, timeline, _ = traced
    for track in ("engine", "a", "b"):
        own = [event for event in timeline.events if event.track == track]
        assert own
        for one, next_one in pairwise(own):
            assert one.begin_us + one.duration_us <= next_one.begin_us + 0.01


def test_records_are_received_after_they_were_sent(traced: tuple[LLM, Timeline, int]) -> None:
    llm, timeline, _ = traced
    by_hop: dict[tuple[int, int | None], dict[str, Any]] = defaultdict(dict)
    for event in timeline.events:
        if event.transfer is not None:
            by_hop[event.step, event.transfer][event.kind] = event
    transfers = {transfer.number: transfer for transfer in llm.plan.transfers}
    assert {number for _, number in by_hop} == set(transfers)
    for (_, number), hop in by_hop.items():
        assert number is not None
        sent, waited = hop["send"], hop["wait"]
        assert (sent.track, sent.peer) == (transfers[number].source, transfers[number].target)
        assert (waited.track, waited.peer) == (transfers[number].target, transfers[number].source)
        assert sent.begin_us < waited.begin_us + waited.duration_us
        assert sent.nbytes > 0


def test_the_engine_has_a_header_a_wait_and_tokens_for_each_step(
    traced: tuple[LLM, Timeline, int],
) -> None:
    _, timeline, _ = traced
    steps = {event.step for event in timeline.events if event.kind == "stage"}
    for kind in ("header", "wait", "tokens", "text"):
        own = [e.step for e in timeline.events if (e.track, e.kind) == ("engine", kind)]
        assert set(own) >= steps
        assert len(own) == len(set(own))


def test_both_files_hold_the_same_events(traced: tuple[LLM, Timeline, int], tmp_path: Path) -> None:
    _, timeline, _ = traced
    timeline.write(tmp_path / "t.json")
    timeline.write(tmp_path / "t.parquet")
    document = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    table = pq.read_table(tmp_path / "t.parquet")
    names = {
        event["tid"]: event["args"]["name"]
        for event in document["traceEvents"]
        if event["name"] == "thread_name"
    }
    drawn = [
        (names[event["tid"]], event["cat"], event["name"], event["ts"], event["dur"])
        for event in document["traceEvents"]
        if event["ph"] == "X"
    ]
    columns = ("track", "kind", "name", "begin_us", "duration_us")
    assert drawn == [tuple(row[name] for name in columns) for row in table.to_pylist()]
    assert len(drawn) == len(timeline.events) > 50
    stages = [row["stage"] for row in table.to_pylist()]
    assert stages == [event.stage for event in timeline.events]
    dropped = json.loads(table.schema.metadata[b"dropped"])
    assert dropped == document["otherData"]["dropped"] == {"engine": 0, "a": 0, "b": 0}
    arrows = Counter((e["id"], e["ph"]) for e in document["traceEvents"] if e["name"] == "hop")
    assert set(arrows.values()) == {1}
    assert {(name, end) for name, _ in arrows for end in "sf"} == set(arrows)


def test_the_oldest_events_give_way() -> None:
    trace = Trace()
    assert not trace.on
    trace.start(room=4)
    for step in range(10):
        trace.add(EventKind.STAGE, 0, step, 0, 0.0)
    recorded = trace.recorded()
    assert recorded.dropped == 6
    assert recorded.events["step"].tolist() == [6, 7, 8, 9]
    assert np.all(np.diff(recorded.events["end"]) >= 0)
    assert (recorded.events["begin"] > 0).all()  # nothing began before the trace did
    trace.received(Record(RecordKind.STEP, 1, 10, 0, transfer=2), 0.0)
    assert trace.recorded().events["number"][-1] == -1
    trace.start()
    assert len(trace.recorded().events) == 0


@pytest.mark.parametrize("name", ["trace.txt", "trace", "none/trace.json"])
def test_a_file_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}: "):
        Timeline((), {}).write(tmp_path / name)


@pytest.mark.ray
def test_another_machines_clock_is_brought_into_line(ray_cluster: None, tiny_model: Path) -> None:
    def clock() -> tuple[str, float]:
        """That of a machine which was started a hundred seconds later."""
        return "another boot", time.perf_counter() - 100

    params = SamplingParams(temperature=0, max_tokens=3)
    with LLM(tiny_model, devices=["a:threads=1,backend=reference"]) as llm:
        with patch("raygraft.actors.ray_fleet.clock", clock):
            llm.start_trace()
        llm.generate("the cat", params)
        (ahead,) = {own.ahead for own in llm._fleet.recorded().values()}
        assert ahead == pytest.approx(100, abs=0.1)
        llm.start_trace()
        (ahead,) = {own.ahead for own in llm._fleet.recorded().values()}
        assert ahead == 0
