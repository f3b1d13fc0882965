"""Steps that are sent before their tokens are known: the same answers, and nobody waits longer."""

from types import SimpleNamespace

import pytest
from engine.engines import ATTENTION_AND_FFN, GREEDY, HALVES, alone, engine

from raygraft import SamplingParams
from raygraft.actors.sharing import core_left

PROMPTS = [[5 * n + 1, 5 * n + 2, 5 * n + 3][: 1 + n % 3] for n in range(5)]
SEEDED = SamplingParams(temperature=1.1, top_k=20, seed=5, max_tokens=20, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0, max_tokens=16, ignore_eos=True, presence_penalty=1.0, frequency_penalty=0.5
)
SAME_ACTOR = {"*": "a", "kind:ffn": "b"}


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """There is one left for the engine."""
    monkeypatch.setattr("raygraft.actors.in_process.os.cpu_count", lambda: 3)


def unknown_tokens(steps):
    """How many tokens of each step were still being drawn when it was sent."""
    return [int((step.tokens < 0).sum()) for step in steps]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_steps_are_sent_ahead_and_change_no_token(tiny_model, params):
    with engine(tiny_model) as one:
        answers = one.finish([one.add(prompt, params) for prompt in PROMPTS])
        ahead = unknown_tokens(one.steps())
        assert not one.in_flight
    assert answers == alone(tiny_model, PROMPTS, params)
    assert ahead[:2] == [0, 0]  # the prompts, and the step after them
    assert set(ahead[2:]) == {len(PROMPTS)}
    assert len(ahead) == params.max_tokens  # none for a token that is one too many


def test_answers_of_one_at_a_time_are_the_same_without(tiny_model):
    with engine(tiny_model, place=HALVES) as apart:  # tokens are drawn by another device
        answers = apart.finish([apart.add(prompt, GREEDY) for prompt in PROMPTS])
        assert not any(unknown_tokens(apart.steps()))
    with engine(tiny_model) as one:
        assert one.finish([one.add(prompt, GREEDY) for prompt in PROMPTS]) == answers


def test_a_cut_sends_ahead_what_it_does_not_split(tiny_model):
    with engine(tiny_model, place=SAME_ACTOR) as cut:
        cut.finish([cut.add(PROMPTS[0], GREEDY)])
        assert unknown_tokens(cut.steps())[2:] == [1] * 14
    with engine(tiny_model, place=SAME_ACTOR, half_batches=2) as cut:
        cut.finish([cut.add(prompt, GREEDY) for prompt in PROMPTS])
        assert not any(unknown_tokens(cut.steps()))
    with engine(tiny_model, place=ATTENTION_AND_FFN, half_batches=1) as cut:
        answers = cut.finish([cut.add(prompt, SEEDED) for prompt in PROMPTS])
        assert any(unknown_tokens(cut.steps()))
    assert answers == alone(tiny_model, PROMPTS, SEEDED)


def test_penalties_wait_for_the_token(tiny_model):
    """They count it, so it must be in the header; and nobody gets ahead of who waits."""
    with engine(tiny_model) as one:
        answers = one.finish([one.add(PROMPTS[0], PENALISED), one.add(PROMPTS[1], PENALISED)])
        mixed = one.finish([one.add(PROMPTS[0], PENALISED), one.add(PROMPTS[1], GREEDY)])
        assert not any(unknown_tokens(one.steps()))
    assert answers == alone(tiny_model, PROMPTS[:2], PENALISED)
    assert mixed[1:] == alone(tiny_model, PROMPTS[1:2], GREEDY)


def test_an_end_that_nobody_foresaw_costs_one_step(tiny_model):
    (free,) = alone(tiny_model, PROMPTS[:1], GREEDY)
    stop = free[5]
    first = free.index(stop)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=(stop,))
    with engine(tiny_model, blocks=2) as one:
        sequence = one.add(PROMPTS[0], params)
        assert one.finish([sequence]) == [free[: first + 1]]
        assert sequence.finish_reason == "stop"
        assert len(one.rounds.in_flight) == 1
        assert one.scheduler.pages.free == 1  # the step in flight writes to its page
        assert one.step() == []
        assert one.scheduler.pages.free == 2
        assert not one.busy
        assert len(one.steps()) == first + 2


def test_who_arrives_is_not_kept_waiting(tiny_model):
    """A prompt goes out with the next step, and no step is sent ahead of its first token."""
    with engine(tiny_model) as one:
        old = one.add(PROMPTS[2], GREEDY)
        for _ in range(4):
            one.step()
        assert len(one.rounds.in_flight) == 1
        new = one.add([7] * 10, GREEDY)
        sent = len(one.steps())
        one.step()
        assert len(one.steps()) == sent  # it would have gone ahead without the prompt
        one.step()
        assert [step.rows for step in one.steps()[sent:]] == [11]
        assert len(new.tokens) == 1
        answers = one.finish([old, new])
    assert answers == [
        *alone(tiny_model, PROMPTS[2:3], GREEDY),
        *alone(tiny_model, [[7] * 10], GREEDY),
    ]


def test_full_pages_are_shared_once_their_tokens_are_known(tiny_model):
    """The second turn of a chat finds all full pages of the first."""
    with engine(tiny_model) as one:
        (answer,) = one.finish([one.add([3] * 12, GREEDY)])
        one.drain()
        whole = [3] * 12 + answer
        second = one.add([*whole, 9], GREEDY)
        (again,) = one.finish([second])
        assert second.cached == (len(whole) - 1) // 16 * 16
    assert [again] == alone(tiny_model, [[*whole, 9]], GREEDY)


def test_cancelled_with_a_step_ahead(tiny_model):
    expected = alone(tiny_model, PROMPTS[:2], SEEDED)
    with engine(tiny_model, blocks=16) as one:
        for rest in range(12):
            doomed = [one.add(prompt, GREEDY) for prompt in PROMPTS]
            for _ in range(1 + rest % 4):
                one.step()
            for sequence in doomed:
                one.cancel(sequence)
            assert one.finish([one.add(prompt, SEEDED) for prompt in PROMPTS[:2]]) == expected
        one.drain()
        assert one.scheduler.pages.free == 16


@pytest.mark.parametrize(
    ("uses", "cores", "left"),
    [
        ([("a", "a", "cpu", 2)], 2, False),
        ([("a", "a", "cpu", 2)], 3, True),
        ([("a", "a", "cpu", 1), ("b", "b", "cpu", 1)], 2, False),
        ([("a", "one", "cpu", 2), ("b", "one", "cpu", 1)], 3, True),  # they take turns
        ([("g", "g", "gpu", 16)], 2, True),  # its thread waits
        ([("g", "g", "gpu", 16)], 1, False),
    ],
)
def test_a_core_is_left(uses, cores, left):
    found = [SimpleNamespace(device=d, actor=a, type=kind) for d, a, kind, _ in uses]
    assert core_left(found, {d: threads for d, _, _, threads in uses}, cores) is left
