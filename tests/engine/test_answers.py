"""What callers of the Python API rely on: streams, stop strings, refusals, interrupted steps."""

import signal
import threading

import pytest

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import RequestError
from raygraft.model import Model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, runtime="in-process", ctx_size=64) as llm:
        yield llm


def test_a_stream_says_what_generate_says(llm):
    (whole,) = llm.generate("the end", GREEDY)
    chunks = list(llm.stream("the end", GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids


def test_streams_and_answers_do_not_take_from_each_other(llm):
    (alone,) = llm.generate("the end", GREEDY)
    stream = llm.stream("the end", GREEDY)
    text = next(stream).text
    llm.generate("in between", GREEDY)
    assert text + "".join(chunk.text for chunk in stream) == alone.text


def test_a_closed_stream_gives_its_pages_back(llm):
    for _ in range(40):  # more than there are pages for
        stream = llm.stream("the end", GREEDY)
        next(stream)
        stream.close()
    assert llm.generate("the end", GREEDY)[0].finish_reason == "length"


def test_a_stop_string_ends_the_answer(llm):
    (whole,) = llm.generate("the end", GREEDY)
    stop = whole.text[5:8]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop])
    (cut,) = llm.generate("the end", params)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_logprobs_belong_to_the_tokens(llm):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3)
    (answer,) = llm.generate("the end", params)
    assert [len(position) for position in answer.logprobs] == [3] * 5
    for token, position in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token == next(iter(position))
        assert list(position.values()) == sorted(position.values(), reverse=True)


def test_scores_are_the_distributions_that_generation_draws_from(llm):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=10)
    (answer,) = llm.generate("the end", params)
    ids = answer.prompt_token_ids + answer.token_ids[:-1]
    scores = llm.score(ids)[len(answer.prompt_token_ids) - 1 :]
    for ours, theirs in zip(scores, answer.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "64 tokens and one more is to be generated, the context holds 64"),
        ([1, 99999], {}, "token id 99999; the vocabulary has"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias holds the token id -1"),
        ([1], {"temperature": -1.0}, "temperature is -1.0; accepted is at least 0"),
        ([1], {"top_p": 0.0}, "top_p is 0.0; accepted is above 0"),
        ([1], {"logprobs": 21}, "logprobs is 21; accepted is from 0 to 20"),
        ([1], {"stop": "abc"}, "stop is 'abc'; accepted is a list"),
    ],
)
def test_what_cannot_be_served_is_refused(llm, prompt, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt], SamplingParams(**params))
    assert llm.generate([1, 2], GREEDY)[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "ctx_size", "message"),
    [
        ([], None, "the prompt is empty"),
        ([1] * 256, None, "256 tokens and one more is to be generated, the context holds 256"),
        ([1] * 64, 64, "the context holds 64"),
        ([1, 99999], None, "token id 99999; the vocabulary has"),
    ],
)
def test_a_model_refuses_prompts_without_a_device(tiny_model, prompt, ctx_size, message):
    model = Model(tiny_model)
    with pytest.raises(RequestError, match=message):
        model.check_prompt(prompt, ctx_size)
    model.check_prompt([1, 2], ctx_size)


def test_a_cache_type_that_is_not_known_is_refused(tiny_model):
    with pytest.raises(RequestError, match="cache_type is 'f64'; accepted are f32, f16, q8_0"):
        LLM(tiny_model, runtime="in-process", cache_type="f64")


def test_the_engine_goes_on_after_an_interrupt(llm, monkeypatch):
    (whole,) = llm.generate("the end", GREEDY)
    step = llm.engine_thread.engine.step
    caught = threading.Event()

    def interrupting(**how):
        if not caught.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            caught.wait(10)
        return step(**how)

    monkeypatch.setattr(llm.engine_thread.engine, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("in between", GREEDY)
    caught.set()
    assert llm.generate("the end", GREEDY)[0].text == whole.text
    assert not llm.engine_thread.engine.scheduler.running
