"""Devices that write to each other's memory: an actor's whole step is one run of its chain."""

import threading
import time
from pathlib import Path

import pytest
from engine.comparison import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import RaygraftError
from raygraft.kernels import find_backend
from raygraft.model import Model
from raygraft.placement.costs import DIRECT

FILE = Path(__file__).with_name("direct.py")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 30, 40]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=10, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, seed=7, max_tokens=9, ignore_eos=True)
PLACE = {"*": "a", "kind:ffn": "b"}


def devices(names, kind="Direct"):
    """Each on a GPU of its own."""
    return [
        {"name": name, "backend": f"{FILE}:{kind}", "threads": 1, "gpu": number}
        for number, name in enumerate(names)
    ]


@pytest.fixture
def counts():
    found = find_backend(f"{FILE}:Direct").counts
    found.update(dict.fromkeys(found, 0))
    return found


def test_a_step_is_one_run_of_each_actor(tiny_model_with_room, counts):
    alone = [{"name": "a", "backend": "reference", "threads": 1}]
    with LLM(tiny_model_with_room, devices=alone, runtime="in-process") as llm:
        expected = [[c.token_ids for c in llm.generate(PROMPTS, p)] for p in (PARAMS, DRAWN)]
    own = {"devices": devices("ab"), "place": PLACE, "runtime": "in-process", "half_batches": 2}
    with LLM(tiny_model_with_room, **own) as llm:
        assert {t.link for t in llm.plan.transfers} == {DIRECT, "ring"}
        found = [[c.token_ids for c in llm.generate(PROMPTS, p)] for p in (PARAMS, DRAWN)]
        counters = llm._fleet.counters()
        between = sum(t.link == DIRECT for t in llm.plan.transfers)
    assert found == expected
    steps = counters["a"].steps
    assert counts == {"put": between * steps, "taken": between * steps, "runs": 2 * steps}
    assert counters["a"].records_sent + counters["b"].records_sent == (between + 1) * steps
    assert counters["b"].bytes_sent > 0


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_cuts_compute_the_same(tiny_model, data):
    """Some devices are on one GPU, some on others, some on none."""
    model = Model(tiny_model)
    with LLM(model, runtime="in-process") as llm:
        uncut = llm.generate(PROMPTS, PARAMS)
    gpus = data.draw(st.lists(st.sampled_from([0, 1, 2, None]), min_size=2, max_size=4))
    own = []
    for name, gpu in zip("abcd", gpus, strict=False):
        backend = "reference" if gpu is None else f"{FILE}:Direct"
        place = {} if gpu is None else {"gpu": gpu}
        own.append({"name": name, "backend": backend, "threads": 1, **place})
    names = [device["name"] for device in own]
    leaves = [leaf.name for leaf in model.graph.leaves]
    place = {leaf: data.draw(st.sampled_from(names), label=leaf) for leaf in leaves}
    with LLM(model, devices=own, place=place, runtime="in-process", half_batches=1) as llm:
        cut = llm.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in cut] == [c.token_ids for c in uncut]
    for ours, theirs in zip(cut, uncut, strict=True):
        assert largest_difference(ours.logprobs, theirs.logprobs) <= 1e-5


def test_a_timeline_shows_the_chain(tiny_model_with_room):
    own = {"devices": devices("ab"), "place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, **own) as llm:
        llm.start_trace()
        llm.generate(PROMPTS, PARAMS)
        events = llm.timeline().events
    assert {event.track for event in events if event.kind == "stage"} == {"a", "b"}


def test_who_waits_on_a_device_is_interrupted(tiny_model_with_room):
    """Closing an engine in the middle of a step does not wait for what will never come."""
    slow = devices("ab", "Slow")
    llm = LLM(tiny_model_with_room, devices=slow, place=PLACE, runtime="in-process")

    def ask():
        with pytest.raises(RaygraftError):
            llm.generate(PROMPTS, DRAWN)

    stream = threading.Thread(target=ask, daemon=True)
    stream.start()
    time.sleep(0.3)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 4
    stream.join(10)
    assert not stream.is_alive()


@pytest.mark.ray
def test_devices_that_cannot_reach_each_other(tiny_model_with_room, ray_cluster):
    """Their records go another way, and it is said."""
    own = {"devices": devices("ab", "Far"), "place": PLACE}
    said = []
    with LLM(tiny_model_with_room, devices=devices("a"), runtime="in-process") as llm:
        expected = [c.token_ids for c in llm.generate(PROMPTS, DRAWN)]
    with LLM(tiny_model_with_room, **own, progress=said.append) as llm:
        assert [c.token_ids for c in llm.generate(PROMPTS, DRAWN)] == expected
        llm.move("blk.0.ffn", "a")
        assert [c.token_ids for c in llm.generate(PROMPTS, DRAWN)] == expected
    ways = [line.partition("; ")[2] for line in said if line.startswith("link a to b: there is no")]
    assert ways[:2] == [
        f"its records go through {way}, which takes longer"
        for way in ("memory of the host", "the host's processes")
    ]
