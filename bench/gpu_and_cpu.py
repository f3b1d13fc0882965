"""Attention on a GPU, feed-forward on the CPU: how fast, and where the time goes.

    python bench/gpu_and_cpu.py [--quantization Q8_0] [--layers 8] [--threads N] [--runs 3]
                                [--folder /tmp] [--json FILE]

A model of 8B's shape with fewer layers and random weights. Devices are threads of one process.
Each placement is loaded once; they take turns, and each figure is the median of its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from random_model import SHAPES, write_random_model
from rich.console import Console
from rich.table import Table

from raygraft import LLM, SamplingParams

PROMPT = list(range(100, 228))
TOKENS = 64


def placements(threads: int) -> dict[str, dict[str, Any]]:
    """Devices and rules of each."""
    gpu = {"name": "gpu", "backend": "cuda", "threads": 1}
    cpu = {"name": "cpu", "threads": threads}
    return {
        "gpu": {"devices": [gpu]},
        "attention on gpu, ffn on cpu": {
            "devices": [gpu, cpu],
            "place": {"kind:ffn": "cpu"},
        },
        "cpu": {"devices": [cpu]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on a GPU, feed-forward on the CPU.")
    parser.add_argument("--quantization", default="Q8_0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.folder / "bench-gpu-and-cpu.gguf"
    shape = replace(SHAPES["8b"], layers=options.layers)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        write_random_model(path, options.quantization, shape, 4096, tied=False, repeat=True)
        with ExitStack() as stack:
            models = {
                name: stack.enter_context(
                    LLM(path, runtime="in-process", ctx_size=1024, max_sequences=1, **own)
                )
                for name, own in placements(options.threads).items()
            }
            for llm in models.values():
                decode_tps(llm)
            for _ in range(options.runs):
                for name, llm in models.items():
                    turn = {"tokens/s": decode_tps(llm)} | asdict(llm.timings())
                    found.setdefault(name, []).append(turn)
    finally:
        path.unlink(missing_ok=True)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def decode_tps(llm: LLM) -> float:
    """Tokens after the first one, per second."""
    return TOKENS / (seconds(llm, TOKENS + 1) - seconds(llm, 1))


def seconds(llm: LLM, tokens: int) -> float:
    """How long an answer of so many tokens takes."""
    began = time.perf_counter()
    llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return time.perf_counter() - began


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each placement."""
    table = Table("", "tokens/s", "hops a token", "us a hop", "busy")
    for name, turns in found.items():
        last = turns[-1]
        table.add_row(
            name,
            f"{statistics.median(turn['tokens/s'] for turn in turns):.1f}",
            str(last["hops_per_token"]),
            f"{last['hop_us']:.0f}",
            ", ".join(f"{device} {share:.0%}" for device, share in last["device_busy"].items()),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
