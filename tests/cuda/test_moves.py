"""Regions that move between devices on a GPU while an answer is generated."""

from pathlib import Path

import pytest
from tiny_models import write_tiny_llama

from raygraft import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
PROMPT = list(range(3, 60))


@pytest.mark.parametrize("apart", [True, False], ids=["two actors", "one actor"])
def test_a_region_moves_with_what_is_in_its_cache(tmp_path: Path, apart: bool) -> None:
    """Pages are copied out of one device and into the other; no token is computed again."""
    path = write_tiny_llama(tmp_path / "m.gguf", quantization="Q8_0")
    devices = [
        {"name": name, "backend": "cuda", "gpu": 0, "actor": name if apart else "both"}
        for name in "ab"
    ]
    settings = {"place": {"*": "a"}, "runtime": "in-process", "ctx_size": 256}
    with LLM(path, devices=devices, **settings) as llm:
        (expected,) = llm.generate([PROMPT], PARAMS)
    with LLM(path, devices=devices, **settings) as llm:
        answer = llm.submit(PROMPT, PARAMS)
        tokens, moves = 0, []
        for chunk in answer:
            before, tokens = tokens, tokens + len(chunk.token_ids)
            for at, device in ((20, "b"), (60, "a"), (100, "b")):
                if before < at <= tokens:
                    moves.append(llm.move("blk.1.attn", device))
        found = answer.completion()
    assert found.token_ids == expected.token_ids
    assert len(moves) == 3
    assert [move.recomputed_tokens for move in moves] == [0, 0, 0]
    assert all(move.copied_bytes > 0 for move in moves)
