"""Tiny random models of architecture `llama`, as GGUF files that llama.cpp loads too.

The weights are drawn so that logits are neither flat nor saturated (their standard deviation is
about 2), and each tensor has a random stream of its own, keyed by (seed, name): the same seed
gives the same weights however the file is split, quantised or damaged.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

QUANTIZATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""What the `gguf` package can write, in rows of a multiple of 32."""

K_QUANTIZATIONS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""What it can only read, in rows of a multiple of 256: random blocks stand in for quantised
weights. The numbers are where ggml-common.h has a block's float16 scale (and scale of minima)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# "Ġ" is the byte-level alphabet's space. The order is the rank; each side is a byte or a merge.
MERGES = """
Ġ t|Ġ a|i n|h e|Ġ Ġ|r e|o n|e r|Ġt he|a t|Ġ s|Ġ o|e n|Ġ c|e s|Ġ w|n d|i t|o r|i s|a n|Ġ f|Ġ p|Ġ b
in g|Ġa nd|o u|Ġo f|a l|Ġt o|e d|a r|Ġ m|Ġ in|l l|ĠĠ ĠĠ|o m|Ġ d|l e|i c|Ġ h|v e|1 9|2 0|o t|a s
Ġ is|i l|Ġ g|Ġ l|s t|Ġ re|Ġ n|e t|u t|c e|Ġ e|o w|Ġ y|Ġy ou|Ġ k
""".replace("\n", "|").strip("|")

PIECES = "▁t|▁a|in|he|re|on|er|▁the|at|▁s|▁o|en|▁c|es|▁w|nd|it|or|is|an|▁f|▁p|▁b|ing|▁and|ou|▁of"


