"""How fast a model runs on one GPU, whole and cut, beside llama.cpp and the copy bandwidth.

    python bench/gpu.py [--formats Q8_0 Q4_K_M F16] [--llama-bench PATH] [--batched-bench PATH]
                        [--runs 3] [--folder /tmp] [--json FILE]

The models have the shape of an 8B Llama and random weights; their files are made here and removed
again. Both sides take turns within one run; each figure is the median of its turns.

Ours is the engine, with devices in this process: headers, steps and tokens all
count. Of llama.cpp, which only computes, they do not.

- decode: one token of each of 1 or 16 sequences after a context of 512 tokens: what 64 more take.
- drawn: the same, with tokens drawn at temperature 0.8 and top-p 0.95, less likely ones too.
- prompt: 512 or 4096 tokens from nothing to the first token, in steps of at most --rows.
- cut, one actor: attention on one device and feed-forward on another, which share the GPU and an
  actor: 64 stages hand pointers on, and a token is one CUDA graph.
- copy: bytes read and written of a large device-to-device copy. A token of batch 1 reads all
  weights once; its share of the copy bandwidth is how near that is to the limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from random_model import SHAPES, write_random_model
from rich.console import Console
from rich.table import Table

from raygraft import LLM, SamplingParams
from raygraft.benchmark import Workload, time_workload
from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.step import Sampling, Step
from raygraft.kernels.base import BackendOptions
from raygraft.kernels.cuda.backend import CudaBackend
from raygraft.kernels.cuda.buffers import Counts
from raygraft.kernels.cuda.runner import CudaRunner

BLOCK_SIZE = 16
PAGES = 264  # of a sequence: room for the longest prompt
CONTEXT = 512


def greedy(rows: int) -> Sampling:
    """Parameters that take the best token of each row."""
    zeros, words = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    ints, none = np.zeros(rows, np.int32), np.zeros(0, np.int32)
    starts = np.zeros(rows + 1, np.int32)
    return Sampling(
        zeros, zeros + 1, zeros, zeros + 1, zeros, zeros, ints, ints, words, words, ints + 1,
        starts, none, starts, none, none.astype(np.float32),
    )  # fmt: skip


def step_at(position: int, sequences: int, rows: int = 1, *, last: bool = True) -> Step:
    """`rows` tokens of each sequence from a position on."""
    pages = -(-(position + rows) // BLOCK_SIZE)
    tables = np.arange(sequences * PAGES, dtype=np.int32).reshape(sequences, PAGES)[:, :pages]
    positions = np.tile(np.arange(position, position + rows, dtype=np.int32), sequences)
    owners = np.repeat(np.arange(sequences, dtype=np.int32), rows)
    wanted = np.arange(1, sequences + 1, dtype=np.int32) * rows - 1 if last else owners[:0]
    tokens = (positions * 31 + owners * 7) % 1000
    return Step(tokens, positions, owners, tables, wanted, greedy(len(wanted)))


class Whole:
    """The whole model on one device, without an engine, to time its launches."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        model = ModelFile.open(path)
        graph = build_graph(model)
        self.backend = CudaBackend(BackendOptions())
        subgraph = graph.subgraph([op.name for op in graph.operators])
        weights = MappedWeights(model.files, model.tensors)
        limits = Limits(arguments.rows, 8192, arguments.cache, 16)
        self.runner = self.backend.load(subgraph, weights, limits)
        self.runner.allocate_state(16 * PAGES, BLOCK_SIZE)

    def run(self, step: Step) -> None:
        self.runner.run(step, {})


PLACEMENTS: dict[str, dict[str, Any]] = {
    "unsplit": {"devices": ["a:backend=cuda"]},
    "cut, one actor": {
        "devices": ["a:backend=cuda", "b:backend=cuda"], "place": {"*": "a", "kind:ffn": "b"},
    },
}  # fmt: skip


def load(path: Path, name: str, arguments: argparse.Namespace) -> LLM:
    """An engine for one of the placements."""
    return LLM(
        path, **PLACEMENTS[name], runtime="in-process", ctx_size=BLOCK_SIZE * PAGES,
        max_sequences=16, max_rows=arguments.rows, cache_type=arguments.cache,
    )  # fmt: skip


