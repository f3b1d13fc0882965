"""Attention on one GPU, feed-forward on another: what a cut leaves of the speed.

    python bench/two_gpus.py [--quantization Q8_0] [--layers 32] [--runs 5] [--folder /tmp]
                             [--only PLACEMENT ...] [--json FILE]

A model of 8B's shape and random weights. Every device is a Ray actor on a GPU of its own. Each
placement is loaded once; they take turns, and each figure is the median of its turns.

- unsplit: all of the model on the first GPU.
- cut, devices signal: records are written to the other GPU's memory, where its graph waits.
- cut, one actor: both devices are on the first GPU and share an actor, as they do by default.
- cut, two actors on one GPU: each has a process, and the GPU gives them turns.
- cut, through the host: the same, in memory of the host, as if the GPUs could not reach each other.
- cut, over NCCL: as between machines; with NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 over sockets.
- cut, sealed sockets: what machines use where there is no NCCL.
- cut, host signals: each record goes through the ring of two processes.
- decode: one token of each of 1 or 16 sequences, greedy; prompt: 512 tokens in one step, each
  time others, to the first token.

The answers to a single request must be equal. Those of 16 are not held against each other: which
of them share a step varies with the time of their arrival, and a GPU's sums with the rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from random_model import SHAPES, write_random_model
from reporting import median_ratio, print_table, say, write_json

from raygraft import LLM, SamplingParams
from raygraft.placement import costs

PROMPT, TOKENS = 512, 96
ONE = ["a:backend=cuda,gpu=0"]
TWO = [*ONE, "b:backend=cuda,gpu=1"]
APART = ["a:backend=cuda,gpu=0,actor=a", "b:backend=cuda,gpu=0,actor=b"]
CUT = {"*": "a", "kind:ffn": "b"}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "unsplit": {"devices": ONE},
    "cut, one actor": {"devices": [*ONE, "b:backend=cuda,gpu=0"], "place": CUT},
    "cut, two actors on one GPU": {"devices": APART, "place": CUT},
    "cut, devices signal": {"devices": TWO, "place": CUT},
    "cut, through the host": {"devices": TWO, "place": CUT},
    "cut, over NCCL": {"devices": TWO, "place": CUT},
    "cut, sealed sockets": {"devices": TWO, "place": CUT},
    "cut, host signals": {"devices": TWO, "place": CUT},
}
LINKS = {
    "cut, through the host": costs.PINNED,
    "cut, over NCCL": costs.NCCL,
    "cut, sealed sockets": "tcp",
    "cut, host signals": "ring",
}
LIMITS = {"ctx_size": 1024, "max_sequences": 16, "max_rows": PROMPT, "cache_type": "f16"}


def load(path: Path, name: str) -> LLM:
    """An engine for one of the placements."""
    between, link = costs.link_between, LINKS.get(name, costs.DIRECT)

    def chosen(*ends: Any) -> str:
        return between(*ends).replace(costs.DIRECT, link)

    with patch.object(costs, "link_between", chosen):
        return LLM(path, **PLACEMENTS[name], **LIMITS, progress=say)


class Clock:
    """Times engines, and holds their answers against each other."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._answers: dict[object, list[int]] = {}
        self.different: list[str] = []
        """Answers that were not those of the placement before."""

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._draw.randrange(1000, 120000) for _ in range(length)] for _ in range(count)]

    def seconds(self, llm: LLM, prompts: Sequence[list[int]], tokens: int) -> float:
        """How long all answers of so many tokens take."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        done = llm.generate(prompts, params)
        taken = time.perf_counter() - began
        if len(prompts) == 1:
            found = done[0].token_ids
            if self._answers.setdefault((str(prompts), tokens), found) != found:
                self.different.append(f"{tokens} tokens to a prompt of {len(prompts[0])}")
        return taken

    def turn(self, engines: dict[str, LLM]) -> dict[str, dict[str, float]]:
        """Tokens per second of each, on the same prompts."""
        short = {count: self._prompts(count, 32) for count in (1, 16)}
        long = self._prompts(1, PROMPT)
        found: dict[str, dict[str, float]] = {}
        for name, llm in engines.items():
            own = found[name] = {}
            own[f"prompt {PROMPT}"] = PROMPT / self.seconds(llm, long, 1)
            for count, prompts in short.items():
                first = self.seconds(llm, prompts, 2)
                rest = self.seconds(llm, prompts, TOKENS + 2) - first
                own[f"decode {count}"] = count * TOKENS / rest
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="One model on one GPU, and cut over two.")
    parser.add_argument("--quantization", default="Q8_0")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[*PLACEMENTS], help="placements, by name")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.folder / "bench-two-gpus.gguf"
    shape = replace(SHAPES["8b"], layers=options.layers)
    clock, turns = Clock(), []
    names = dict.fromkeys(("unsplit", *options.only))
    try:
        write_random_model(path, options.quantization, shape, 4096, tied=False, repeat=True)
        with ExitStack() as stack:
            engines = {name: stack.enter_context(load(path, name)) for name in names}
            clock.turn(engines)
            turns = [clock.turn(engines) for _ in range(options.runs)]
            links = {n: sorted({t.link for t in e.plan.transfers}) for n, e in engines.items()}
    finally:
        path.unlink(missing_ok=True)
    show(turns, links)
    write_json(options.json, {"turns": turns, "links": links})
    if clock.different:
        raise SystemExit(f"answers of two placements differ: {', '.join(clock.different)}")


def show(turns: Sequence[dict[str, dict[str, float]]], links: dict[str, list[str]]) -> None:
    """A row for each placement."""
    figures = [*turns[0]["unsplit"]]
    rows = []
    for name, kinds in links.items():
        cells = [name, ", ".join(kinds)]
        for figure in figures:
            own = [turn[name][figure] for turn in turns]
            share = median_ratio(own, [turn["unsplit"][figure] for turn in turns])
            cells.append(f"{statistics.median(own):.1f} ({share:.0%})")
        rows.append(cells)
    title = "Tokens a second, and the share of the unsplit model's"
    print_table(title, ["placement", "links", *figures], rows)


if __name__ == "__main__":
    main()
