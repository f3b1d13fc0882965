"""Devices on one GPU: one stream, one graph; and what a GPU says when it is full.

Tests marked `gpu` run whole models; the others look at what would be launched, without a GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_llama

from raygraft import LLM, SamplingParams
from raygraft.graph.errors import CapacityError, ConfigurationError, DeviceLostError
from raygraft.graph.graph import Graph, Subgraph
from raygraft.graph.operators import Value
from raygraft.graph.step import Step
from raygraft.kernels.base import BackendOptions, Commons
from raygraft.kernels.cuda.buffers import Counts
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.memory import Arena
from raygraft.kernels.cuda.rings import RingUnit
from raygraft.kernels.cuda.runner import CudaRunner

ROWS = 3


class Memory:
    """A GPU's memory, as a dictionary; copies are made at once."""

    def __init__(self) -> None:
        self.held: dict[int, float] = {}
        self.copies: list[str] = []
        self.graphs = 0
        self.waits = 0


class FakeUnit:
    """A unit that adds one to the sum of its inputs."""

    def __init__(self, memory: Memory, subgraph: Subgraph, number: int) -> None:
        self.subgraph = subgraph
        self.made = frozenset(subgraph.outputs)
        self.samples: list[object] = []
        self.states = frozenset[str]()
        self.launches = True
        self._memory = memory
        self._places = {
            name: 1000 * number + place
            for place, name in enumerate((*subgraph.inputs, *subgraph.outputs), 1)
        }

    def address(self, name: str, counts: Counts) -> int:
        return self._places[name]

    def enqueue(self, counts: Counts, most: int, given: Mapping[str, int]) -> dict[str, int]:
        total = sum(self._memory.held[address] for address in given.values())
        for name in self.made:
            self._memory.held[self._places[name]] = total + 1
        return {name: self._places[name] for name in self.made}


