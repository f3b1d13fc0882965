"""Half-batches in flight: the same tokens, in fewer waits."""

from itertools import pairwise

import pytest
from engine.comparison import answer, largest_difference
from engine.engines import ATTENTION_AND_FFN, GREEDY, HALVES, alone, engine

from raygraft import LLM, SamplingParams
from raygraft.actors.half_batches import (
    KEPT_STEPS,
    MOST_KEPT_STEPS,
    TRIAL_STEPS,
    HalfBatches,
)
from raygraft.actors.header import step_of

PROMPTS = [[5 * n + 1, 5 * n + 2, 5 * n + 3][: 1 + n % 3] for n in range(7)]
SEEDED = SamplingParams(
    temperature=1.1, top_k=20, seed=5, max_tokens=20, ignore_eos=True, repetition_penalty=1.2
)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("place", [ATTENTION_AND_FFN, HALVES], ids=["kinds", "halves"])
def test_half_batches_change_no_token(tiny_model, place, params):
    with engine(tiny_model, place=place, half_batches=2) as split:
        answers = split.finish([split.add(prompt, params) for prompt in PROMPTS])
        assert {header.half_batch for header in split.headers} == {0, 1}
        decoding = [step for step in split.steps() if step.rows == len(step.block_tables)]
        assert max(step.rows for step in decoding) == 4  # of seven
    assert answers == alone(tiny_model, PROMPTS, params)


def test_both_half_batches_are_in_flight_at_once(tiny_model):
    with engine(tiny_model, place=HALVES, half_batches=2) as split:
        sequences = [split.add(prompt, GREEDY) for prompt in PROMPTS]
        split.step()
        in_flight = []
        while not all(sequence.finished for sequence in sequences):
            split.step()
            in_flight.append(len(split.rounds.in_flight))
        assert set(in_flight[:-2]) == {1}  # while another one is handed over


def test_a_long_prompt_goes_through_both_halves_at_once(tiny_model):
    prompt = list(range(1, 101))
    with engine(tiny_model, place=HALVES, half_batches=2) as split:
        answers = split.finish([split.add(prompt, GREEDY)])
        assert [step.rows for step in split.steps()][:4] == [32, 32, 32, 4]
        assert [header.half_batch for header in split.headers][:4] == [0, 1, 0, 1]
    assert answers == alone(tiny_model, [prompt], GREEDY)


def test_a_half_batch_without_rows_is_a_header_without_arrays(tiny_model):
    with engine(tiny_model, place=HALVES, half_batches=2) as split:
        split.finish([split.add([1, 2], GREEDY)])
        assert [step_of(header) is None for header in split.headers[:4]] == [False, True] * 2


def test_rounds_grow_and_shrink(tiny_model):
    sizes = iter([1, 2, 2, 1, 2, 1] * 20)
    with engine(tiny_model, place=ATTENTION_AND_FFN) as split:
        split.rounds.sizes.choose = lambda decoding, prompt_rows: next(sizes)
        answers = split.finish([split.add(prompt, SEEDED) for prompt in PROMPTS])
        split.drain()
    assert answers == alone(tiny_model, PROMPTS, SEEDED)


def test_a_plan_on_one_device_is_never_split(tiny_model):
    with engine(tiny_model, half_batches=2) as whole:
        whole.finish([whole.add(prompt, GREEDY) for prompt in PROMPTS])
        assert {header.transfer for header in whole.headers} == {1}


def test_cancelled_while_both_are_in_flight(tiny_model):
    """Pages are not handed out while a step that writes to them is on its way."""
    expected = alone(tiny_model, PROMPTS[:2], SEEDED)
    with engine(tiny_model, place=HALVES, half_batches=2, blocks=16) as split:
        for _ in range(30):
            doomed = [split.add(prompt, GREEDY) for prompt in PROMPTS]
            for _ in range(3):
                split.step()
            flying = [chunk.sequence for sent in split.rounds.in_flight for chunk in sent.chunks]
            assert flying
            free = split.scheduler.pages.free
            for sequence in flying:
                split.cancel(sequence)
            assert split.scheduler.pages.free == free
            answers = split.finish([split.add(prompt, SEEDED) for prompt in PROMPTS[:2]])
            assert answers == expected
            for sequence in doomed:
                split.cancel(sequence)
        split.drain()
        assert split.scheduler.pages.free == 16


class Clock:
    """Rounds of a device for which splitting pays, or not."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def run(self, rounds, halves, decoding):
        chosen = []
        for _ in range(rounds):
            chosen.append(halves.choose(decoding, 0))
            self.now += self.seconds[chosen[-1]]
        return chosen


@pytest.mark.parametrize(("seconds", "best"), [({1: 4.0, 2: 3.0}, 2), ({1: 4.0, 2: 6.0}, 1)])
def test_the_faster_way_is_kept_and_tried_again(seconds, best):
    clock = Clock(seconds)
    halves = HalfBatches(2, clock=lambda: clock.now)
    trial = clock.run(4 * TRIAL_STEPS, halves, 8)
    assert {*trial[: 2 * TRIAL_STEPS]} == {1, 2}
    assert set(trial[-TRIAL_STEPS:]) == {best}
    clock.seconds = {1: 1.0, 2: 1.0 if best == 1 else 2.0}
    clock.seconds[1 if best == 2 else 2] = 0.5
    later = clock.run(KEPT_STEPS + 4 * TRIAL_STEPS, halves, 8)
    assert later[0] == best
    assert later[-1] == 3 - best


def test_a_winner_is_kept_longer_each_time():
    """A trial that was won by chance is soon forgotten; a sure winner is seldom tried again."""
    clock = Clock({1: 4.0, 2: 3.0})
    chosen = clock.run(4 * MOST_KEPT_STEPS, HalfBatches(2, clock=lambda: clock.now), 8)
    trials = [n for n in range(1, len(chosen)) if chosen[n] == 1 and chosen[n - 1] == 2]
    between = [later - earlier for earlier, later in pairwise(trials)]
    assert KEPT_STEPS < between[0] < 2 * KEPT_STEPS
    assert all(a < b for a, b in pairwise(between[:4]))
    assert MOST_KEPT_STEPS < between[-1] < MOST_KEPT_STEPS + 4 * TRIAL_STEPS


def test_one_sequence_is_never_split():
    assert Clock({1: 1.0, 2: 0.5}).run(50, HalfBatches(2), 1) == [1] * 50


@pytest.mark.ray
@pytest.mark.parametrize("split", [None, 2])
def test_across_ray_actors(demo_model, oracle_cases, ray_cluster, split):
    cases = [case for case in oracle_cases if case["name"] != "long"][:6]
    place = {"kind:attention": "a", "kind:ffn": "b"}
    with LLM(demo_model, devices=["a:threads=1"], runtime="in-process") as llm:
        whole = answer(llm, cases)
    with LLM(
        demo_model, devices=["a:threads=1", "b:threads=1"], place=place, half_batches=split
    ) as llm:
        completions = answer(llm, cases)
        assert llm.timings().half_batches > 0
    for case, ours, theirs in zip(cases, completions, whole, strict=True):
        assert ours.token_ids == case["tokens"], case["name"]
        assert largest_difference(ours.logprobs, theirs.logprobs) <= 1e-4, case[
            "name"
        ]  # batches of another shape
