"""How long answers pause while regions move to another device.

    python bench/moves.py [-m FILE] [--moves 20] [--requests 4] [--blocks 6] [--json FILE]

Two devices of one thread each; attention on one, feed-forward on the other. While requests are
answered, the attention of the first blocks moves to the other device and back, with what its cache
holds. The pause is the time between the last result of the old plan and the first header of the
new one; a part of it is the copying of the cache. It stands beside the time of a step, the median
of those before the move. Every answer must be the one that was given without moves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft import LLM, SamplingParams
from raygraft.demo_model import demo_model_path

DEVICES = ["a:threads=1", "b:threads=1"]
PLACE = {"*": "a", "kind:ffn": "b"}
REST_SECONDS = 0.7
STEPS = 20


def run(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """A row for each move."""
    steps: deque[float] = deque(maxlen=STEPS)
    prompts = [[100 * number + 5] * 40 for number in range(1, options.requests + 1)]
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    rows: list[dict[str, Any]] = []
    with LLM(model, devices=DEVICES, place=PLACE, ctx_size=2048, progress=say) as llm:
        expected = [done.token_ids for done in llm.generate(prompts, params)]
        while len(rows) < options.moves:
            answers = [llm.submit(prompt, params) for prompt in prompts]
            time.sleep(2 * REST_SECONDS)
            while len(rows) < options.moves and not any(a.request.finish_reason for a in answers):
                rows.append(_move(llm, options.blocks, "ab"[1 - len(rows) % 2], steps))
                time.sleep(REST_SECONDS)
            if [answer.wait().token_ids for answer in answers] != expected:
                raise SystemExit("an answer is not the one that was given without moves")
    return rows


def _move(llm: LLM, blocks: int, device: str, steps: deque[float]) -> dict[str, Any]:
    """`steps` are those that were seen last: what metrics have counted is told to nobody else."""
    engine = llm.engine_thread.engine  # type: ignore[union-attr]
    steps.extend(seconds for _, seconds in [*engine.timings.latest_steps])
    while not steps:
        time.sleep(0.01)
        steps.extend(seconds for _, seconds in [*engine.timings.latest_steps])
    step = statistics.median(steps)
    move = llm.move(f"blk.[0-{blocks - 1}].attn", device)
    cached = sum(sequence.computed for sequence in [*engine.scheduler.running])
    return {
        "step": step,
        "pause": move.pause_seconds,
        "copy": move.copy_seconds,
        "MB": move.copied_bytes / 1e6,
        "load": move.load_seconds,
        "cached tokens": cached,
        "computed again": move.recomputed_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How long answers pause while regions move.")
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = circumstances()
    rows = run(options, options.model or demo_model_path(say))
    print_circumstances(found)
    cells = []
    for name in ("step", "pause", "copy", "load"):
        own = [1000 * row[name] for row in rows]
        cells.append([name, f"{statistics.median(own):.0f}", f"{min(own):.0f}", f"{max(own):.0f}"])
    print_table("Milliseconds", ["", "median", "least", "most"], cells)
    megabytes = statistics.median(row["MB"] for row in rows)
    steps = [(row["pause"] - row["copy"]) / row["step"] for row in rows]
    print(
        f"\nThe pause without the copy is {statistics.median(steps):.1f} steps in the median, "
        f"{max(steps):.1f} at most; {megabytes:.0f} MB were copied in the median. "
        f"{rows[-1]['cached tokens']} tokens were in the caches at the end, "
        f"{sum(row['computed again'] for row in rows)} computed again."
    )
    write_json(options.json, {"circumstances": found, "moves": rows})


if __name__ == "__main__":
    main()
