"""How much memory a device takes for its regions, above an empty actor with the same imports.

    python bench/memory.py [-m FILE] [--ctx-size 512] [--json FILE]

Uncut and cut, the model is loaded once to fill the caches of compiled kernels and packed weights,
then again; a prompt fills the KV cache. Each device's process is compared with a device of the same
fleet that was given nothing, whose backend is imported as well: what it has more, less the KV
cache, over the bytes that its regions' weights have in the file.

Pages of the model's files and of packed weights count in full, though other processes may map them
too: who else runs must not make a device look smaller. All others count by their PSS, in parts
where several processes share them: those of libraries, which belong to nobody, and rings with two
ends. By RSS everything counts in full. Linux only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft.actors.part import part_of
from raygraft.actors.request import SamplingParams
from raygraft.demo_model import demo_model_path
from raygraft.llm import LLM

EMPTY = "empty"
CUTS: Mapping[str, Mapping[str, str]] = {
    "uncut": {"model": "a"},
    "cut": {"model": "a", "kind:ffn": "b"},
}


KINDS = ("weights", "libraries", "own")


def memory_of(llm: LLM) -> dict[str, dict[str, int]]:
    """Device -> its process's memory in bytes: by kind, and its RSS."""
    actors: dict[str, Any] = llm.engine_thread.engine.fleet._actors  # type: ignore[attr-defined]
    calls = {
        name: actor.__ray_call__.remote(lambda _: os.getpid()) for name, actor in actors.items()
    }
    found = {}
    for name, call in calls.items():
        counted = dict.fromkeys((*KINDS, "rss"), 0)
        for mapping in psutil.Process(ray.get(call)).memory_maps():
            counted["rss"] += mapping.rss
            if mapping.path.endswith((".arrow", ".gguf")):
                counted["weights"] += mapping.rss
            else:
                ours = mapping.path.startswith(("[", "/dev/shm"))
                counted["own" if ours else "libraries"] += mapping.pss
        found[name] = counted
    return found


def load(model: Path, place: Mapping[str, str], context: int) -> LLM:
    names = [*dict.fromkeys(place.values()), EMPTY]
    return LLM(
        model,
        devices=[f"{name}:threads=1" for name in names],
        place=place,
        ctx_size=context,
        max_sequences=1,
        progress=say,
    )


def rows_of(model: Path, cut: str, context: int) -> list[dict[str, Any]]:
    """One row for each device of a cut."""
    with load(model, CUTS[cut], context) as llm:
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate([1] * (context - 1), params)  # every page of the cache is written
        memory = memory_of(llm)
        rows = []
        for use in llm.plan.devices:
            if use.device == EMPTY:
                continue
            tensors = part_of(llm.plan, llm.graph, use.device).tensors.values()
            in_file = sum(tensor.nbytes for tensor in tensors)
            own, empty = memory[use.device], memory[EMPTY]
            more = {kind: own[kind] - empty[kind] for kind in own}
            more["own"] -= use.cache
            row = {"cut": cut, "device": use.device, "in_file": in_file, "cache": use.cache}
            row |= {f"more_{kind}": nbytes for kind, nbytes in more.items()}
            row |= {f"empty_{kind}": nbytes for kind, nbytes in empty.items()}
            row["ratio"] = sum(more[kind] for kind in KINDS) / in_file
            row["rss_ratio"] = (more["rss"] - use.cache) / in_file
            rows.append(row)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = options.model or demo_model_path(say)
    found = circumstances()
    print_circumstances(found)
    rows = []
    for cut, place in CUTS.items():
        load(model, place, options.ctx_size).close()
        rows += rows_of(model, cut, options.ctx_size)
    mib = 2**20
    cells = [
        [
            f"{row['cut']}, {row['device']}",
            f"{row['ratio']:.2f}",
            f"{row['rss_ratio']:.2f}",
            *[f"{row[key] / mib:.1f}" for key in ("in_file", "cache")],
            *[f"{row[f'more_{kind}'] / mib:.1f}" for kind in KINDS],
        ]
        for row in rows
    ]
    head = ["device", "ratio", "by RSS", "in the file, MiB", "cache", *KINDS]
    print_table(f"Memory above an empty actor, to bytes in the file, {model.name}", head, cells)
    write_json(options.json, {"circumstances": found, "memory": rows})


if __name__ == "__main__":
    main()
