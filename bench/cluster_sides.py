"""A loaded model, or as many empty actors: processes for the benches of start and idleness.

    python bench/cluster_sides.py loaded|empty DEVICES MODEL

Prints "ready" when the first token is there, or the empty actors have answered; then it waits until
its standard input is closed. Both start Ray in the same way.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACES = ({}, {"kind:attention": "d0", "kind:ffn": "d1"})
"""Rules for one device, and for two."""


@contextmanager
def started(role: str, devices: int, model: Path) -> Iterator[subprocess.Popen[str]]:
    """One of them, once it is ready."""
    command = [sys.executable, __file__, role, str(devices), str(model)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"the side {role!r} did not start; see above")
        yield process
    finally:
        process.stdin.close()
        process.wait(60)


def _load(devices: int, model: str) -> None:
    from raygraft import LLM, SamplingParams  # noqa: PLC0415  # imports count

    names = [f"d{number}" for number in range(devices)]
    with LLM(model, devices=[f"{n}:threads=1" for n in names], place=PLACES[devices - 1]) as llm:
        stream = llm.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=2))
        next(stream)
        _wait()
        stream.close()


def _start_empty(devices: int) -> None:
    import ray  # noqa: PLC0415

    from raygraft.actors import cluster  # noqa: PLC0415

    class Empty:
        def ping(self) -> None:
            pass

    cluster.connect(None)
    actors = [ray.remote(num_cpus=0)(Empty).remote() for _ in range(devices)]
    ray.get([actor.ping.remote() for actor in actors])
    _wait()
    ray.shutdown()


def _wait() -> None:
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "loaded":
        _load(int(sys.argv[2]), sys.argv[3])
    else:
        _start_empty(int(sys.argv[2]))
