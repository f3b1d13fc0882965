"""Token ids, their bytes and the ends of answers, against llama.cpp in this process."""

from pathlib import Path
from random import Random

import pytest

from raygraft.text import PRE_TOKENIZERS, Tokenizer
from raygraft.text.end_of_generation import END_NAMES, FILL_NAMES

from .random_texts import draw_text
from .tokenizer_peer import TokenizerPeer
from .vocabularies import Metadata, make_byte_pairs, make_named, make_sentence_pieces

pytestmark = pytest.mark.peer

TEXTS = 250
REQUIRED = ("default", "gpt-2", "llama-bpe", "llama3", "smollm", "qwen2", "deepseek-llm")
# One name for each set of patterns is enough; the required names are all asked.
NAMES = sorted({*REQUIRED, *{cuts: name for name, cuts in PRE_TOKENIZERS.items()}.values()})
DEMO_SPECIALS = "<|im_start|> <|im_end|> <|endoftext|> <reponame> <|im_start _end|>"
LLAMA_SPECIALS = "<s> </s> <|user|> [user] <unk> <0x41> <unused0> <|endoftext|> ▁ <|user"


def compare(metadata: Metadata, path: Path, specials: str, seed: int) -> None:
    peer, ours = TokenizerPeer(metadata, path / "idle.gguf"), Tokenizer.from_metadata(metadata)
    random = Random(seed)
    print(f"seed {seed}")
    for _ in range(TEXTS):
        text = draw_text(random, specials.split())
        add_special, parse_special = random.random() < 0.5, random.random() < 0.5
        expected = peer.encode(text, add_special, parse_special)
        assert ours.encode(text, add_special, parse_special) == expected, (text, parse_special)
    for _ in range(TEXTS // 10):
        for token_id, data in peer.token_bytes(draw_text(random, specials.split())):
            assert ours.token_bytes(token_id) == data, token_id


@pytest.fixture
def seed() -> int:
    return Random().randrange(1_000_000)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_is_that_of_llama_cpp(name: str, seed: int, tmp_path: Path) -> None:
    compare(make_byte_pairs(name), tmp_path, "<|im_start|> <|im_end|> <|im", seed)


@pytest.mark.parametrize("name", REQUIRED)
def test_the_demo_vocabulary(name: str, demo_metadata: Metadata, seed: int, tmp_path: Path) -> None:
    metadata = {**demo_metadata, "tokenizer.ggml.pre": name}
    compare(metadata, tmp_path, DEMO_SPECIALS, seed)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tokenizer.ggml.add_space_prefix": False},
        {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
        {"general.name": "Phi-3 Mini"},
    ],
    ids=["plain", "no_space", "end_only", "phi_3"],
)
def test_sentence_pieces(more: Metadata, seed: int, tmp_path: Path) -> None:
    compare(make_sentence_pieces(seed) | more, tmp_path, LLAMA_SPECIALS, seed)


HARMONY = ("<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>")
FILLS = tuple(name for names in FILL_NAMES.values() for name in names[:1])


@pytest.mark.parametrize(
    "metadata",
    [
        make_named(["<s>", *(name for name in END_NAMES if name != "<|tool_response>")], eos=3),
        make_named(["<s>", "x", "<|tool_response>", "</s>", "<eos>", "<turn|>"], eos=4),
        make_named(["<s>", "x", *HARMONY], eos=4),
        make_named(["<s>", "x", "<|end|>", "<|flush|>", "<|calls|>"], eos=4),
        make_named(["<s>", "x", "<|end|>", "<|flush|>", "<|return|>"], eos=4),
        make_named(["<s>", "x", *FILLS], eos=4),
        make_named(["<s>", "x", "y", "z", "<|fim_pad|>"], eos=3, eot=4, eom=5, fim_pad=6),
        make_named(["<s>", "x", "y"], eos=3, eot=99),
    ],
    ids=["names", "gemma", "harmony", "solar", "neither", "fills", "keys", "outside"],
)
def test_ends_of_generation(metadata: Metadata, tmp_path: Path) -> None:
    peer, ours = TokenizerPeer(metadata, tmp_path / "idle.gguf"), Tokenizer.from_metadata(metadata)
    expected = {id_ for id_ in range(ours.vocabulary_size) if peer.ends_generation(id_)}
    assert ours.end_of_generation == expected
