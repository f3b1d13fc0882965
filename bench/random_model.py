"""Write a Llama-shaped GGUF file with random weights, as large as the benches want it.

    python bench/random_model.py 1b-q4_k.gguf --quantization Q4_K [--shape 1b] [--layers 4]

The blocks are drawn in the format itself, random quants with scales that give each matrix a
standard deviation of 1/sqrt(columns), so that a gigabyte takes seconds and activations stay finite.
The embeddings are tied to the output and have the type that llama.cpp's quantize would choose:
Q6_K (Q8_0 in widths that are no multiple of 256), unless the whole file is Q8_0 or larger. With
`--untied` the output is a matrix of its own, and the embeddings have the file's type. Q4_K_M is
llama.cpp's mix of Q4_K and Q6_K. `--repeat` draws some megabytes of each type and repeats them:
faster than drawing all of a large file. The tokenizer knows the 256 bytes; the rest of the
vocabulary is unused tokens.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Names, rows and columns of all matrices but the embeddings."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        for layer in range(self.layers):
            for name, rows, columns in (
                ("attn_q", queries, self.width),
                ("attn_k", keys, self.width),
                ("attn_v", keys, self.width),
                ("attn_output", self.width, queries),
                ("ffn_gate", self.feed_forward, self.width),
                ("ffn_up", self.feed_forward, self.width),
                ("ffn_down", self.width, self.feed_forward),
            ):
                yield f"blk.{layer}.{name}.weight", rows, columns

    def norms(self) -> Iterator[str]:
        for layer in range(self.layers):
            yield f"blk.{layer}.attn_norm.weight"
            yield f"blk.{layer}.ffn_norm.weight"
        yield "output_norm.weight"


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 64, 49152),  # SmolLM2-135M
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),  # Llama 3.2 1B
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128256),  # Llama 3.2 3B
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),  # Llama 3.1 8B
}

SCALES = {
    "Q4_0": (0, None, 0.0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0.0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0.0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
}
"""Where a block has its float16 scale, where that of its minima, and how much of the scale the
latter is: as much as takes the mean of unsigned quants away (ggml-common.h in llama.cpp)."""
FLOATS = ("F32", "F16", "BF16")
MIX = "Q4_K_M"
REPEATED_BYTES = 32 * 2**20


def random_blocks(name: str, kind: GGMLQuantizationType, rows: int, columns: int) -> Bytes:
    """A matrix of random blocks, `[rows, bytes of a row]`."""
    elements, size = GGML_QUANT_SIZES[kind]
    if columns % elements:
        raise SystemExit(f"{name}: {columns} columns are no multiple of {kind.name}'s {elements}")
    random = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    deviation = columns**-0.5
    if kind.name in FLOATS:
        return _random_floats(random, kind.name, rows * columns, deviation).reshape(rows, -1)
    count = rows * columns // elements
    words = random.integers(0, 2**64, -(-count * size // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: count * size].reshape(count, size)
    sample = blocks[:256].copy()
    _set_scale(sample, kind.name, 1.0)
    _set_scale(blocks, kind.name, deviation / float(dequantize(sample, kind).std()))
    return blocks.reshape(rows, -1)


def _set_scale(blocks: Bytes, kind: str, scale: float) -> None:
    at, minimum_at, share = SCALES[kind]
    for offset, value in ((at, scale), (minimum_at, scale * share)):
        if offset is not None:
            blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)


def _random_floats(random: np.random.Generator, kind: str, count: int, deviation: float) -> Bytes:
    """Uniform rather than normal: three times as fast, and as good here."""
    drawn = random.random(count, np.float32)
    drawn -= np.float32(0.5)
    drawn *= np.float32(deviation * 12**0.5)
    if kind == "BF16":
        return (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return drawn.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)


def embedding_type(kind: str, width: int) -> str:
    """What llama.cpp's quantize makes of embeddings that are tied to the output."""
    if kind in (*FLOATS, "Q8_0"):
        return kind
    return "Q8_0" if width % 256 else "Q6_K"


