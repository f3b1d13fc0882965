"""Turns without Python: the same tokens and log probabilities, whatever the cut and the batch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from engine.engines import ATTENTION_AND_FFN, HALVES
from tiny_models import write_tiny_llama

from raygraft import LLM, Completion, SamplingParams
from raygraft.actors import in_process, loop, rounds
from raygraft.actors.compiled_turns import LEFT
from raygraft.actors.links import RingReceiver, RingSender, format_ring, ring_bytes
from raygraft.actors.native_turns import DONE, LATE, UNEXPECTED, NativeTurns

SLOT = 1 << 18
PROMPTS = [list(range(3, 60)), [5], [9, 8, 7], list(range(20, 41)), [2, 3]]
PARAMS = SamplingParams(temperature=0, max_tokens=20, logprobs=5, ignore_eos=True)
CUTS = {
    "attention and feed-forward": ATTENTION_AND_FFN,
    "halves": HALVES,
    "three devices": {"*": "a", "kind:attention": "b", "blk.1.ffn": "c"},
    "head apart": {"*": "a", "head": "b"},
    "attention and feed-forward in one actor": ATTENTION_AND_FFN,
    "two of three devices in one actor": {"*": "a", "kind:attention": "b", "blk.1.ffn": "c"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "m.gguf", quantization="Q4_0")


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of this process are linked by rings, as actors of one node are."""

    def ring(slots: int, name: str) -> tuple[RingSender, RingReceiver]:
        memory = np.zeros(ring_bytes(slots, SLOT), np.uint8)
        format_ring(memory, slots, SLOT)
        return RingSender(memory, slots, SLOT, name), RingReceiver(memory, slots, SLOT, name)

    monkeypatch.setattr(in_process, "local_link", ring)


@pytest.fixture(params=["ahead", "bursts"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Enough for the engine as well, or none, and bursts as long as they may be."""
    count = 1 if request.param == "bursts" else 64
    monkeypatch.setattr(in_process.os, "cpu_count", lambda: count)
    monkeypatch.setattr(rounds, "BURST_SECONDS", 60.0)
    return str(request.param)


def answers(
    model: Path, place: dict[str, str], half_batches: int, together: str = ""
) -> list[Completion]:
    names = dict.fromkeys(place.values())
    actors = dict.fromkeys(together, ",actor=one")
    devices = [f"{name}:backend=cpu,threads=1{actors.get(name, '')}" for name in sorted(names)]
    with LLM(
        model, devices=devices, place=place, runtime="in-process", max_rows=16,
        half_batches=half_batches,
    ) as llm:  # fmt: skip
        return llm.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("half_batches", [1, 2])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.usefixtures("rings")
def test_nothing_changes(
    cut: str, half_batches: int, cores: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: Counter[int] = Counter()
    together_for: list[int] = []
    run = NativeTurns.run

    def counted(self: NativeTurns, timeout: float) -> int:
        if self._state[LEFT // 8] > 1:
            together_for.append(len(self._halves))
        result = run(self, timeout)
        ended[result] += 1
        return result

    monkeypatch.setattr(NativeTurns, "run", counted)
    together = "ab" if "one actor" in cut else ""
    native = answers(model, CUTS[cut], half_batches, together)
    if half_batches == 1 or "attention" in cut:  # the first turn of several is taken in Python
        assert ended[DONE] > (20 if cores == "ahead" else 3)
    if cores == "bursts" and cut == "attention and feed-forward":
        assert set(together_for) == {half_batches}
    monkeypatch.setattr(NativeTurns, "end_of", lambda self, first, early=False: first)
    ended.clear()
    python = answers(model, CUTS[cut], half_batches, together)
    assert not ended
    for ours, theirs in zip(native, python, strict=True):
        assert ours.token_ids == theirs.token_ids
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.keys() == other.keys()
            assert all(abs(mine[token] - other[token]) < 1e-4 for token in mine)


@pytest.mark.usefixtures("rings")
def test_python_goes_on_wherever_it_stops(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that end early, late or at a record that Python must look at lose nothing."""
    expected = answers(model, ATTENTION_AND_FFN, 1)
    random = np.random.default_rng(0)
    run = NativeTurns.run
    ended: Counter[int] = Counter()

    def disturbed(self: NativeTurns, timeout: float) -> int:
        last = self._last
        if self._state[LEFT // 8] > 1:
            return run(self, 1e-5)
        # As if the record that begins one of the turns were one to look at.
        self._last = int(random.integers(self._first, last + 1))
        result = run(self, 1e-5 if random.random() < 0.5 else timeout)
        if result == DONE and self._last < last:
            result = UNEXPECTED
        self._last = last
        ended[result] += 1
        return result

    monkeypatch.setattr(NativeTurns, "run", disturbed)
    found = answers(model, ATTENTION_AND_FFN, 1)
    assert min(ended[result] for result in (DONE, LATE, UNEXPECTED)) > 0
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]


@pytest.mark.usefixtures("rings")
def test_a_traced_step_is_taken_in_python(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(NativeTurns, "begin", lambda *_: calls.append(1) or False)
    devices = ["a:backend=cpu,threads=1", "b:backend=cpu,threads=1"]
    with LLM(model, devices=devices, place=ATTENTION_AND_FFN, runtime="in-process") as llm:
        llm.generate([[1, 2]], PARAMS)
        untraced = len(calls)
        llm.start_trace()
        llm.generate([[1, 2, 3, 4]], PARAMS)
    assert untraced > 0
    assert len(calls) == untraced


def test_links_that_are_no_rings_leave_it_to_python(model: Path) -> None:
    seen: list[list[bool]] = []
    init = loop.ResidentLoop.__init__

    def watched(self: loop.ResidentLoop, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        seen.append(self._native.possible)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.ResidentLoop, "__init__", watched)
        answers(model, ATTENTION_AND_FFN, 1)
    assert seen
    assert not any(possible for turns in seen for possible in turns)
