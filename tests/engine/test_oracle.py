"""The demo model says what llama.cpp says on the same weights in float32."""

from engine.comparison import answer, largest_difference

from raygraft import LLM
from raygraft.graph.gguf_file import ModelFile
from raygraft.text import Tokenizer

TOLERANCE = 0.01


def test_prompts_have_the_oracles_ids(demo_model, oracle_cases):
    tokenizer = Tokenizer.from_metadata(ModelFile.open(demo_model).metadata)
    for case in oracle_cases:
        assert tokenizer.encode(case["prompt"]) == case["prompt_tokens"], case["name"]


def test_all_twelve_cases_unsplit(demo_model, oracle_cases):
    assert len(oracle_cases) == 12
    check(demo_model, "cpu", oracle_cases)


def test_three_cases_on_the_reference(demo_model, oracle_cases):
    names = ("capital", "unicode", "dialog")
    check(demo_model, "reference", [case for case in oracle_cases if case["name"] in names])


def check(demo_model, backend, oracle_cases):
    devices = [{"name": "one", "backend": backend}]
    with LLM(demo_model, devices=devices, runtime="in-process", max_sequences=12) as llm:
        completions = answer(llm, oracle_cases)
        eos = llm.tokenizer.end_of_generation
    for case, completion in zip(oracle_cases, completions, strict=True):
        assert completion.token_ids == case["tokens"], case["name"]
        theirs = [dict(position) for position in case["top_logprobs"]]
        assert largest_difference(completion.logprobs, theirs) < TOLERANCE, case["name"]
        ends = completion.token_ids[-1] in eos
        assert ends == (case["finish_reason"] == "stop"), case["name"]
