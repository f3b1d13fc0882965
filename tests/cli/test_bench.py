"""`raygraft bench`: rows as llama-bench has them."""

import json
import statistics
from pathlib import Path

import pytest
from cli.command_line import Command

from raygraft.benchmark import Workload, time_workload
from raygraft.graph.errors import RequestError
from raygraft.llm import LLM

CUT = ("--device", "a:threads=1", "--device", "b:threads=1")
RULES = ("--place", "kind:attention=a", "--place", "kind:ffn=a|b")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_one_document_with_a_row_for_each_test(raygraft: Command, tiny_model: Path) -> None:
    tests = (
        "-p",
        "16,40",
        "-n",
        4,
        "-n",
        6,
        "-b",
        "1,2",
        "-t",
        1,
        "-r",
        3,
        "-ub",
        24,
        "--cache-type",
        "f16",
    )
    ended = raygraft("bench", "-m", tiny_model, *tests, "--json")
    assert ended.code == 0
    assert "pp40" in ended.err
    document = json.loads(ended.out)
    rows = document["results"]
    assert [(row["n_prompt"], row["n_gen"], row["n_batch"]) for row in rows] == [
        (prompt, generated, batch)
        for prompt, generated in ((16, 0), (40, 0), (0, 4), (0, 6))
        for batch in (1, 2)
    ]
    for row in rows:
        tokens = (row["n_prompt"] + row["n_gen"]) * row["n_batch"]
        rates = [tokens * 1e9 / ns for ns in row["samples_ns"]]
        assert len(rates) == 3
        assert row["samples_ts"] == pytest.approx(rates)
        assert row["avg_ts"] == pytest.approx(statistics.fmean(rates))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(rates))
        assert row["avg_ns"] == pytest.approx(statistics.fmean(row["samples_ns"]), abs=1)
        assert row["stddev_ns"] == pytest.approx(statistics.stdev(row["samples_ns"]), abs=1)
        assert (row["n_threads"], row["n_ubatch"], row["hops_per_token"]) == (1, 24, 1)
        assert row["model_type"] == "llama F32"
        assert row["model_size"] == 4 * row["model_n_params"]
        assert row["type_k"] == row["type_v"] == "f16"
        assert row["rules"] == []
        assert row["load_s"] > 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_table_of_a_cut(raygraft: Command, tiny_model: Path) -> None:
    ended = raygraft("bench", "-m", tiny_model, "-p", 8, "-n", 0, "-r", 2, *CUT, *RULES)
    assert ended.code == 0
    head, rule, row = (cells(line) for line in ended.out.splitlines())
    assert head == [
        "model",
        "size",
        "params",
        "backend",
        "threads",
        "devices",
        "rules",
        "test",
        "t/s",
    ]
    assert all(mark.endswith("-:") for mark in rule)
    found = dict(zip(head, row, strict=True))
    assert found["threads"].split("+") == ["1"] * len(found["devices"].split("+"))
    assert found["rules"] == "kind:attention=a kind:ffn=a/b"
    assert found["test"] == "pp8"
    mean, _, deviation = found["t/s"].partition(" ± ")
    assert float(mean) > 0
    assert float(deviation) >= 0


def cells(line: str) -> list[str]:
    """A row of a Markdown table; `\\|` in a cell is written as `/`."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-p", "12,many"), "-p 12,many: expected whole numbers from 0 on"),
        (("-b", "0"), "-b 0: expected whole numbers from 1 on"),
        (("-t", "1,,-2"), "-t 1,,-2: expected whole numbers from 1 on"),
        (("-n", ","), "-n ,: expected whole numbers"),
    ],
)
def test_lists_that_make_no_sense(
    raygraft: Command, tiny_model: Path, options: tuple[str, ...], said: str
) -> None:
    ended = raygraft("bench", "-m", tiny_model, *options)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_a_workload_is_prompts_alone_or_decode_steps_alone(tiny_model: Path) -> None:
    options = {"runtime": "in-process", "ctx_size": 64, "max_sequences": 3, "max_rows": 32}
    with LLM(tiny_model, devices=["a:threads=1"], **options) as llm:
        engine = llm.engine_thread.engine
        timings = engine.timings
        time_workload(llm, Workload(40, 0, 3))
        assert (timings.prefill_tokens, timings.decode_tokens) == (120, 0)
        nanoseconds = time_workload(llm, Workload(0, 10, 3))
        assert (timings.prefill_tokens, timings.decode_tokens) == (120, 30)
        assert (timings.decode_steps, engine.busy) == (10, False)
        assert llm.timings().cached_tokens == 0
        assert nanoseconds == pytest.approx(timings.decode_seconds * 1e9)


def test_sequences_that_would_have_to_wait_are_refused(tiny_model: Path) -> None:
    options = {"runtime": "in-process", "ctx_size": 64, "max_sequences": 2}
    with LLM(tiny_model, devices=["a:threads=1"], **options) as llm:
        for workload in (Workload(8, 0, 3), Workload(100, 0, 2)):
            with pytest.raises(RequestError, match="the plan has 8, for 2 sequences"):
                time_workload(llm, workload)
