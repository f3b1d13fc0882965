"""Processes that stand by: one takes the place of a device that dies, and another follows."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import ray

from raygraft import LLM, SamplingParams
from raygraft.actors import spares
from raygraft.actors.spares import Spares

pytestmark = pytest.mark.ray

PLACE = {"*": "a", "kind:ffn": "b"}
DEVICES = [{"name": name, "backend": "reference", "threads": 1} for name in "ab"]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(spares, "CALM_SECONDS", 0.1)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def standing_by(own: Spares) -> list[int]:
    """The processes of the spares, when they are warm."""
    return ray.get([actor.pid.remote() for actor in own.actors])


def test_a_spare_takes_the_place_of_a_device_that_died(tiny_model, ray_cluster):
    with LLM(tiny_model, devices=DEVICES, place=PLACE, spares=1) as llm:
        actors = llm._fleet._actors
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
        eventually(lambda: actors.spares.actors)
        (spare,) = standing_by(actors.spares)
        os.kill(ray.get(actors["b"].pid.remote()), signal.SIGKILL)
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
        assert ray.get(actors["b"].pid.remote()) == spare
        eventually(lambda: actors.spares.actors)
        (another,) = standing_by(actors.spares)
        assert another != spare
        os.kill(another, signal.SIGKILL)  # a dead one is of no use, and does no harm
        os.kill(ray.get(actors["a"].pid.remote()), signal.SIGKILL)
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
        assert ray.get(actors["a"].pid.remote()) != another
        own = actors.spares
        eventually(lambda: own.actors)
    assert not own.actors


def test_none_by_default(tiny_model, ray_cluster):
    with LLM(tiny_model, devices=DEVICES, place=PLACE) as llm:
        time.sleep(0.5)
        assert not llm._fleet._actors.spares.actors
