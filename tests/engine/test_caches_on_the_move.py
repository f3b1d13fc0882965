"""Caches when a plan follows another: what stays is handed on, what moves is copied."""

from types import SimpleNamespace

import numpy as np
import pytest

from raygraft import LLM, SamplingParams
from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.journeys import Journeys
from raygraft.actors.part import part_of
from raygraft.actors.worker import DeviceWorker
from raygraft.configuration import parse_rules
from raygraft.graph.capability import Limits
from raygraft.graph.errors import DeviceFailedError
from raygraft.graph.gguf_file import MappedWeights
from raygraft.kernels.base import BackendOptions
from raygraft.kernels.reference.backend import ReferenceBackend
from raygraft.model import Model
from raygraft.placement.devices import DeviceSpec
from raygraft.planning import plan_on

PLACE = {"*": "a", "kind:ffn": "b"}
PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 90)), [9, 2]]
GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
NUMBER_BYTES = {"f32": 4, "f16": 2}

STUBBORN = """
from raygraft.kernels.reference.backend import ReferenceBackend, ReferenceRunner

class Copies(ReferenceBackend):  # pages leave and come, the cache itself does not
    def load(self, *arguments):
        runner = super().load(*arguments)
        runner.hand_on_state = lambda name: None
        return runner

class CopiesAlone(Copies):  # and there is no room for two parts
    loads_beside = False

class HandsOnAlone(ReferenceBackend):
    loads_beside = False

class FitsNothing(ReferenceBackend):
    def load(self, *arguments):
        runner = super().load(*arguments)
        runner.take_state = lambda name, state: False
        return runner

class KeepsToItself(Copies):
    def load(self, *arguments):
        runner = super().load(*arguments)
        runner.export_state = lambda name, pages: None
        return runner
"""


