"""Devices that can be given the next step while they compute one."""

from pathlib import Path

import pytest

from raygraft import LLM, SamplingParams
from raygraft.actors import rounds
from raygraft.graph.errors import RaygraftError
from raygraft.kernels import find_backend

FILE = Path(__file__).with_name("streaming.py")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 30, 40]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=4, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, seed=7, max_tokens=9, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, max_tokens=9, presence_penalty=1.0, ignore_eos=True)


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr("raygraft.actors.in_process.os.cpu_count", lambda: 2)  # one for the engine
    found = find_backend(f"{FILE}:Streaming").stream
    found.most_under_way = found.under_way = found.started = found.unknown = 0
    found.fails_at = None
    return found


def on(backend):
    """The settings of a model on one such device."""
    device = {"name": "a", "backend": backend, "threads": 1}
    return {"devices": [device], "runtime": "in-process"}


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_next_step_is_started_while_one_is_computed(tiny_model, stream, params):
    with LLM(tiny_model, **on("reference")) as llm:
        expected = llm.generate(PROMPTS, params)
    with LLM(tiny_model, **on(f"{FILE}:Streaming")) as llm:
        found = llm.generate(PROMPTS, params)
        assert llm._fleet.counters()["a"].run_seconds > 0
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]
    assert [own.logprobs for own in found] == [own.logprobs for own in expected]
    assert stream.most_under_way == 2
    assert stream.unknown > 3 * (params.max_tokens - 4)  # of three sequences
    assert stream.under_way == 0


def test_what_must_be_known_is_waited_for(tiny_model, stream):
    with LLM(tiny_model, **on("reference")) as llm:
        expected = llm.generate(PROMPTS, PENALISED)
    with LLM(tiny_model, **on(f"{FILE}:Streaming")) as llm:
        found = llm.generate(PROMPTS, PENALISED)
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]
    assert (stream.most_under_way, stream.unknown) == (1, 0)


@pytest.mark.parametrize("number", [1, 5, 6])
def test_a_step_that_fails(tiny_model, stream, number):
    """Also with the next one under way: one error, and it serves again."""
    with LLM(tiny_model, **on(f"{FILE}:Streaming"), on_loss="fail") as llm:
        stream.fails_at = number
        with pytest.raises(RaygraftError, match="the stream is broken"):
            llm.generate(PROMPTS, GREEDY)
    with LLM(tiny_model, **on("reference")) as llm:
        expected = llm.generate(PROMPTS, GREEDY)
    stream.fails_at = stream.started + 5
    with LLM(tiny_model, **on(f"{FILE}:Streaming")) as llm:
        found = llm.generate(PROMPTS, GREEDY)
    assert stream.started > stream.fails_at
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]


@pytest.mark.parametrize("steps", [4, 6, 9])
def test_a_burst_that_fails(tiny_model, stream, monkeypatch, steps):
    """What it had for the engine is lost with it, and computed again."""
    monkeypatch.setattr("raygraft.actors.in_process.os.cpu_count", lambda: 1)
    monkeypatch.setattr(rounds, "BURST_SECONDS", 60.0)
    with LLM(tiny_model, **on("reference")) as llm:
        expected = llm.generate(PROMPTS, GREEDY)
    stream.fails_at = stream.started + steps
    with LLM(tiny_model, **on(f"{FILE}:Streaming")) as llm:
        found = llm.generate(PROMPTS, GREEDY)
        assert llm.engine_thread.recovery.count == 1
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]
    assert stream.most_under_way == 1
