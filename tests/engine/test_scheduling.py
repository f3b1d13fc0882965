"""Continuous batching: who joins, who waits, who is set aside, and what that costs the others."""

import time

import pytest
from engine.engines import ATTENTION_AND_FFN, GREEDY, alone, engine
from hypothesis import given
from hypothesis import strategies as st

from raygraft import SamplingParams
from raygraft.actors.batch import divide
from raygraft.graph.capability import Limits
from raygraft.graph.errors import QueueFullError, RequestError

PROMPTS = [list(range(10 * n + 1, 10 * n + 8 + n)) for n in range(8)]
LONG = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=1.3, seed=3, max_tokens=70, ignore_eos=True, presence_penalty=0.5, logprobs=2
)


@given(rows=st.integers(0, 60), wanted=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_shares_are_fair(rows, wanted):
    shares = divide(rows, wanted)
    assert sum(shares) == min(rows, sum(wanted))
    even = (rows - rows // 2) // len(wanted)
    for share, most in zip(shares, wanted, strict=True):
        assert min(even, most) <= share <= most


@given(rows=st.integers(0, 60), wanted=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_who_wants_little_is_done_first(rows, wanted):
    shares = divide(rows, wanted)
    for share, most in zip(shares, wanted, strict=True):
        longer = [own for own, other in zip(shares, wanted, strict=True) if other > most]
        assert share == most or all(own <= share + 1 for own in longer)


@pytest.mark.parametrize("params", [LONG, DRAWN], ids=["greedy", "seeded"])
@pytest.mark.parametrize("place", [None, ATTENTION_AND_FFN], ids=["whole", "cut"])
def test_eight_requests_with_pages_for_three(tiny_model, params, place):
    halves = 2 if place else None
    with engine(tiny_model, place=place, blocks=16, half_batches=halves) as small:
        sequences = [small.add(prompt, params) for prompt in PROMPTS]
        answers = small.finish(sequences)
        assert small.scheduler.set_aside > 0
        small.drain()
        assert small.scheduler.pages.free == 16
        assert {sequence.finish_reason for sequence in sequences} == {"length"}
    assert answers == alone(tiny_model, PROMPTS, params)


def test_the_oldest_is_never_set_aside(tiny_model):
    with engine(tiny_model, blocks=8) as small:
        sequences = [small.add(prompt, LONG) for prompt in PROMPTS[:4]]
        while not sequences[0].finished:
            before = sequences[0].computed + len(sequences[0].tokens)
            small.step()
            now = sequences[0].computed + len(sequences[0].tokens)
            assert sequences[0].finished or now > before


def test_a_request_joins_and_another_leaves(tiny_model):
    with engine(tiny_model) as one:
        first = one.add(PROMPTS[0], GREEDY)
        for _ in range(5):
            one.step()
        second, third = one.add(PROMPTS[1], GREEDY), one.add(PROMPTS[2], GREEDY)
        one.step()
        one.cancel(third)
        answers = one.finish([first, second])
        assert len({step.rows for step in one.steps()}) > 2
        assert third.finish_reason == "cancelled"
    assert answers == alone(tiny_model, PROMPTS[:2], GREEDY)


def test_a_long_prompt_does_not_stall_those_that_decode(tiny_model_with_room):
    """Every step has a row of each of them, and no more rows than a step may have."""
    limits = Limits(max_rows=64, context=2048, cache_type="f32", max_sequences=8)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with engine(tiny_model_with_room, limits=limits) as busy:
        decoding = [busy.add(prompt, params) for prompt in PROMPTS[:4]]
        busy.step()
        before = len(busy.steps())
        prompt = busy.add([1 + n % 200 for n in range(2000)], GREEDY)
        while not prompt.tokens:
            grown = [len(sequence.tokens) for sequence in decoding]
            busy.step()
            assert [len(sequence.tokens) - 1 for sequence in decoding] == grown
        steps = busy.steps()[before:]
        assert {step.rows for step in steps[:-1]} == {64}
        assert len(steps) == -(-2000 // 60)


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one(tiny_model_with_room):
    limits = Limits(max_rows=64, context=2048, cache_type="f32", max_sequences=8)
    with engine(tiny_model_with_room, limits=limits) as busy:
        long = busy.add([1 + n % 200 for n in range(1500)], GREEDY)
        busy.step()
        short = busy.add(PROMPTS[0], GREEDY)
        busy.step()
        assert short.tokens
        assert long.computed == 64 + 64 - len(PROMPTS[0])


def test_a_full_queue_refuses(tiny_model):
    limits = Limits(max_rows=64, context=128, cache_type="f32", max_sequences=2)
    with engine(tiny_model, limits=limits, max_queue=2) as one:
        sequences = [one.add(prompt, GREEDY) for prompt in PROMPTS[:4]]
        with pytest.raises(QueueFullError, match="0 requests run and 4 wait; 1 more would"):
            one.add(PROMPTS[4], GREEDY)
        assert issubclass(QueueFullError, RequestError)
        one.step()
        with pytest.raises(QueueFullError, match="2 requests run and 2 wait; 1 more would make"):
            one.add(PROMPTS[4], GREEDY)
        one.cancel(sequences.pop())
        sequences.append(one.add(PROMPTS[4], GREEDY))
        prompts = [*PROMPTS[:3], PROMPTS[4]]
        assert one.finish(sequences) == alone(tiny_model, prompts, GREEDY)


def test_a_deadline_ends_what_runs_and_what_waits(tiny_model):
    limits = Limits(max_rows=64, context=128, cache_type="f32", max_sequences=1)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, max_seconds=0.2)
    with engine(tiny_model, limits=limits) as one:
        running, waiting = one.add(PROMPTS[0], params), one.add(PROMPTS[1], params)
        patient = one.add(PROMPTS[2], GREEDY)
        one.step()
        time.sleep(0.21)
        ended = [output.sequence for output in one.step() if output.token is None]
        assert set(map(id, ended)) == {id(running), id(waiting)}
        assert running.finish_reason == waiting.finish_reason == "deadline"
        assert (len(running.tokens), len(waiting.tokens)) == (1, 0)
        assert one.finish([patient]) == alone(tiny_model, PROMPTS[2:3], GREEDY)


def test_scores_survive_being_set_aside(tiny_model):
    with engine(tiny_model) as roomy:
        whole = roomy.add(PROMPTS[7] * 4, GREEDY, scoring=True)
        (expected,) = roomy.finish([whole])
    with engine(tiny_model, blocks=7) as small:
        older = small.add(PROMPTS[0], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        small.step()
        scored = small.add(PROMPTS[7] * 4, GREEDY, scoring=True)
        scores = small.finish([older, scored])[1]
    assert scores == expected
    assert len(scores) == len(PROMPTS[7] * 4)
