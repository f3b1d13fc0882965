"""How long a device may take, and what becomes of records that come too late."""

import importlib
import sys

import pytest
from engine.engines import GREEDY, HALVES, alone, engine

from raygraft import LLM, SamplingParams
from raygraft.actors import deadlines
from raygraft.actors.deadlines import KNOWN_STEPS, LEAST_SECONDS, TIMES, Deadlines
from raygraft.actors.records import Record, RecordKind

PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 60)), [9, 2]]

HANGING = """
import threading
from raygraft.kernels.reference.backend import ReferenceBackend

HANGS = threading.Event()
GOES_ON = threading.Event()

class Hanging(ReferenceBackend):
    def load(self, subgraph, weights, limits):
        runner = super().load(subgraph, weights, limits)
        run = runner.run
        def hanging(step, inputs):
            if HANGS.is_set():
                HANGS.clear()
                GOES_ON.wait(60)
            return run(step, inputs)
        runner.run = hanging
        return runner
"""


def test_unknown_steps_may_take_long():
    known = Deadlines(most=600.0)
    assert known.seconds(8) == 600.0
    for _ in range(KNOWN_STEPS):
        assert known.seconds(8) == 600.0
        known.note(9, 1.5)
    assert known.seconds(8) == known.seconds(15) == TIMES * 1.5
    assert known.seconds(16) == known.seconds(7) == 600.0
    assert known.slowest == 1.5


def test_no_step_has_less_than_some_seconds_nor_more_than_most():
    known = Deadlines(most=600.0)
    for seconds, rows in ((1e-3, 1), (100.0, 64)):
        for _ in range(KNOWN_STEPS):
            known.note(rows, seconds)
    assert known.seconds(1) == LEAST_SECONDS
    assert known.seconds(64) == 600.0


def test_slow_steps_are_forgotten():
    known = Deadlines()
    known.note(1, 60.0)
    for _ in range(deadlines.RECENT_STEPS):
        known.note(1, 0.1)
    assert known.seconds(1) == LEAST_SECONDS


def test_a_backend_that_hangs(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "hanging_board.py").write_text(HANGING)
    (tmp_path / "board.py").write_text("from hanging_board import Hanging\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("hanging_board", None)
    board = importlib.import_module("hanging_board")
    monkeypatch.setattr(deadlines, "LEAST_SECONDS", 0.5)
    devices = [
        {"name": "a", "backend": "reference", "threads": 1},
        {"name": "b", "backend": f"{tmp_path / 'board.py'}:Hanging", "threads": 1},
    ]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    place = {"*": "a", "kind:ffn": "b"}
    with LLM(tiny_model, devices=devices, place=place, runtime="in-process") as llm:
        for _ in range(KNOWN_STEPS + 1):  # the first one finds nothing in the cache
            expected = [done.token_ids for done in llm.generate(PROMPTS, params)]
        board.HANGS.set()
        assert [done.token_ids for done in llm.generate(PROMPTS, params)] == expected
        assert llm.engine_thread.recovery.count == 1
        board.GOES_ON.set()
        assert [done.token_ids for done in llm.generate(PROMPTS, params)] == expected


@pytest.mark.parametrize("where", ["a", "b", "engine"])
def test_a_late_record_of_an_earlier_epoch_is_skipped(tiny_model, where):
    late = Record(RecordKind.STEP, 0, 7, 0, 1)
    with engine(tiny_model, place=HALVES) as made:
        wires = made.rounds.wires
        if where == "engine":
            receive, records = wires.results.receive, [late]

            class Results:
                close = wires.results.close

                def receive(self, timeout):
                    return records.pop() if records else receive(timeout)

            made.rounds.wires = type(wires)(wires.control, Results())
        else:
            wires.control[where].send(late, 1)
        answers = made.finish([made.add(prompt, GREEDY) for prompt in PROMPTS])
    assert answers == alone(tiny_model, PROMPTS, GREEDY)
