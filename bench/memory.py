"""How much memory a device takes for its regions, above an empty actor with the same imports.

    python bench/memory.py [-m FILE] [--ctx-size 512] [--json FILE]

Uncut and cut, the model is loaded once to fill the caches of compiled kernels and packed weights,
then again; a prompt fills the KV cache. Each device's process is compared with a device of the same
fleet that was given nothing: what it has more, less the KV cache, over the bytes that its regions'
weights have in the file. PSS counts a page that several processes share in parts (Linux); RSS
counts it in each.
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


def memory_of(llm: LLM) -> dict[str, dict[str, int]]:
    """Device -> its process's PSS and RSS in bytes."""
    actors: dict[str, Any] = llm.engine_thread.engine.fleet._actors  # type: ignore[attr-defined]
    calls = {
        name: actor.__ray_call__.remote(lambda _: os.getpid()) for name, actor in actors.items()
    }
    found = {}
    for name, call in calls.items():
        said = psutil.Process(ray.get(call)).memory_full_info()
        found[name] = {"rss": said.rss, "pss": getattr(said, "pss", said.rss)}
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
            row = {"cut": cut, "device": use.device, "in_file": in_file, "cache": use.cache}
            for kind, nbytes in memory[use.device].items():
                more = nbytes - memory[EMPTY][kind]
                row |= {kind: nbytes, f"empty_{kind}": memory[EMPTY][kind]}
                row[f"{kind}_ratio"] = (more - use.cache) / in_file
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
            f"{row['pss_ratio']:.2f}",
            f"{row['rss_ratio']:.2f}",
            *[f"{row[key] / mib:.1f}" for key in ("in_file", "cache", "pss", "empty_pss")],
        ]
        for row in rows
    ]
    head = ["device", "by PSS", "by RSS", "in the file, MiB", "cache", "PSS", "empty actor's PSS"]
    print_table(f"Memory above an empty actor, to bytes in the file, {model.name}", head, cells)
    write_json(options.json, {"circumstances": found, "memory": rows})


if __name__ == "__main__":
    main()
