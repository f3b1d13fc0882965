"""Ours and llama.cpp on the same files with the same threads, in turns within one run.

    python bench/peers/compare.py [formats] [drawn] [batches] [bandwidth] [cuts] [--pairs 5]
                                  [--json FILE]

Both sides keep their models loaded in processes of their own and sleep between their turns. Each
pair of turns gives a ratio of times; what is reported is the median of the ratios, and after it the
median of each side's tokens per second.

- formats: SmolLM2-135M in Q4_1, Q4_0, Q8_0 and F16, and a random model of the shape of Llama 3.2 1B
  in Q4_K and Q6_K; decode at batch 1 and a prompt, --threads a side. Decode stands beside what the
  memory allows: llama.cpp's time over that of a pure read of the weights' bytes (see bandwidth).
- drawn: decode of SmolLM2 Q4_1 with tokens that are drawn, by three kinds of filters.
- batches: decode of several sequences at once, SmolLM2 Q4_1, --threads a side.
- bandwidth: decode of the 1B shape in Q4_0, against a pure read of a gigabyte of memory by as many
  threads (a sum of integers, compiled by Numba): the share that the weights' bytes over the read
  bandwidth allow.
- cuts: SmolLM2 Q4_1, one thread a device: uncut; attention on one device and feed-forward on
  another; halves of the layers. Ours goes over Ray, llama.cpp over its RPC on this machine. How
  much of the uncut speed each keeps, and how near ours comes to what the devices' own times allow
  when two half-batches are in flight.

llama.cpp comes with llama-cpp-python, built for this machine and with RPC:

    CMAKE_ARGS="-DGGML_RPC=ON -DGGML_NATIVE=ON" pip install llama-cpp-python
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the benches share

from files import DEMO, RANDOM, demo_file, random_file
from layers import bytes_per_token
from reading import NBYTES
from reporting import (
    circumstances,
    median_ratio,
    print_circumstances,
    print_table,
    say,
    write_json,
)
from sides import Entrant, Measured, Setup, Side, take_turns

from raygraft.benchmark import Workload

Found = dict[str, list[Measured]]
Row = dict[str, Any]
BATCHES = (1, 4, 8, 16)


def formats(options: argparse.Namespace) -> list[Row]:
    """Each file, uncut."""
    files = {f"SmolLM2-135M {kind}": lambda kind=kind: demo_file(kind) for kind in DEMO}
    files |= {f"1B shape {kind}": lambda kind=kind: random_file(kind) for kind in RANDOM[:2]}
    workloads = [Workload(0, options.n_gen), Workload(options.n_prompt, 0)]
    rows = []
    for name, make in files.items():
        if options.file and not any(part in name for part in options.file):
            continue
        setup = _uncut(make(), options, workloads)
        nbytes = bytes_per_token(setup.path)
        with (
            Side("raygraft", [setup]) as ours,
            Side("read", [setup]) as reader,
            Side("llama.cpp", [setup]) as theirs,
        ):
            sides = {"ours": ours, "read": reader, "llama.cpp": theirs}
            for workload in workloads:
                say(f"{name}, {workload.name}")
                found = _turns(sides, setup.name, workload, options)
                row = {"file": name} | _comparison(found, workload)
                if workload.n_gen:  # each token reads all weights
                    least = [m.seconds * nbytes / NBYTES * workload.n_gen for m in found["read"]]
                    row["limit"] = median_ratio(row["seconds"]["llama.cpp"], least)
                rows.append(row)
    head = ["file", "test", "ours / llama.cpp", "least to most", "ours t/s", "llama.cpp t/s"]
    head.append("memory allows")
    limits = [f"{row['limit']:.2f}" if "limit" in row else "-" for row in rows]
    cells = [
        [row["file"], *_comparison_cells(row), limit]
        for row, limit in zip(rows, limits, strict=True)
    ]
    print_table(f"Uncut, {options.threads} threads", head, cells)
    return rows


def batches(options: argparse.Namespace) -> list[Row]:
    """Decode of several sequences at once, uncut."""
    return _demo_rows(
        options, "batch", {batch: Workload(0, options.n_gen, batch) for batch in options.batch}
    )


DRAWN: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "llama.cpp's defaults": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
}
"""What users ask for. A greedy token of llama.cpp's is not sampled at all, as in llama-bench."""


def drawn(options: argparse.Namespace) -> list[Row]:
    """Decode with tokens that are drawn."""
    return _demo_rows(
        options,
        "tokens",
        {name: Workload(0, options.n_gen, sampling=own) for name, own in DRAWN.items()},
    )


