"""Device actors that are killed, or stop, at every moment of their lives: the same tokens."""

import os
import signal
import time

import psutil
import pytest
import ray
from engine.mortal import MORTAL

from raygraft import LLM, SamplingParams
from raygraft.actors import ray_actors
from raygraft.graph.errors import DeviceLostError

pytestmark = pytest.mark.ray

PLACE = {"*": "a", "kind:ffn": "b"}
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 60)), [9, 2]]


def devices(second="reference"):
    return [
        {"name": "a", "backend": "reference", "threads": 1},
        {"name": "b", "backend": second, "threads": 1},
    ]


@pytest.fixture(scope="module")
def expected(tiny_model):
    with LLM(tiny_model, devices=devices(), place=PLACE, runtime="in-process") as llm:
        return [done.token_ids for done in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture
def mortal(tmp_path):
    """A backend's name, and the file that decides its fate."""
    fate = tmp_path / "fate"
    (tmp_path / "board.py").write_text(MORTAL.format(fate=str(fate)))
    return f"{tmp_path / 'board.py'}:Mortal", fate


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ray_actors, "PING_SECONDS", 2.0)


def pid_of(llm, name):
    return ray.get(llm._fleet._actors[name].pid.remote())


def gone(pid, seconds=15):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("what", ["question kill", "load kill", "load stop"])
def test_lost_before_it_ever_ran(tiny_model, ray_cluster, expected, mortal, what):
    backend, fate = mortal
    fate.write_text(what)
    with LLM(tiny_model, devices=devices(backend), place=PLACE) as llm:
        assert [done.token_ids for done in llm.generate(PROMPTS, GREEDY)] == expected
    assert not fate.exists()


def test_lost_before_it_ever_ran_and_policy_fail(tiny_model, ray_cluster, mortal):
    backend, fate = mortal
    fate.write_text("load kill")
    with pytest.raises(DeviceLostError, match=r"device b on node .* was lost"):
        LLM(tiny_model, devices=devices(backend), place=PLACE, on_loss="fail")


@pytest.mark.parametrize("what", ["prompt kill", "decode kill", "prompt stop", "decode stop"])
def test_lost_while_it_computes(tiny_model, ray_cluster, expected, mortal, what):
    backend, fate = mortal
    with LLM(tiny_model, devices=devices(backend), place=PLACE) as llm:
        pid = pid_of(llm, "b")
        fate.write_text(what)
        assert [done.token_ids for done in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.engine_thread.recovery.count == 1
        assert gone(pid)


@pytest.mark.parametrize("what", ["start kill", "load kill", "prompt kill"])
def test_lost_again_in_the_middle_of_the_recovery(tiny_model, ray_cluster, expected, mortal, what):
    backend, fate = mortal
    with LLM(tiny_model, devices=devices(backend), place=PLACE) as llm:
        answers = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
        for answer in answers:  # or the fate is met before the first loss
            next(iter(answer))
        fate.write_text(what)
        os.kill(pid_of(llm, "b"), signal.SIGKILL)
        assert [answer.wait().token_ids for answer in answers] == expected
        assert not fate.exists()


def test_lost_while_nothing_is_asked(tiny_model, ray_cluster, expected):
    """It is noticed, and mended, before anybody asks."""
    with LLM(tiny_model, devices=devices(), place=PLACE) as llm:
        os.kill(pid_of(llm, "b"), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not llm.engine_thread.recovery.count and time.monotonic() < deadline:
            time.sleep(0.05)
        assert llm.engine_thread.recovery.count == 1
        assert [done.token_ids for done in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.engine_thread.recovery.count == 1


def test_a_pause_is_no_loss(tiny_model, ray_cluster, expected):
    with LLM(tiny_model, devices=devices(), place=PLACE) as llm:
        pid = pid_of(llm, "b")
        answers = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
        next(iter(answers[0]))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.8)
        os.kill(pid, signal.SIGCONT)
        assert [answer.wait().token_ids for answer in answers] == expected
        assert llm.engine_thread.recovery.count == 0
        assert pid_of(llm, "b") == pid
