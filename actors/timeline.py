"""A run as a timeline: a track for the engine and for each device, for Perfetto or for tables.

In the Chrome trace format (https://perfetto.dev and chrome://tracing open it) a hop is an arrow
from where a record was sent to where it was received.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raygraft.actors.trace import EventKind, Recorded
from raygraft.graph.errors import ConfigurationError
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Stage

SUFFIXES = (".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the timeline. Times are in microseconds since its first."""

    track: str
    """A device, or the engine."""
    kind: str
    """stage, wait, send, header, tokens or text."""
    name: str
    peer: str
    """Whom a wait is for, or who a record is sent to."""
    step: int
    half_batch: int
    stage: int | None
    transfer: int | None
    begin_us: float
    duration_us: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What everybody did when."""

    events: tuple[Event, ...]
    """By time."""
    dropped: Mapping[str, int]
    """Track -> older events that there was no room for."""

    def write(self, path: Path) -> None:
        """As a Chrome trace or as Parquet, by the file's suffix. Raises ConfigurationError."""
        check_path(path)
        try:
            if path.suffix == ".json":
                path.write_text(json.dumps(self.to_chrome()), encoding="utf-8")
            else:
                self._write_parquet(path)
        except OSError as error:
            raise ConfigurationError(f"{path}: the timeline cannot be written: {error}") from error

    def to_chrome(self) -> dict[str, Any]:
        """A document of the Chrome trace event format."""
        tracks = dict.fromkeys((ENGINE, *self.dropped))
        threads = {track: number for number, track in enumerate(tracks, 1)}
        document: list[dict[str, Any]] = []
        for track, thread in threads.items():
            place = {"ph": "M", "pid": 1, "tid": thread}
            document.append({**place, "name": "thread_name", "args": {"name": track}})
            document.append({**place, "name": "thread_sort_index", "args": {"sort_index": thread}})
        process = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "raygraft"}}
        document.append(process)
        for event in self.events:
            place = {"pid": 1, "tid": threads[event.track], "cat": event.kind}
            document.append(
                {
                    **place,
                    "ph": "X",
                    "name": event.name,
                    "ts": event.begin_us,
                    "dur": event.duration_us,
                    "args": _arguments(event),
                }
            )
            if event.transfer is not None:
                document.append({**place, "cat": "hop", **_arrow(event)})
        return {
            "traceEvents": document,
            "displayTimeUnit": "ms",
            "otherData": {"dropped": dict(self.dropped)},
        }

    def _write_parquet(self, path: Path) -> None:
        import pyarrow as pa  # noqa: PLC0415  # takes a while to import
        import pyarrow.parquet as pq  # noqa: PLC0415

        types = {"str": pa.string(), "int": pa.int64(), "int | None": pa.int64()}
        fields = Event.__dataclass_fields__.items()
        schema = pa.schema(
            [(name, types.get(str(field.type), pa.float64())) for name, field in fields],
            metadata={"dropped": json.dumps(dict(self.dropped))},
        )
        rows = [asdict(event) for event in self.events]
        pq.write_table(pa.Table.from_pylist(rows, schema), path)


def check_path(path: Path) -> None:
    """Raise ConfigurationError when a timeline cannot be written there."""
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(
            f"{path}: a timeline is written as {' or '.join(SUFFIXES)}, not as "
            f"{path.suffix or 'a file without a suffix'}"
        )
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path}: there is no folder {path.parent}")


def timeline_of(plan: Plan, recorded: Mapping[str, Recorded]) -> Timeline:
    """Put the tracks of a run together, in the engine's time."""
    begins = [own.events["begin"][0] - own.ahead for own in recorded.values() if len(own.events)]
    start = min(begins, default=0.0)
    found = [e for track, own in recorded.items() for e in _events_of(plan, track, own, start)]
    found.sort(key=lambda event: event.begin_us)
    return Timeline(tuple(found), {track: own.dropped for track, own in recorded.items()})


def _events_of(plan: Plan, track: str, recorded: Recorded, start: float) -> Iterator[Event]:
    stages = {stage.number: stage for stage in plan.stages}
    transfers = {transfer.number: transfer for transfer in plan.transfers}
    for kind_code, half_batch, number, step, begin, end, nbytes in recorded.events.tolist():
        kind = EventKind(kind_code).name.lower()
        name, peer = kind, ""
        if kind == "stage":
            name = _regions(stages.get(number))
        elif kind == "wait":
            peer = transfers[number].source if number in transfers else ENGINE
            name = f"wait for {peer}"
        elif kind == "send":
            peer = transfers[number].target if number in transfers else ""
            name = f"send to {peer}"
        yield Event(
            track=track,
            kind=kind,
            name=name,
            peer=peer,
            step=step,
            half_batch=half_batch,
            stage=number if kind == "stage" else None,
            transfer=number if kind in {"wait", "send"} and number >= 0 else None,
            begin_us=round((begin - recorded.ahead - start) * 1e6, 3),
            duration_us=round((end - begin) * 1e6, 3),
            nbytes=nbytes,
        )


def _regions(stage: Stage | None) -> str:
    if stage is None:
        return "a stage of an earlier plan"
    first, last = stage.regions[0], stage.regions[-1]
    return first if first == last else f"{first} to {last}"


def _arguments(event: Event) -> dict[str, Any]:
    shown = {"step": event.step, "half_batch": event.half_batch, "nbytes": event.nbytes}
    numbers = {"stage": event.stage, "transfer": event.transfer}
    return shown | {name: number for name, number in numbers.items() if number is not None}


def _arrow(event: Event) -> dict[str, Any]:
    """One end of a hop's arrow: where a record was sent, or the end of the wait for it."""
    arrow = {"name": "hop", "id": f"{event.step}.{event.transfer}"}
    if event.kind == "send":
        return {**arrow, "ph": "s", "ts": event.begin_us}
    end = event.begin_us + max(0.0, event.duration_us - 0.001)  # still inside the wait
    return {**arrow, "ph": "f", "bp": "e", "ts": round(end, 3)}
