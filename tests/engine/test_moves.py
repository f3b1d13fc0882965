"""Regions that move, and devices that leave and come, while answers grow: the same tokens."""

import pytest

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import (
    ConfigurationError,
    DeviceLostError,
    PlanError,
    SelectorError,
)

DEVICES = [
    {"name": "a", "backend": "reference", "threads": 1},
    {"name": "b", "backend": "reference", "threads": 1},
]
PLACE = {"*": "a", "kind:ffn": "b"}
GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
SEEDED = SamplingParams(
    temperature=1.2, seed=11, max_tokens=120, ignore_eos=True, presence_penalty=0.3
)
REQUESTS = [([3, 1, 4, 1, 5], GREEDY), (list(range(1, 60)), SEEDED), ([9, 2], GREEDY)]


@pytest.fixture(scope="module")
def expected(tiny_model_with_room):
    with LLM(tiny_model_with_room, devices=DEVICES, place=PLACE, runtime="in-process") as llm:
        return [llm.generate([prompt], params)[0].token_ids for prompt, params in REQUESTS]


@pytest.fixture(params=["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def runtime(request):
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


def begun(llm):
    """Answers that have begun."""
    answers = [llm.submit(*request) for request in REQUESTS]
    for answer in answers:
        next(iter(answer))
    return answers


def test_a_region_moves_under_load(tiny_model_with_room, expected, runtime):
    settings = {"devices": DEVICES, "place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, **settings) as llm:
        answers = begun(llm)
        moves = [llm.move("blk.1.attn", "b"), llm.move("blk.1", "a"), llm.move("blk.0.ffn", "a")]
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.engine_thread.recovery.count == 0
        assert set(llm.plan.device_of.values()) == {"a"}
        assert all(move.regions for move in moves)
        assert [move.recomputed_tokens for move in moves] == [0, 0, 0]
        assert [llm.generate([p], q)[0].token_ids for p, q in REQUESTS] == expected


def test_a_device_is_drained_and_comes_back(tiny_model_with_room, expected, runtime):
    settings = {"devices": DEVICES, "place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, **settings) as llm:
        answers = begun(llm)
        llm.move("blk.0.attn", "b")
        assert llm.drain("b").recomputed_tokens == 0
        assert set(llm.plan.device_of.values()) == {"a"}
        llm.add(DEVICES[1])
        assert set(llm.plan.device_of.values()) == {"a", "b"}
        llm.add({**DEVICES[1], "name": "c"})
        llm.move("blk.1.ffn", "c")
        assert set(llm.plan.device_of.values()) == {"a", "b", "c"}
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.engine_thread.recovery.count == 0


def test_what_cannot_be_changes_nothing(tiny_model_with_room, expected):
    limited = {**DEVICES[1], "regions": "ffn"}
    settings = {"devices": [DEVICES[0], limited], "place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, **settings) as llm:
        before = llm.plan
        answers = begun(llm)
        with pytest.raises(PlanError):
            llm.move("blk.0.attn", "b")
        with pytest.raises(SelectorError):
            llm.move("blk.7.attn", "b")
        with pytest.raises(ConfigurationError, match="there is no device 'd'; there are a, b"):
            llm.drain("d")
        with pytest.raises(PlanError):
            llm.drain("a")
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.plan == before
        assert llm.engine_thread.engine.epoch == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_move_while_a_device_is_not_back_yet(tiny_model):
    """Found by a soak: it asked for an actor that was between its loss and its return."""
    prompt, params = REQUESTS[2][0], SamplingParams(temperature=0, max_tokens=5)
    with LLM(tiny_model, devices=DEVICES, place=PLACE) as llm:
        before = llm.generate([prompt], params)[0].token_ids
        actors = llm.engine_thread.engine.fleet._actors._actors
        away = actors.pop("b")
        with pytest.raises(DeviceLostError, match="actor b is not there"):
            llm.move("blk.0.attn", "b")
        actors["b"] = away
        llm.move("blk.0.attn", "b")
        assert llm.generate([prompt], params)[0].token_ids == before
