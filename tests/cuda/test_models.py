"""Whole models on a GPU: llama.cpp's answers, the reference's, and those of cut models."""

import numpy as np
import pytest
from engine.comparison import CLOSE, answer, differences
from tiny_models import write_tiny_llama

from raygraft import LLM, SamplingParams
from raygraft.graph.builder import MAX_LOGPROBS

pytestmark = pytest.mark.gpu

ONE = [{"name": "g", "backend": "cuda"}]
TWO = [{"name": "a", "backend": "cuda"}, {"name": "b", "backend": "cuda"}]


@pytest.mark.parametrize("devices", [ONE, TWO], ids=["uncut", "cut"])
def test_the_oracle(demo_model, oracle_cases, devices):
    place = {"kind:attention": "a", "kind:ffn": "b"} if devices is TWO else None
    with LLM(
        demo_model, devices=devices, place=place, runtime="in-process", max_sequences=12
    ) as llm:
        completions = answer(llm, oracle_cases)
    for case, completion in zip(oracle_cases, completions, strict=True):
        theirs = [dict(position) for position in case["top_logprobs"]]
        worst = max(differences(completion, case["tokens"], theirs))
        print(case["name"], "largest difference", worst)
        assert worst < CLOSE, case["name"]


@pytest.mark.parametrize(
    "quantization",
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "Q4_K", "Q5_K", "Q6_K"],
)
def test_models_of_every_type_say_what_the_reference_says(quantization, tmp_path):
    k = quantization.endswith("_K")
    sizes = {"width": 256, "feed_forward": 512} if k else {}
    path = write_tiny_llama(tmp_path / "m.gguf", quantization=quantization, biases=True, **sizes)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=MAX_LOGPROBS, ignore_eos=True)
    prompts = [list(range(3, 60)), [5], [9, 8, 7]]
    answers = []
    for backend in ("cuda", "reference"):
        devices = [{"name": "d", "backend": backend}]
        with LLM(path, devices=devices, runtime="in-process", max_rows=64) as llm:
            answers.append(llm.generate(prompts, params))
    for ours, theirs in zip(*answers, strict=True):
        assert max(differences(ours, theirs.token_ids, theirs.logprobs)) < CLOSE


def test_drawn_tokens_are_the_references(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    params = SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True)
    answers = []
    for backend in ("cuda", "reference"):
        devices = [{"name": "d", "backend": backend}]
        with LLM(path, devices=devices, runtime="in-process") as llm:
            answers.append([c.token_ids for c in llm.generate([[5, 6], [9, 8, 7]], params)])
    assert answers[0] == answers[1]


def test_verification_finds_nothing(tmp_path):
    path = write_tiny_llama(
        tmp_path / "m.gguf", quantization="Q8_0", heads=4, kv_heads=2, rope_factors=True
    )
    with LLM(path, devices=ONE, runtime="in-process", verify=True) as llm:
        results = [result for found in llm.verification.values() for result in found]
    assert results
    for result in results:
        assert result.ok, (result.what, result.detail)
        assert result.error is None or np.isfinite(result.error)
