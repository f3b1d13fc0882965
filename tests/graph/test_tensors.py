"""Slices of quantised tensors equal slices of the dequantised ones."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import K_QUANTIZATIONS, QUANTIZATIONS, write_tiny_llama

from raygraft.graph.errors import ModelFileError
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.tensors import TensorInfo, WeightSlice, row_bytes, take_slice

NAME = "blk.0.ffn_down.weight"


@pytest.mark.parametrize("kind", [*QUANTIZATIONS, *K_QUANTIZATIONS])
def test_slices_of_a_matrix(kind: str, tmp_path: Path) -> None:
    path = write_tiny_llama(
        tmp_path / "tiny.gguf", blocks=1, width=64, feed_forward=768, quantization={NAME: kind}
    )
    tensor = next(t for t in GGUFReader(path).tensors if t.name == NAME)
    whole = dequantize(tensor.data, tensor.tensor_type)
    assert tensor.tensor_type.name == kind

    model = ModelFile.open(path)
    source, info = MappedWeights(model.files, model.tensors), model.tensors[NAME]
    for weight, expected in (
        (WeightSlice(NAME), whole),
        (WeightSlice(NAME, 0, 0, 64), whole),
        (WeightSlice(NAME, 0, 5, 6), whole[5:6]),
        (WeightSlice(NAME, 0, 48), whole[48:]),
        (WeightSlice(NAME, 1, 256, 512), whole[:, 256:512]),
        (WeightSlice(NAME, 1, 512), whole[:, 512:]),
    ):
        found = source.read(weight)
        np.testing.assert_array_equal(found.dequantise(), expected)
        assert found.dequantise().flags.c_contiguous
        assert found.shape == weight.shape(info) == expected.shape
        assert found.data.nbytes == weight.nbytes(info)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    "index", [np.s_[1:3, :, :], np.s_[:, 2:5, :], np.s_[:, :, 32:64], np.s_[3:4]]
)
def test_slices_of_experts(kind: str, index: tuple[slice, ...], tmp_path: Path) -> None:
    experts = np.random.default_rng(0).standard_normal((4, 6, 96), dtype=np.float32)
    quantised = quantize(experts, GGMLQuantizationType[kind])
    writer = GGUFWriter(tmp_path / "experts.gguf", "none")
    writer.add_tensor("experts", quantised, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = ModelFile.open(tmp_path / "experts.gguf")
    index = index if isinstance(index, tuple) else (index,)
    axis, part = next((n, s) for n, s in enumerate(index) if s != slice(None))
    weight = WeightSlice("experts", axis, part.start, part.stop)
    found = MappedWeights(model.files, model.tensors).read(weight)
    expected = dequantize(quantised, GGMLQuantizationType[kind])[index]
    np.testing.assert_array_equal(found.dequantise(), expected)


@given(st.data())
def test_any_rows_and_blocks(data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    whole = np.random.default_rng(rows * 10 + blocks).standard_normal((rows, blocks * 32))
    raw = quantize(whole.astype(np.float32), GGMLQuantizationType.Q5_1)
    info = TensorInfo("t", (rows, blocks * 32), "Q5_1", 0, 0)
    axis = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, (rows, blocks)[axis] - 1))
    stop = data.draw(st.integers(start + 1, (rows, blocks)[axis]))
    step = (1, 32)[axis]
    weight = WeightSlice("t", axis, start * step, stop * step)
    index = (slice(None),) * axis + (slice(start * step, stop * step),)
    found = take_slice(raw.reshape(-1), info, weight).dequantise()
    expected = dequantize(raw, GGMLQuantizationType.Q5_1)[index]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WeightSlice("t", 0, 0, 9), "0:9 lies outside of t, size 8"),
        (WeightSlice("t", 0, 8), "8:8 lies outside of t, size 8"),
        (WeightSlice("t", 0, -1, 2), "-1:2 lies outside of t"),
        (WeightSlice("t", 1, 64, 64), "64:64 lies outside of t, size 96"),
        (WeightSlice("t", 2), r"t of shape \(8, 96\) has no axis 2"),
        (WeightSlice("t", 1, 0, 40), "40 columns are no multiple of Q4_0's block of 32"),
        (WeightSlice("t", 1, 16, 48), "16 columns are no multiple of Q4_0's block of 32"),
    ],
)
def test_slice_that_cannot_be_taken(weight: WeightSlice, message: str) -> None:
    info = TensorInfo("t", (8, 96), "Q4_0", 0, 0)
    with pytest.raises(ValueError, match=message):
        take_slice(np.zeros(info.nbytes, np.uint8), info, weight)


def test_bytes_of_a_row() -> None:
    """By the block sizes of the format: 32 elements in 18, 20 and 34 bytes, 256 in 144."""
    sizes = {"F32": 3072, "F16": 1536, "Q4_0": 432, "Q4_1": 480, "Q8_0": 816, "Q4_K": 432}
    assert {kind: row_bytes(kind, 768) for kind in sizes} == sizes


def test_type_that_cannot_be_dequantised() -> None:
    info = TensorInfo("t", (2, 4), "I32", 0, 0)
    weight = take_slice(np.zeros(info.nbytes, np.uint8), info, WeightSlice("t"))
    with pytest.raises(ModelFileError, match="weights of type I32 cannot be dequantised"):
        weight.dequantise()
