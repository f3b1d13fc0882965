"""Several steps in one header, where devices have all cores: the same answers, fewer waits."""

import pytest
from engine.comparison import largest_difference
from engine.engines import ATTENTION_AND_FFN, GREEDY, alone, engine

from raygraft import LLM, SamplingParams
from raygraft.actors import rounds
from raygraft.actors.header import steps_of
from raygraft.kernels.cpu.runner import CpuRunner
from raygraft.placement.schedule import BURST_STEPS

PROMPTS = [[5 * n + 1, 5 * n + 2, 5 * n + 3][: 1 + n % 3] for n in range(5)]
SEEDED = SamplingParams(temperature=1.1, top_k=20, seed=5, max_tokens=20, ignore_eos=True)
CUT = {"*": "a", "kind:ffn": "b"}
CUTS = {
    "attention": ATTENTION_AND_FFN,
    "three": {"*": "a", "kind:attention": "b", "blk.1.ffn": "c"},
    "skipped": {"*": "a", "kind:core": "b"},
}


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """None is left for the engine; and steps are as short as a test needs them."""
    monkeypatch.setattr("raygraft.actors.in_process.os.cpu_count", lambda: 1)
    monkeypatch.setattr(rounds, "BURST_SECONDS", 60.0)


def bursts(watched):
    return [steps_of(header) for header in watched.headers]


@pytest.mark.parametrize("place", [None, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_bursts_change_no_token(tiny_model, params, place):
    prompts = PROMPTS if place is None else PROMPTS[:1]  # a cut divides several sequences
    with engine(tiny_model, place=place) as one:
        answers = one.finish([one.add(prompt, params) for prompt in prompts])
        counts = bursts(one)
        assert sum(counts) == params.max_tokens == one.rounds.step
        assert max(counts) == BURST_STEPS
        assert not one.in_flight
        assert not any((step.tokens < 0).any() for step in one.steps())
        counters = one.fleet.counters()
        assert {own.steps for own in counters.values()} == {params.max_tokens}
    assert answers == alone(tiny_model, prompts, params)


@pytest.mark.parametrize("half_batches", [1, 2, None])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("cut", CUTS)
def test_half_batches_go_on_together(tiny_model, cut, params, half_batches):
    with engine(tiny_model, place=CUTS[cut], half_batches=half_batches) as split:
        answers = split.finish([split.add(prompt, params) for prompt in PROMPTS])
        rounds_of = {}
        for header in split.headers:
            if header.half_batch == 0:
                latest = rounds_of[header.step] = []
            latest.append((header.step, steps_of(header)))
        assert max(steps for own in rounds_of.values() for _, steps in own) == BURST_STEPS
        if half_batches:
            assert {len(own) for own in rounds_of.values()} == {half_batches}
        for first, own in rounds_of.items():  # all of a round go on for as many steps
            assert own == [(first + n * own[0][1], own[0][1]) for n in range(len(own))]
    assert answers == alone(tiny_model, PROMPTS, params)


def test_a_round_that_was_sent_in_part_is_completed(tiny_model):
    """As before a move: the other half-batch has no rows, in as many steps."""
    with engine(tiny_model, place=ATTENTION_AND_FFN, half_batches=2) as split:
        sequences = [split.add(prompt, GREEDY) for prompt in PROMPTS]
        while not any(steps_of(header) > 1 for header in split.headers):
            split.step()
        assert [sent.half_batch for sent in split.rounds.in_flight][-1] == 0
        empty = len(split.headers)
        while split.in_flight:
            split.step(sends=False)
        assert [len(header.tensors) for header in split.headers[empty:]] == [0]
        answers = split.finish(sequences)
    assert answers == alone(tiny_model, PROMPTS, GREEDY)


def test_an_end_in_one_half_batch(tiny_model):
    """It leaves with the burst; the other goes on."""
    free = alone(tiny_model, PROMPTS, GREEDY)
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=(free[0][3], free[4][6])
    )
    expected = alone(tiny_model, PROMPTS, params)
    assert {len(answer) for answer in expected} > {16}
    with engine(tiny_model, place=ATTENTION_AND_FFN, half_batches=2) as split:
        assert split.finish([split.add(prompt, params) for prompt in PROMPTS]) == expected
        split.drain()
        assert split.scheduler.pages.free == split.scheduler.pages.blocks


def test_a_burst_is_as_long_as_its_time(tiny_model, monkeypatch):
    monkeypatch.setattr(rounds, "BURST_SECONDS", 0.0)
    with engine(tiny_model) as one:
        one.finish([one.add(prompt, GREEDY) for prompt in PROMPTS])
        assert set(bursts(one)) == {1}


def test_it_ends_before_the_first_sequence_does(tiny_model):
    short = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    with engine(tiny_model) as one:
        sequences = [one.add(PROMPTS[0], short), one.add(PROMPTS[1], GREEDY)]
        one.finish(sequences)
        assert bursts(one) == [1, 1, 5, 8, 1]  # prompts, then a step to see how long one takes
        assert [step.rows for step in one.steps()] == [3, 2, 2, 1, 1]


def test_an_end_that_nobody_foresaw(tiny_model):
    """What is drawn after it goes nowhere; its pages are given back when the burst is over."""
    (free,) = alone(tiny_model, PROMPTS[:1], GREEDY)
    first = next(n for n, token in enumerate(free) if n > 1 and token not in free[:n])
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=(free[first],)
    )
    with engine(tiny_model, blocks=2) as one:
        sequence = one.add(PROMPTS[0], params)
        assert one.finish([sequence]) == [free[: first + 1]]
        assert one.in_flight
        assert one.scheduler.pages.free < 2
        while one.busy:
            assert one.step() == []
        assert one.scheduler.pages.free == 2
        (again,) = one.finish([one.add(PROMPTS[0], GREEDY)])
    assert again == free


