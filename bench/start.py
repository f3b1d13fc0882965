"""From the command to the first token, against Ray and as many empty actors.

    python bench/start.py [-m FILE] [--devices 1 2] [--pairs 5] [--json FILE]

Each time is that of a new process, from its start on: one that loads the model and generates a
token, and one that starts Ray in the same way with as many actors that do nothing. They take turns;
a first start of ours, which fills the caches of compiled kernels and packed weights, is not
counted. Two devices have attention on one and feed-forward on the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from cluster_sides import started
from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft.demo_model import demo_model_path


def seconds_to_ready(role: str, devices: int, model: Path) -> float:
    """Of a new process."""
    began = time.perf_counter()
    with started(role, devices, model):
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--devices", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = options.model or demo_model_path(say)
    found = circumstances()
    print_circumstances(found)
    rows = []
    for devices in options.devices:
        say(f"{devices} devices, warming up")
        seconds_to_ready("loaded", devices, model)
        times: dict[str, list[float]] = {"loaded": [], "empty": []}
        for pair in range(options.pairs):
            say(f"{devices} devices, pair {pair + 1}")
            for role in sorted(times, reverse=pair % 2 == 1):
                times[role].append(seconds_to_ready(role, devices, model))
        more = [a - b for a, b in zip(times["loaded"], times["empty"], strict=True)]
        rows.append({"devices": devices, "more_s": statistics.median(more), "seconds": times})
    cells = [
        [
            row["devices"],
            f"{row['more_s']:.2f}",
            *[f"{statistics.median(row['seconds'][role]):.2f}" for role in ("loaded", "empty")],
        ]
        for row in rows
    ]
    head = ["devices", "more than empty actors, s", "to the first token, s", "Ray and actors, s"]
    print_table(f"Start, {model.name}", head, cells)
    write_json(options.json, {"circumstances": found, "start": rows})


if __name__ == "__main__":
    main()
