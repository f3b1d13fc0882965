"""Hours in minutes: what an engine holds when everything happens to it, again and again.

    python bench/soak.py [-m FILE] [--minutes 30] [--seed 0] [--json FILE]

Six clients send requests of all kinds to one engine on three devices, and cancel some of them.
Meanwhile regions move, a device is drained and added again, and device processes are killed, all of
them but the first, whose process lives from the beginning to the end. Every lap of such actions
ends in the plan of the beginning; there the memory, the open files and the threads of the engine's
process and of each device are counted, the files in /dev/shm, and the objects in Ray's store.

It fails when the last third of the laps has more than both others, beyond what the measure
itself varies by, when a request fails, or when something is left at the end.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from clients import Clients
from leftovers import processes, settled, stored_objects
from ray.exceptions import RayError
from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft import LLM, SamplingParams
from raygraft.demo_model import demo_model_path
from raygraft.graph.errors import RaygraftError, RunError
from raygraft.model import Model

CLIENTS = 6
ACTIONS = {"move": 0.5, "kill": 0.15, "drain": 0.2, "wait": 0.15}
LAP_ACTIONS = 6
WARM_LAPS = 3
LASTING = "a"
"""The device whose process is left alone."""
SPECS = {name: f"{name}:threads=1" for name in "abc"}
PLACE = {"*": "a", "kind:ffn": "b", "head": "c"}
MEMORY_GROWTH = 0.02
MEMORY_BYTES = {"files": 8 << 20}
"""From the earlier thirds to the last: what allocators vary by, and what mapped weights do, which
count for a process by how many others map them as well."""
COUNT_GROWTH = 3
"""Open files, threads, objects, files of shared memory."""
MEMORY = ("RSS", "its own", "files", "Ray's store")
RAYS = ("Ray's store", "sockets of the dead")
"""What grows by Ray's ways, within bounds. A page of its store that a process has touched stays
with the process, up to the store's size; what the store holds is counted apart."""


class Requests:
    """Requests of all kinds, some of them cancelled, and what became of them."""

    def __init__(self, llm: LLM, model: Model) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._llm = llm
        self._vocabulary = model.graph.dimensions.vocabulary

    def ask(self, _: int, draw: random.Random) -> None:
        """One request, and a short rest."""
        prompt = [draw.randrange(3, self._vocabulary) for _ in range(draw.randint(1, 120))]
        params = SamplingParams(
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.randrange(1000),
            presence_penalty=draw.choice([0.0, 0.5]),
            logprobs=draw.choice([None, 5]),
            max_tokens=draw.randint(1, 60),
            max_seconds=draw.choice([None, None, None, 2.0]),
            ignore_eos=True,
        )
        leaves_after = draw.choice([None, None, 0, draw.randint(1, 60)])
        try:
            answer = self._llm.submit(prompt, params)
            tokens = 0
            if leaves_after == 0:
                answer.cancel()
            for chunk in answer:
                tokens += len(chunk.token_ids)
                if tokens == leaves_after:
                    answer.cancel()
            done = answer.completion()
        except RaygraftError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return
        self.counts[str(done.finish_reason)] += 1
        if done.finish_reason == "length" and tokens != params.max_tokens:
            self.errors.append(f"{tokens} tokens instead of {params.max_tokens}")
        time.sleep(0.1 * draw.random())


class Soak:
    """One engine, what is done to it, and what it holds."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.actions: Counter[str] = Counter()
        self.laps: list[dict[str, dict[str, int]]] = []
        """What was counted, by whose it is and what it is."""
        self._llm = llm
        self._draw = random.Random(seed)
        self._blocks = llm.model.graph.dimensions.blocks
        self._there = [*SPECS]
        self._tokens = 0

    @property
    def _actors(self) -> Mapping[str, Any]:
        actors: Mapping[str, Any] = self._llm._fleet._actors  # type: ignore[attr-defined]
        return actors

    def lap(self) -> None:
        """Some actions, then back to where it began, and count."""
        for _ in range(LAP_ACTIONS):
            time.sleep(self._draw.random())
            action = self._draw.choices([*ACTIONS], [*ACTIONS.values()])[0]
            self.actions[action] += 1
            if action != "wait":
                getattr(self, f"_{action}")()
        if "c" not in self._there:
            self._add()
        for selector, device in PLACE.items():
            if selector != "*":
                self._change(lambda s=selector, d=device: self._llm.move(s, d))
        time.sleep(1)
        gc.collect()
        self.laps.append(self.count())

    def count(self) -> dict[str, dict[str, int]]:
        """What is held at this moment."""
        own = {"engine": psutil.Process()}
        for name, actor in self._actors.items():
            own[f"device {name}"] = psutil.Process(ray.get(actor.pid.remote()))
        found = {}
        for name, process in own.items():
            found[name] = {
                **memory_of(process),
                "threads": process.num_threads(),
                **open_files(process),
            }
        found["node"] = {"files in /dev/shm": len(shared()), "Ray objects": stored_objects()}
        return found

    def _move(self) -> None:
        first = self._draw.randrange(self._blocks)
        last = self._draw.randrange(first, self._blocks)
        kind = self._draw.choice(["attn", "ffn"])
        device = self._draw.choice(self._there)
        self._change(lambda: self._llm.move(f"blk.[{first}-{last}].{kind}", device))

    def _kill(self) -> None:
        """Kill a device, once there was a token since the last time: else the engine gives up."""
        thread = self._llm.engine_thread
        before, self._tokens = self._tokens, thread.engine.timings.generated_tokens  # type: ignore[union-attr]
        if before == self._tokens:
            return
        name = self._draw.choice([name for name in self._there if name != LASTING])
        actor = self._actors.get(name)
        ready = ray.wait([actor.pid.remote()], timeout=5)[0] if actor is not None else ()
        for pid in ready:
            with suppress(RayError, psutil.NoSuchProcess):  # killed before, and not replaced yet
                psutil.Process(ray.get(pid)).kill()

    def _drain(self) -> None:
        if "c" not in self._there:
            self._add()
        elif self._change(lambda: self._llm.drain("c")):
            self._there.remove("c")

    def _add(self) -> None:
        if self._change(lambda: self._llm.add(SPECS["c"])):
            self._there.append("c")

    def _change(self, change: Any) -> bool:
        """Whether it was done; it is asked for again when a device is lost meanwhile."""
        for _ in range(5):
            try:
                change()
            except RunError:
                self.actions["change cut short by a loss"] += 1
                time.sleep(0.5)
            else:
                return True
        return False


def shared() -> set[str]:
    """Files of shared memory."""
    return {str(path) for path in Path("/dev/shm").glob("*")}


def memory_of(process: psutil.Process) -> dict[str, int]:
    """Resident bytes by their kinds, those that are shared in parts (Linux)."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return {"RSS": process.memory_info().rss}
    lines = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:])
    kinds = {"its own": "Pss_Anon", "files": "Pss_File", "Ray's store": "Pss_Shmem"}
    return {name: 1024 * int(lines[kind].split()[0]) for name, kind in kinds.items()}