def test_pages_for_a_burst_are_taken_before_it(tiny_model):
    """Where there are too few it is shorter, and nobody is set aside for it."""
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine(tiny_model, blocks=3) as one:
        answers = one.finish([one.add(PROMPTS[0], long)])
        assert one.scheduler.set_aside == 0
    with engine(tiny_model, blocks=4) as small:
        two = small.finish([small.add(PROMPTS[0], long), small.add(PROMPTS[1], long)])
        small.drain()
        assert small.scheduler.pages.free == 4
    assert answers == two[:1] == alone(tiny_model, PROMPTS[:1], long)
    assert two[1:] == alone(tiny_model, PROMPTS[1:2], long)


@pytest.mark.parametrize(
    "waits",
    [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, presence_penalty=1.0),
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3),
    ],
)
def test_who_counts_tokens_goes_step_by_step(tiny_model, waits):
    with engine(tiny_model) as one:
        answers = one.finish([one.add(PROMPTS[0], waits), one.add(PROMPTS[1], GREEDY)])
        counts = bursts(one)
        assert set(counts[:12]) == {1}
    assert answers == [
        *alone(tiny_model, PROMPTS[:1], waits),
        *alone(tiny_model, PROMPTS[1:2], GREEDY),
    ]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3, "top_p": 0.9}])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_backend_runs_a_burst_by_itself(tiny_model, monkeypatch, threads, params):
    """Rows are sampled, and the next step begun, in compiled code."""
    several = []
    run_several = CpuRunner.run_several

    def counted(self, step, steps):
        found = run_several(self, step, steps)
        several.append(found is not None)
        return found

    monkeypatch.setattr(CpuRunner, "run_several", counted)
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=3, **params)
    devices = [{"name": "a", "backend": "reference", "threads": 1}]
    with LLM(tiny_model, devices=devices, runtime="in-process") as llm:
        expected = llm.generate(PROMPTS, params)
    devices = [{"name": "a", "backend": "cpu", "threads": threads}]
    with LLM(tiny_model, devices=devices, runtime="in-process") as llm:
        found = llm.generate(PROMPTS, params)
    assert set(several) == {True}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert largest_difference(ours.logprobs, theirs.logprobs) <= 1e-3
