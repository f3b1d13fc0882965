"""GGUF files: against the `gguf` package's own reader, and damaged in every way."""

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import truncated, write_tiny_llama

from raygraft.graph.architectures import build_graph
from raygraft.graph.errors import ModelFileError, UnknownArchitectureError
from raygraft.graph.gguf_file import MappedWeights, ModelFile, local_identity
from raygraft.graph.tensors import WeightSlice

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "biases and factors": {"biases": True, "rope_factors": True},
    "quantised": {"quantization": "Q4_1"},
    "SentencePiece": {"tokenizer": "llama", "quantization": "F16"},
    "explicit head size": {"head_size": 32, "chat_template": None},
}


def read_by_package(path: Path) -> tuple[dict[str, object], dict[str, tuple[object, ...]]]:
    """Metadata and (shape, type, offset, bytes) of the tensors, by the `gguf` package."""
    reader = GGUFReader(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.tensor_type.name,
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    }
    return metadata, tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_the_package(variant: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", **VARIANTS[variant])
    model = ModelFile.open(path)
    metadata, tensors = read_by_package(path)
    found = {t.name: (t.shape, t.type, t.offset, t.nbytes) for t in model.tensors.values()}
    assert model.metadata == metadata
    assert found == tensors
    assert list(found) == list(tensors)  # in the file's order
    assert (model.path, len(model.files)) == (path, 1)


def write_every_type(path: Path) -> Path:
    """A small file with a value of every type."""
    writer = GGUFWriter(path, "none")
    writer.add_uint8("a", 255)
    writer.add_int8("b", -128)
    writer.add_uint16("c", 65535)
    writer.add_int16("d", -32768)
    writer.add_uint32("e", 2**32 - 1)
    writer.add_int32("f", -(2**31))
    writer.add_float32("g", 0.1)
    writer.add_bool("h", True)
    writer.add_string("i", "Grüße ▁ 🙂")
    writer.add_uint64("j", 2**64 - 1)
    writer.add_int64("k", -(2**63))
    writer.add_float64("l", 0.1)
    writer.add_array("m", ["", "a", "▁b"])
    writer.add_array("n", [1, -2, 3])
    writer.add_array("o", [0.5, -1.5])
    writer.add_array("p", [True, False])
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", np.arange(6, dtype=np.float16).reshape(3, 2))
    writer.add_tensor("experts", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_of_every_type(tmp_path: Path) -> None:
    path = write_every_type(tmp_path / "types.gguf")
    metadata, tensors = read_by_package(path)
    model = ModelFile.open(path)
    assert model.metadata == metadata
    assert model.get("i", str) == "Grüße ▁ 🙂"
    assert model.get("j", int) == 2**64 - 1
    assert model.get("absent", int, 7) == 7
    assert model.get("f", float) == -(2.0**31)  # an integer is a number too
    assert {t.name: t.shape for t in model.tensors.values()} == {
        "vector": (5,),
        "matrix": (3, 2),
        "experts": (2, 3, 4),
    }
    assert [t[2] for t in tensors.values()] == [t.offset for t in model.tensors.values()]


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("absent", int, r"types\.gguf: the metadata lacks absent"),
        ("i", int, r"types\.gguf: i is 'Grüße ▁ 🙂', not of type int"),
        ("h", int, r"h is True, not of type int"),
        ("h", float, r"h is True, not of type float"),
        ("e", str, r"e is 4294967295, not of type str"),
        ("m", str, r"m is \['', 'a', '▁b'\], not of type str"),
    ],
)
def test_value_of_another_type(tmp_path: Path, key: str, kind: type, message: str) -> None:
    model = ModelFile.open(write_every_type(tmp_path / "types.gguf"))
    with pytest.raises(ModelFileError, match=message):
        model.get(key, kind)


@pytest.mark.parametrize("parts", [2, 5])
def test_split_files_read_as_one(tmp_path: Path, parts: int) -> None:
    whole = ModelFile.open(write_tiny_llama(tmp_path / "whole.gguf", quantization="Q8_0"))
    first = write_tiny_llama(tmp_path / "parts.gguf", quantization="Q8_0", split=parts)
    names = [f"parts-{n:05}-of-{parts:05}.gguf" for n in range(1, parts + 1)]
    for name in names:  # whichever part is opened
        model = ModelFile.open(tmp_path / name)
        assert model.path == first
        assert [Path(file.path).name for file in model.files] == names
        assert model.metadata.items() >= whole.metadata.items()
        assert list(model.tensors) == list(whole.tensors)
        assert sorted({tensor.file for tensor in model.tensors.values()}) == list(range(parts))
    ours, theirs = (
        MappedWeights(model.files, model.tensors),
        MappedWeights(whole.files, whole.tensors),
    )
    for tensor in whole.tensors:
        weight = WeightSlice(tensor)
        np.testing.assert_array_equal(ours.read(weight).data, theirs.read(weight).data)