def open_files(process: psutil.Process) -> dict[str, int]:
    """Open files, and apart from them sockets that are connected to nothing (Linux).

    Ray keeps such a socket for each process that has ended and had an object that others used.
    """
    folder = Path(f"/proc/{process.pid}")
    if not folder.is_dir():
        return {"open files": process.num_fds()}
    names = []
    for entry in (folder / "fd").iterdir():
        with suppress(OSError):
            names.append(str(entry.readlink()))
    tables = [folder / "net" / kind for kind in ("tcp", "tcp6", "udp", "unix", "netlink")]
    known = {word for table in tables if table.exists() for word in table.read_text().split()}
    sockets = [name[len("socket:[") : -1] for name in names if name.startswith("socket:[")]
    dead = sum(inode not in known for inode in sockets)
    return {"open files": len(names) - dead, "sockets of the dead": dead}


def rows_of(laps: Sequence[dict[str, dict[str, int]]]) -> list[dict[str, Any]]:
    """For all that is counted: the medians of thirds, growth by the hour, whether it is flat."""
    third = max(1, len(laps) // 3)
    rows = []
    for owner, kinds in laps[0].items():
        for kind in kinds:
            series = [lap[owner][kind] for lap in laps if owner in lap]
            first, last = statistics.median(series[:third]), statistics.median(series[-third:])
            middle = statistics.median(series[third : -third or None] or series)
            memory = kind in MEMORY
            least = MEMORY_BYTES.get(kind, 4 << 20)
            room = max(MEMORY_GROWTH * middle, least) if memory else COUNT_GROWTH
            slope = statistics.linear_regression(range(len(series)), series).slope
            flat = last - max(first, middle) <= room or kind in RAYS
            rows.append(
                {"of": owner, "what": kind, "first": first, "middle": middle, "last": last,
                 "a_lap": slope, "flat": flat}
            )  # fmt: skip
    return rows


def run(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """All of it."""
    before = shared()
    files = psutil.Process().num_fds()
    with LLM(
        model, devices=SPECS.values(), place=PLACE, max_sequences=4,
        ctx_size=min(model.graph.dimensions.context, 256),
    ) as llm:  # fmt: skip
        requests, soak = Requests(llm, model), Soak(llm, options.seed)
        clients = Clients(CLIENTS, requests.ask, options.seed)
        began = said = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes or len(soak.laps) < WARM_LAPS + 3:
            soak.lap()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"lap {len(soak.laps)}, {dict(soak.actions)}, {dict(requests.counts)}")
        seconds = time.monotonic() - began
        requests.errors += clients.stop()
        recoveries = llm.engine_thread.recovery.count  # type: ignore[union-attr]
    left = {
        "processes": settled(processes, []),
        "files in /dev/shm": sorted(settled(lambda: shared() - before, set())),
    }
    return {
        "seconds": seconds,
        "laps": len(soak.laps),
        "actions": dict(soak.actions),
        "recoveries": recoveries,
        "answers": dict(requests.counts),
        "errors": requests.errors,
        "held": rows_of(soak.laps[WARM_LAPS:]),
        "open_files_more": psutil.Process().num_fds() - files,
        "left": left,
        "series": soak.laps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = circumstances()
    document = run(options, Model(options.model or demo_model_path(say)))
    print_circumstances(found)
    rows = []
    for row in document["held"]:
        unit = 2**20 if row["what"] in MEMORY else 1
        name = row["what"] + (", MiB" if unit > 1 else "")
        numbers = [f"{row[key] / unit:.1f}" for key in ("first", "middle", "last")]
        rows.append(
            [
                row["of"],
                name,
                *numbers,
                f"{row['a_lap'] / unit:+.2f}",
                "yes" if row["flat"] else "NO",
            ]
        )
    head = ["of", "what", "first third", "middle", "last third", "a lap", "flat"]
    print_table(f"What is held, medians over {document['laps']} laps", head, rows)
    print()
    for key in ("seconds", "actions", "recoveries", "answers", "open_files_more", "left"):
        print(f"{key}: {document[key]}")
    print(f"errors: {len(document['errors'])}")
    for line in document["errors"][:20]:
        print(f"  {line}")
    write_json(options.json, {"circumstances": found, **document})
    flat = all(row["flat"] for row in document["held"])
    raise SystemExit(not flat or bool(document["errors"]) or any(document["left"].values()))


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main()