class Vocabulary(NamedTuple):
    """The tokenizer's part of the file. Ids index `tokens`; `scores` only of a llama one."""

    model: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    bos: int
    eos: int
    unknown: int

    def padded(self, size: int | None) -> "Vocabulary":
        """This one with unused tokens up to `size`. Raises ValueError where it is larger."""
        missing = 0 if size is None else size - len(self.tokens)
        if missing < 0:
            raise ValueError(f"vocabulary: at least {len(self.tokens)} tokens, asked for {size}")
        return self._replace(
            tokens=self.tokens + [f"<unused_{index}>" for index in range(missing)],
            types=self.types + [TokenType.UNUSED] * missing,
            scores=self.scores + [-1e6] * missing,
        )


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for the bytes in GPT-2's byte-level BPE, by byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level_vocabulary() -> Vocabulary:
    """GPT-2's kind: 3 special tokens (0 to 2), 256 bytes (3 to 258, by byte), then merges."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = MERGES.split("|")
    ordinary = byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    return Vocabulary(
        model="gpt2",
        tokens=special + ordinary,
        types=[TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * len(ordinary),
        merges=merges,
        scores=[],
        bos=1,
        eos=2,
        unknown=0,
    )


def sentence_piece_vocabulary() -> Vocabulary:
    """Llama 2's kind: unknown, BOS and EOS (0 to 2), 256 bytes (3 to 258), chat marks, pieces."""
    special = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    marks = ["<|im_start|>", "<|im_end|>"]
    # Merged pieces rank first, as in Llama 2, so a bigram is always better than its characters.
    pieces = PIECES.split("|") + ["▁"] + [chr(code) for code in range(33, 127)]
    return Vocabulary(
        model="llama",
        tokens=special + raw + marks + pieces,
        types=[TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        + [TokenType.BYTE] * 256
        + [TokenType.CONTROL] * 2
        + [TokenType.NORMAL] * len(pieces),
        merges=[],
        scores=[0.0] * 261 + [-float(rank) for rank in range(len(pieces))],
        bos=1,
        eos=2,
        unknown=0,
    )


VOCABULARIES = {"gpt2": byte_level_vocabulary, "llama": sentence_piece_vocabulary}


class Shape(NamedTuple):
    """The model's sizes, by the names of `write_tiny_llama`."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    context: int


def tensor_shapes(
    shape: Shape, *, tied: bool = False, biases: bool = False, rope_factors: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and NumPy shapes ([out, in]; GGUF writes them in reverse), in file order."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (shape.vocabulary, shape.width)
    if rope_factors:
        yield "rope_freqs.weight", (shape.head_size // 2,)
    for block in range(shape.blocks):
        yield f"blk.{block}.attn_norm.weight", (shape.width,)
        yield f"blk.{block}.ffn_norm.weight", (shape.width,)
        for name, rows, columns in (
            ("attn_q", queries, shape.width),
            ("attn_k", keys, shape.width),
            ("attn_v", keys, shape.width),
            ("attn_output", shape.width, queries),
            ("ffn_gate", shape.feed_forward, shape.width),
            ("ffn_up", shape.feed_forward, shape.width),
            ("ffn_down", shape.width, shape.feed_forward),
        ):
            yield f"blk.{block}.{name}.weight", (rows, columns)
            if biases:
                yield f"blk.{block}.{name}.bias", (rows,)
    yield "output_norm.weight", (shape.width,)
    if not tied:
        yield "output.weight", (shape.vocabulary, shape.width)


def random_weights(name: str, shape: tuple[int, ...], *, seed: int, tied: bool) -> np.ndarray:
    """The float32 weights of one tensor; norms lie around 1, RoPE factors between 1 and 8."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name == "rope_freqs.weight":
        # As Llama 3 does it: high frequencies stay, low ones are divided by the factor.
        return np.geomspace(1.0, 8.0, shape[0]).astype(np.float32)
    drawn = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return np.float32(1) + np.float32(0.1) * drawn
    if name.endswith(".bias"):
        return np.float32(0.3) * drawn
    gain = 1.0
    if "attn_q" in name or "attn_k" in name:
        gain = 1.5  # scores with a deviation of about 2: attention that is not an average
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        gain = 2.0
    return np.float32(gain / np.sqrt(shape[-1])) * drawn


def random_k_blocks(name: str, kind: GGMLQuantizationType, weights: np.ndarray) -> np.ndarray:
    """Random blocks (uint8) of the same shape and standard deviation as `weights`, mean near 0."""
    elements, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng([zlib.crc32(name.encode()), *weights[0, :4].view(np.uint32)])
    count = weights.size // elements
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)

    def scale_by(factor: float) -> None:
        # Quants of n bits have a mean of (2^n - 1) / 2, which the minima take away again.
        minimum = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}.get(kind.name, 0.0)
        for offset, scale in zip(K_QUANTIZATIONS[kind.name], (1.0, minimum), strict=False):
            value = np.array([factor * scale], dtype=np.float16)
            blocks[:, offset : offset + 2] = value.view(np.uint8)

    scale_by(1.0)
    scale_by(float(weights.std() / dequantize(blocks, kind).std()))
    return blocks.reshape(len(weights), -1)


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    blocks: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int | None = None,
    feed_forward: int = 96,
    vocabulary: int | None = None,
    tied: bool = False,
    biases: bool = False,
    rope_factors: bool = False,
    rope_base: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    quantization: str | Mapping[str, str] = "F32",
    context: int = 256,
    split: int = 1,
    tokenizer: str = "gpt2",
    pre_tokenizer: str = "smollm",
    chat_template: str | None = CHAT_TEMPLATE,
    architecture: str = "llama",
    omit: Collection[str] = (),
    reshape: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Writes a random model to `path` (a name ending in `.gguf`) and returns the first file.

    `head_size` (default width / heads) is written as key and value length where it is given.
    `vocabulary` (default: the tokenizer's own, 320 for gpt2, 383 for llama) adds unused tokens.
    `biases` gives every projection of a block one. `rope_factors` adds Llama 3's
    `rope_freqs.weight`. `rope_scaling` has `type` (`linear` or `yarn`), `factor`, and, for yarn,
    `original_context`. `quantization` is one of QUANTIZATIONS or K_QUANTIZATIONS for all matrices,
    or maps tensor names to one (others stay F32); norms, biases and factors are always F32.
    `split` writes that many files with the names and keys of llama.cpp's `gguf-split`.

    For damaged files: `architecture` is any name, `omit` leaves out tensors and metadata keys by
    name, `reshape` maps tensor names to other NumPy shapes. Raises ValueError where rows do not
    divide into the quantisation's blocks, or there are fewer tensors than files.
    """
    path = Path(path)
    words = VOCABULARIES[tokenizer]().padded(vocabulary)
    shape = Shape(
        blocks=blocks,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size or width // heads,
        feed_forward=feed_forward,
        vocabulary=len(words.tokens),
        context=context,
    )
    writer = GGUFWriter(path, architecture)
    _add_metadata(writer, shape, explicit_head_size=head_size is not None)
    _add_rope(writer, rope_base, rope_scaling)
    _add_vocabulary(writer, words, pre_tokenizer, chat_template)
    for key in omit:
        writer.kv_data[0].pop(key, None)

    shapes = dict(tensor_shapes(shape, tied=tied, biases=biases, rope_factors=rope_factors))
    shapes |= reshape or {}
    names = [name for name in shapes if name not in omit]
    if split > len(names):
        raise ValueError(f"split: {len(names)} tensors do not fill {split} files")
    for index, name in enumerate(names):
        # The writer puts a tensor into its last file; a part begins where the quotient steps.
        if index and index * split // len(names) != (index - 1) * split // len(names):
            writer.tensors.append({})
        weights = random_weights(name, shapes[name], seed=seed, tied=tied)
        _add_tensor(writer, name, weights, _quantization_of(name, weights, quantization))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if split == 1 else path.with_name(f"{path.stem}-00001-of-{split:05d}.gguf")


def _add_metadata(writer: GGUFWriter, shape: Shape, *, explicit_head_size: bool) -> None:
    writer.add_type("model")
    writer.add_name("tiny random llama")
    writer.add_quantization_version(2)
    writer.add_block_count(shape.blocks)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    if explicit_head_size:
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)


def _add_rope(writer: GGUFWriter, base: float, scaling: Mapping[str, Any] | None) -> None:
    writer.add_rope_freq_base(base)
    if scaling is None:
        return
    unknown = set(scaling) - {"type", "factor", "original_context"}
    if unknown:
        raise ValueError(f"rope_scaling: unknown {sorted(unknown)}")
    writer.add_rope_scaling_type(RopeScalingType(scaling["type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if "original_context" in scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling["original_context"])


def _add_vocabulary(
    writer: GGUFWriter, words: Vocabulary, pre_tokenizer: str, chat_template: str | None
) -> None:
    llama = words.model == "llama"
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre("default" if llama else pre_tokenizer)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if llama:
        writer.add_token_scores(words.scores)
    else:
        writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.bos)
    writer.add_eos_token_id(words.eos)
    writer.add_unk_token_id(words.unknown)
    writer.add_add_bos_token(llama)
    writer.add_add_space_prefix(llama)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _quantization_of(
    name: str, weights: np.ndarray, quantization: str | Mapping[str, str]
) -> GGMLQuantizationType:
    if weights.ndim < 2:
        return GGMLQuantizationType.F32
    wanted = quantization if isinstance(quantization, str) else quantization.get(name, "F32")
    kind = GGMLQuantizationType[wanted]
    block, _ = GGML_QUANT_SIZES[kind]
    if weights.shape[-1] % block:
        raise ValueError(f"{name}: rows of {weights.shape[-1]} are no multiple of {block} {wanted}")
    return kind


def _add_tensor(
    writer: GGUFWriter, name: str, weights: np.ndarray, kind: GGMLQuantizationType
) -> None:
    if kind is GGMLQuantizationType.F32:
        writer.add_tensor(name, weights)
    elif kind is GGMLQuantizationType.F16:
        writer.add_tensor(name, weights.astype(np.float16))
    elif kind.name in K_QUANTIZATIONS:
        writer.add_tensor(name, random_k_blocks(name, kind, weights), raw_dtype=kind)
    else:
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)


def truncated(path: Path, out: Path, keep_bytes: int) -> Path:
    """Writes the first `keep_bytes` bytes of `path` to `out` (negative: all but so many)."""
    out = Path(out)
    out.write_bytes(Path(path).read_bytes()[:keep_bytes])
    return out
