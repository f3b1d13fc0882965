"""Vocabularies that tell two tokenizers apart, as the metadata of a GGUF file."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from gguf import TokenType

from raygraft.text.byte_level import byte_characters

from .random_texts import draw_text

Metadata = dict[str, Any]


def make_byte_pairs(pre_tokenizer: str) -> Metadata:
    """All 256 bytes and all pairs of them, so that nearly every cut shows in the tokens."""
    alphabet = list(byte_characters())
    pairs = [(left, right) for left in alphabet for right in alphabet]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, *(left + right for left, right in pairs)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _kinds(
            len(tokens), {0: TokenType.CONTROL, 1: TokenType.CONTROL}
        ),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def make_sentence_pieces(seed: int, size: int = 1500) -> Metadata:
    """The `size` commonest parts of random texts, many of which no merges lead to.

    Many scores are equal, which is where implementations differ.
    """
    random = Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(150):
        # A token cannot hold a zero byte: llama.cpp reads it as a C string.
        text = draw_text(random).replace(" ", "▁").replace("\0", "")
        for length in range(1, 8):
            counts.update(text[at : at + length] for at in range(len(text) - length + 1))
    special = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    special |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    special |= {"<|user|>": TokenType.CONTROL, "[user]": TokenType.USER_DEFINED}
    special |= {"<|endoftext|>": TokenType.CONTROL, "<unused0>": TokenType.UNUSED}
    pieces = [piece for piece, _ in counts.most_common(size) if piece not in special]
    scores = [float(-random.randrange(1, size // 2)) for _ in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *pieces],
        "tokenizer.ggml.token_type": _kinds(
            len(special) + len(pieces), dict(enumerate(special.values()))
        ),
        "tokenizer.ggml.scores": [0.0] * len(special) + scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def make_named(names: Sequence[str], **ids: int) -> Metadata:
    """Control tokens of the given names, after three that are text; `ids` are special ids."""
    tokens = ["a", "b", "ab", *names]
    control = dict.fromkeys(range(3, len(tokens)), TokenType.CONTROL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _kinds(len(tokens), control),
        "tokenizer.ggml.merges": ["a b"],
    } | {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}


def _kinds(size: int, others: dict[int, TokenType]) -> list[int]:
    return [int(others.get(token_id, TokenType.NORMAL)) for token_id in range(size)]