def decode_tps(llm: LLM, batch: int, tokens: int = 64, **drawn: float) -> float:
    """Of answers that share no token with earlier ones; their prompts have been read before."""
    vocabulary = llm.graph.dimensions.vocabulary
    prompts = np.random.default_rng().integers(vocabulary, size=(batch, CONTEXT)).tolist()

    def taken(most: int) -> float:
        params = SamplingParams(**{"temperature": 0, **drawn}, max_tokens=most, ignore_eos=True)
        began = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - began

    taken(8)
    return batch * tokens / (taken(8 + tokens) - taken(8))


def prompt_tps(llm: LLM, length: int) -> float:
    workload = Workload(n_prompt=length, n_gen=0)
    return statistics.median(length / (time_workload(llm, workload) / 1e9) for _ in range(3))


def copy_bandwidth(cupy: Any) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    a = cupy.zeros(2**32, cupy.uint8)
    b = cupy.empty_like(a)
    a[:] = 1
    found = []
    for _ in range(12):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        b[:] = a
        stop.record()
        stop.synchronize()
        found.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
    return float(2 * a.nbytes / statistics.median(found[2:]))


def launch_seconds(whole: Whole, batch: int, kinds: dict[str, list[Any]]) -> dict[str, float]:
    """Microseconds of each kind of launch, a token's worth of them captured alone."""
    runner, shared = whole.runner, whole.backend.shared
    assert isinstance(runner, CudaRunner)
    (unit,), gpu = runner.units, shared.gpu
    launcher = unit.launcher
    program = launcher.program
    found = {}
    step = step_at(CONTEXT + 64, batch)
    whole.run(step)
    counts = Counts.of(step)
    with gpu.active():
        for name, order in kinds.items():
            launcher.program = replace(program, order=tuple(order))
            graph = runner.capture(lambda: launcher.launch(counts, {}))
            times = []
            for _ in range(12):
                start, stop = gpu.cupy.cuda.Event(), gpu.cupy.cuda.Event()
                start.record(gpu.stream)
                graph.launch(gpu.stream)
                stop.record(gpu.stream)
                stop.synchronize()
                times.append(gpu.cupy.cuda.get_elapsed_time(start, stop) * 1000)
            found[name] = statistics.median(times[2:])
            launcher.program = program
    return found


def kinds_of(whole: Whole) -> dict[str, list[Any]]:
    """The launches of a token by what they do."""
    assert isinstance(whole.runner, CudaRunner)
    found: dict[str, list[Any]] = {"all": list(whole.runner.units[0].launcher.program.order)}
    for one in found["all"]:
        name = type(one).__name__
        if name == "Single":
            name = one.operator.kind
        elif name == "Products":
            name = one.operators[0].name.rpartition(".")[2]
        found.setdefault(name, []).append(one)
    return found