def matrix_type(kind: str, name: str, layers: int) -> str:
    """The type of a matrix in a file of such a name."""
    if kind != MIX:
        return kind
    if name == "output.weight":
        return "Q6_K"
    if "attn_v" not in name and "ffn_down" not in name:
        return "Q4_K"
    layer = int(name.split(".")[1])
    outer = layer < layers // 8 or layer >= 7 * layers // 8
    return "Q6_K" if outer or (layer - layers // 8) % 3 == 2 else "Q4_K"


class _Blocks:
    """Where the bytes of matrices come from: drawn for each, or repeated."""

    def __init__(self, repeat: bool) -> None:
        self._repeat = repeat
        self._pools: dict[tuple[GGMLQuantizationType, int], Bytes] = {}

    def of(self, name: str, kind: GGMLQuantizationType, rows: int, columns: int) -> Bytes:
        """A matrix, `[rows, bytes of a row]`."""
        if not self._repeat:
            return random_blocks(name, kind, rows, columns)
        key = (kind, columns)
        if key not in self._pools:
            elements, size = GGML_QUANT_SIZES[kind]
            enough = max(1, REPEATED_BYTES // (columns // elements * size))
            self._pools[key] = random_blocks(str(key), kind, enough, columns)
        pool = self._pools[key]
        return np.tile(pool, (-(-rows // len(pool)), 1))[:rows]


def write_random_model(
    path: Path,
    kind: str,
    shape: Shape,
    context: int = 4096,
    *,
    tied: bool = True,
    repeat: bool = False,
) -> Path:
    """Write the file; whoever reads `path` sees all of it or nothing."""
    unfinished = path.with_suffix(".unfinished")
    writer = GGUFWriter(unfinished, "llama")
    _add_metadata(writer, shape, context)
    _add_tokenizer(writer, shape.vocabulary)
    embedded = "token_embd.weight"
    first = embedding_type(kind, shape.width) if tied else matrix_type(kind, embedded, shape.layers)
    matrices = [
        (embedded, first, shape.vocabulary, shape.width),
        *[
            (name, matrix_type(kind, name, shape.layers), rows, columns)
            for name, rows, columns in shape.matrices()
        ],
    ]
    if not tied:
        output = matrix_type(kind, "output.weight", shape.layers)
        matrices.append(("output.weight", output, shape.vocabulary, shape.width))
    blocks = _Blocks(repeat)
    for name, type_name, rows, columns in matrices:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        row_bytes = columns // elements * size
        writer.add_tensor_info(
            name,
            (rows, row_bytes),
            np.dtype(np.uint8),
            rows * row_bytes,
            GGMLQuantizationType[type_name],
        )
    for name in shape.norms():
        writer.add_tensor_info(name, (shape.width,), np.dtype(np.float32), 4 * shape.width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, type_name, rows, columns in matrices:
        writer.write_tensor_data(blocks.of(name, GGMLQuantizationType[type_name], rows, columns))
    for _ in shape.norms():
        writer.write_tensor_data(np.ones(shape.width, np.float32))
    writer.close()
    return unfinished.replace(path)


def _add_metadata(writer: GGUFWriter, shape: Shape, context: int) -> None:
    writer.add_name("random weights")
    writer.add_quantization_version(2)
    writer.add_block_count(shape.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)


def _add_tokenizer(writer: GGUFWriter, vocabulary: int) -> None:
    """Byte-level BPE with a single merge, which llama.cpp wants to see."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    special = ["<|begin|>", "<|end|>"]
    known = [*special, *letters, letters[32] + "t"]
    unused = vocabulary - len(known)
    if unused < 0:
        raise SystemExit(f"a vocabulary of {vocabulary} is too small: at least {len(known)}")
    kinds = [TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * (len(known) - len(special))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*known, *[f"<unused_{index}>" for index in range(unused)]])
    writer.add_token_types([*kinds, *[TokenType.UNUSED] * unused])
    writer.add_token_merges([f"{letters[32]} t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--quantization", default="Q4_0", choices=[*FLOATS, *SCALES, MIX])
    parser.add_argument("--untied", dest="tied", action="store_false")
    parser.add_argument("--repeat", action="store_true")
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    for name in Shape.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the shape's")
    parser.add_argument("--context", type=int, default=4096)
    options = parser.parse_args()
    given = {
        name: getattr(options, name)
        for name in Shape.__dataclass_fields__
        if getattr(options, name) is not None
    }
    shape = replace(SHAPES[options.shape], **given)
    path = write_random_model(
        options.path, options.quantization, shape, options.context,
        tied=options.tied, repeat=options.repeat,
    )  # fmt: skip
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
