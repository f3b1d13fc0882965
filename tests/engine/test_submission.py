"""Requests from many threads at once, to an engine that has a thread of its own."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import DeviceFailedError, QueueFullError, RunError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
DEVICES = ["a:backend=reference,threads=1"]


@pytest.fixture(scope="module")
def llm(tiny_model_with_room):
    with LLM(tiny_model_with_room, devices=DEVICES, runtime="in-process", max_queue=8) as llm:
        yield llm


def test_answers_of_many_threads(llm):
    prompts = [f"number {n}" for n in range(12)]
    expected = [llm.generate(prompt, GREEDY)[0].text for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(
            lambda prompt: "".join(c.text for c in llm.stream(prompt, GREEDY)), prompts
        )
        assert list(answers) == expected


def test_chunks_come_while_the_answer_grows(llm):
    told = threading.Event()
    answer = llm.submit("the end", ENDLESS, told.set)
    chunks = iter(answer)
    first = next(chunks)
    assert told.is_set()
    assert answer.completion().finish_reason is None
    answer.cancel()
    rest = list(chunks)
    completion = answer.wait()
    assert completion.finish_reason == "cancelled"
    assert [t for chunk in [first, *rest] for t in chunk.token_ids] == completion.token_ids
    assert list(answer) == []


def test_cancelled_before_it_runs(llm):
    answers = [llm.submit("the end", ENDLESS) for _ in range(10)]
    waiting = answers.pop()
    waiting.cancel()
    assert waiting.wait().token_ids == []
    for answer in answers:
        answer.cancel()
        answer.wait()
    assert not llm.engine_thread.engine.scheduler.busy


def test_a_queue_that_is_full_refuses_all_or_none(llm):
    running = [llm.submit("the end", ENDLESS) for _ in range(8)]
    while len(llm.engine_thread.engine.scheduler.running) < 8:
        time.sleep(0.01)
    with pytest.raises(QueueFullError, match="8 requests run and 0 wait; 9 more"):
        llm.generate(["again"] * 9, GREEDY)
    assert not llm.engine_thread.engine.scheduler.waiting
    for answer in running:
        answer.cancel()
        answer.wait()
    assert llm.generate(["again"] * 9, GREEDY)[0].finish_reason == "length"


def test_a_deadline_is_told_to_who_waits(llm):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, max_seconds=0.3)
    began = time.monotonic()
    (completion,) = llm.generate("the end", params)
    assert completion.finish_reason == "deadline"
    assert time.monotonic() - began >= 0.3
    assert completion.token_ids


def test_an_observer_that_fails_ends_its_own_request(llm):
    def observe(token):
        raise ValueError("no such token")

    other = llm.submit("the end", GREEDY)
    request = llm.engine_thread.request([1, 2, 3], GREEDY, observe=observe)
    llm.engine_thread.start([request])
    with pytest.raises(ValueError, match="no such token"):
        list(request)
    assert len(other.wait().token_ids) == 24


def test_closing_ends_what_runs(tiny_model):
    llm = LLM(tiny_model, devices=DEVICES, runtime="in-process")
    answer = llm.submit("the end", ENDLESS)
    next(iter(answer))
    llm.close()
    with pytest.raises(RunError, match="this engine was shut down"):
        answer.wait()
    with pytest.raises(RunError, match="this engine was shut down"):
        llm.generate("again", GREEDY)


def test_a_failure_reaches_everybody(tiny_model, monkeypatch):
    with LLM(tiny_model, devices=DEVICES, runtime="in-process", on_loss="fail") as llm:
        answers = [llm.submit("the end", ENDLESS) for _ in range(3)]
        next(iter(answers[0]))

        def fail(timeout):
            raise DeviceFailedError("device a failed")

        monkeypatch.setattr(llm.engine_thread.engine.rounds.wires.results, "receive", fail)
        for answer in answers:
            with pytest.raises(DeviceFailedError, match="device a failed"):
                answer.wait()
        with pytest.raises(DeviceFailedError, match="device a failed"):
            llm.generate("again", GREEDY)