def _demo_rows(
    options: argparse.Namespace, column: str, workloads: Mapping[Any, Workload]
) -> list[Row]:
    """SmolLM2 Q4_1, uncut: a row for each workload, by what stands in its column."""
    setup = _uncut(demo_file("Q4_1"), options, list(workloads.values()))
    rows = []
    with Side("raygraft", [setup]) as ours, Side("llama.cpp", [setup]) as theirs:
        for what, workload in workloads.items():
            say(f"{workload.name}, {column} {what}")
            found = _turns({"ours": ours, "llama.cpp": theirs}, setup.name, workload, options)
            rows.append({column: what} | _comparison(found, workload))
    head = [column, "test", "ours / llama.cpp", "least to most", "ours t/s", "llama.cpp t/s"]
    cells = [[row[column], *_comparison_cells(row)] for row in rows]
    print_table(f"SmolLM2-135M Q4_1, uncut, {options.threads} threads", head, cells)
    return rows


def bandwidth(options: argparse.Namespace) -> list[Row]:
    """Decode against what reading the weights takes at least."""
    path = random_file("Q4_0")
    workload = Workload(0, options.n_gen)
    setup = _uncut(path, options, [workload])
    nbytes = bytes_per_token(path)
    with (
        Side("raygraft", [setup]) as ours,
        Side("read", [setup]) as reader,
        Side("llama.cpp", [setup]) as theirs,
    ):
        say(f"1B shape Q4_0, {workload.name}")
        sides = {"ours": ours, "read": reader, "llama.cpp": theirs}
        found = _turns(sides, setup.name, workload, options)
    read = [measured.seconds * nbytes / NBYTES for measured in found["read"]]  # per token
    rows = []
    for name in ("ours", "llama.cpp"):
        tokens = [measured.seconds / workload.tokens for measured in found[name]]
        shares = [least / token for least, token in zip(read, tokens, strict=True)]
        rows.append(
            {
                "side": name,
                "share_of_limit": statistics.median(shares),
                "shares": shares,
                "median_ts": 1 / statistics.median(tokens),
                "median_gb_per_s": nbytes / statistics.median(tokens) / 1e9,
                "read_gb_per_s": nbytes / statistics.median(read) / 1e9,
                "bytes_per_token": nbytes,
            }
        )
    head = ["side", "of the limit", "least to most", "t/s", "weights GB/s", "pure read GB/s"]
    cells = [
        [
            row["side"],
            f"{row['share_of_limit']:.0%}",
            f"{min(row['shares']):.0%} to {max(row['shares']):.0%}",
            f"{row['median_ts']:.1f}",
            f"{row['median_gb_per_s']:.1f}",
            f"{row['read_gb_per_s']:.1f}",
        ]
        for row in rows
    ]
    title = f"1B shape Q4_0, {nbytes / 2**20:.0f} MiB a token, {options.threads} threads"
    print_table(title, head, cells)
    return rows


def cuts(options: argparse.Namespace) -> list[Row]:
    """Attention on one device and feed-forward on the other, then halves of the layers."""
    most = max(options.batch)
    uncut = Setup("uncut", demo_file("Q4_1"), 1, context=options.n_gen_cut + 1, sequences=most)
    head = ["batch", "ours keeps", "llama.cpp keeps", "ours / llama.cpp"]
    head += ["bound", "of the bound", "ours t/s", "uncut t/s", "llama.cpp t/s", "its uncut t/s"]
    rows = []
    # Each cut by itself: on two cores every loaded engine costs a cut some of its speed.
    for cut, words in (("attention", "attention | feed-forward"), ("halves", "halves of layers")):
        own = _one_cut(options, uncut, replace(uncut, name=cut, cut=cut))
        cells = [_cut_cells(row) for row in own]
        print_table(f"SmolLM2-135M Q4_1, one thread a device: {words}", head, cells)
        rows += own
    return rows