@pytest.fixture(scope="module")
def expected(tiny_model_with_room):
    devices = [{"name": "a", "backend": "reference", "threads": 1}]
    with LLM(tiny_model_with_room, devices=devices, runtime="in-process") as llm:
        return [done.token_ids for done in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(params=["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def runtime(request):
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


def devices(backend="reference"):
    return [{"name": name, "backend": backend, "threads": 1} for name in "ab"]


def held_bytes(llm):
    """What one block's cache holds in the pages that hold something."""
    pages = len(llm._engine.scheduler.pages.held())
    state = next(op.state for op in llm.graph.operators if op.state is not None)
    numbers = state.kv_heads * (state.key_size + state.value_size) * llm.plan.block_size
    return pages * numbers * NUMBER_BYTES[llm.plan.limits.cache_type]


# What is copied.


def test_only_what_moves_is_copied(tiny_model_with_room, expected, runtime):
    settings = {"devices": devices(), "place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, **settings) as llm:
        llm.generate(PROMPTS, GREEDY)
        block = held_bytes(llm)  # nothing runs, but pages wait to be shared
        assert block > 0
        assert llm.move("blk.1.attn", "b").copied_bytes == block
        assert llm.move("blk.0.ffn", "a").copied_bytes == 0  # both parts change
        assert llm.move("blk.0.attn", "b").copied_bytes == block
        assert llm.move("blk.1.ffn", "a").copied_bytes == 0
        assert llm.move("kind:attention", "a").copied_bytes == 2 * block
        again = llm.generate(PROMPTS, GREEDY)
        assert [done.token_ids for done in again] == expected
        assert again[1].cached_tokens > 0


@pytest.mark.ray
def test_what_stays_is_not_put_into_the_object_store(
    tiny_model_with_room, ray_cluster, monkeypatch
):
    """Every state that leaves an actor arrives at another one."""
    left = []

    def between(*arguments):
        journeys = made(*arguments)
        left.append((dict(journeys.leaving), dict(journeys.arriving)))
        return journeys

    made = Journeys.between
    monkeypatch.setattr(Journeys, "between", between)
    with LLM(tiny_model_with_room, devices=devices(), place=PLACE) as llm:
        llm.generate(PROMPTS, GREEDY)
        left.clear()
        llm.move("blk.1.attn", "b")
        llm.move("blk.0.ffn", "a")
    (one,) = [op.name for op in llm.graph.operators if op.state and op.name.startswith("blk.1")]
    assert left == [({"a": (one,)}, {"b": {"b": (one,)}}), ({}, {})]


@pytest.mark.parametrize("backend", ["Copies", "CopiesAlone", "HandsOnAlone"])
def test_backends_that_do_it_another_way(
    tiny_model_with_room, expected, runtime, tmp_path, backend
):
    assert moved(tiny_model_with_room, expected, runtime, tmp_path, backend) == [0, 0]


@pytest.mark.parametrize("backend", ["KeepsToItself", "FitsNothing"])
def test_what_cannot_be_kept_is_computed_again(
    tiny_model_with_room, expected, runtime, tmp_path, backend
):
    assert all(moved(tiny_model_with_room, expected, runtime, tmp_path, backend))


def moved(model, expected, runtime, folder, backend):
    """Tokens computed again in two moves, of which one moves no cache."""
    (folder / "stubborn.py").write_text(STUBBORN)
    own = devices(f"{folder / 'stubborn.py'}:{backend}")
    with LLM(model, devices=own, place=PLACE, runtime=runtime) as llm:
        answers = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
        next(iter(answers[0]))
        moves = [llm.move("blk.1.attn", "b"), llm.move("blk.0.ffn", "a")]
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.engine_thread.recovery.count == 0
        return [move.recomputed_tokens for move in moves]


def test_caches_of_the_cpu_backend(tiny_model_with_room, runtime):
    settings = {"devices": devices("cpu"), "place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, **settings) as llm:
        expected = [done.token_ids for done in llm.generate(PROMPTS, GREEDY)]
        answers = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
        next(iter(answers[0]))
        moves = [llm.move("blk.1.attn", "b"), llm.move("blk.0.ffn", "a")]
        moves += [llm.move("blk.0.attn", "b"), llm.move("kind:attention", "a")]
        assert [answer.wait().token_ids for answer in answers] == expected
        assert [move.recomputed_tokens for move in moves] == [0, 0, 0, 0]
        assert moves[1].copied_bytes == 0


# Loading that fails.


@pytest.mark.parametrize("failing", range(1, 4))
def test_loading_fails_in_the_middle_of_a_move(
    tiny_model_with_room, expected, monkeypatch, failing
):
    """One of the devices has taken over by then; the engine mends itself with the new plan."""
    settings = {"devices": devices(), "place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, **settings) as llm:
        answers = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
        next(iter(answers[0]))
        load, count = ReferenceBackend.load, [0]

        def flaky(self, *arguments):
            count[0] += 1
            if count[0] == failing:
                raise OSError("the board fell off")
            return load(self, *arguments)

        monkeypatch.setattr(ReferenceBackend, "load", flaky)
        with pytest.raises(DeviceFailedError, match="the board fell off"):
            llm.move("blk.1.attn", "b")
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.engine_thread.recovery.count == 1
        assert llm.move("blk.0.attn", "b").recomputed_tokens == 0
        assert [done.token_ids for done in llm.generate(PROMPTS, GREEDY)] == expected


# One device.


@pytest.fixture(scope="module")
def parts(tiny_model_with_room):
    """Two parts for device a, with one cache in common; weights for both."""
    model = Model(tiny_model_with_room)
    fleet = InProcessFleet([DeviceSpec(name, backend="reference", threads=1) for name in "ab"])
    limits = Limits(max_rows=16, context=64, cache_type="f32", max_sequences=2)
    made = []
    for place in ({"*": "a"}, {"*": "a", "blk.1": "b"}):
        plan, graph, _ = plan_on(
            fleet, model.graph, parse_rules(place), limits=limits, context=64, model="tiny"
        )
        made.append(part_of(plan, graph, "a"))
    assert len(made[0].states) == 2
    assert len(made[1].states) == 1
    return *made, MappedWeights(model.file.files, model.file.tensors)


def runner_of(worker, state):
    units = [unit for own in worker.runners.values() for unit in own]
    return next(u.runner for u in units if state in [op.name for op in u.subgraph.operators])


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_that_stays_is_the_same_memory(parts, backend, beside):
    first, second, weights = parts
    worker = DeviceWorker("a", backend, BackendOptions(threads=1))
    worker.make_room(first, (), ())
    worker.load(first, weights)
    state, pages = second.states[0], [0, 3]
    written = runner_of(worker, state)
    cache = written.hand_on_state(state)
    content = tuple(
        np.ones_like(array) * number
        for number, array in enumerate(written.export_state(state, pages), start=1)
    )
    if beside:
        worker.prepare(second, weights)
    written.import_state(state, pages, content)  # the old part goes on until the switch
    worker.make_room(second, [state], pages)
    assert worker.load(second, weights)
    new = runner_of(worker, state)
    assert new is not written
    assert new.hand_on_state(state) is cache
    for found, put in zip(new.export_state(state, pages), content, strict=True):
        np.testing.assert_array_equal(found, put)


def loaded(backend, part, weights, state):
    worker = DeviceWorker("a", backend, BackendOptions(threads=1))
    worker.make_room(part, (), ())
    worker.load(part, weights)
    return runner_of(worker, state)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_of_another_size_is_refused(parts, backend):
    part, _, weights = parts
    state = part.states[0]
    runner, smaller = (loaded(backend, part, weights, state) for _ in range(2))
    assert runner.take_state(state, smaller.hand_on_state(state))
    smaller.allocate_state(part.cache_blocks - 1, part.block_size)
    own = runner.hand_on_state(state)
    assert not runner.take_state(state, smaller.hand_on_state(state))
    assert not runner.take_state(state, object())
    assert runner.hand_on_state(state) is own


# Where states go.


def actor_parts(**actors):
    """actor = {device: states}."""
    return {
        actor: SimpleNamespace(parts={d: SimpleNamespace(states=own) for d, own in held.items()})
        for actor, held in actors.items()
    }


def test_where_states_go():
    before = actor_parts(one={"a": ("x", "y"), "b": ("z",)}, two={"c": ("v", "w")})
    after = actor_parts(one={"a": ("x", "z"), "b": ()}, three={"d": ("v", "y")}, two={"c": ("w",)})
    journeys = Journeys.between(before, after, [4, 7])
    assert {actor: own.names for actor, own in journeys.staying.items()} == {
        "one": {"a": ("x",)}, "three": {}, "two": {"c": ("w",)},
    }  # fmt: skip
    assert journeys.arriving == {"one": {"a": ("z",)}, "three": {"d": ("v", "y")}}
    assert journeys.leaving == {"one": ("y", "z"), "two": ("v",)}
    assert all(own.pages == [4, 7] for own in journeys.staying.values())


@pytest.mark.parametrize("pages", [None, []])
def test_nobody_travels_with_empty_hands(pages):
    parts = actor_parts(one={"a": ("x",)}), actor_parts(two={"b": ("x",)})
    assert Journeys.between(*parts, pages) == Journeys({}, {}, {})
