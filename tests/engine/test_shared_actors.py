"""Devices that share an actor: the same tokens, and nothing is sent between them."""

import importlib
import os
import signal
import sys
import time
from collections import Counter

import pytest
import ray
from engine.mortal import MORTAL

from raygraft import LLM, SamplingParams
from raygraft.actors import in_process
from raygraft.actors.wiring import Wiring
from raygraft.graph.errors import CapacityError, DeviceFailedError, DeviceLostError, PlanError
from raygraft.kernels.reference.backend import ReferenceRunner
from raygraft.placement.devices import ENGINE

PLACE = {"*": "a", "kind:ffn": "b"}
THREE = {"*": "a", "kind:ffn": "b", "blk.1.attn.core": "c", "head": "c"}
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 60)), [9, 2]]


def devices(*names, backend="reference", **more):
    """Devices of which a and b share an actor."""
    shared = {"a": {"actor": "both"}, "b": {"actor": "both"}}
    alike = {"backend": backend, "threads": 1, **more}
    return [{"name": name, **alike, **shared.get(name, {})} for name in names]


@pytest.fixture(scope="module")
def expected(tiny_model_with_room):
    """Of the uncut model."""
    alone = [{"name": "a", "backend": "reference", "threads": 1}]
    with LLM(tiny_model_with_room, devices=alone, runtime="in-process") as llm:
        return {
            params.max_tokens: [done.token_ids for done in llm.generate(PROMPTS, params)]
            for params in (GREEDY, LONG)
        }