def llama_bench(binary: str, model: Path, what: list[str], tests: int) -> list[float]:
    """Tokens per second of so many of llama-bench's tests, all layers on the GPU."""
    command = [binary, "-m", str(model), "-ngl", "99", "-r", "3", "-o", "json", "-fa", "1", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = [float(test["avg_ts"]) for test in json.loads(done.stdout)]
    except (json.JSONDecodeError, KeyError):
        found = []
    if len(found) != tests:
        print(done.stderr[-2000:], file=sys.stderr)
        return [float("nan")] * tests
    return found


def batched_bench(binary: str, model: Path, batch: int) -> float:
    """Aggregate tokens per second of llama-batched-bench's decode."""
    command = [
        binary, "-m", str(model), "-ngl", "99", "-c", str(batch * 640), "-npp", str(CONTEXT),
        "-ntg", "64", "-npl", str(batch), "-fa", "on", "--output-format", "jsonl",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return float(json.loads(line)["speed_tg"])
    print(done.stderr[-2000:], file=sys.stderr)
    return float("nan")


@contextmanager
def model_file(folder: Path, name: str, layers: int) -> Iterator[Path]:
    """A file of 8B's shape while it is needed; numbers repeat after some megabytes."""
    path = folder / f"bench-{name}.gguf"
    shape = replace(SHAPES["8b"], layers=layers)
    try:
        yield write_random_model(path, name, shape, 8192, tied=False, repeat=True)
    finally:
        path.unlink(missing_ok=True)


def their_turn(path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The same tests by llama.cpp, where its programs are given."""
    found = {}
    if binary := arguments.llama_bench:
        what = ["-p", "0", "-n", "64", "-d", str(CONTEXT)]
        (found["decode 1"],) = llama_bench(binary, path, what, 1)
        prompts = llama_bench(binary, path, ["-n", "0", "-p", "512,4096"], 2)
        found["prompt 512"], found["prompt 4096"] = prompts
    if arguments.batched_bench:
        found["decode 16"] = batched_bench(arguments.batched_bench, path, 16)
    return found


def measure(name: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one file."""
    began = time.perf_counter()
    engines = {"unsplit": load(path, "unsplit", arguments)}
    tensors = engines["unsplit"].model.file.tensors
    found: dict[str, Any] = {"format": name, "bytes": sum(t.nbytes for t in tensors.values())}
    found["weights read"] = found["bytes"] - tensors["token_embd.weight"].nbytes
    found["load_s"] = time.perf_counter() - began
    if arguments.cut:
        engines["cut, one actor"] = load(path, "cut, one actor", arguments)
    tests: dict[str, Callable[[LLM], float]] = {
        "decode 1": lambda llm: decode_tps(llm, 1),
        "decode 16": lambda llm: decode_tps(llm, 16),
        "drawn 1": lambda llm: decode_tps(llm, 1, temperature=0.8, top_p=0.95),
        "drawn 16": lambda llm: decode_tps(llm, 16, temperature=0.8, top_p=0.95),
        "prompt 512": lambda llm: prompt_tps(llm, 512),
        "prompt 4096": lambda llm: prompt_tps(llm, 4096),
    }
    turns: dict[str, dict[str, list[float]]] = {test: {} for test in tests}
    for _ in range(arguments.runs):
        for test, own in tests.items():
            for who, llm in engines.items():
                turns[test].setdefault(who, []).append(own(llm))
        for test, tps in their_turn(path, arguments).items():
            turns[test].setdefault("llama.cpp", []).append(tps)
    found["tokens/s"] = {
        test: {who: statistics.median(values) for who, values in own.items()}
        for test, own in turns.items()
    }
    found["turns"] = turns
    for llm in engines.values():
        llm.close()
    whole = Whole(path, arguments)
    if arguments.launches:
        kinds = kinds_of(whole)
        found["microseconds"] = {
            f"batch {batch}": launch_seconds(whole, batch, kinds) for batch in (1, 4, 8, 16)
        }
    found["copy"] = copy_bandwidth(whole.backend.shared.gpu.cupy)
    found["share of copy"] = (
        found["weights read"] * found["tokens/s"]["decode 1"]["unsplit"] / found["copy"]
    )
    return found


def show(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"{found['format']}: {found['bytes'] / 1e9:.2f} GB, loaded in {found['load_s']:.1f} s, "
        f"copy {found['copy'] / 1e12:.2f} TB/s, decode at {found['share of copy']:.0%} of it"
    )
    who = list(dict.fromkeys(name for own in found["tokens/s"].values() for name in own))
    table = Table("tokens/s", *who)
    for test, own in found["tokens/s"].items():
        table.add_row(test, *[f"{own[name]:.1f}" if name in own else "" for name in who])
    console.print(table)
    for batch, own in found.get("microseconds", {}).items():
        console.print(batch, {name: round(value, 1) for name, value in own.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed on one GPU, beside llama.cpp.")
    parser.add_argument("--formats", nargs="+", default=["Q8_0", "Q4_K_M", "F16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cache", default="f16")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--llama-bench")
    parser.add_argument("--batched-bench")
    parser.add_argument("--no-cut", dest="cut", action="store_false")
    parser.add_argument("--launches", action="store_true", help="time each kind of launch alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=110)
    results = []
    for name in arguments.formats:
        with model_file(arguments.folder, name, arguments.blocks) as path:
            results.append(measure(name, path, arguments))
        show(results[-1], console)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
