import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.text import PRE_TOKENIZERS, Detokenizer, Tokenizer

from .vocabularies import Metadata, make_byte_pairs, make_named, make_sentence_pieces

BYTE_PAIRS = make_byte_pairs("gpt-2")
SENTENCE_PIECES = make_sentence_pieces(0)
KINDS = {"gpt2": BYTE_PAIRS, "llama": SENTENCE_PIECES}

TOKENIZERS = {name: Tokenizer.from_metadata(metadata) for name, metadata in KINDS.items()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def test_prompts_of_the_oracle(
    demo_tokenizer: Tokenizer, oracle_cases: list[dict[str, Any]]
) -> None:
    assert len(oracle_cases) == 12
    for case in oracle_cases:
        assert demo_tokenizer.encode(str(case["prompt"])) == case["prompt_tokens"], case["name"]


def test_answers_of_the_oracle(
    demo_tokenizer: Tokenizer, oracle_cases: list[dict[str, Any]]
) -> None:
    for case in oracle_cases:
        assert demo_tokenizer.decode(case["tokens"]) == case["text"], case["name"]


def test_demo_model(demo_tokenizer: Tokenizer) -> None:
    assert demo_tokenizer.vocabulary_size == 49152
    assert (demo_tokenizer.bos_id, demo_tokenizer.eos_id) == (1, 2)
    assert demo_tokenizer.end_of_generation == {0, 2, 4}
    assert demo_tokenizer.is_end_of_generation(2)
    assert not demo_tokenizer.is_end_of_generation(1)
    assert "im_start" in (demo_tokenizer.chat_template or "")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        (" ", [216]),
        ("     ", [4444]),
        ("<|im_start|><|im_end|><|im_start|>", [1, 2, 1]),
        ("<|im_end|>\n", [2, 198]),
        (" <|im_end|> ", [216, 2, 216]),
        ("\x04a", [81]),
    ],
)
def test_edges(demo_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert demo_tokenizer.encode(text) == ids


def test_a_byte_without_a_token_keeps_its_neighbours_apart(demo_tokenizer: Tokenizer) -> None:
    apart = demo_tokenizer.encode("t") + demo_tokenizer.encode("he")
    assert demo_tokenizer.encode("the") != apart
    assert demo_tokenizer.encode("t\x04he") == apart


def test_control_tokens_are_text_where_they_are_not_trusted(demo_tokenizer: Tokenizer) -> None:
    ids = demo_tokenizer.encode("<|im_end|>", parse_special=False)
    assert 2 not in ids
    assert demo_tokenizer.decode(ids) == "<|im_end|>"


def test_user_defined_tokens_are_always_found() -> None:
    tokenizer = Tokenizer.from_metadata(SENTENCE_PIECES)
    user = SENTENCE_PIECES["tokenizer.ggml.tokens"].index("[user]")
    assert tokenizer.encode("[user]", add_special=False, parse_special=False) == [user]


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [1]),
        ({"add_bos_token": False}, []),
        ({"add_eos_token": True}, [1, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [2]),
    ],
)
def test_beginning_and_end_of_text(flags: dict[str, bool], ids: list[int]) -> None:
    metadata = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
    tokenizer = Tokenizer.from_metadata(SENTENCE_PIECES | metadata)
    assert tokenizer.encode("") == ids
    assert tokenizer.encode("", add_special=False) == []


def test_llama_3_begins_its_texts() -> None:
    metadata = BYTE_PAIRS | {"tokenizer.ggml.pre": "llama-bpe"}
    assert Tokenizer.from_metadata(metadata).encode("") == [0]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert Tokenizer.from_metadata(metadata).encode("") == []


def test_the_longest_special_token_wins_over_the_first() -> None:
    tokenizer = Tokenizer.from_metadata(make_named(["<a", "a>>>"], eos=3))
    assert tokenizer.encode("<a>>>") == [4]  # "<" has no token


def test_phi_3_swallows_spaces_after_special_tokens() -> None:
    metadata = make_named(["<|user|>", "<s>", "</s>"], eos=5)
    metadata["tokenizer.ggml.tokens"][1] = "Ġ"
    metadata["tokenizer.ggml.merges"] = []
    for name, ids in [("Phi-3 Mini", [3, 0, 4, 1, 0]), ("Other", [3, 1, 0, 4, 1, 0])]:
        tokenizer = Tokenizer.from_metadata(metadata | {"general.name": name})
        assert tokenizer.encode("<|user|> a<s> a") == ids


@settings(deadline=None)
@given(text=st.text().filter(lambda text: "▁" not in text))  # SentencePiece's own space
def test_what_is_encoded_is_decoded_again(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids, begins_text=True) == text


