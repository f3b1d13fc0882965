"""Packed weights on disk: what is kept, what goes, and what a broken disk costs."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_llama
from weight_blocks import random_weight

from raygraft import LLM, SamplingParams
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.tensors import KeyedSource, QuantizedTensor, WeightSlice
from raygraft.kernels.cpu import packed_cache
from raygraft.kernels.cpu.packed_cache import packed_folder
from raygraft.kernels.cpu.packing import PackedWeight, pack


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packed_cache, "cache_path", lambda: tmp_path)
    return packed_folder()


def cached(key: str, weight: QuantizedTensor) -> PackedWeight:
    """A file of one matrix."""
    (found,) = packed_cache.cached({key: weight})
    return found


def weight(seed: int = 0, rows: int = 40) -> QuantizedTensor:
    return random_weight("Q4_1", rows, 64, np.random.default_rng(seed))


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedTensor]:
    """What was packed since the test began."""
    seen: list[QuantizedTensor] = []

    def counted(raw: QuantizedTensor) -> PackedWeight:
        seen.append(raw)
        return pack(raw)

    monkeypatch.setattr(packed_cache, "pack", counted)
    return seen


def test_the_second_time_it_is_mapped(packings: list[QuantizedTensor]) -> None:
    for found in (cached("a", weight()), cached("a", weight())):
        assert (found.rows, found.columns, found.format.name) == (40, 64, "Q4_1")
        assert np.array_equal(found.data, pack(weight()).data)
        assert not found.data.flags.owndata
        assert found.address % 64 == 0
    assert len(packings) == 1


def test_matrices_that_belong_together_lie_in_one_file(
    folder: Path, packings: list[QuantizedTensor]
) -> None:
    several = {
        "a": weight(1),
        "b": random_weight("Q8_0", 24, 96, np.random.default_rng(2)),
        "c": weight(3, rows=7),
    }
    for _ in range(2):
        found = packed_cache.cached(several)
        for each, raw in zip(found, several.values(), strict=True):
            assert (each.format.name, each.rows, each.columns) == (raw.type, *raw.shape)
            assert np.array_equal(each.data, pack(raw).data)
            assert each.address % 64 == 0
        assert [each.address for each in found] == sorted(each.address for each in found)
    assert len(packings) == 3
    assert len(list(folder.iterdir())) == 1
    packed_cache.cached({"b": several["b"], "a": several["a"]})
    assert len(list(folder.iterdir())) == 2


def test_it_fits_its_bound_and_the_longest_unused_go_first(
    folder: Path, packings: list[QuantizedTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("a", weight())
    (file,) = folder.iterdir()
    monkeypatch.setenv("RAYGRAFT_PACKED_BYTES", str(3 * file.stat().st_size))
    os.utime(file, (1, 1))
    for key in "bc":
        cached(key, weight())
    cached("a", weight())  # used now, so b and c are older
    for other in folder.iterdir():
        if other != file:
            os.utime(other, (2, 2))
    cached("d", weight())
    assert len(list(folder.iterdir())) == 3
    cached("a", weight())
    assert len(packings) == 4


def test_what_can_never_fit_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYGRAFT_PACKED_BYTES", "0")
    assert cached("a", weight()).rows == 40
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(packed_cache, "cache_path", lambda: tmp_path / "file")
    assert cached("a", weight()).rows == 40
    assert "cannot be kept" in caplog.text


def test_a_damaged_file_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached("a", weight())
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(cached("a", weight()).data, pack(weight()).data)
    assert "cannot be kept" in caplog.text


def test_many_that_write_the_same_at_once(folder: Path) -> None:
    made = weight(rows=4000)
    found: list[PackedWeight] = []
    threads = [threading.Thread(target=lambda: found.append(cached("a", made))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(np.array_equal(each.data, pack(made).data) for each in found)
    assert [file.suffix for file in folder.iterdir()] == [".arrow"]


def test_slices_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    model = ModelFile.open(write_tiny_llama(tmp_path / "m.gguf", quantization="Q8_0"))
    source = MappedWeights(model.files, model.tensors)
    assert isinstance(source, KeyedSource)
    name = next(name for name, info in model.tensors.items() if info.rows > 32)
    keys = {source.key(WeightSlice(name, 0, *part)) for part in ((0, None), (0, 16), (16, 32))}
    assert len(keys) == 3
    whole = WeightSlice(name, 0, 0, model.tensors[name].shape[0])
    assert source.key(whole) == source.key(WeightSlice(name))


def test_a_model_answers_the_same_from_the_cache(folder: Path, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", quantization="Q4_0")
    answers = []
    for _ in range(2):
        with LLM(path, devices=["d:threads=1"], runtime="in-process") as llm:
            answers.append(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8)))
    assert any(folder.iterdir())
    assert answers[0][0].token_ids == answers[1][0].token_ids
