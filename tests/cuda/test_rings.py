"""Records from GPU to GPU: between two streams of one GPU, and between two GPUs of a machine."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from engine.comparison import CLOSE, differences
from tiny_models import write_tiny_llama

from raygraft import LLM, SamplingParams
from raygraft.graph.operators import Value
from raygraft.graph.step import Step
from raygraft.kernels import create_backend
from raygraft.kernels.base import BackendOptions
from raygraft.kernels.cuda.rings import join_ring
from raygraft.placement import costs
from raygraft.placement.costs import BY_DEVICES, DIRECT, PINNED

pytestmark = pytest.mark.gpu

VALUES = (Value("x", 96), Value("y", 33, rows="logits"), Value("z", 4096))
PLACE = {"*": "a", "kind:ffn": "b"}
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=700, logprobs=10, ignore_eos=True)
PROMPTS = [list(range(3, 60)), [5], [9, 8, 7]]


def step(rows, logits):
    numbers = np.arange(rows, dtype=np.int32)
    wanted = SimpleNamespace(history=numbers[:0], bias_ids=numbers[:0], logprobs=numbers[:0])
    table = np.zeros((1, 1), np.int32)
    return Step(numbers, numbers, numbers * 0, table, numbers[:logits], wanted)


@pytest.fixture(params=[DIRECT, PINNED])
def ends(request):
    """Runners that put and take, on streams of one GPU; one thread uses both, or all is ready:
    what CUDA does when something is new may wait for all kernels of a process."""
    here, there = (create_backend("cuda", BackendOptions()) for _ in range(2))
    taking, opened = here.open_ring(1, 300 * 4300 * 4, request.param)
    putting = join_ring(there.shared, opened)
    yield putting.runner(VALUES), taking.runner(VALUES), opened.slots
    putting.close()
    taking.close()


def test_records_arrive_in_order(ends):
    """Many more than there are slots, small ones (captured) and large ones in any order."""
    put, take, slots = ends
    sizes = [(rows, rows % 4) for rows in (1, 7, 16, 17, 300) for _ in range(9)]
    draw = np.random.default_rng(1)
    draw.shuffle(sizes)
    sent = []
    for rows, logits in sizes:
        counts = {"tokens": rows, "logits": logits}
        sent.append(
            {v.name: draw.standard_normal((counts[v.rows], v.width), np.float32) for v in VALUES}
        )
    assert len(sizes) > 2 * slots > 2
    for start in range(0, len(sizes), slots):
        part = slice(start, start + slots)
        for (rows, logits), values in zip(sizes[part], sent[part], strict=True):
            put.run(step(rows, logits), values)
        for (rows, logits), values in zip(sizes[part], sent[part], strict=True):
            found = take.run(step(rows, logits), {})
            for name, expected in values.items():
                assert np.array_equal(found[name], expected), (name, rows)


@pytest.mark.parametrize("slow", ["put", "take"])
def test_the_faster_end_waits(ends, slow):
    put, take, _ = ends
    records = [{v.name: np.full((2, v.width), n, np.float32) for v in VALUES} for n in range(40)]
    for values in records[:3]:  # all is compiled, allocated and captured
        put.run(step(2, 2), values)
        take.run(step(2, 2), {})

    def send():
        for values in records:
            time.sleep(0.005 if slow == "put" else 0)
            put.run(step(2, 2), values)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for values in records:
        time.sleep(0.005 if slow == "take" else 0)
        found = take.run(step(2, 2), {})
        assert all(np.array_equal(found[name], expected) for name, expected in values.items())
    sender.join(10)
    assert not sender.is_alive()


def test_who_waits_can_be_told_to_give_up():
    here = create_backend("cuda", BackendOptions())
    ring, _ = here.open_ring(1, 4096, DIRECT)
    take = ring.runner(VALUES[:1])
    waiting = threading.Thread(target=take.run, args=(step(1, 0), {}), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    here.interrupt(True)
    waiting.join(10)
    assert not waiting.is_alive()


def two_gpus():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    return [f"{name}:backend=cuda,gpu={number}" for number, name in enumerate("ab")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("rings") / "m.gguf"
    return write_tiny_llama(path, quantization="Q8_0", context=1024)


def answers(llm):
    return [[c.token_ids for c in llm.generate(PROMPTS, own)] for own in (GREEDY, DRAWN)]


def use(monkeypatch, link):
    """Have GPUs reach each other in some way, whatever the best one is."""
    between = costs.link_between
    monkeypatch.setattr(costs, "link_between", lambda *ends: between(*ends).replace(DIRECT, link))


@pytest.mark.ray
@pytest.mark.parametrize("link", BY_DEVICES)
@pytest.mark.parametrize("max_rows", [8, 256])
def test_a_cut_on_two_gpus(model, ray_cluster, monkeypatch, max_rows, link):
    devices = two_gpus()
    with LLM(model, devices=devices[:1], max_rows=max_rows) as llm:
        expected = answers(llm)
    use(monkeypatch, link)
    with LLM(model, devices=devices, place=PLACE, max_rows=max_rows) as llm:
        assert {t.link for t in llm.plan.transfers} == {link, "ring"}
        assert answers(llm) == expected
        counters = llm._fleet.counters()
        assert counters["b"].records_sent == counters["b"].steps * sum(
            t.source == "b" for t in llm.plan.transfers
        )


def test_in_one_process_records_go_through_the_host(model):
    devices = two_gpus()
    with LLM(model, devices=devices[:1], runtime="in-process") as llm:
        expected = answers(llm)
    with LLM(model, devices=devices, place=PLACE, runtime="in-process") as llm:
        assert answers(llm) == expected


@pytest.mark.ray
@pytest.mark.parametrize("link", BY_DEVICES)
@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_gpu_that_is_lost_is_replaced(model, ray_cluster, monkeypatch, lost, link):
    import ray

    devices = two_gpus()
    use(monkeypatch, link)
    with LLM(model, devices=devices[:1]) as llm:
        (expected,) = llm.generate(PROMPTS[:1], LONG)
    with LLM(model, devices=devices, place=PLACE) as llm:
        found = []
        thread = threading.Thread(
            target=lambda: found.extend(llm.generate(PROMPTS[:1], LONG)), daemon=True
        )
        thread.start()
        time.sleep(0.2)
        os.kill(ray.get(llm._fleet._actors[lost].pid.remote()), signal.SIGKILL)
        thread.join(60)
        assert not thread.is_alive()
        # What was computed row by row is computed anew in one go, which rounds otherwise.
        assert max(differences(found[0], expected.token_ids, expected.logprobs)) < CLOSE
        assert llm.status()["recoveries"] == 1
