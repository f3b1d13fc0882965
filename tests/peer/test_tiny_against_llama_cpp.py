"""Each feature of the llama architecture, on tiny random models, against llama.cpp."""

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import K_QUANTIZATIONS, QUANTIZATIONS, write_tiny_llama

from .agreement import Distribution, best, margin
from .exact_copy import write_f32_copy

pytest.importorskip("xllamacpp")
from .llama_cpp import LlamaCpp

pytestmark = pytest.mark.peer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_head": {"tied": True},
    "biases": {"biases": True},
    "rope_factors": {"rope_factors": True},
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 32}},
    "rope_base": {"rope_base": 500000.0},
    "no_grouped_queries": {"kv_heads": 4},
    "one_kv_head": {"kv_heads": 1},
    "wide_heads": {"head_size": 32},
    "sentence_piece": {"tokenizer": "llama"},
    **{kind: {"quantization": kind} for kind in QUANTIZATIONS if kind != "F32"},
    **{kind: {"quantization": kind, "width": 256, "feed_forward": 256} for kind in K_QUANTIZATIONS},
    "mixed": {"quantization": {"token_embd.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_1"}},
}

# Past YaRN's original context, and past one page of a cache.
PROMPT_TOKENS, GREEDY_TOKENS = 24, 56
TOLERANCE = 2e-3  # a plain NumPy model comes within 2e-5; a wrong epsilon shows from 5e-3 on


def peer_run(model: Path, seed: int) -> tuple[list[int], list[Distribution]]:
    """A random prompt with llama.cpp's greedy answer, and the distribution after each token."""
    prompt = random.Random(seed).choices(range(3, 320), k=PROMPT_TOKENS)
    with LlamaCpp(model) as llama:
        answer, _ = llama.greedy(prompt, GREEDY_TOKENS)
        tokens = prompt + answer
        return tokens, llama.score(tokens)


def assert_close(expected: Distribution, actual: Distribution, where: str) -> None:
    """The same best token, and all log probabilities within TOLERANCE.

    Near ties leave the order open, at the top and at the border of the ten best.
    """
    if margin(expected) > 2 * TOLERANCE:
        assert best(actual) == best(expected), where
    for mine, theirs in ((expected, actual), (actual, expected)):
        border = min(theirs.values())
        for token, value in mine.items():
            assert theirs.get(token, border) == pytest.approx(value, abs=TOLERANCE), (
                f"{where}, token {token}: llama.cpp {expected.get(token)}, ours {actual.get(token)}"
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_same_distributions(name: str, tmp_path: Path) -> None:
    """Greedy choices and log probabilities, of quantised files against their dequantised copy."""
    from raygraft import LLM

    model = write_tiny_llama(tmp_path / "tiny.gguf", seed=3, **VARIANTS[name])
    tokens, expected = peer_run(write_f32_copy(model, tmp_path / "exact.gguf"), seed=len(name))
    ours = LLM(model=str(model), runtime="in-process").score(tokens)
    assert len(ours) == len(expected)
    for position, (theirs, mine) in enumerate(zip(expected, ours, strict=True)):
        assert_close(theirs, mine, f"position {position}")


@pytest.mark.parametrize("name", ["biases", "rope_factors", "rope_linear", "rope_yarn"])
def test_llama_cpp_sees_the_feature(name: str, tmp_path: Path) -> None:
    """With the same weights, the feature changes the answers in many positions."""
    plain = write_tiny_llama(tmp_path / "plain.gguf", seed=3)
    model = write_tiny_llama(tmp_path / "tiny.gguf", seed=3, **VARIANTS[name])
    tokens, expected = peer_run(plain, seed=1)
    with LlamaCpp(model) as llama:
        changed = llama.score(tokens)
    different = [best(a) != best(b) for a, b in zip(expected, changed, strict=True)]
    assert sum(different) > 10


@pytest.mark.parametrize(
    "damage",
    [
        {"omit": ["blk.1.ffn_up.weight"]},
        {"reshape": {"blk.0.attn_q.weight": (32, 64)}},
        {"architecture": "nonesuch"},
    ],
    ids=["missing", "shape", "architecture"],
)
def test_llama_cpp_refuses_damaged_files(damage: dict[str, Any], tmp_path: Path) -> None:
    """The damaged files of our own tests are damaged by llama.cpp's judgement too."""
    with pytest.raises(RuntimeError):
        LlamaCpp(write_tiny_llama(tmp_path / "tiny.gguf", **damage))


def test_llama_cpp_reads_split_files(tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf")
    first = write_tiny_llama(tmp_path / "parts.gguf", split=3)
    assert first.name == "parts-00001-of-00003.gguf"
    tokens, expected = peer_run(whole, seed=1)
    with LlamaCpp(first) as llama:
        assert llama.score(tokens) == expected