@pytest.fixture(params=["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def runtime(request):
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.fixture
def linked(monkeypatch):
    """Pairs of actors that a link was made between."""
    pairs = []
    local_link, join = in_process.local_link, Wiring._join

    def watched_link(slots, name):
        pairs.append(tuple(name.split(" to ")))
        return local_link(slots, name)

    def watched_join(self, openings):
        pairs.extend(openings)
        return join(self, openings)

    monkeypatch.setattr(in_process, "local_link", watched_link)
    monkeypatch.setattr(Wiring, "_join", watched_join)
    return pairs


def tokens(llm, params=GREEDY):
    return [done.token_ids for done in llm.generate(PROMPTS, params)]


def test_nothing_is_sent_between_them(tiny_model_with_room, expected, runtime, linked):
    model, own = tiny_model_with_room, devices("a", "b")
    with LLM(model, devices=own, place=PLACE, runtime=runtime) as llm:
        assert tokens(llm) == expected[60]
        assert {*linked} == {(ENGINE, "both"), ("both", ENGINE)}
        assert Counter(transfer.link for transfer in llm.plan.transfers) == {"shared": 4, "ring": 1}
        assert [(use.device, use.actor) for use in llm.plan.devices] == [
            ("a", "both"), ("b", "both"),
        ]  # fmt: skip
        counters = llm._fleet.counters()
        end = time.monotonic() + 5
        while counters["a"].records_sent < counters["a"].steps and time.monotonic() < end:
            counters = llm._fleet.counters()  # a record is counted after it has gone
        assert counters["a"].records_sent == counters["a"].steps == counters["b"].steps > 0
        assert counters["b"].records_sent == 0
        assert min(own.run_seconds for own in counters.values()) > 0
        assert llm.timings().hops_per_token == 1


@pytest.mark.parametrize("half_batches", [1, 2])
def test_others_live_elsewhere(tiny_model_with_room, expected, runtime, linked, half_batches):
    settings = {"place": THREE, "runtime": runtime, "half_batches": half_batches}
    with LLM(tiny_model_with_room, devices=devices("a", "b", "c"), **settings) as llm:
        assert tokens(llm) == expected[60]
        assert {*linked} == {
            (ENGINE, "both"), (ENGINE, "c"), ("both", "c"), ("c", "both"), ("both", ENGINE),
        }  # fmt: skip


def test_unlike_backends_in_one_actor(tiny_model_with_room, expected):
    first, second = devices("a", "b")
    own = [first, {**second, "backend": "cpu"}]
    settings = {"place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, devices=own, **settings) as llm:
        assert tokens(llm) == expected[60]


def test_a_timeline_has_a_track_for_each(tiny_model_with_room):
    settings = {"place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, devices=devices("a", "b"), **settings) as llm:
        llm.start_trace()
        llm.generate(PROMPTS, GREEDY)
        events = llm.timeline().events
    stages = {(event.track, event.name) for event in events if event.kind == "stage"}
    assert ("b", "blk.0.ffn.gate_up to blk.0.ffn.down") in stages
    assert {track for track, _ in stages} == {"a", "b"}
    assert {(event.track, event.peer) for event in events if event.kind == "send"} == {
        ("a", ENGINE)
    }


# Two devices on GPUs, without one: the backend says what a GPU would.

BOARD = """
from dataclasses import replace
from raygraft.kernels.reference.backend import ReferenceBackend

class Board(ReferenceBackend):
    def describe(self):
        return replace(super().describe(), type="gpu", memory_free=1000 * 2**20,
                       hardware=f"GPU {self.options.gpu}")
"""


@pytest.fixture
def board(tmp_path):
    (tmp_path / "board.py").write_text(BOARD)
    return f"{tmp_path / 'board.py'}:Board"


def test_devices_on_one_gpu_share_an_actor_and_its_memory(tiny_model, board, runtime):
    own = [
        {"name": "a", "backend": board, "gpu": 0},
        {"name": "b", "backend": board, "gpu": 0, "memory": "200MiB"},
        {"name": "c", "backend": board, "gpu": 1},
        {"name": "d", "backend": board, "gpu": 0},
        {"name": "e", "backend": board, "gpu": 0, "actor": "apart"},
    ]
    with LLM(tiny_model, devices=own, place={"*": "a", "blk.1": "d"}, runtime=runtime) as llm:
        uses = {use.device: use for use in llm.plan.devices}
        assert {name: use.actor for name, use in uses.items()} == {
            "a": "a", "b": "a", "c": "c", "d": "a", "e": "apart",
        }  # fmt: skip
        mib = {name: use.memory // 2**20 for name, use in uses.items()}
        assert mib == {"a": 200, "b": 200, "c": 800, "d": 200, "e": 200}
        assert llm.plan.where(uses["a"]).endswith("with b and d")
        assert llm._fleet.describe()["c"][1].hardware == "GPU 1"
        assert llm.plan.hops == 1


# Losses, moves.


def pid_of(llm, actor):
    return ray.get(llm._fleet._actors[actor].pid.remote())


@pytest.mark.ray
@pytest.mark.parametrize("policy", ["replace", "replan"])
def test_a_killed_actor_takes_all_its_devices_along(
    tiny_model_with_room, ray_cluster, expected, policy
):
    settings = {"place": THREE, "on_loss": policy}
    with LLM(tiny_model_with_room, devices=devices("a", "b", "c"), **settings) as llm:
        answers = [llm.submit(prompt, LONG) for prompt in PROMPTS]
        for _, answer in zip(range(2), answers, strict=False):
            next(iter(answer))
        before = pid_of(llm, "both")
        os.kill(before, signal.SIGKILL)
        assert [answer.wait().token_ids for answer in answers] == expected[300]
        assert llm.engine_thread.recovery.count == 1
        used = set(llm.plan.device_of.values())
        assert used == ({"a", "b", "c"} if policy == "replace" else {"c"})
        if policy == "replace":
            assert pid_of(llm, "both") != before
        else:  # they come back one by one, into one actor
            llm.add(devices("b")[0])
            both = pid_of(llm, "both")
            llm.add(devices("a")[0])
            assert pid_of(llm, "both") == both
            assert tokens(llm, LONG) == expected[300]
            assert set(llm.plan.device_of.values()) == {"a", "b", "c"}


@pytest.mark.ray
def test_a_killed_actor_and_policy_fail(tiny_model_with_room, ray_cluster):
    settings = {"place": PLACE, "on_loss": "fail"}
    with LLM(tiny_model_with_room, devices=devices("a", "b"), **settings) as llm:
        tokens(llm)
        os.kill(pid_of(llm, "both"), signal.SIGKILL)
        with pytest.raises(DeviceLostError, match=r"devices a and b on node .* was lost"):
            tokens(llm)


@pytest.mark.ray
@pytest.mark.parametrize("what", ["start kill", "load kill", "decode kill"])
def test_the_second_device_ends_the_process(
    tiny_model_with_room, ray_cluster, expected, tmp_path, what
):
    """While it starts anew beside the other, while it loads, while it computes."""
    fate = tmp_path / "fate"
    (tmp_path / "board.py").write_text(MORTAL.format(fate=str(fate)))
    first, second = devices("a", "b")
    own = [first, {**second, "backend": f"{tmp_path / 'board.py'}:Mortal"}]
    with LLM(tiny_model_with_room, devices=own, place=PLACE) as llm:
        answers = [llm.submit(prompt, LONG) for prompt in PROMPTS]
        next(iter(answers[0]))
        fate.write_text(what)
        if what != "decode kill":
            os.kill(pid_of(llm, "both"), signal.SIGKILL)
        assert [answer.wait().token_ids for answer in answers] == expected[300]
        assert not fate.exists()
        assert set(llm.plan.device_of.values()) == {"a", "b"}


def test_a_device_that_fails_takes_its_neighbour_along(tiny_model_with_room, expected, monkeypatch):
    failures = [9]
    run = ReferenceRunner.run

    def flaky(self, step, inputs):
        failures[0] -= 1
        if failures[0] == 0:
            raise OSError("the board fell off")
        return run(self, step, inputs)

    monkeypatch.setattr(ReferenceRunner, "run", flaky)
    settings = {"place": PLACE, "runtime": "in-process"}
    with LLM(tiny_model_with_room, devices=devices("a", "b"), **settings) as llm:
        assert tokens(llm) == expected[60]
        assert llm.engine_thread.recovery.count == 1


def test_regions_move_inside_of_an_actor_and_out_of_it(tiny_model_with_room, expected, runtime):
    settings = {"place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, devices=devices("a", "b", "c"), **settings) as llm:
        answers = [llm.submit(prompt, LONG) for prompt in PROMPTS]
        next(iter(answers[0]))
        moves = [llm.move("blk.0.attn", "b")]
        assert llm.plan.hops == 1
        moves += [llm.move("blk.0.attn", "c"), llm.move("blk.1.attn", "c"), llm.move("blk.0", "b")]
        assert [answer.wait().token_ids for answer in answers] == expected[300]
        assert llm.engine_thread.recovery.count == 0
        assert [move.recomputed_tokens for move in moves] == [0, 0, 0, 0]


def test_one_of_them_is_drained_and_comes_back(tiny_model_with_room, expected, runtime):
    settings = {"place": PLACE, "runtime": runtime}
    with LLM(tiny_model_with_room, devices=devices("a", "b"), **settings) as llm:
        before = pid_of(llm, "both") if runtime == "ray" else None
        answers = [llm.submit(prompt, LONG) for prompt in PROMPTS]
        next(iter(answers[0]))
        llm.drain("b")
        assert set(llm.plan.device_of.values()) == {"a"}
        with pytest.raises(PlanError, match="no device left"):
            llm.drain("a")
        llm.add(devices("b")[0])
        assert set(llm.plan.device_of.values()) == {"a", "b"}
        assert [answer.wait().token_ids for answer in answers] == expected[300]
        assert llm.engine_thread.recovery.count == 0
        assert (pid_of(llm, "both") if runtime == "ray" else None) == before


# Runners that can be chained, without a GPU.

CHAINS = """
from raygraft.kernels.reference.backend import ReferenceBackend, ReferenceRunner

SEEN = []

class Chain(ReferenceRunner):
    def __init__(self, runners, outputs):
        self.runners, self.outputs = runners, outputs
    def run(self, step, inputs):
        SEEN.append((len(self.runners), set(inputs), set(self.outputs)))
        values = dict(inputs)
        for runner in self.runners:
            needed = {name: values[name] for name in runner._subgraph.inputs}
            values.update(ReferenceRunner.run(runner, step, needed))
        return {name: values[name] for name in self.outputs}

class Link(ReferenceRunner):
    def leads_to(self, following):
        return isinstance(following, Link)
    def chain(self, following, outputs):
        return Chain([self, *following], outputs)

class Chained(ReferenceBackend):
    def load(self, subgraph, weights, limits):
        runner = super().load(subgraph, weights, limits)
        runner.__class__ = Link
        return runner
"""


@pytest.fixture
def chained(tmp_path, monkeypatch):
    (tmp_path / "chained_board.py").write_text(CHAINS)
    (tmp_path / "board.py").write_text("from chained_board import Chained\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "chained_board", raising=False)
    module = importlib.import_module("chained_board")
    module.PATH = f"{tmp_path / 'board.py'}:Chained"
    return module


@pytest.mark.parametrize("half_batches", [1, 2])
def test_stages_without_a_record_between_them_run_as_one(
    tiny_model_with_room, expected, chained, half_batches
):
    settings = {"runtime": "in-process", "half_batches": half_batches}
    own = devices("a", "b", backend=chained.PATH)
    with LLM(tiny_model_with_room, devices=own, place=PLACE, **settings) as llm:
        assert tokens(llm) == expected[60]
        assert len(llm.plan.stages) == 5
        ((stages, inputs, outputs),) = {(n, *map(frozenset, more)) for n, *more in chained.SEEN}
        assert (stages, inputs) == (5, frozenset())
        assert outputs == {"sample.id", "sample.logprob", "sample.top_ids", "sample.top_logprobs"}
        chained.SEEN.clear()
        llm.start_trace()  # which shows stage by stage
        assert tokens(llm) == expected[60]
        assert len(chained.SEEN) <= 1


@pytest.mark.parametrize("half_batches", [1, 2])
def test_a_chain_ends_where_a_record_comes_or_goes(
    tiny_model_with_room, expected, chained, half_batches
):
    own = [*devices("a", "b", backend=chained.PATH), *devices("c")]
    settings = {"runtime": "in-process", "half_batches": half_batches}
    with LLM(tiny_model_with_room, devices=own, place=THREE, **settings) as llm:
        assert tokens(llm) == expected[60]
        turns = [stage.device for stage in llm.plan.stages]
        assert turns == ["a", "b", "a", "c", "a", "b", "c", "a"]
        assert {n for n, _, _ in chained.SEEN} == {3, 2}  # until c has the core; from then on


def test_values_that_are_needed_later_leave_the_chain(tiny_model_with_room, expected, chained):
    """The residual of block 1 waits for its core, which runs on another device of the actor."""
    own = devices("a", "b", backend=chained.PATH)
    own.append({"name": "c", "backend": "reference", "threads": 1, "actor": "both"})
    settings = {"runtime": "in-process"}
    with LLM(tiny_model_with_room, devices=own, place=THREE, **settings) as llm:
        assert tokens(llm) == expected[60]
        assert llm.plan.hops == 1
        first = next(outputs for n, _, outputs in chained.SEEN if n == 3)
        assert len(first) == 4  # q, k, v, and the residual
        assert all(name.startswith("blk.") for name in first)


# Errors.


def test_a_device_without_room_says_what_was_needed(tiny_model_with_room, tmp_path, runtime):
    (tmp_path / "full.py").write_text(
        "from raygraft.graph.errors import CapacityError\n"
        "from raygraft.kernels.reference.backend import ReferenceBackend\n"
        "class Full(ReferenceBackend):\n"
        "    def load(self, *given):\n"
        "        raise CapacityError('GPU 1 (X): a needs 2.00 GiB; 1.00 of 8.00 GiB are free')\n"
    )
    own = [*devices("a"), *devices("b", backend=f"{tmp_path / 'full.py'}:Full")]
    with pytest.raises(CapacityError) as raised:
        LLM(tiny_model_with_room, devices=own, place=PLACE, runtime=runtime)
    assert str(raised.value) == (
        "device b failed to load blk.0.ffn.gate_up to blk.0.ffn.down: "
        "GPU 1 (X): a needs 2.00 GiB; 1.00 of 8.00 GiB are free"
    )


def test_an_error_names_the_device_of_the_turn(tiny_model_with_room, monkeypatch):
    def fails(self, step, inputs):
        if "blk.1.ffn" in str(self._subgraph.operators[0].name):
            raise OSError("too hot")
        return run(self, step, inputs)

    run = ReferenceRunner.run
    monkeypatch.setattr(ReferenceRunner, "run", fails)
    settings = {"place": PLACE, "runtime": "in-process", "on_loss": "fail"}
    with (
        LLM(tiny_model_with_room, devices=devices("a", "b"), **settings) as llm,
        pytest.raises(
            DeviceFailedError, match=r"device b failed in blk\.1\.ffn\.gate_up to .* too hot"
        ),
    ):
        tokens(llm)