class FakeRunner(CudaRunner):
    """Its copies go to and from that memory."""

    def _copy_in(self, name: str, values: Any, address: int) -> None:
        self._gpu.memory.copies.append(f"in {name}")
        self._gpu.memory.held[address] = float(values[0, 0])

    def _fetch(self, name: str, address: int, size: int) -> Any:
        self._gpu.memory.copies.append(f"out {name}")
        value = np.full(size // 4, self._gpu.memory.held[address], np.float32)
        return value.view(np.uint8)

    def chain(self, following: Any, outputs: Any) -> CudaRunner:
        chained = super().chain(following, outputs)
        chained.__class__ = FakeRunner
        return chained


class FakeGpu:
    """One whose graphs launch again what was launched while they were captured."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.stream = SimpleNamespace(begin_capture=lambda: None, end_capture=self._graph)

    def mark(self, event: object = None) -> object:
        return SimpleNamespace(synchronize=self._wait, done=False)

    def _graph(self) -> object:
        self.memory.graphs += 1
        return SimpleNamespace(launch=lambda _: None)

    def _wait(self) -> None:
        self.memory.waits += 1

    @contextmanager
    def active(self) -> Iterator[None]:
        yield


@pytest.fixture
def stages(tiny_graph: Graph) -> list[Subgraph]:
    """Embedding and attention, feed-forward, attention of the next block."""
    found: list[list[str]] = [[], [], []]
    for op in tiny_graph.operators:
        block, _, rest = op.name.removeprefix("blk.").partition(".")
        if op.name.startswith(("embed", "blk.0.attn")):
            found[0].append(op.name)
        elif op.name.startswith("blk.0"):
            found[1].append(op.name)
        elif block == "1" and rest.startswith("attn"):
            found[2].append(op.name)
    return [tiny_graph.subgraph(names) for names in found]


def step() -> Step:
    rows = np.arange(ROWS, dtype=np.int32)
    wanted = SimpleNamespace(history=rows[:0], bias_ids=rows[:0], logprobs=rows[:0])
    return Step(rows, rows, rows * 0, np.zeros((1, 1), np.int32), rows[:0], wanted)  # type: ignore[arg-type]


def runners_of(stages: list[Subgraph]) -> tuple[FakeGpu, list[FakeRunner]]:
    gpu = FakeGpu()
    shared: Any = SimpleNamespace(
        gpu=gpu, version=(0, 0), step=SimpleNamespace(upload=lambda step: None)
    )
    units: Any = [FakeUnit(gpu.memory, stage, number) for number, stage in enumerate(stages, 1)]
    return gpu, [FakeRunner(shared, [unit]) for unit in units]


def test_a_chain_keeps_on_the_gpu_what_nobody_else_reads(stages: list[Subgraph]) -> None:
    gpu, (first, *others) = runners_of(stages)
    assert all(a.leads_to(b) for a, b in zip([first, *others], others, strict=False))
    chain = first.chain(others, stages[2].outputs)
    for _ in range(3):  # plainly, captured, replayed
        found = chain.run(step(), {})
    copies = [f"out {name}" for name in stages[2].outputs]
    assert gpu.memory.copies == 3 * copies
    assert (gpu.memory.graphs, gpu.memory.waits) == (1, 3)
    assert found.keys() == {*stages[2].outputs}
    alone: dict[str, Any] = {}
    for stage, runner in zip(stages, [first, *others], strict=True):
        alone |= runner.run(step(), {name: alone[name] for name in stage.inputs})
    for name in stages[2].outputs:
        assert np.array_equal(found[name], alone[name])
        assert found[name].shape == (ROWS, stages[2].values[name].width)


def test_a_chain_takes_what_it_does_not_make(stages: list[Subgraph]) -> None:
    """Each input is copied once; what is wanted of the middle is copied out."""
    gpu, (_, second, third) = runners_of(stages)
    outputs = (*stages[1].outputs, *stages[2].outputs)
    inputs = {
        name: np.full((ROWS, stages[1].values[name].width), 5, np.float32)
        for name in stages[1].inputs
    }
    found = second.chain([third], outputs).run(step(), inputs)
    assert gpu.memory.copies == [
        *[f"in {name}" for name in stages[1].inputs], *[f"out {name}" for name in outputs],
    ]  # fmt: skip
    assert {float(found[name][0, 0]) for name in stages[1].outputs} == {5 * len(inputs) + 1}


def test_runners_of_other_gpus_and_actors_are_no_chain(stages: list[Subgraph]) -> None:
    one, other = runners_of(stages)[1], runners_of(stages)[1]
    assert not one[0].leads_to(other[1])


class OutOfMemoryError(Exception):
    """As CuPy's."""


class RuntimeFailedError(Exception):
    """As CUDA's, with its status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.fixture
def full() -> Gpu:
    """A GPU of 8 GiB with 1 GiB free, by a CuPy that is not there."""

    def zeros(shape: object, dtype: str) -> object:
        raise OutOfMemoryError

    pool = SimpleNamespace(free_bytes=lambda: 2**29, free_all_blocks=lambda: None)
    failing = SimpleNamespace(CUDARuntimeError=RuntimeFailedError)
    gpu = Gpu.__new__(Gpu)
    gpu.number, gpu.name = 1, "X"
    gpu.device = gpu.stream = nullcontext()
    gpu.cupy = SimpleNamespace(
        zeros=zeros,
        dtype=np.dtype,
        get_default_memory_pool=lambda: pool,
        cuda=SimpleNamespace(
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            driver=SimpleNamespace(CUDADriverError=RuntimeFailedError),
            runtime=SimpleNamespace(**vars(failing), memGetInfo=lambda: (2**29, 2**33)),
        ),
    )
    return gpu


def test_a_full_gpu_says_what_was_needed_and_what_is_free(full: Gpu) -> None:
    with pytest.raises(CapacityError) as raised, full.active():
        Arena(full).room("a", 2**31, "the value y")
    assert str(raised.value) == ("GPU 1 (X): the value y needs 2.00 GiB; 1.00 of 8.00 GiB are free")
    full_again = pytest.raises(CapacityError, match=r"out of memory: status 2; 1\.00 of 8\.00")
    with full_again, full.active():
        raise RuntimeFailedError(2)
    with pytest.raises(DeviceLostError, match=r"GPU 1 \(X\) failed: status 700"), full.active():
        raise RuntimeFailedError(700)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDeviceCount=lambda: 2)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr("raygraft.kernels.cuda.gpu.import_cupy", lambda: cupy)
    with pytest.raises(ConfigurationError, match="no GPU 2: this machine has GPUs 0 to 1"):
        Gpu(2)


def test_what_is_common_lives_as_long_as_somebody_holds_it() -> None:
    class Thing:
        pass

    commons = BackendOptions().commons
    first = commons.get("x", Thing)
    assert commons.get("x", Thing) is first
    assert Commons().get("x", Thing) is not first
    del first
    assert "x" not in commons._held


@pytest.mark.gpu
@pytest.mark.parametrize("max_rows", [8, 64])
def test_a_cut_on_one_gpu_is_one_chain(tmp_path: Any, monkeypatch: Any, max_rows: int) -> None:
    """Greedy and drawn; one run a step; the tokens of the uncut model."""
    path = write_tiny_llama(tmp_path / "m.gguf", quantization="Q8_0")
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True),
        SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True),
    ]
    prompts = [list(range(3, 60)), [5], [9, 8, 7]]
    settings = {"runtime": "in-process", "max_rows": max_rows}
    with LLM(path, devices=["g:backend=cuda"], **settings) as llm:
        expected = [llm.generate(prompts, own) for own in params]
    units: list[int] = []
    ahead: list[bool] = []
    start = CudaRunner.start

    def counted(self: CudaRunner, step: Step, inputs: Any) -> Any:
        units.append(len(self.units))
        ahead.append(bool((step.tokens < 0).any()))
        return start(self, step, inputs)

    monkeypatch.setattr(CudaRunner, "start", counted)
    devices = ["a:backend=cuda,gpu=0", "b:backend=cuda"]
    with LLM(path, devices=devices, place={"*": "a", "kind:ffn": "b"}, **settings) as llm:
        assert {use.actor for use in llm.plan.devices} == {"a"}
        found = [llm.generate(prompts, own) for own in params]
        assert set(units) == {len(llm.plan.stages)}
        assert any(ahead)  # started before the step that draws their tokens was done
    for ours, theirs in zip(found, expected, strict=True):
        assert [own.token_ids for own in ours] == [own.token_ids for own in theirs]


def test_an_end_of_a_link_leaves_no_memory_behind() -> None:
    """A plan has new ones; those of the plan before would fill the GPU."""
    place = SimpleNamespace(nbytes=1 << 20, data=SimpleNamespace(ptr=4096))
    gpu: Any = SimpleNamespace(allocate=lambda what, shape, dtype: place)
    arena = Arena(gpu)
    ring: Any = SimpleNamespace(kernel="take", shared=SimpleNamespace(gpu=gpu, arena=arena))
    unit = RingUnit(ring, [Value("x", 8)])
    assert unit.address("x", Counts(3, 0)) == 4096
    assert len(arena._slots) == 1
    del unit
    assert not arena._slots