def test_pickle_round_trip(tiny_model: Path) -> None:
    model = ModelFile.open(tiny_model)
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model
    assert build_graph(copy) == build_graph(model)
    weight = WeightSlice("blk.1.attn_q.weight", 0, 3, 9)
    np.testing.assert_array_equal(
        MappedWeights(copy.files, copy.tensors).read(weight).dequantise(),
        MappedWeights(model.files, model.tensors).read(weight).dequantise(),
    )


def test_identity_follows_the_content(tmp_path: Path) -> None:
    (own,) = ModelFile.open(write_tiny_llama(tmp_path / "a.gguf")).files
    same = local_identity(own)
    assert own.same_file(same)
    copied = Path(shutil.copy2(own.path, tmp_path / "b.gguf"))
    assert own.same_file(ModelFile.open(copied).files[0])  # another path, the same file
    other = write_tiny_llama(tmp_path / "c.gguf", rope_base=20000.0)
    assert not own.same_file(ModelFile.open(other).files[0])
    Path(own.path).touch()
    assert not own.same_file(local_identity(own))
    Path(own.path).write_bytes(b"GGUF")
    assert not own.same_file(local_identity(own))
    Path(own.path).unlink()
    assert local_identity(own) is None
    assert not own.same_file(None)


def empty(folder: Path) -> Path:
    path = folder / "bad.gguf"
    path.touch()
    return path


def no_gguf(folder: Path) -> Path:
    path = folder / "bad.gguf"
    path.write_text("PK: this is another format")
    return path