def _one_cut(options: argparse.Namespace, uncut: Setup, cut: Setup) -> list[Row]:
    """A row for each batch."""
    alone = replace(cut, name="alone", half_batches=1)
    rows = []
    with Side("raygraft", [uncut, cut, alone]) as ours, Side("llama.cpp", [uncut, cut]) as theirs:
        for batch in options.batch:
            say(f"{cut.name}, batch {batch}")
            workload = Workload(0, options.n_gen_cut, batch)
            entrants = {
                f"{who} {setup.name}": Entrant(side, setup.name, workload)
                for who, side in (("ours", ours), ("llama.cpp", theirs))
                for setup in (uncut, cut)
            }
            if batch > 1:
                half = Workload(0, options.n_gen_cut, batch // 2)
                entrants["ours alone"] = Entrant(ours, alone.name, half)
            found = take_turns(entrants, options.pairs)
            rows.append({"cut": cut.name, **_cut_row(found, workload, cut.name)})
    return rows


def _cut_row(found: Found, workload: Workload, cut: str) -> Row:
    """The ratios of one batch."""
    seconds = {name: [m.seconds for m in measured] for name, measured in found.items()}
    row: Row = {
        "batch": workload.batch,
        "n_gen": workload.n_gen,
        "median_ts": {
            name: workload.tokens / statistics.median(seconds[name])
            for name in (f"ours {cut}", "ours uncut", f"llama.cpp {cut}", "llama.cpp uncut")
        },
        "seconds": seconds,
        "busy": {name: [dict(m.busy) for m in ms] for name, ms in found.items() if ms[0].busy},
        "keeps": median_ratio(seconds["ours uncut"], seconds[f"ours {cut}"]),
        "llama_keeps": median_ratio(seconds["llama.cpp uncut"], seconds[f"llama.cpp {cut}"]),
        "to_llama": median_ratio(seconds[f"llama.cpp {cut}"], seconds[f"ours {cut}"]),
    }
    if workload.batch > 1:
        # Half of the rows by itself, twice: the busiest device can do no better.
        least = [2 * max(m.busy.values()) for m in found["ours alone"]]
        row["bound"] = median_ratio(seconds["ours uncut"], least)
        row["of_bound"] = median_ratio(least, seconds[f"ours {cut}"])
    return row


def _cut_cells(row: Row) -> list[str]:
    bound = f"{row['bound']:.2f}" if "bound" in row else "-"
    of_bound = f"{row['of_bound']:.0%}" if "of_bound" in row else "-"
    kept = [f"{row['keeps']:.0%}", f"{row['llama_keeps']:.0%}", f"{row['to_llama']:.2f}"]
    speeds = [f"{speed:.1f}" for speed in row["median_ts"].values()]
    return [str(row["batch"]), *kept, bound, of_bound, *speeds]


def _uncut(path: Path, options: argparse.Namespace, workloads: Sequence[Workload]) -> Setup:
    return Setup(
        "uncut",
        path,
        options.threads,
        runtime=options.runtime,
        context=max(workload.context for workload in workloads),
        sequences=max(workload.batch for workload in workloads),
    )


def _turns(
    sides: Mapping[str, Side], setup: str, workload: Workload, options: argparse.Namespace
) -> Found:
    entrants = {name: Entrant(side, setup, workload) for name, side in sides.items()}
    return take_turns(entrants, options.pairs)


def _comparison(found: Found, workload: Workload) -> Row:
    seconds = {n: [m.seconds for m in found[n]] for n in ("ours", "llama.cpp")}
    pairs = zip(seconds["llama.cpp"], seconds["ours"], strict=True)
    medians = {n: workload.tokens / statistics.median(times) for n, times in seconds.items()}
    return {
        "test": workload.name,
        "n_prompt": workload.n_prompt,
        "n_gen": workload.n_gen,
        "ratio": median_ratio(seconds["llama.cpp"], seconds["ours"]),
        "ratios": [theirs / ours for theirs, ours in pairs],
        "median_ts": medians,
        "seconds": seconds,
    }


def _comparison_cells(row: Row) -> list[str]:
    spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
    speeds = [f"{row['median_ts'][name]:.1f}" for name in ("ours", "llama.cpp")]
    return [row["test"], f"{row['ratio']:.2f}", spread, *speeds]


TABLES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "formats": formats,
    "drawn": drawn,
    "batches": batches,
    "bandwidth": bandwidth,
    "cuts": cuts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="*", help=f"any of {', '.join(TABLES)}; default: all")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each side, uncut (default 2)")
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=64, help="tokens of a turn, uncut")
    parser.add_argument("--n-gen-cut", type=int, default=48, help="tokens of a turn, in cuts")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--file", nargs="+", help="formats: only files with this in their name")
    parser.add_argument(
        "--runtime",
        choices=("in-process", "ray"),
        default="in-process",
        help="how ours runs uncut in all tables but `cuts`, where everything of ours is over Ray",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all turns to a file")
    options = parser.parse_args()
    if wrong := set(options.table) - set(TABLES):
        parser.error(f"no table {min(wrong)!r}; there are {', '.join(TABLES)}")
    found = circumstances(("llama-cpp-python",))
    print_circumstances(found)
    document: Row = {"circumstances": found}
    for name in options.table or TABLES:
        document[name] = TABLES[name](options)
        write_json(options.json, document)


if __name__ == "__main__":
    main()
