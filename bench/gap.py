"""What a long prompt does to those who are reading: the longest gap between two of their tokens.

    python bench/gap.py [-m FILE] [--prompt 2000] [--pairs 5] [--cut] [--json FILE]

Four requests decode. In every second round a long prompt arrives among them, in the others nothing
does; of each round the longest gap between two tokens of any of the four is taken. A prompt goes
through the devices in chunks, whose times are those of the same run. `--cut` puts feed-forward on a
device of its own; otherwise one device has all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft import LLM, SamplingParams
from raygraft.demo_model import demo_model_path

READERS = 4
TOKENS = 150
ARRIVES_AFTER = 0.1
"""Share of a reader's tokens after which the prompt arrives."""


class Reader:
    """A request that decodes, and when its tokens came."""

    def __init__(self, llm: LLM, number: int, tokens: int) -> None:
        self.times: list[float] = []
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        prompt = [100 + number, 7, 8, 9]
        self.answer = llm.submit(prompt, params, notify=self._note)

    def _note(self) -> None:
        self.times.append(time.perf_counter())

    def longest_gap(self) -> float:
        """In seconds, without the wait for the first token."""
        self.answer.wait()
        times = self.times[:-1]  # the last one says that the answer has ended
        return max(after - before for before, after in pairwise(times))


def one_round(llm: LLM, prompt: list[int] | None, tokens: int) -> dict[str, Any]:
    """The readers' longest gap, and the times of the prompt's chunks when there is one."""
    steps = llm.engine_thread.engine.timings.latest_steps
    readers = [Reader(llm, number, tokens) for number in range(READERS)]
    while min(len(reader.times) for reader in readers) < tokens * ARRIVES_AFTER:
        time.sleep(0.001)
    steps.clear()
    if prompt is not None:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    gap = max(reader.longest_gap() for reader in readers)
    most = max(rows for rows, _ in steps)
    chunks = [seconds for rows, seconds in steps if prompt is not None and rows > most / 2]
    return {"gap": gap, "chunks": chunks}


def run(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """All rounds, with and without the prompt in turns."""
    devices = {"devices": ["a:threads=1", "b:threads=1"], "place": {"*": "a", "kind:ffn": "b"}}
    with LLM(
        model, ctx_size=options.prompt + 256, max_sequences=8, **(devices if options.cut else {})
    ) as llm:
        llm._metrics.close()  # type: ignore[union-attr]  # it takes the steps' times
        one_round(llm, [5] * 300, options.tokens)  # code is compiled, memory is touched
        rounds = []
        for pair in range(options.pairs):
            say(f"pair {pair + 1}")
            prompt = [1000 + 31 * pair + n % 4000 for n in range(options.prompt)]
            found = {}
            for kind in ("without", "with")[:: 1 if pair % 2 else -1]:
                found[kind] = one_round(llm, prompt if kind == "with" else None, options.tokens)
            rounds.append(found)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cut", action="store_true", help="feed-forward on another device")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = options.model or demo_model_path(say)
    found = circumstances()
    rounds = run(options, model)
    print_circumstances(found)
    rows = []
    for number, both in enumerate(rounds):
        chunk = statistics.median(both["with"]["chunks"])
        without, with_prompt = both["without"]["gap"], both["with"]["gap"]
        longer = (with_prompt - without) / chunk
        rows.append({"pair": number + 1, "without": without, "with": with_prompt, "chunk": chunk,
                     "chunks": len(both["with"]["chunks"]), "longer": longer})  # fmt: skip
    cells = [
        [row["pair"], *(f"{1000 * row[key]:.0f}" for key in ("without", "with", "chunk")),
         row["chunks"], f"{row['longer']:.2f}"]
        for row in rows
    ]  # fmt: skip
    head = ["pair", "longest gap without, ms", "with the prompt", "a chunk, median", "chunks",
            "longer by, chunks"]  # fmt: skip
    print_table(f"{READERS} readers and a prompt of {options.prompt} tokens", head, cells)
    print(f"\nmedian: longer by {statistics.median(row['longer'] for row in rows):.2f} chunks")
    write_json(options.json, {"circumstances": found, "rounds": rows})


if __name__ == "__main__":
    main()