@settings(deadline=None)
@given(data=st.binary())
def test_a_detokenizer_gives_what_decode_gives(data: bytes) -> None:
    tokenizer = TOKENIZERS["llama"]
    byte_ids = [SENTENCE_PIECES["tokenizer.ggml.tokens"].index(f"<0x{byte:02X}>") for byte in data]
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(map(detokenizer.push, byte_ids)) + detokenizer.finish()
    assert streamed == tokenizer.decode(byte_ids) == data.decode("utf-8", "replace")


def test_half_characters_are_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("🫠", add_special=False)
    assert len(ids) > 1
    *before, last = [detokenizer.push(token_id) for token_id in ids]
    assert ("".join(before).strip(), last) == ("", "🫠")
    for token_id in ids[:-1]:
        detokenizer.push(token_id)
    assert detokenizer.finish() == "\ufffd"


def test_the_space_before_a_text() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.encode("Hello")
    assert tokenizer.decode(ids) == " Hello"
    assert tokenizer.decode(ids, begins_text=True) == "Hello"
    assert tokenizer.decode(ids, skip_special=False) == "<s> Hello"


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude80") == tokenizer.encode("🚀")


def test_a_character_that_cannot_be_written() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a"],
        "tokenizer.ggml.scores": [0.0] * 5,
    }
    assert Tokenizer.from_metadata(metadata).encode("aé") == [1, 3, 4, 0]


def test_an_id_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.vocabulary_size):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            tokenizer.decode([token_id])


def test_arrays_of_numpy() -> None:
    for name, metadata in KINDS.items():
        arrays = {
            key: np.array(value) if isinstance(value, list) else value
            for key, value in metadata.items()
        }
        text = json.dumps(metadata["tokenizer.ggml.model"])
        assert Tokenizer.from_metadata(arrays).encode(text) == TOKENIZERS[name].encode(text)


def with_entry(key: str, value: object, base: Metadata = BYTE_PAIRS) -> Metadata:
    return {**base, f"tokenizer.ggml.{key}": value}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model is None; known here: gpt2, llama"),
        (with_entry("model", "bert"), "'bert'; known here: gpt2, llama"),
        (with_entry("pre", "klingon"), "'klingon'; known here: .*llama-bpe.*smollm"),
        (with_entry("model", 3), "holds a int, wanted a string"),
        (with_entry("tokens", None), "no vocabulary"),
        (with_entry("tokens", ["a", "b", "a"]), "'a' stands there twice"),
        (with_entry("tokens", ["a", 3]), r"tokens\[1\] is 3, wanted an array of strings"),
        (with_entry("tokens", "abc"), "holds a str, wanted an array of strings"),
        (with_entry("token_type", [1, 1]), "token_type has 2 entries for 65794 tokens"),
        (with_entry("scores", [0.5], SENTENCE_PIECES), "scores has 1 entries"),
        (with_entry("scores", "no", SENTENCE_PIECES), "holds a str, wanted an array of numbers"),
        (with_entry("merges", None), "needs merges"),
        (with_entry("merges", ["ab"]), "'ab' is not a pair"),
        (with_entry("merges", ["abc def"]), "merges"),
        (with_entry("bos_token_id", "one"), "holds a str, wanted a token id"),
        (with_entry("add_bos_token", "yes"), "holds a str, wanted a boolean"),
        (make_named(["x"]) | {"tokenizer.ggml.add_bos_token": True}, "bos_token_id is not set"),
        (make_named(["x"]) | {"tokenizer.ggml.add_eos_token": True}, "eos_token_id is not set"),
    ],
)
def test_files_that_cannot_be_used(metadata: Metadata, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_metadata(metadata)


def test_the_names_that_must_be_known() -> None:
    names = "default gpt-2 llama-bpe llama3 llama-v3 smollm qwen2 deepseek-llm starcoder"
    assert set(names.split()) <= PRE_TOKENIZERS.keys()


def test_a_file_without_a_pre_tokenizer_has_the_default_one() -> None:
    metadata = {key: value for key, value in BYTE_PAIRS.items() if key != "tokenizer.ggml.pre"}
    default = BYTE_PAIRS | {"tokenizer.ggml.pre": "default"}
    text = "a-b 12345 'it's`"
    ids = Tokenizer.from_metadata(metadata).encode(text)
    assert ids == Tokenizer.from_metadata(default).encode(text) != TOKENIZERS["gpt2"].encode(text)


def test_empty_tokens_have_names_of_their_own() -> None:
    metadata = make_named(["", "x"], eos=4)
    metadata["tokenizer.ggml.tokens"][1] = ""
    metadata["tokenizer.ggml.merges"] = []
    assert Tokenizer.from_metadata(metadata).token_bytes(3) == b"[EMPTY_3]"