def of_version(version: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write_tiny_llama(folder / "bad.gguf")
        data = path.read_bytes()
        path.write_bytes(data[:4] + version + data[8:])
        return path

    return make


def with_entry(value: bytes) -> Callable[[Path], Path]:
    """A file whose only metadata entry `key` has these bytes."""

    def make(folder: Path) -> Path:
        path = folder / "bad.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 3) + b"key" + value)
        return path

    return make


def with_tensor(fields: bytes) -> Callable[[Path], Path]:
    """A file whose only tensor `name` has these bytes after its name."""

    def make(folder: Path) -> Path:
        path = folder / "bad.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 4) + b"name" + fields)
        return path

    return make


def without_part(folder: Path) -> Path:
    write_tiny_llama(folder / "bad.gguf", split=3)
    (folder / "bad-00002-of-00003.gguf").unlink()
    return folder / "bad-00001-of-00003.gguf"


def renamed_part(folder: Path) -> Path:
    return write_tiny_llama(folder / "good.gguf", split=3).rename(folder / "bad.gguf")


def repeated_part(folder: Path) -> Path:
    first = write_tiny_llama(folder / "bad.gguf", split=2)
    shutil.copy(first, folder / "bad-00002-of-00002.gguf")
    return first


def cut_header(folder: Path) -> Path:
    return truncated(write_tiny_llama(folder / "good.gguf"), folder / "bad.gguf", 100)


def cut_weights(folder: Path) -> Path:
    return truncated(write_tiny_llama(folder / "good.gguf"), folder / "bad.gguf", -1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "bad.gguf", "no such file"),
        (lambda folder: folder, "no such file"),
        (empty, "not a GGUF file: it starts with b''"),
        (no_gguf, "not a GGUF file: it starts with b'PK: ', not b'GGUF'"),
        (of_version(b"\1\0\0\0"), r"GGUF version 1; readable are \(2, 3\)"),
        (of_version(b"\0\0\0\3"), "GGUF version 50331648; .* little-endian"),
        (with_entry(struct.pack("<I", 77)), "key has the unknown type 77"),
        (with_entry(struct.pack("<IIQ", 9, 9, 1)), "key is an array of arrays"),
        (with_entry(struct.pack("<IIQ", 9, 4, 2**62)), "truncated: key needs"),
        (with_entry(struct.pack("<IIQ", 9, 8, 2**62)), "truncated: key needs 8 bytes"),
        (with_tensor(struct.pack("<I", 0)), "name has 0 dimensions, not 1 to 4"),
        (with_tensor(struct.pack("<IQIQ", 1, 32, 999, 0)), "name has the unknown tensor type 999"),
        (with_tensor(struct.pack("<IQIQ", 1, 33, 2, 0)), r"name of shape \(33,\) .* 32 \(Q4_0\)"),
        (with_tensor(struct.pack("<IQIQ", 1, 0, 0, 0)), r"name of shape \(0,\)"),
        (with_tensor(struct.pack("<IQIQ", 1, 32, 0, 0)), "truncated: name ends at byte 192"),
        (cut_header, "truncated: .* the file has 100 in all"),
        (cut_weights, "truncated: output.weight ends at byte"),
        (without_part, r"split in 3 files, missing bad-00002-of-00003\.gguf"),
        (renamed_part, r"one of 3 files .* not named like name-00001-of-00003\.gguf"),
        (repeated_part, r"00002-of-00002\.gguf: repeats the tensor"),
    ],
)
def test_unreadable_file(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(ModelFileError, match=message) as caught:
        ModelFile.open(path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"omit": ["blk.1.ffn_up.weight"]},
            r"{path}: the tensor blk\.1\.ffn_up\.weight is missing",
        ),
        ({"omit": ["token_embd.weight"]}, r"{path}: the tensor token_embd\.weight is missing"),
        (
            {"reshape": {"blk.0.attn_k.weight": (64, 32)}},
            r"{path}: the tensor blk\.0\.attn_k\.weight has the shape \(64, 32\), "
            r"expected is \(32, 64\)",
        ),
        (
            {"biases": True, "reshape": {"blk.0.attn_q.bias": (32,)}},
            r"{path}: the tensor blk\.0\.attn_q\.bias has the shape \(32,\), expected is \(64,\)",
        ),
        (
            {"rope_factors": True, "reshape": {"rope_freqs.weight": (16,)}},
            r"{path}: the tensor rope_freqs\.weight has the shape \(16,\), expected is \(8,\)",
        ),
        ({"omit": ["llama.block_count"]}, r"{path}: the metadata lacks llama\.block_count"),
        ({"kv_heads": 3}, r"{path}: 4 heads cannot share 3 key-value heads at width 64"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            r"{path}: llama\.rope\.scaling\.type is 'longrope'; known are none, linear, yarn",
        ),
        ({"head_size": 7}, r"{path}: llama\.rope\.dimension_count is 7, heads have 7"),
    ],
)
def test_file_that_does_not_fit_its_architecture(
    damage: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", **damage)
    with pytest.raises(ModelFileError, match=message.format(path=path)):
        build_graph(ModelFile.open(path))


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", architecture="tapir")
    message = f"{path}: the architecture 'tapir' is not known; known are .*llama"
    with pytest.raises(UnknownArchitectureError, match=message):
        build_graph(ModelFile.open(path))


def read_all(path: Path) -> bool:
    """Open a file, build its graph and touch all weights; False when that is refused."""
    try:
        model = ModelFile.open(path)
        build_graph(model)
    except (ModelFileError, UnknownArchitectureError):
        return False
    weights = MappedWeights(model.files, model.tensors)
    for info in model.tensors.values():
        assert weights.read(WeightSlice(info.name)).data.nbytes == info.nbytes
    return True


def test_every_cut_of_a_small_file(tmp_path: Path) -> None:
    path = write_every_type(tmp_path / "types.gguf")
    size = path.stat().st_size
    assert size < 2000
    ends = {tensor.offset + tensor.nbytes for tensor in ModelFile.open(path).tensors.values()}
    for keep in range(size):
        cut = truncated(path, tmp_path / "cut.gguf", keep)
        try:
            ModelFile.open(cut)
        except ModelFileError:
            assert keep < max(ends)
        else:
            assert keep >= max(ends)  # only padding is lost


HEADER_END = 12000
"""Somewhat behind the tiny model's header."""


@given(data=st.data())
@settings(max_examples=60)
def test_any_cut_of_a_model(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    size = tiny_model.stat().st_size
    keep = data.draw(st.integers(0, HEADER_END) | st.integers(0, size - 64))
    cut = truncated(tiny_model, tmp_path_factory.getbasetemp() / "cut.gguf", keep)
    assert not read_all(cut)


@given(position=st.integers(0, 1500) | st.integers(0, HEADER_END), value=st.integers(0, 255))
@settings(max_examples=250)
def test_any_corrupt_byte_of_a_header(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    data = bytearray(tiny_model.read_bytes())
    data[position] = value
    path = tmp_path_factory.getbasetemp() / "corrupt.gguf"
    path.write_bytes(data)
    read_all(path)
