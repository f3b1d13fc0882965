"""What the benches print: where and how they ran, medians, Markdown tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from raygraft.kernels.host import processor_name


def circumstances(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The command, the machine, and how busy it was with other things at the start."""
    versions = {}
    for package in ("raygraft", "ray", "numba", "numpy", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def print_circumstances(found: dict[str, Any]) -> None:
    """As two lines above the tables."""
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    print(f"`{found['command']}`\n")
    print(
        f"{found['processor']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB, "
        f"load average {found['load_average']:.1f} at the start; {found['time']}, "
        f"Python {found['python']}, {versions}."
    )


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table, its columns as wide as they need to be; the first one to the left."""
    lines = [list(head), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]

    def line_of(cells: Sequence[str]) -> str:
        first = f"{cells[0]:<{widths[0]}}"
        rest = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    print(f"\n### {title}\n")
    print(line_of(lines[0]))
    print(line_of(["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]))
    for line in lines[1:]:
        print(line_of(line), flush=True)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Write a document where the user wants one."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
