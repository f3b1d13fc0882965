"""What is lost is computed again: the same tokens after a device has failed, died or hung."""

import importlib
import os
import signal
import sys
import threading
from dataclasses import replace

import pytest
import ray

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import DeviceFailedError, DeviceLostError, LinkError, RunError

PLACE = {"*": "a", "kind:ffn": "b"}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(
    temperature=1.2, seed=11, max_tokens=40, ignore_eos=True, presence_penalty=0.3
)
PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 60)), [9, 2]]

FLAKY = """
from raygraft.kernels.reference.backend import ReferenceBackend

FAILURES = []  # steps after which a run fails, once each
RUNS = 0
FAILED_LOADS = 0  # so many more loads fail

class Flaky(ReferenceBackend):
    def load(self, subgraph, weights, limits):
        global FAILED_LOADS
        if FAILED_LOADS:
            FAILED_LOADS -= 1
            raise OSError("the board is warming up")
        runner = super().load(subgraph, weights, limits)
        run = runner.run
        def flaky(step, inputs):
            global RUNS
            RUNS += 1
            if FAILURES and RUNS >= FAILURES[0]:
                FAILURES.pop(0)
                raise OSError("the board fell off")
            return run(step, inputs)
        runner.run = flaky
        return runner
"""


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """A backend module whose runs can be made to fail."""
    (tmp_path / "flaky_board.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("flaky_board", None)
    module = importlib.import_module("flaky_board")
    (tmp_path / "board.py").write_text("from flaky_board import Flaky\n")
    module.PATH = f"{tmp_path / 'board.py'}:Flaky"
    return module


def devices(second="reference"):
    return [
        {"name": "a", "backend": "reference", "threads": 1},
        {"name": "b", "backend": second, "threads": 1},
    ]


@pytest.fixture(scope="module")
def expected(tiny_model):
    with LLM(tiny_model, devices=devices(), place=PLACE, runtime="in-process") as llm:
        return {id(p): [c.token_ids for c in llm.generate(PROMPTS, p)] for p in (GREEDY, SEEDED)}


@pytest.mark.parametrize("policy", ["replace", "replan"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_backend_that_raises(tiny_model, expected, flaky, policy, params):
    settings = {"devices": devices(flaky.PATH), "place": PLACE, "on_loss": policy}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        flaky.FAILURES[:] = [9] if policy == "replan" else [9, 30, 60]
        tokens = [c.token_ids for c in llm.generate(PROMPTS, params)]
        assert tokens == expected[id(params)]
        assert not flaky.FAILURES
        thread = llm.engine_thread
        assert thread.recovery.count == thread.engine.epoch - 1 == (1 if policy == "replan" else 3)
        assert set(llm.plan.device_of.values()) == ({"a"} if policy == "replan" else {"a", "b"})
        assert [c.token_ids for c in llm.generate(PROMPTS, params)] == tokens


def test_a_stream_goes_on_where_it_was(tiny_model, expected, flaky):
    settings = {"devices": devices(flaky.PATH), "place": PLACE}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        tokens = [*next(stream).token_ids]
        flaky.FAILURES[:] = [flaky.RUNS]
        for chunk in stream:
            tokens += chunk.token_ids
        assert tokens == expected[id(GREEDY)][0]


def test_a_device_that_fails_while_it_is_replaced(tiny_model, expected, flaky):
    settings = {"devices": devices(flaky.PATH), "place": PLACE}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        flaky.FAILURES[:], flaky.FAILED_LOADS = [9], 2
        assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == expected[id(GREEDY)]
        assert llm.engine_thread.recovery.count == 1
        assert llm.engine_thread.engine.epoch == 4


def test_policy_fail_fails(tiny_model, flaky):
    settings = {"devices": devices(flaky.PATH), "place": PLACE, "on_loss": "fail"}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        flaky.FAILURES[:] = [9]
        for _ in range(2):
            with pytest.raises(DeviceFailedError, match=r"device b failed .* the board fell off"):
                llm.generate(PROMPTS, GREEDY)


def test_a_device_that_fails_again_and_again(tiny_model, expected, flaky):
    """Its own error is told; and when it works again, so does the engine."""
    settings = {"devices": devices(flaky.PATH), "place": PLACE}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        flaky.FAILURES[:] = [0] * 4
        with pytest.raises(DeviceFailedError, match=r"device b failed .* the board fell off"):
            llm.generate(PROMPTS, GREEDY)
        flaky.FAILURES.clear()
        assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == expected[id(GREEDY)]


def test_no_plan_without_the_device(tiny_model, expected, flaky):
    """Only b may run feed-forward; it is said, and b is taken back when it returns."""
    board = {"name": "b", "backend": flaky.PATH, "threads": 1}
    limited = {
        "name": "a",
        "backend": "reference",
        "threads": 1,
        "regions": "attention+head+embed+sample",
    }
    settings = {"devices": [limited, board], "place": PLACE, "on_loss": "replan"}
    with LLM(tiny_model, runtime="in-process", **settings) as llm:
        flaky.FAILURES[:] = [9]
        with pytest.raises(RunError, match="the board fell off; no plan is possible without it: "):
            llm.generate(PROMPTS, GREEDY)
        assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == expected[id(GREEDY)]
        assert set(llm.plan.device_of.values()) == {"a", "b"}


def kill(llm, name):
    """SIGKILL to a device's process."""
    fleet = llm._fleet
    pid = ray.get(fleet._actors[name].pid.remote())
    os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.parametrize("policy", ["replace", "replan"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_killed_actor(tiny_model_with_room, ray_cluster, policy, name):
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    prompts = [[3, 1, 4], list(range(1, 200)), [2, 7]]
    settings = {"devices": devices(), "place": PLACE}
    with LLM(tiny_model_with_room, runtime="in-process", **settings) as llm:
        expected = [c.token_ids for c in llm.generate(prompts, long)]
    with LLM(tiny_model_with_room, on_loss=policy, **settings) as llm:
        answers = [llm.submit(prompt, long) for prompt in prompts]  # in a prompt, in decode
        chunks = iter(answers[0])
        for _ in range(50):
            next(chunks)
        kill(llm, name)
        assert [answer.wait().token_ids for answer in answers] == expected
        used = set(llm.plan.device_of.values())
        assert used == ({"a", "b"} if policy == "replace" else {"a", "b"} - {name})
        if policy == "replace":  # while idle
            kill(llm, name)
            assert llm.generate(prompts, long)[1].token_ids == expected[1]
            assert llm.engine_thread.recovery.count == 2


@pytest.mark.ray
def test_a_killed_actor_and_policy_fail(tiny_model, ray_cluster):
    with LLM(tiny_model, devices=devices(), place=PLACE, on_loss="fail") as llm:
        llm.generate(PROMPTS, GREEDY)
        kill(llm, "b")
        with pytest.raises(DeviceLostError, match=r"device b on node .* was lost"):
            llm.generate(PROMPTS, GREEDY)


def test_time_that_is_over_in_the_step_of_a_loss(tiny_model_with_room):
    """Its request ends like any other, though that step tells nothing."""
    devices = [{"name": "a", "backend": "reference", "threads": 1}]
    with LLM(tiny_model_with_room, devices=devices, runtime="in-process") as llm:
        engine = llm.engine_thread.engine
        expire = engine.scheduler.expire

        def lost():
            raise LinkError("a device hangs")

        def expire_with_a_loss():
            late = expire()
            if late:
                engine.rounds.receive = lost
            return late

        engine.scheduler.expire = expire_with_a_loss
        params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
        other = llm.submit([1, 2], replace(params, max_tokens=400))
        answer = llm.submit([3, 4], replace(params, max_seconds=0.2))
        waiting = threading.Thread(target=answer.wait, daemon=True)
        waiting.start()
        waiting.join(30)
        assert not waiting.is_alive()
        assert answer.wait().finish_reason == "deadline"
        assert len(other.wait().token_ids) == 400
        assert llm.status()["recoveries"] == 1
