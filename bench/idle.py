"""What a loaded model that nobody asks anything costs in CPU time, against empty actors.

    python bench/idle.py [-m FILE] [--devices 2] [--seconds 20] [--windows 3] [--json FILE]

Two local Rays run side by side: one with a loaded model that has answered, one with as many empty
actors. In the same windows, the CPU time of each with all its processes (the driver, Ray's own, the
actors) is taken as percents of one core.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from pathlib import Path

import psutil
from cluster_sides import started
from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft.demo_model import demo_model_path

SETTLE_S = 10.0
"""Ray goes on starting things for a while."""


def cpu_times(root: subprocess.Popen[str]) -> dict[int, float]:
    """Process id -> seconds of CPU so far, of a process and all below it."""
    process = psutil.Process(root.pid)
    found = {}
    for each in (process, *process.children(recursive=True)):
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[each.pid] = times.user + times.system
    return found


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """Seconds of CPU between two looks; of a process that ended, nothing is known."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--devices", type=int, choices=(1, 2), default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = options.model or demo_model_path(say)
    found = circumstances()
    print_circumstances(found)
    percents: dict[str, list[float]] = {"loaded": [], "empty": []}
    with (
        started("loaded", options.devices, model) as loaded,
        started("empty", options.devices, model) as empty,
    ):
        sides = {"loaded": loaded, "empty": empty}
        time.sleep(SETTLE_S)
        for window in range(options.windows):
            say(f"window {window + 1} of {options.windows}")
            before = {name: cpu_times(side) for name, side in sides.items()}
            began = time.perf_counter()
            time.sleep(options.seconds)
            passed = time.perf_counter() - began
            for name, side in sides.items():
                percents[name].append(100 * spent(before[name], cpu_times(side)) / passed)
    more = [a - b for a, b in zip(percents["loaded"], percents["empty"], strict=True)]
    medians = {name: statistics.median(values) for name, values in percents.items()}
    cells = [[options.devices, *[f"{v:.2f}" for v in (statistics.median(more), *medians.values())]]]
    head = ["devices", "more than empty actors", "loaded", "empty"]
    print_table("CPU time while idle, % of one core", head, cells)
    row = {"devices": options.devices, "more": statistics.median(more), "percents": percents}
    write_json(options.json, {"circumstances": found, "idle": row})


if __name__ == "__main__":
    main()
